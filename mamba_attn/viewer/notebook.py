"""The page in a cell of a notebook."""

import html
from typing import Any


class Frame:
    """A frozen page that a notebook shows in a frame.

    Args:
        page: HTML.
        height: of the frame, in pixels.
    """

    def __init__(self, page: str, height: int) -> None:
        self.page, self.height = page, height

    def _repr_html_(self) -> str:
        held = html.escape(self.page, quote=True)
        return (
            f'<iframe title="Where the model looks" srcdoc="{held}" sandbox="allow-scripts allow-downloads" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )


def notebook(
    *stores: Any, images: int = 4, size: float = 8.0, methods: tuple[str, ...] = ("pca",), height: int = 860
) -> Frame:
    """Return the page of some stores, frozen, for a notebook to show; it needs no server.

    Args:
        stores: ``AttentionStore`` objects, at least one.
        images: per store, how many of those kept in full are shown.
        size: of the page at most, in 10^6 bytes.
        methods: of dimension reduction: "pca", "tsne", "umap".
        height: of the frame, in pixels.

    Raises:
        ValueError: no store.
        ReportError: nothing can be shown, or not within the size.

    Example:
        >>> notebook(AttentionStore.open("store"))  # doctest: +SKIP
    """
    from mamba_attn.viewer.report.content import make  # imported late: it needs plotly's and pillow's packages

    if not stores:
        raise ValueError("notebook(): expected at least one store, e.g. notebook(AttentionStore.open('store')).")
    text, _ = make(stores, methods, images, size, "mamba_attn.viewer.notebook")
    return Frame(text, height)
