"""A store in memory, with the interface of AttentionStore, made from a real model's traces."""

from dataclasses import dataclass

import numpy as np
import torch

import mamba_attn
from mamba_attn import images
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform


@dataclass(frozen=True, eq=False)
class Layer:
    name: str
    kind: str
    stage: int
    block: int
    layout: object
    orders: np.ndarray
    routes: int


@dataclass(frozen=True)
class Image:
    key: str
    label: str
    predicted: str
    kept: bool
    correct: bool | None = None


class Double:
    """Means over a few images; the first image is kept in full, the others need the model."""

    def __init__(self, model, pixels, labels, keep=1, name="vmamba_micro"):
        self.model_name, self._model, self.classes = name, model.eval(), []
        self._pixels = list(pixels)
        self.layers, self.images = [], []
        self._mean, self._matrix, self._features, self._embeddings = {}, {}, {}, {}
        self.lines_read = []
        for number, picture in enumerate(self._pixels):
            with torch.no_grad(), mamba_attn.trace(self._model) as record:
                logits = self._model(images.normalise(picture[None]))
            image = Image(f"image_{number}.jpg", labels[number], str(int(logits.argmax())), number < keep)
            self.images.append(image)
            self.layers = self.layers or [self._layer(layer) for layer in record.layers]
            for mine, layer in zip(self.layers, record.layers, strict=True):
                each = {"sum": layer.attention()[0].double().numpy()}
                if mine.routes > 1:
                    routes = layer.attention(routes="each")[0].double().numpy()
                    each |= dict(enumerate(routes))
                for route, matrix in each.items():
                    key = (mine.name, route)
                    self._mean[key] = self._mean.get(key, 0) + matrix / len(self._pixels)
                    if image.kept:
                        self._matrix[(*key, image.key)] = matrix
                self._features.setdefault(mine.name, []).append(each["sum"].ravel().astype(np.float16))

    @staticmethod
    def _layer(layer):
        parts = layer.name.split(".")
        stage, block = (int(parts[1]), int(parts[3])) if len(parts) > 3 else (0, int(parts[1]))
        orders = layer.scan.read_order.numpy()
        return Layer(layer.name, "selective scans", stage, block, layer.layout, orders, len(orders))

    @property
    def subject(self):
        return LoadedModel(self._model, Transform(self._pixels[0].shape[:2]))

    def model(self):
        return self._model

    def pixels(self, image):
        return self._pixels[self.images.index(image)]

    def mean(self, layer, route="sum"):
        return self._mean[layer.name, route]

    def variance(self, layer, route="sum"):
        matrices = [matrix for key, matrix in self._matrix.items() if key[:2] == (layer.name, route)]
        return np.var(matrices, axis=0)

    def lines(self, layer, start, stop, route="sum", *, image=None, columns=False):
        self.lines_read.append((layer.name, start, stop))
        found = self.mean(layer, route) if image is None else self.matrix(layer, image, route)
        return found[:, start:stop].T if columns else found[start:stop]

    def matrix(self, layer, image, route="sum"):
        return self._matrix[layer.name, route, image.key]

    def features(self, layer):
        return np.stack(self._features[layer.name])

    def feature_rows(self, layer, rows):
        found = self.features(layer)
        for start in range(0, len(found), rows):
            yield start, found[start : start + rows].astype(np.float32)

    def embedding(self, key):
        return self._embeddings.get(key)

    def save_embedding(self, key, array, about):
        self._embeddings[key] = (array, about)


def demo(count=6, weights="demo", name="vmamba_micro"):
    """The packaged images and weights."""
    model = mamba_attn.models.create(name, weights=weights)
    transform = mamba_attn.models.transform(name, model.image_size)
    paths = images.samples()[:count]
    pixels = [transform.pixels(path) for path in paths]
    return Double(model, pixels, [path.stem.split("_")[1] for path in paths], keep=2, name=name)


def tiny(count=4, **options):
    """A VMamba of random weights on a grid of 8 x 12, 4 x 6, ..."""
    torch.manual_seed(0)
    options = {"depths": (1, 1, 2, 1), "image_size": (32, 48), "num_classes": 3, **options}
    model = mamba_attn.models.create("vmamba_micro", **options)
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 255, (32, 48, 3), dtype=np.uint8) for _ in range(count)]
    return Double(model, pixels, ["cat", "dog", "cat", "dog"][:count])
