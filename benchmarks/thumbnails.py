"""Draws the thumbnails of the README from the demo weights: ``python -m benchmarks.thumbnails``."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mamba_attn
from mamba_attn import images, models, orders
from mamba_attn.attribution import MambaLRP
from mamba_attn.erf import receptive_field
from mamba_attn.figures import png
from mamba_attn.models import registry

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "thumbnails"
SIDE = 128  # pixels
PHOTO = images.samples()[5]


def maps() -> np.ndarray:
    """A map of relevance over its photo."""
    loaded = mamba_attn.load("vmamba_micro", weights="demo")
    heat = MambaLRP(loaded.model).attribute(loaded.transform(PHOTO)[None])
    return png.overlay_rgb(loaded.transform.pixels(PHOTO), heat[0, 0].detach())


def matrices() -> np.ndarray:
    """The matrix of a layer."""
    loaded = mamba_attn.load("vim_micro", weights="demo")
    with torch.no_grad(), mamba_attn.trace(loaded.model, layers=5) as trace:
        loaded.model(loaded.transform(PHOTO)[None])
    return png.matrix_rgb(trace.layers[0].attention()[0])


def knockout() -> np.ndarray:
    """The highest half of the patches taken away."""
    loaded = mamba_attn.load("vim_micro", weights="demo")
    heat = MambaLRP(loaded.model).attribute(loaded.transform(PHOTO)[None], grid=True)[0, 0].detach().numpy()
    pixels = loaded.transform.pixels(PHOTO).copy()
    side = pixels.shape[0] // heat.shape[0]
    pixels[(heat > np.median(heat)).repeat(side, 0).repeat(side, 1)] = 0
    return pixels


def scans() -> np.ndarray:
    """The path of a scan."""
    return png.scan_path_rgb(orders.hilbert(8, 8), (8, 8), size=SIDE)


def field() -> np.ndarray:
    """The effective receptive field of the patch in the middle."""
    loaded = mamba_attn.load("vmamba_micro", weights="demo")
    found = receptive_field(
        loaded.model, torch.stack([loaded.transform(each) for each in images.samples()]), reach=False
    )
    return png.matrix_rgb(found.gradient**0.25)


def text() -> np.ndarray:
    """What the last word of a review reads in every layer."""
    model, vocabulary = models.create("mamba_reviews", weights="demo"), registry.vocabulary("mamba_reviews")
    ids = vocabulary.encode("a charming and hilarious film")
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(ids)
    return png.matrix_rgb(torch.stack([layer.row(ids.shape[1] - 1)[0] for layer in trace.layers]), signed=True)


DRAWN: dict[str, Callable[[], np.ndarray]] = {
    each.__name__: each for each in (maps, matrices, knockout, scans, field, text)
}


def main() -> int:
    """Draw them all."""
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(0)
    for name, draw in DRAWN.items():
        picture = Image.fromarray(draw()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        picture.save(FOLDER / f"{name}.png", optimize=True)
        print(f"{name}.png: {(FOLDER / f'{name}.png').stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
