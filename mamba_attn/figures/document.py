"""An HTML page in one file that needs no network: the style that all pages share, and the frame around a body."""

import html

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
OPACITY = (
    '<label>opacity of the maps <input type="range" min="0" max="1" step="0.05" value="0.6" '
    "oninput=\"document.body.style.setProperty('--opacity',this.value)\"></label>"
)


def document(title: str, body: str, style: str = "") -> str:
    """Return a whole page.

    Args:
        title: plain text.
        body: HTML.
        style: rules after those that all pages share.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{safe(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{style}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def figure(content: str, caption: str) -> str:
    """Return HTML above a caption, both HTML."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def safe(text: str) -> str:
    """Return plain text as HTML."""
    return html.escape(text)
