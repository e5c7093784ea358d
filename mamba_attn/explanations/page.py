"""The offline HTML page of one image, and the index of all pages."""

from collections.abc import Sequence

import numpy as np

from mamba_attn.core.document import render
from mamba_attn.explanations.answer import Answer
from mamba_attn.figures import png
from mamba_attn.figures.colours import PERCENTILE, limits
from mamba_attn.figures.picture import data_uri


def page(title: str, answers: Sequence[Answer], command: str) -> str:
    """Return the page of one image as HTML.

    Args:
        title: the image's name.
        answers: one per model; each gets a section.
        command: what the user ran.
    """
    shared = f"{100 - PERCENTILE:g}"
    return render(
        "explain.html", title=title, answers=answers, command=command, shared=shared, uri=data_uri, heat=_heat
    )


def index(titles: Sequence[str], files: Sequence[str]) -> str:
    """Return the index of all pages as HTML; it shows the pictures in the same folder.

    Args:
        titles: the images' names.
        files: their pages' and pictures' file names, without suffix.
    """
    return render("explain_index.html", title="mamba-attn explain", pages=list(zip(titles, files, strict=True)))


def _heat(values: np.ndarray) -> str:
    return data_uri(png.matrix_rgb(values, **limits(values)))
