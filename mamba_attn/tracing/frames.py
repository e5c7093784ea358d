"""Frames: which token each step of a scan writes, measured by masked gradients at the doors.

A gradient put on some cells of a tensor T behind the scans arrives as ``dout`` at every door at once, on the steps that
write these cells, while none passes a scan. So log2(cells) backward passes, each from the cells whose number has one
bit set, give the cell of every step of every call. T is the latest tensor of the forward pass in which a step answers
to one cell.
"""

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mamba_attn._types import Int
from mamba_attn.core.decisions import decided
from mamba_attn.tracing.doors import Watch, open_doors, suspended
from mamba_attn.tracing.probes import LAYER_NORMS, SHARE, Centre, Probe, noise_on, watch_fused_norms
from mamba_attn.tracing.replay import Replay, as_it_was
from mamba_attn.tracing.selective_scans import ScanCall
from mamba_attn.tracing.softmax_calls import SoftmaxCall
from mamba_attn.tracing.softmax_doors import open_softmax_doors
from mamba_attn.tracing.strict_scans import writes_behind

_SMALLEST = torch.finfo(torch.float32).tiny
_LOOKS = 2  # at tensors of one shape


@dataclass(frozen=True, eq=False)
class Place:
    """Where the steps of one call land.

    Args:
        order: cell of each step, counted over T without its features, images first; -1 where it lands nowhere: padding.
        tensor: number of T among the tensors of the forward pass; calls with the same T have the same token frame.
        shape: of T.
        axis: of T's features.
        summed: whether the groups' outputs are added up behind the scan, so that all get the same gradient.
        share: part of a step's gradient that comes from its own cell, of the worst hundredth of steps.
        where: the module that returned T.
        behind: whether a step writes not the cell that it reads, but the one that the next step reads, as in Hydra.
    """

    order: Int[Tensor, "rows groups length"]
    tensor: int
    shape: tuple[int, ...]
    axis: int
    summed: bool
    share: float
    where: str
    behind: bool = False

    @property
    def grid(self) -> tuple[int, ...]:
        """T's axes but the images' and the features'."""
        return tuple(n for axis, n in enumerate(self.shape) if axis not in (0, self.axis))


@dataclass(frozen=True, eq=False)
class Measured:
    """What measuring a model gave.

    Args:
        signatures: of its scans' calls, in the order of the forward pass.
        places: of each call; None where no tensor qualifies.
        chained: pairs (earlier, later) of calls in one run of a module, of which the later depends on the earlier.
        nearest: what came nearest to a place, in words, for calls without one.
        other_keys: calls of attention whose keys or values were not found to come from the tokens of its queries.
        maps: shapes of the tensors of four axes and more that modules took and returned, by the modules' names.
        backwards: number of backward passes.
    """

    signatures: list[tuple[Any, ...]]
    places: list[Place | None]
    chained: set[tuple[int, int]]
    nearest: dict[int, str]
    other_keys: set[int]
    maps: dict[str, list[tuple[int, ...]]]
    backwards: int


def measure(model: nn.Module, replay: Replay) -> Measured:
    """Run a model once with its graph, and backwards many times: where do its scans' steps land?

    The model's modes, flags, buffers, gradients and the random generators are as before, after an error too.

    Args:
        model: any model whose scans go through doors.
        replay: how it is called.

    Raises:
        TraceError: parameters that are inference tensors: no gradient can be taken.
    """
    with _watched_pass(model, replay) as run:
        calls = run.watch.calls
        other_keys = {
            i for i, c in enumerate(calls) if isinstance(c, SoftmaxCall) and not c.reads_own(run.before(c.at))
        }
        search = _Search(calls)
        for number in _to_look_at(run, search.settled):
            search.take(list(_decoded(run, number, search)))
        for i, place in search.places.items():
            if writes_behind(run, i, place):
                search.places[i] = replace(place, behind=True)
        scans = f"{len(search.places)} of {len(calls)} calls at doors"
        decided("%s: places of %s measured by %d backward passes", type(model).__name__, scans, run.backwards)
        return Measured(
            [call.signature for call in calls],
            [search.places.get(i) for i in range(len(calls))],
            _chained(calls),
            {i: words for i, (_, words) in search.nearest.items() if i not in search.places},
            other_keys,
            run.maps,
            run.backwards,
        )


class _Search:
    """The places found so far, and the calls for which no other tensor is to be looked at."""

    def __init__(self, calls: Sequence[ScanCall | SoftmaxCall]) -> None:
        self.calls = calls
        self.places: dict[int, Place] = {}
        self.settled: set[int] = set()
        self.nearest: dict[int, tuple[float, str]] = {}
        self._tries: dict[int, int] = {}

    def cells(self, call: int) -> int:
        """Number of cells of the tensor in which a call has its place."""
        place = self.places.get(call)
        return 0 if place is None else prod(place.shape) // place.shape[place.axis]

    def take(self, decoded: Sequence["_Decoded"]) -> None:
        """Take the places that one tensor gives."""
        runs: dict[tuple[str, int], list[_Decoded]] = {}
        for each in decoded:
            call, place = self.calls[each.call], each.place
            if each.single and place.share >= SHARE:
                runs.setdefault((call.module, call.run), []).append(each)
            elif place.share >= self.nearest.get(each.call, (0.0, ""))[0]:
                kind = "one cell a step" if each.single else "steps share cells"
                words = f"{place.where or 'the model'} {place.shape}: {place.share:.0%} of a gradient, {kind}"
                self.nearest[each.call] = (place.share, words)
        for members in runs.values():
            self._take_run(members)

    def _take_run(self, members: Sequence["_Decoded"]) -> None:
        """Take those of one run of a module.

        Where several scans write a cell and are not added up there, the tensor may have merged their tokens, as patch
        merging does; then one further inside has more cells.
        """
        numbers = {each.call for each in members}
        before = [self.places[i] for i in numbers if i in self.places]
        if len(before) < len(members) or _cells([each.place for each in members]) > _cells(before):
            self.places.update({each.call: each.place for each in members})
        for i in numbers:
            self._tries[i] = self._tries.get(i, 0) + 1
        heads = isinstance(self.calls[members[0].call], SoftmaxCall) and _in_one_order(members[0].place.order)
        if heads or _added_up(members):
            self.settled |= numbers
        else:
            self.settled |= {i for i in numbers if self._tries[i] > _LOOKS}


def _in_one_order(order: Int[Tensor, "rows groups length"]) -> bool:
    return bool((order == order[:, :1]).all())


def _cells(places: Sequence[Place]) -> int:
    """Number of cells that some steps write."""
    orders = torch.cat([place.order.flatten() for place in places])
    return len(orders[orders >= 0].unique())


def _added_up(members: Sequence["_Decoded"]) -> bool:
    """Whether all steps that write a cell get the same gradient from it."""
    if len({each.gradient.shape[2] for each in members}) > 1:
        return False
    order = torch.cat([each.place.order.flatten() for each in members]).to(members[0].gradient.device)
    gradient = torch.cat([each.gradient.movedim(2, 3).flatten(0, 2) for each in members])[order >= 0]
    order = order[order >= 0]
    cells = gradient.new_zeros(int(order.max()) + 1, gradient.shape[1])
    cells[order] = gradient
    return float((cells[order] - gradient).abs().max()) <= 1e-3 * float(gradient.abs().max())


def agrees(model: nn.Module, replay: Replay, measured: Measured) -> bool:
    """Whether the places hold for another call of the model; two backward passes per tensor T.

    Args:
        model: the model that was measured.
        replay: another call of it, of the same shapes.
        measured: what was measured.
    """
    with _watched_pass(model, replay) as run:
        if [call.signature for call in run.watch.calls] != measured.signatures:
            return False
        by_tensor: dict[int, list[tuple[int, Place]]] = {}
        for i, place in enumerate(measured.places):
            if place is not None:
                by_tensor.setdefault(place.tensor, []).append((i, place))
        for number, placed in by_tensor.items():
            out, first = run.tensors[number][1], placed[0][1]
            if tuple(out.shape) != first.shape:
                return False
            probe = Probe(out, first.axis)
            total, check = run.back(out, probe.noise), run.back(out, probe.weighted)
            for i, place in placed:
                if i not in total or _shares(total[i], check[i], probe.weight, place.order) < SHARE:
                    return False
        return True


class Run:
    """One forward pass with its graph, and backward passes that end at the doors."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.tensors = watch.tensors  # what modules returned, with the module, in order
        self.inside: set[int] = set()  # numbers of those that a function returned, and no module
        self.maps: dict[str, list[tuple[int, ...]]] = {}
        self.leaves: list[Tensor] = []
        self.axes: dict[tuple[int, ...], int] = {}  # of features, by shape
        self.backwards = 0

    def before(self, number: int) -> list[Tensor]:
        """The tensors seen before one, latest first, and what the pass began with."""
        returned = (self.tensors[i][1] for i in reversed(range(number)) if i not in self.inside)
        return [*returned, *self.leaves]

    def returned_after(self, number: int) -> bool:
        """Whether the module in which a function returned a tensor returned as much itself, and no logits, say."""
        name, out = self.tensors[number]
        return any(its == name and value.numel() >= out.numel() for its, value in self.tensors[number + 1 :])

    def show(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """Keep what a layer norm returned, called as a function: between two scans of one module there may be no more.

        A place is looked for there at last, unless the module returns less: the last norm stands in front of a head.
        """
        if func in LAYER_NORMS:
            self.inside.add(len(self.tensors))
            self.tensors.append((self.watch.name_of.running(sys._getframe()) or "", out))
        return out

    def see(self, name: str, given: Any, output: Any) -> None:
        """Keep what a module returned; of several tensors the first is looked at first, so it comes last."""
        tensors = [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]
        if self.tensors and any(self.tensors[-1][1] is value for value in tensors):
            self.inside.discard(len(self.tensors) - 1)  # that function is all that the module calls
            self.tensors.pop()
        self.tensors += [(name, value) for value in reversed(tensors)]
        both = pytree.tree_leaves((given, output))
        self.maps.setdefault(name, []).extend(tuple(v.shape) for v in both if isinstance(v, Tensor) and v.ndim > 3)

    def back(self, out: Tensor, cotangent: Tensor) -> dict[int, Tensor]:
        """What arrives at each door, by the call's number: (rows, groups, width, length)."""
        self.backwards += 1
        calls = self.watch.calls
        for call in calls:
            call.dout = None
        torch.autograd.grad(out, self.leaves, cotangent, retain_graph=True, allow_unused=True)
        return {
            i: call.dout.detach().float().unflatten(1, (call.groups, -1))
            for i, call in enumerate(calls)
            if call.dout is not None
        }


@contextmanager
def _watched_pass(model: nn.Module, replay: Replay) -> Iterator[Run]:
    """A forward pass with cut doors, whose graph lives as long as the block."""
    watch = Watch(model, cut=True)
    with ExitStack() as whole:
        whole.callback(watch.close)
        for block in (
            torch.inference_mode(False),
            as_it_was(model),
            open_doors(watch),
            open_softmax_doors(),
            suspended(watch),
        ):
            whole.enter_context(block)
        run = Run(watch)

        def leaf(value: Tensor) -> Tensor:
            fresh = value.clone()
            if fresh.is_floating_point() or fresh.is_complex():
                run.leaves.append(fresh)
            return fresh

        own = replay.changed(leaf)
        if not run.leaves:  # words: what can be differentiated begins at the embedding
            kinds = (nn.Embedding, nn.EmbeddingBag)
            run.leaves = [module.weight for module in model.modules() if isinstance(module, kinds)]
        for tensor in run.leaves:
            tensor.requires_grad_()
        with ExitStack() as stack:
            for device, dtype in own.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            stack.enter_context(torch.enable_grad())
            _look(stack, model, run)
            stack.enter_context(Centre(run.show))
            model(*own.args, **own.kwargs)
        yield run


def _look(stack: ExitStack, model: nn.Module, run: Run) -> None:
    """Show a pass what every module, and every fused norm, returns."""

    def returned(name: str, module: nn.Module, args: Any, output: Any) -> None:
        run.see(name, args, output)

    for name, module in model.named_modules():
        stack.callback(module.register_forward_hook(partial(returned, name)).remove)
    watch_fused_norms(stack, partial(run.see, "a fused norm", ()))


def _to_look_at(run: Run, settled: Collection[int]) -> Iterator[int]:
    """The tensors to try, latest first; at last those around the scans that are not settled yet."""
    calls, looked = run.watch.calls, set()
    times: dict[tuple[Any, ...], int] = {}

    def left() -> list[ScanCall | SoftmaxCall]:
        return [call for i, call in enumerate(calls) if i not in settled]

    def possible(number: int) -> bool:
        out = run.tensors[number][1]
        fewest = min(call.steps for call in left())
        return out.requires_grad and out.ndim > 2 and out.is_floating_point() and out.numel() >= fewest

    inside = {number for number in run.inside if run.returned_after(number)}
    for number in reversed(range(len(run.tensors))):
        if not left():
            return
        key = (tuple(run.tensors[number][1].shape), len(left()))
        if number not in inside and possible(number) and times.get(key, 0) < _LOOKS:
            times[key] = times.get(key, 0) + 1
            looked.add(number)
            yield number
    for call in reversed(calls):
        around = {call.module[:end] for end, letter in enumerate(call.module + ".") if letter == "."}
        for number in reversed(range(len(run.tensors))):
            name = run.tensors[number][0]
            near = name in around or name.startswith(f"{call.module}.")
            if near and call in left() and number not in looked and possible(number):
                looked.add(number)
                yield number


@dataclass(frozen=True, eq=False)
class _Decoded:
    """What a tensor says of one call."""

    call: int
    place: Place
    single: bool  # no two steps of a row and group share a cell, and all of a row are in one image
    gradient: Tensor  # (rows, groups, width, length)


def _decoded(run: Run, number: int, search: _Search) -> Iterator[_Decoded]:
    """What a tensor says of every call that is not settled, and that its gradient reaches."""
    name, out = run.tensors[number]
    # of each call and group, all rows
    steps = {i: call.steps for i, call in enumerate(run.watch.calls) if i not in search.settled}
    shape = tuple(out.shape)
    axis = run.axes.get(shape)
    if axis is None:
        axis = _feature_axis(run, out, steps)
        if axis is None:
            return
        run.axes[shape] = axis
    probe = Probe(out, axis)
    # half of the steps may be padding; a second place is one with more cells
    reachable = [i for i, count in steps.items() if 2 * probe.cells >= count and probe.cells > search.cells(i)]
    total = run.back(out, probe.noise) if reachable else {}
    reached = [i for i in reachable if i in total and bool(total[i].any())]
    check = run.back(out, probe.weighted) if reached else {}
    # where every step lands on one cell, the weighted gradient of a step is parallel to the plain one
    reached = [i for i in reached if _parallel(total[i], check[i]) > 0.1]
    if not reached:
        return
    numbers = {i: torch.zeros(total[i][:, :, 0].shape, dtype=torch.long, device=out.device) for i in reached}
    # a gate may leave some steps 1e-20 of what it leaves others; padding gets nothing
    size = {i: total[i].abs().amax(2, keepdim=True) for i in reached}
    unit = {i: total[i] / size[i].clamp_min(_SMALLEST) for i in reached}
    for bit in range(probe.bits):
        found = run.back(out, probe.with_bit(bit))
        for i in reached:  # nearer to all of the gradient than to none of it
            part = found[i] / size[i].clamp_min(_SMALLEST)
            numbers[i] += ((unit[i] * (2 * part - unit[i])).sum(2) > 0).long() << bit
    for i in reached:
        order = torch.where(size[i].squeeze(2) > 0, probe.cell_of(numbers[i]), -1)
        first = total[i][:, :1]
        alike = float((total[i] - first).abs().max()) <= 1e-4 * float(first.abs().max())
        share = _shares(total[i], check[i], probe.weight, order)
        place = Place(order.cpu(), number, shape, axis, alike, share, name)
        yield _Decoded(i, place, _single(order, probe.cells // shape[0]), total[i])


def _single(order: Tensor, image: int) -> bool:
    """Whether no two steps of a row and group share a cell, and a row's steps lie in one image, of so many cells."""
    landed = order >= 0
    if not bool(landed.any()):
        return False
    if not all(bool((row[row >= 0].unique(return_counts=True)[1] == 1).all()) for row in order.flatten(0, 1)):
        return False
    images = torch.where(landed, order // image, -1).flatten(1)
    return bool(((images < 0) | (images == images.amax(1, keepdim=True))).all())


def _feature_axis(run: Run, out: Tensor, wanted: Iterable[int]) -> int | None:
    """The axis along which a line lands on the fewest steps of some call; None when nothing arrives at any."""
    noise = noise_on(out, torch.Generator().manual_seed(3))
    best: tuple[float, int] | None = None
    for axis in range(1, out.ndim):
        line = tuple(slice(None) if a == axis else slice(n // 2, n // 2 + 1) for a, n in enumerate(out.shape))
        cotangent = torch.zeros_like(out)
        cotangent[line] = noise[line]
        found = run.back(out, cotangent)
        for arrived in (found[i] for i in wanted if i in found):
            energy = arrived.square().sum(2).flatten().double()
            steps = float(energy.sum() ** 2 / energy.square().sum().clamp_min(1e-300))
            # of a scan of one step every axis reaches one: then features are the longest
            longer = best is not None and steps < best[0] * 1.001 and out.shape[axis] > out.shape[best[1]]
            if steps and (best is None or steps < best[0] * 0.999 or longer):
                best = (steps, axis)
    return None if best is None else best[1]


def _parallel(t: Tensor, c: Tensor) -> float:
    """1 where the weighted gradient of every step is a multiple of the plain one, 0 where it is unlike it."""
    along = (t * c).sum(2, keepdim=True) / t.square().sum(2, keepdim=True).clamp_min(1e-30)
    rest = (c - along * t).square().sum() / c.square().sum().clamp_min(1e-30)
    return 1 - float(rest.sqrt())


def _shares(t: Tensor, c: Tensor, weight: Tensor, order: Tensor) -> float:
    """Part of a step's gradient that comes from its own cell, of the worst hundredth of steps that land somewhere."""
    order = order.to(t.device)
    own = weight[order.clamp_min(0)].unsqueeze(2).to(t)
    size = t.abs().amax(2, keepdim=True).clamp_min(_SMALLEST)
    error = ((c - t * own) / size).norm(dim=2) / (t / size).norm(dim=2).clamp_min(_SMALLEST)
    share = (1 - error[order >= 0].clamp_max(1)).sort()[0]
    return float(share[len(share) // 100]) if len(share) else 0.0


def _chained(calls: Sequence[ScanCall | SoftmaxCall]) -> set[tuple[int, int]]:
    """Pairs of calls in one run of a module, of which the later takes what the earlier gave."""
    runs: dict[tuple[str, int], list[int]] = {}
    for i, call in enumerate(calls):
        runs.setdefault((call.module, call.run), []).append(i)
    found = set()
    for members in runs.values():
        for position, later in enumerate(members[1:], 1):
            above = _behind(calls[later].node)
            found |= {(earlier, later) for earlier in members[:position] if calls[earlier].node in above}
    return found


def _behind(node: Any) -> set[Any]:
    """The nodes of the graph that a node depends on."""
    seen: set[Any] = set()
    waiting: list[Any] = [] if node is None else [node]
    while waiting:
        for following, _ in waiting.pop().next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return seen
