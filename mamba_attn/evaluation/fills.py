"""What stands in the place of pixels that are removed from an image.

No fill is neutral: a model sees the black squares, too. A figure that holds under one fill only is a figure of the
fill, and ``random`` in every table shows what a fill alone does.
"""

import numpy as np
import torch
from torch import Tensor

from mamba_attn._types import Bool, Float
from mamba_attn.core.blur import blurred
from mamba_attn.core.transform import Transform

FILLS = ("black", "mean", "blur", "road")
_NOISE = 0.01  # of the published code; after normalisation
_NEIGHBOURS = {  # 1/6 next to a pixel, 1/12 diagonally
    (down, right): 1 / 12 if down and right else 1 / 6
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
    if (down, right) != (0, 0)
}


def filled(
    image: Float[Tensor, "colours height width"],
    gone: Bool[Tensor, "copies height width"],
    fill: str,
    shown: Transform | None = None,
    seed: int = 0,
) -> Float[Tensor, "copies colours height width"]:
    """Return copies of an image with pixels replaced.

    Args:
        image: normalised.
        gone: the pixels to replace, in each copy.
        fill: "black", 0 before normalisation, as published; "mean", the mean colour of the normalisation; "blur", the
            blurred image's pixels; "road", the noisy linear imputation of Rong et al., "A Consistent and Efficient
            Evaluation Strategy for Attribution Methods", ICML 2022: each pixel the weighted mean of its neighbours,
            plus noise, so that the shape of what is missing tells the model little.
        shown: the model's transform. Default: ImageNet's normalisation.
        seed: of the noise.

    Raises:
        ValueError: an unknown fill, or "road" for an image of which nothing is left.
    """
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r}: expected one of {', '.join(FILLS)}.")
    if fill == "road":
        if bool(gone.flatten(1).all(1).any()):
            raise ValueError("fill='road': nothing is left of an image, so no pixel can be imputed from others.")
        return _imputed(image, gone, seed)
    if fill == "blur":
        content = blurred(image)
    else:
        black = (Transform((1, 1)) if shown is None else shown).normalise(np.zeros((1, 1, 1, 3), dtype=np.uint8))[0]
        content = (torch.zeros_like(black) if fill == "mean" else black).to(image)
    return torch.where(gone.unsqueeze(1), content, image)


def blank(
    images: Float[Tensor, "batch colours height width"], fill: str, shown: Transform | None = None
) -> Float[Tensor, "batch colours height width"]:
    """Return the images with all pixels replaced; for "road", which has nothing to begin from, the mean colour.

    Args:
        images: normalised.
        fill: as in ``filled``.
        shown: as in ``filled``.
    """
    everything = torch.ones(1, *images.shape[2:], dtype=torch.bool, device=images.device)
    return torch.cat([filled(image, everything, "mean" if fill == "road" else fill, shown) for image in images])


def _imputed(
    image: Float[Tensor, "colours height width"], gone: Bool[Tensor, "copies height width"], seed: int
) -> Float[Tensor, "copies colours height width"]:
    """Solve for the missing pixels: each is the weighted mean of its neighbours inside the image, plus noise."""
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import splu

    framed = np.pad(image.double().cpu().numpy(), ((0, 0), (1, 1), (1, 1)))
    inside = np.pad(np.ones(image.shape[1:]), 1)
    copies = np.repeat(image.double().cpu().numpy()[None], len(gone), 0)
    random = np.random.default_rng(seed)
    for copy, mask in zip(copies, gone.cpu().numpy(), strict=True):
        count, missing = int(mask.sum()), np.pad(mask, 1)
        number = np.full(missing.shape, -1)
        number[missing] = np.arange(count)
        rows, columns = np.nonzero(missing)
        whole, known = np.zeros(count), np.zeros((count, len(image)))
        entries = []
        for (down, right), weight in _NEIGHBOURS.items():
            place = rows + down, columns + right
            its = weight * inside[place]
            whole += its
            known += (its * ~missing[place])[:, None] * framed[:, place[0], place[1]].T
            (both,) = np.nonzero(number[place] >= 0)
            entries.append((both, number[place][both], np.full(len(both), -weight)))
        entries.append((np.arange(count), np.arange(count), whole))
        i, j, values = (np.concatenate(parts) for parts in zip(*entries, strict=True))
        # symmetric and positive, so no pivoting, and an ordering that keeps the factors thin: 5 x faster
        solver = splu(
            csc_matrix((values, (i, j))), "MMD_AT_PLUS_A", diag_pivot_thresh=0, options={"SymmetricMode": True}
        )
        copy[:, mask] = solver.solve(known).T + _NOISE * random.standard_normal((len(image), count))
    return torch.from_numpy(copies).to(image)
