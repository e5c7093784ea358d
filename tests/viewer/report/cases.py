"""A small store, whose names are meant to do harm, and its report."""

import zlib

import numpy as np
from PIL import Image

from mamba_attn.analytics import AttentionStore, Request, collect
from mamba_attn.datasets import open_data
from mamba_attn.viewer.report.content import make
from tests.analytics.cases import subject

HOSTILE = '<img src=x onerror="window.harmed=1">'
OPTIONS = {"image_size": (32, 48), "depths": (1, 2), "dims": 8}  # grids of 8 x 12 and 4 x 6


def stored(folder, name="vmamba_micro", images=5, keep=2, routes="each", **options):
    """A store of noise."""
    generator = np.random.default_rng(0)
    for number in range(images):
        where = folder / "photos" / (HOSTILE if number % 2 else "plain")
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 48, 3), np.uint8)).save(where / f"{HOSTILE}{number}.png")
    options = {**(OPTIONS if name == "vmamba_micro" else {}), **options}
    asked = Request(subject(name, 0, **options), open_data(str(folder / "photos")), None, keep, 2, None, routes, part=4)
    collect(asked, folder / "store")
    return AttentionStore.open(folder / "store")


def report(*stores, methods=("pca",), images=8, limit=10**7):
    return make(stores, methods, images, limit / 1e6, "a test")


def unpacked(content, rows, columns):
    """The matrix that ``packed`` packed, as the page's script unpacks it."""
    raw = zlib.decompress(content)
    scales = np.frombuffer(raw, "<f4", rows)
    upper, lower = np.frombuffer(raw, np.uint8, offset=4 * rows).reshape(2, rows, columns)
    numbers = (upper.astype(np.uint16) << 8 | lower).view(np.int16)
    return np.asarray(numbers * scales[:, None], dtype=np.float32)
