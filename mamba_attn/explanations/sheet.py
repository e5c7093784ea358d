"""The picture about one image: a row per model with the image, its maps, its matrices."""

from collections.abc import Sequence

import numpy as np

from mamba_attn.attribution.queries import Query
from mamba_attn.explanations.answer import Answer
from mamba_attn.figures import png
from mamba_attn.figures.colours import INK, limits

_MARK = "#00ffff"


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
    best, probability = answer.best(1)[0]
    panels = [marked(answer.image, answer.question.query)]
    captions = [f"{answer.name}: {best} {probability:.0%}"]
    for method in answer.methods:
        values = answer.maps[method.key]
        panels.append(png.overlay_rgb(answer.image, values, **limits(values)))
        of = f", {answer.class_name(answer.explained)}" if method.of_a_class else ""
        captions.append(method.title + of)
    for layer, matrix in answer.matrices.items():
        panels.append(png.matrix_rgb(matrix, **limits(matrix)))
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
