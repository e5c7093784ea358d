"""The page of one image: one HTML file that needs no network, and the list of all pages."""

from collections.abc import Sequence

from mamba_attn.attribution.spec import Method
from mamba_attn.explanations.answer import Answer
from mamba_attn.figures import png
from mamba_attn.figures.colours import PERCENTILE, limits
from mamba_attn.figures.document import OPACITY, document, figure, safe
from mamba_attn.figures.picture import data_uri


def page(title: str, answers: Sequence[Answer], command: str) -> str:
    """Return the page of one image as HTML.

    Args:
        title: the image's name.
        answers: one per model; each gets a section.
        command: what the user ran.
    """
    maps, matrices = ("".join(map(part, answers)) for part in (_maps, _matrices))
    body = (
        f"<h1>{safe(title)}</h1><p class=note>Every map and matrix has its own colours. Positive ones run from dark "
        f"(low) to bright (high); signed ones are white at zero, blue below, red above. The largest "
        f"{100 - PERCENTILE:g} % of the values share the last colour.</p>{OPACITY}<h2>Maps</h2>{maps}"
        "<h2>Attention matrices</h2><p class=note>Row i is what token i reads; channels, or heads, averaged.</p>"
        f"{matrices}<h2>Again</h2><p><code>{safe(command)}</code></p>"
    )
    return document(title, body)


def index(titles: Sequence[str], files: Sequence[str]) -> str:
    """Return the list of all pages as HTML; it shows the pictures that lie beside it.

    Args:
        titles: the images' names.
        files: their pages' and pictures' file names, without suffix.
    """
    entries = "".join(
        f'<a href="{safe(file)}.html"><b>{safe(title)}</b><img src="{safe(file)}.png" alt="{safe(title)}"></a>'
        for title, file in zip(titles, files, strict=True)
    )
    return document("mamba-attn explain", f"<h1>mamba-attn explain</h1>{entries}")


def _maps(answer: Answer) -> str:
    subject = answer.question.subject
    about = f"{len(subject.layers)} layers, {subject.parameters / 1e6:.2f} M parameters"
    photo = figure(_stack(answer, ""), f"<b>{safe(answer.name)}</b>, {about}{_classes(answer)}")
    maps = "".join(_map(answer, method) for method in answer.methods)
    return f"<div class=row>{photo}{maps}</div>"


def _matrices(answer: Answer) -> str:
    panels = "".join(_matrix(answer, layer) for layer in answer.matrices)
    return f"<h3>{safe(answer.name)}</h3><div class=row>{panels}</div>"


def _classes(answer: Answer) -> str:
    rows = "".join(
        f"<tr><td>{safe(name)}</td><td class=p>{probability:.1%}</td>"
        f'<td class=bar><div style="width:{100 * probability:.1f}%"></div></td></tr>'
        for name, probability in answer.best()
    )
    return f"<table>{rows}</table>"


def _map(answer: Answer, method: Method) -> str:
    values = answer.maps[method.key]
    heat = data_uri(png.matrix_rgb(values, **limits(values)))
    of = f" of <i>{safe(answer.class_name(answer.explained))}</i>" if method.of_a_class else ""
    meaning = method.entry.meaning.format(reader=answer.reader)
    caption = f"<b>{safe(method.title)}</b>{of}<br>{values.min():.2g} to {values.max():.2g}<br>{meaning}"
    return figure(_stack(answer, f'<img class=heat src="{heat}" alt="{safe(method.title)}">'), caption)


def _matrix(answer: Answer, layer: str) -> str:
    values = answer.matrices[layer]
    picture = data_uri(png.matrix_rgb(values, **limits(values)))
    caption = f"<b>{safe(answer.depth(layer))}</b>, {safe(layer)}, {values.shape[0]} tokens"
    return figure(f'<img class=matrix src="{picture}" alt="attention matrix of {safe(layer)}">', caption)


def _stack(answer: Answer, above: str) -> str:
    """The image, a map over it, the query's mark on top."""
    rows, columns = answer.image.shape[:2]
    photo = f'<img src="{data_uri(answer.image)}" alt="the image">'
    return f'<div class=stack style="aspect-ratio:{columns}/{rows}">{photo}{above}{_mark(answer)}</div>'


def _mark(answer: Answer) -> str:
    query = answer.question.query
    if query is None:
        return ""
    rows, columns = answer.image.shape[:2]
    (place,) = query.places
    if query.kind == "pixel":
        shape = f'<circle cx="{place[1]:g}" cy="{place[0]:g}" r="{min(rows, columns) / 32:g}"'
    else:
        x0, y0, x1, y1 = place
        shape = f'<rect x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}"'
    line = 'fill="none" stroke="cyan" stroke-width="2" vector-effect="non-scaling-stroke"'
    return f'<svg viewBox="0 0 {columns} {rows}">{shape} {line}/></svg>'
