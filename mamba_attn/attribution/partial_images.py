"""What methods share that ask the model about changed images: the settled target, and many copies in one pass."""

import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.attribution.maps import MapAttribution
from mamba_attn.attribution.targets import Target, scores_in, target_indices
from mamba_attn.core.outputs import follow
from mamba_attn.tracing.texts import is_text


class PartialImages(MapAttribution):
    """Base of the methods that ask the model about images some of whose content is taken away.

    Args:
        model: as for ``MapAttribution``.
    """

    takes_parts: ClassVar[bool] = False  # as MambaLRP

    def _settled(self, images: Tensor, target: Target) -> Target:
        """Return the target, the class predicted for the whole image if it is open: parts may be taken for others.

        Raises:
            ValueError: inputs that are no images.
        """
        call = f"{self.called}.attribute"
        if is_text(images) or images.ndim != 4:
            raise ValueError(
                f"{call}(inputs{tuple(images.shape)}): expected images (batch, colours, rows, columns), whose cells "
                "can be filled; for texts, volumes and spectrograms use MambaLRP or, of a model without scans, "
                "IntegratedGradients."
            )
        output = self._output(images, target)
        if target is not None:
            return target
        scores = follow(output, scores_in(f"{call}(target=None)", output, len(images)))
        indices = target_indices(call, scores, None, len(images))
        return indices[:, 0].tolist() if indices.shape[1] else None

    def _read(
        self,
        copies: Float[Tensor, "copies batch colours height width"],
        target: Target,
        read: Callable[[Any, Target, int], Float[Tensor, "kinds values"]],
    ) -> Float[Tensor, "kinds values"]:
        """Return what ``read`` makes of the model's outputs, their targets and batches, copy after copy."""
        if self._call.has_others or callable(target):  # which know the batch
            return torch.cat([read(self._call.run(self.model, each), target, len(each)) for each in copies], dim=1)
        count, batch = copies.shape[:2]
        each = target.tolist() if isinstance(target, Tensor) and target.ndim else target
        repeated = each * count if isinstance(each, list) else each
        return read(self._call.run(self.model, copies.flatten(0, 1)), repeated, count * batch)

    def _log_chance(self, output: Any, target: Target, batch: int) -> Float[Tensor, " batch"] | None:
        """Return the log of the target's probability by softmax; None where an output or a target has no classes."""
        if callable(target):
            return None
        call = f"{self.called}.attribute"
        scores = follow(output, scores_in(f"{call}(target={target!r})", output, batch, target))
        if scores.ndim == 1 or scores.shape[1] == 1:
            return None
        indices = target_indices(call, scores, target, batch)
        places = (torch.arange(batch, device=scores.device), *indices.unbind(1))
        return in_single(scores).log_softmax(1)[places]


def in_single(values: Tensor) -> Tensor:
    """Return values in single precision, unless theirs is higher."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def drawn_for(images: Float[Tensor, "batch colours height width"]) -> list[torch.Generator]:
    """Return a generator per image, the same wherever an image is in a batch.

    Args:
        images: as the model takes them.
    """
    seeds = [zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes()) for image in images]
    return [torch.Generator().manual_seed(seed) for seed in seeds]
