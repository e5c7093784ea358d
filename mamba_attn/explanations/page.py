"""What is written about one image: an offline HTML page, a picture, and the index of all pages."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from mamba_attn.attribution.queries import Query
from mamba_attn.core.document import render
from mamba_attn.explanations.answer import Answer
from mamba_attn.figures import png
from mamba_attn.figures.colours import DIVERGING, INK, PERCENTILE, limits, scale
from mamba_attn.figures.picture import data_uri

_MARK = "#00ffff"
_STRENGTHS = DIVERGING[len(DIVERGING) // 2 :]


def page(title: str, answers: Sequence[Answer], command: str) -> str:
    """Return the page of one image as HTML.

    Args:
        title: the image's name.
        answers: one per model; each gets a section.
        command: what the user ran.
    """
    shared = f"{100 - PERCENTILE:g}"
    return render(
        "explain.html", title=title, answers=answers, command=command, shared=shared, uri=data_uri, heat=_heat, bar=bar,
        matrix=lambda values: data_uri(_matrix(values)), of_matrices=_STRENGTHS,
    )  # fmt: skip


def bar(values: np.ndarray, strengths: Sequence[str] | None = None) -> Markup:
    """Return the colours of a map or matrix with their ends, as HTML.

    Args:
        values: that it shows.
        strengths: colours of values that are not signed.
    """
    its = limits(values)
    chosen = scale(values, colours=None if its["signed"] else strengths, **its)
    ends = [f"{chosen.low:.2g}", f"{chosen.high:.2g}"]
    if "limits" in its:
        ends = [mark + end for mark, end in zip(("≤ " if its["signed"] else "", "≥ "), ends, strict=True)]
    colours = Markup(",".join(chosen.colours))
    return Markup(
        '<span class=scale><span>{}</span><span class=ramp data-low="{:.9g}" data-high="{:.9g}" '
        'style="background:linear-gradient(to right,{})"></span><span>{}</span></span>'
    ).format(ends[0], chosen.low, chosen.high, colours, ends[1])


def index(
    titles: Sequence[str],
    files: Sequence[str],
    verdicts: Sequence[str] = (),
    *,
    pages: Sequence[str] = (),
    current: str = "",
) -> str:
    """Return the index of all pages as HTML, or one page of it; it shows the pictures in the same folder.

    Args:
        titles: the images' names.
        files: their pages' and pictures' file names, without suffix.
        verdicts: what each model predicts, in words. Default: nothing.
        pages: names of the index's own pages, where there are several.
        current: which of them this is.
    """
    shown = list(zip(titles, files, verdicts or [""] * len(files), strict=True))
    title = "Where the model looks, image by image"
    return render("explain_index.html", title=title, pages=shown, parts=pages, current=current)


def predictions(answers: Sequence[Answer]) -> str:
    """Return what each model predicts, and whether that is right, e.g. "vim_micro: hat 86 % (correct)"."""
    return "; ".join(f"{each.name}: {predicted(each)}" for each in answers if each.best(1))


def predicted(answer: Answer) -> str:
    """Return the likeliest class, its probability, and whether it is right."""
    return "".join(
        f"{name} {answer.spelt(value, 0)}{f' ({answer.verdict})' if answer.verdict else ''}"
        for name, value in answer.best(1)
    )


def _matrix(values: np.ndarray) -> np.ndarray:
    """Softmax attention has the colours of positive entries of scans."""
    its = limits(values)
    return png.matrix_rgb(values, colours=None if its["signed"] else _STRENGTHS, **its)


def _heat(values: np.ndarray) -> str:
    return data_uri(png.matrix_rgb(values, **limits(values)))


def sheet(answers: Sequence[Answer]) -> np.ndarray:
    """Return everything about one image as (rows, columns, 3) uint8, one row of panels per model."""
    rows = [_row(answer) for answer in answers]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(padded)


def marked(image: np.ndarray, query: Query | None) -> np.ndarray:
    """Return the image with the query drawn on it."""
    if query is None:
        return image
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    draw, size = ImageDraw.Draw(picture), max(2, min(image.shape[:2]) // 32)
    (place,) = query.places
    if query.kind == "pixel":
        row, column = place
        box = [column - size, row - size, column + size, row + size]
        draw.ellipse(box, outline=INK, width=3)
        draw.ellipse(box, outline=_MARK, width=1)
    else:
        draw.rectangle([*place[:2], place[2] - 1, place[3] - 1], outline=_MARK, width=max(1, size // 2))
    return np.asarray(picture)


def _row(answer: Answer) -> np.ndarray:
    panels = [marked(answer.image, answer.question.query)]
    captions = [": ".join(filter(None, (answer.name, predicted(answer))))]
    for method in answer.methods:
        values = answer.maps[method.key]
        panels.append(png.overlay_rgb(answer.image, values, **limits(values)))
        of = f", {answer.class_name(answer.explained)}" if method.of_a_class and answer.explained is not None else ""
        captions.append(method.title + of)
    for layer, matrix in answer.matrices.items():
        panels.append(_matrix(matrix))
        captions.append(f"matrix, {answer.depth(layer)}")
    height = 256
    panels = [_shrunk(panel, height) for panel in panels]
    return png.side_by_side(panels, captions, height=height)


def _shrunk(panel: np.ndarray, height: int) -> np.ndarray:
    """Limit a panel's height, by averaging so that every pixel counts."""
    from PIL import Image

    if panel.shape[0] <= height:
        return panel
    width = max(1, round(panel.shape[1] * height / panel.shape[0]))
    return np.asarray(Image.fromarray(panel).resize((width, height), Image.Resampling.BOX))
