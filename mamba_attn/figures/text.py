"""Figures of text: a strip of tokens, and what other viewers and a comparison with vision take of a trace."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mamba_attn.figures.colours import PERCENTILE, plotly_scale, scale
from mamba_attn.figures.heatmaps import depth_grid
from mamba_attn.figures.theme import Figure, name_ticks, plain, readable

_DEPTHS = (0.25, 0.5, 0.75)
# orange for, blue against, over whatever the page's colour is; letters keep the page's own
_STYLE = """
.mamba-tokens{--for:226,122,40;--against:66,133,205;font:15px/2.1 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
color:#1d2329;background:#fff;padding:12px 14px;border-radius:8px;overflow-wrap:anywhere;white-space:pre-wrap;
color-scheme:light dark}
.mamba-tokens b{font-weight:600;display:block;font-family:system-ui,sans-serif;line-height:1.6;margin-bottom:4px}
.mamba-tokens span{padding:3px 1px;border-radius:3px}
.mamba-tokens .quiet{opacity:.45}
.mamba-tokens .asked{outline:2px solid currentColor;outline-offset:-1px}
.mamba-tokens small{display:block;font-family:system-ui,sans-serif;opacity:.7;line-height:1.6;margin-top:4px}
@media(prefers-color-scheme:dark){.mamba-tokens{color:#e8ebee;background:#16191d;--for:196,92,20;--against:50,110,190}}
"""


class Strip(str):
    """HTML of a strip of tokens, without scripts; a notebook shows it."""

    def _repr_html_(self) -> str:
        return str(self)

    def write_html(self, path: str | Path) -> None:
        """Write a page of its own.

        Args:
            path: of the file.
        """
        head = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        )
        dark = "<style>@media(prefers-color-scheme:dark){body{background:#16191d}}</style>"
        Path(path).write_text(f"{head}<title>tokens</title>{dark}<body>{self}</body></html>\n", encoding="utf-8")


def tokens(
    words: Sequence[str],
    values: Any,
    *,
    asked: int | None = None,
    quiet: Iterable[int] = (),
    limit: float | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Strip:
    """Show a value per token as colours behind the text: orange above zero, blue below, nothing at zero.

    The strip wraps with the page, follows its dark or light setting, and says a token's value under the pointer.

    Args:
        words: the tokens as they are read, spaces and line breaks included.
        values: (tokens,).
        asked: number of the token that is explained; outlined. Negative numbers count from the end.
        quiet: numbers of tokens that are no text, such as padding; pale.
        limit: absolute value of the full colour. Default: the largest.
        title: above the strip.
        note: below it.

    Raises:
        ValueError: another number of values than tokens, values that are not finite, a token that is not there, a
            limit that is not above zero.

    Example:
        >>> tokens(["a", " good", " film"], [0.0, 1.0, 0.2], asked=-1)._repr_html_().count("<span") >= 3
        True
    """
    array = _line("tokens", words, values)
    count = len(array)
    pale = {number % count for number in quiet if -count <= number < count}
    if asked is not None and not -count <= asked < count:
        raise ValueError(f"tokens(asked={asked}): there are {count} tokens; expected {-count}..{count - 1}.")
    if limit is not None and not limit > 0:
        raise ValueError(f"tokens(limit={limit}): expected the absolute value of the full colour, above 0.")
    top = float(np.abs(array).max()) or 1.0 if limit is None else limit
    parts = []
    for number, (word, value) in enumerate(zip(words, array.tolist(), strict=True)):
        hue, strength = ("for" if value > 0 else "against"), min(1.0, abs(value) / top)
        classes = " ".join(
            name
            for name, on in (("quiet", number in pale), ("asked", asked is not None and number == asked % count))
            if on
        )
        # space before a word has no colour; where a token is nothing else, its colour is what shows it
        seen = word.lstrip() or word.replace("\n", "\u21b5")
        before = word[: len(word) - len(word.lstrip())] if word.lstrip() else ""
        after = "\n" if not word.lstrip() and "\n" in word else ""
        parts.append(
            f"{before}<span{f' class={chr(34)}{classes}{chr(34)}' if classes else ''} "
            f'style="background:rgba(var(--{hue}),{0.85 * strength:.3f})" '
            f'title="{number}: {html.escape(repr(word))} {value:+.3g}">{html.escape(seen)}</span>{after}'
        )
    above = f"<b>{html.escape(title)}</b>" if title else ""
    below = f"<small>{html.escape(note)}</small>" if note else ""
    return Strip(f'<style>{_STYLE}</style><div class="mamba-tokens">{above}{"".join(parts)}{below}</div>')


def token_grid(
    values: Any,
    words: Sequence[str],
    layers: Sequence[str],
    *,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    title: str | None = None,
    size: int = 26,
) -> go.Figure:
    """Show a value per layer and token: what the last token reads in each layer, say.

    Args:
        values: (layers, tokens).
        words: the tokens, under the columns.
        layers: names, before the rows; the first layer is below.
        limits: values of the first and the last colour. Default: the values' range; signed data is centred on zero.
        signed: centre on zero. Default: whether a value is negative.
        title: above the figure.
        size: height of a row in pixels.

    Raises:
        ValueError: numbers of layers or tokens that disagree with the values.

    Example:
        >>> figure = token_grid(torch.rand(2, 3), ["a", "good", "film"], ["layers.0", "layers.1"])
        >>> figure.data[0].z.shape
        (2, 3)
    """
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    if array.shape != (len(layers), len(words)):
        raise ValueError(
            f"token_grid(values{array.shape}): expected (layers, tokens) = {(len(layers), len(words))}, one name for "
            "each."
        )
    chosen = scale(array, limits=limits, signed=signed)
    shown = readable(words)
    heat = go.Heatmap(
        z=array,
        zmin=chosen.low,
        zmax=chosen.high,
        colorscale=plotly_scale(chosen.colours),
        customdata=np.broadcast_to(np.array(shown, dtype=object), array.shape),
        hovertemplate="%{y}: token %{x} %{customdata}: %{z:.3g}<extra></extra>",
    )
    width = max(360, min(1200, 22 * len(words) + 200))
    figure = plain(Figure(heat), title=title, width=width, height=size * len(layers) + 140)
    name_ticks(figure.update_xaxes, shown, width - 140)
    figure.update_yaxes(tickvals=list(range(len(layers))), ticktext=list(layers), showgrid=False, zeroline=False)
    return figure.update_layout(margin={"l": 10, "b": 90}).update_yaxes(automargin=True)


def depths(
    traces: Mapping[str, Any],
    *,
    image: int = 0,
    fold: str = "absolute",
    at: Sequence[float] = _DEPTHS,
    title: str | None = None,
    size: int = 260,
) -> go.Figure:
    """Show matrices of several models at the same depths, a row each: text next to vision (arXiv 2403.01590, fig. 4).

    Every panel has its own range, whose last colour the largest half percent share.

    Args:
        traces: by title, e.g. {"text": trace, "vision": another}.
        image: number of the image, or of the text, in its batch.
        fold: of channels, as for ``layer.attention``.
        at: parts of the depth.
        title: above the figure.
        size: side of a panel in pixels.

    Raises:
        ValueError: no traces, a depth outside 0..1.

    Example:
        >>> import mamba_attn
        >>> with mamba_attn.trace(model) as record, torch.no_grad():
        ...     logits = model(images[:1])
        >>> figure = depths({"vision": record}, at=(0.5,))
        >>> len(figure.data)
        1
    """
    if not traces or any(not 0 <= depth <= 1 for depth in at):
        raise ValueError(f"depths({len(traces)} traces, at={tuple(at)}): expected a trace, and depths in 0..1.")
    panels, names = [], []
    for name, trace in traces.items():
        for depth in at:
            number = min(round(depth * len(trace.layers)), len(trace.layers) - 1)
            matrix = trace.layers[number].attention(fold)[image].detach().cpu().numpy()
            top = float(np.percentile(np.abs(matrix), PERCENTILE)) or 1.0
            panels.append(np.clip(matrix / top, -1, 1))
            names.append(f"{name}, layer {number + 1} of {len(trace.layers)}")
    return depth_grid(panels, names, columns=len(at), title=title, size=size)


def to_bertviz(trace: Any, *, image: int = 0, folds: Sequence[str] = ("mean", "positive", "absolute")) -> list[Any]:
    """Return what BertViz's ``head_view`` and ``model_view`` take: per layer a tensor (1, heads, tokens, tokens).

    A layer of softmax attention gives its own heads. A scan has one matrix per channel, hundreds; in place of heads it
    gives several folds of them, each divided by its largest sum of a row, since BertViz draws weights in 0..1:

        >>> bertviz.head_view(to_bertviz(trace), words)  # doctest: +SKIP

    Args:
        trace: of a forward pass.
        image: number of the text in its batch.
        folds: of channels, one per head; "mean" is signed, and shown by its absolute values.

    Raises:
        ValueError: layers with different numbers of tokens, or an unknown fold.
    """
    sizes = sorted({layer.tokens for layer in trace.layers})
    if len(sizes) > 1:
        raise ValueError(f"to_bertviz(trace): its layers have {sizes} tokens; expected one number. Trace a part of it.")
    found = []
    for layer in trace.layers:
        if hasattr(layer, "scan"):
            heads = [layer.attention(fold)[image].detach().abs() for fold in folds]
            found.append([head / head.sum(-1).max().clamp_min(1e-12) for head in heads])
        else:
            found.append(list(layer.attention("each")[image].detach()))
    return [_stacked(heads) for heads in found]


def _stacked(heads: Sequence[Any]) -> Any:
    """Tensors of equal shapes, stacked without torch's name: (1, heads, ...)."""
    whole = heads[0].new_empty(1, len(heads), *heads[0].shape)
    for number, head in enumerate(heads):
        whole[0, number] = head
    return whole


def _line(call: str, words: Sequence[str], values: Any) -> np.ndarray:
    """Values of tokens, checked."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    if array.shape != (len(words),) or not np.isfinite(array).all():
        raise ValueError(
            f"{call}(values{array.shape}): expected a finite value for each of the {len(words)} tokens, e.g. "
            "attribution[0] of a batch."
        )
    return array
