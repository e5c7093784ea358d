"""The page of one image: one HTML file that needs no network, and the list of all pages."""

import html
from collections.abc import Sequence

from mamba_attn.explain.answer import Answer
from mamba_attn.explain.choices import Method
from mamba_attn.explain.sheet import PERCENTILE, limits
from mamba_attn.figures import png
from mamba_attn.figures.picture import data_uri

_STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;color:#222;background:#fff;
  max-width:1180px;margin:24px auto;padding:0 20px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:22px 0 8px;border-top:1px solid #ddd;padding-top:16px}
.note{color:#555;margin:0 0 10px;max-width:90ch}
.row{display:flex;flex-wrap:wrap;gap:16px;margin-bottom:18px}
figure{margin:0;width:256px}figcaption{font-size:13px;color:#444;margin-top:4px;overflow-wrap:anywhere}
figcaption b{color:#222;font-weight:600}
.stack{position:relative;width:256px;background:#eee}
.stack img,.stack svg{position:absolute;inset:0;width:100%;height:100%}
.stack .heat{opacity:var(--opacity,.6)}
.matrix{width:256px;height:256px;image-rendering:pixelated;border:1px solid #ddd;box-sizing:border-box}
h3{font-size:15px;margin:14px 0 6px}
table{border-collapse:collapse;margin-top:4px}td{padding:0 8px 0 0}
td.bar{width:80px}td.bar div{background:#3b6ea5;height:9px}td.p{text-align:right;font-variant-numeric:tabular-nums}
label{font-size:14px}input{vertical-align:middle;width:180px}
code{background:#f3f3f3;padding:1px 4px;overflow-wrap:anywhere}
a img{display:block;max-width:100%;margin:4px 0 24px}
"""
_OPACITY = (
    '<label>opacity of the maps <input type="range" min="0" max="1" step="0.05" value="0.6" '
    "oninput=\"document.body.style.setProperty('--opacity',this.value)\"></label>"
)


def page(title: str, answers: Sequence[Answer], command: str) -> str:
    """Return the page of one image as HTML.

    Args:
        title: the image's name.
        answers: one per model; each gets a section.
        command: what the user ran.
    """
    maps, matrices = ("".join(map(part, answers)) for part in (_maps, _matrices))
    body = (
        f"<h1>{_safe(title)}</h1><p class=note>Every map and matrix has its own colours. Positive ones run from dark "
        f"(low) to bright (high); signed ones are white at zero, blue below, red above. The largest "
        f"{100 - PERCENTILE:g} % of the values share the last colour.</p>{_OPACITY}<h2>Maps</h2>{maps}"
        "<h2>Attention matrices</h2><p class=note>Row i is what token i reads; channels, or heads, averaged.</p>"
        f"{matrices}<h2>Again</h2><p><code>{_safe(command)}</code></p>"
    )
    return _document(title, body)


def index(titles: Sequence[str], files: Sequence[str]) -> str:
    """Return the list of all pages as HTML; it shows the pictures that lie beside it.

    Args:
        titles: the images' names.
        files: their pages' and pictures' file names, without suffix.
    """
    entries = "".join(
        f'<a href="{_safe(file)}.html"><b>{_safe(title)}</b><img src="{_safe(file)}.png" alt="{_safe(title)}"></a>'
        for title, file in zip(titles, files, strict=True)
    )
    return _document("mamba-attn explain", f"<h1>mamba-attn explain</h1>{entries}")


def _maps(answer: Answer) -> str:
    subject = answer.question.subject
    about = f"{len(subject.layers)} layers, {subject.parameters / 1e6:.2f} M parameters"
    photo = _figure(_stack(answer, ""), f"<b>{_safe(answer.name)}</b>, {about}{_classes(answer)}")
    maps = "".join(_map(answer, method) for method in answer.methods)
    return f"<div class=row>{photo}{maps}</div>"


def _matrices(answer: Answer) -> str:
    panels = "".join(_matrix(answer, layer) for layer in answer.matrices)
    return f"<h3>{_safe(answer.name)}</h3><div class=row>{panels}</div>"


def _classes(answer: Answer) -> str:
    rows = "".join(
        f"<tr><td>{_safe(name)}</td><td class=p>{probability:.1%}</td>"
        f'<td class=bar><div style="width:{100 * probability:.1f}%"></div></td></tr>'
        for name, probability in answer.best()
    )
    return f"<table>{rows}</table>"


def _map(answer: Answer, method: Method) -> str:
    values = answer.maps[method.key]
    heat = data_uri(png.matrix_rgb(values, **limits(values)))
    of = f" of <i>{_safe(answer.class_name(answer.explained))}</i>" if method.of_a_class else ""
    meaning = method.entry.meaning.format(reader=answer.reader)
    caption = f"<b>{_safe(method.title)}</b>{of}<br>{values.min():.2g} to {values.max():.2g}<br>{meaning}"
    return _figure(_stack(answer, f'<img class=heat src="{heat}" alt="{_safe(method.title)}">'), caption)


def _matrix(answer: Answer, layer: str) -> str:
    values = answer.matrices[layer]
    picture = data_uri(png.matrix_rgb(values, **limits(values)))
    caption = f"<b>{_safe(answer.depth(layer))}</b>, {_safe(layer)}, {values.shape[0]} tokens"
    return _figure(f'<img class=matrix src="{picture}" alt="attention matrix of {_safe(layer)}">', caption)


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


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
    if len(query) == 2:
        shape = f'<circle cx="{query[1]:g}" cy="{query[0]:g}" r="{min(rows, columns) / 32:g}"'
    else:
        x0, y0, x1, y1 = query
        shape = f'<rect x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}"'
    line = 'fill="none" stroke="cyan" stroke-width="2" vector-effect="non-scaling-stroke"'
    return f'<svg viewBox="0 0 {columns} {rows}">{shape} {line}/></svg>'


def _document(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>{body}</body></html>\n'
    )


def _safe(text: str) -> str:
    return html.escape(text)
