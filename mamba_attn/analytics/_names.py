"""What a store's layers, images and routes are called, and what is said about a name that it does not hold."""

from functools import cached_property
from pathlib import Path

from mamba_attn.analytics._writer import route_names
from mamba_attn.analytics.index import Index, StoredImage, StoredLayer
from mamba_attn.errors import StoreError, nearest


class NotStoredError(StoreError, KeyError):
    """Something that a store does not hold: a layer, a route, an image, an image's matrices."""

    __str__ = RuntimeError.__str__  # KeyError would print the repr of the sentence


class Names:
    """Layers, images and routes of a store.

    Args:
        folder: of the store.
        index: what it holds.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    @property
    def layers(self) -> list[StoredLayer]:
        """The layers, in execution order."""
        return list(self.index.layers)

    @property
    def images(self) -> list[StoredImage]:
        """The images that are counted."""
        return list(self.index.images)

    def layer(self, layer: StoredLayer | str | int) -> StoredLayer:
        """Return a layer.

        Args:
            layer: itself, its name, or its number, negative ones from the last.

        Raises:
            NotStoredError: there is no such layer.
        """
        return self.index.layers[self._number(layer)]

    def image(self, image: StoredImage | str | int) -> StoredImage:
        """Return an image.

        Args:
            image: itself, its key, or its number.

        Raises:
            NotStoredError: there is no such image.
        """
        if isinstance(image, StoredImage):
            image = image.key
        number = image if isinstance(image, int) else self._rows_by_key.get(image, -1)
        if not 0 <= number < len(self.index.images):
            hint = nearest(image, self._rows_by_key) if isinstance(image, str) else ""
            raise NotStoredError(f"{self.folder}: it holds no image {image!r} of {len(self.images)}. {hint}".rstrip())
        return self.index.images[number]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {layer.name: number for number, layer in enumerate(self.index.layers)}

    @cached_property
    def _rows_by_key(self) -> dict[str, int]:
        return {image.key: image.row for image in self.index.images}

    def _number(self, layer: StoredLayer | str | int) -> int:
        name = layer.name if isinstance(layer, StoredLayer) else layer
        count = len(self.index.layers)
        number = name if isinstance(name, int) and not isinstance(name, bool) else self._numbers.get(str(name), count)
        if not -count <= number < count:
            hint = nearest(name, self._numbers) if isinstance(name, str) else f"It has {count}, 0..{count - 1}."
            raise NotStoredError(f"{self.folder}: it holds no layer {name!r}. {hint}")
        return number % count

    def _route(self, number: int, route: str | int) -> str:
        """The route's name on the disk; the only route of a layer is the sum."""
        layer = self.index.layers[number]
        if layer.routes == 1 and route == 0:
            return "sum"
        if str(route) not in route_names(layer, self.index.routes):
            collected = self.index.routes == "each"
            expected = f"'sum' or 0..{layer.routes - 1}" if collected else "'sum': it was collected with routes='sum'"
            raise NotStoredError(f"{layer.name}: no route {route!r}; expected {expected}.")
        return str(route)

    def _token(self, layer: StoredLayer | str | int, token: int) -> int:
        tokens = self.layer(layer).tokens
        if not 0 <= token < tokens:
            raise IndexError(f"token {token!r}: expected the index of a token, 0..{tokens - 1}.")
        return token
