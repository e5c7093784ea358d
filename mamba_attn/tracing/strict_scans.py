"""Strict scans: whether steps write not the token that they read, but the next one's, as those of Hydra."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba_attn.tracing.chunk_scans import ChunkInputs
from mamba_attn.tracing.probes import Probe, noise_on
from mamba_attn.tracing.selective_scans import ScanCall

if TYPE_CHECKING:
    from mamba_attn.tracing.frames import Place, Run

_LOOKS = 2  # at tensors in front of a scan
_CLEAR = 0.9  # part of every cell's gradient that must be its own


def writes_behind(run: "Run", number: int, place: "Place") -> bool:
    """Whether a chunk scan's steps read the cells that the steps before them write.

    A gradient of u, weighted by these cells, goes back to the latest tensor in front of the scan whose cells T holds
    unmixed: there it has the weights.
    """
    call, out = run.watch.calls[number], run.tensors[place.tensor][1]
    if not isinstance(call, ScanCall) or not isinstance(call.inputs, ChunkInputs):
        return False
    probe = Probe(out, place.axis)

    def by_cell(gradient: Tensor) -> Tensor:
        return gradient.detach().movedim(place.axis, -1).flatten(0, -2).float()

    def share(plain: Tensor, weighted: Tensor) -> float:
        alive = plain.norm(dim=1) > 0
        error = (weighted - plain * probe.weight[:, None]).norm(dim=1)[alive] / plain.norm(dim=1)[alive]
        return float(1 - error.max()) if 2 * int(alive.sum()) > len(alive) else 0.0

    def arrived(tensor: Tensor, cotangent: Tensor, sent: Tensor | None = None) -> Tensor | None:
        call.sent = sent
        (found,) = torch.autograd.grad(out, tensor, cotangent, retain_graph=True, allow_unused=True)
        call.sent = None
        return None if found is None else by_cell(found)

    before = (run.tensors[i][1] for i in reversed(range(call.at)) if i not in run.inside)
    alike = [tensor for tensor in before if tensor.requires_grad and tensor.shape == out.shape]
    for tensor in alike[:_LOOKS]:
        plain, weighted = (arrived(tensor, cotangent) for cotangent in (probe.noise, probe.weighted))
        if plain is None or weighted is None or share(plain, weighted) < _CLEAR:
            continue
        cells = torch.cat([torch.full_like(place.order[..., :1], -1), place.order[..., :-1]], -1).to(out.device)
        noise = noise_on(call.inputs.u, torch.Generator().manual_seed(7)).unflatten(1, (call.groups, -1))
        noise = noise * (cells >= 0)[:, :, None]
        weight = probe.weight[cells.clamp_min(0)][:, :, None]
        none = torch.zeros_like(out)
        plain, weighted = (arrived(tensor, none, sent.flatten(1, 2)) for sent in (noise, noise * weight))
        return plain is not None and weighted is not None and share(plain, weighted) > _CLEAR
    return False
