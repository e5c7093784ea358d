"""The page in a cell of a notebook."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.tracing.tracer import Trace


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
    *shown: Any,
    model: LoadedModel | None = None,
    inputs: Sequence[str | Path] | str = (),
    images: int = 4,
    size: float = 8.0,
    methods: tuple[str, ...] = ("pca",),
    height: int = 860,
) -> Frame:
    """Return the page of stores, traces or models, frozen, for a notebook to show; it needs no server.

    Args:
        shown: ``AttentionStore`` objects; what ``trace`` returned, after its with-block; ``LoadedModel`` objects, which
            are run on ``inputs``. At least one.
        model: whose traces these are: their pages then have its name, its classes, and the tokens of its tokenizer as
            they are read. Default: the traced network alone.
        inputs: for a ``LoadedModel``: paths of images, or a text. Default: the six sample photos.
        images: of each, how many of those kept in full are shown.
        size: of the page at most, in 10^6 bytes.
        methods: of dimension reduction: "pca", "tsne", "umap".
        height: of the frame, in pixels.

    Raises:
        ValueError: nothing to show, or a model that reads texts without a text.
        MambaAttnError: a model that cannot be traced, or a trace without a layout.
        ReportError: nothing can be shown, or not within the size.

    Example:
        >>> notebook(AttentionStore.open("store"))  # doctest: +SKIP
    """
    from mamba_attn.viewer.report.content import make  # imported late: it needs plotly's and pillow's packages

    if not shown:
        raise ValueError(
            "notebook(): expected at least one store, trace or model, e.g. notebook(AttentionStore.open('store'))."
        )
    stores = [_store(each, model, inputs) for each in shown]
    text, _ = make(stores, methods, images, size, "mamba_attn.viewer.notebook")
    return Frame(text, height)


def _store(shown: Any, model: LoadedModel | None, inputs: Sequence[str | Path] | str) -> Any:
    from mamba_attn.images import samples
    from mamba_attn.viewer.traced import Traced, traced

    if isinstance(shown, Trace):
        return Traced(shown, model)
    if isinstance(shown, LoadedModel):
        return traced(shown, inputs or ("" if shown.reads == "text" else samples()))
    return shown
