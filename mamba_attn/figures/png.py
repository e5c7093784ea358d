"""The same figures as RGB arrays, without a browser: drawn by numpy and Pillow, charts by matplotlib."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_attn.figures.colours import (
    EMPTY,
    GRID,
    INK,
    PATH,
    SEQUENTIAL,
    Scale,
    as_image,
    as_values,
    mix,
    scale,
    scales,
    to_rgb,
)
from mamba_attn.figures.picture import patch_size
from mamba_attn.figures.picture import save_png as save_png
from mamba_attn.figures.route_geometry import as_marks, as_route, jumps, mark, shown_steps, stroke

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = 8  # pixels between panels
_EDGE, _CAPTION, _CHART, _LEFT, _LINE = 12, 22, 160, 62, 19  # pixels of receptive fields; a legend's line


def matrix_rgb(
    values: Any,
    *,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
) -> np.ndarray:
    """Return a matrix or map as (rows, columns, 3) uint8, one pixel per value; NaN and Inf are grey.

    Args:
        values: (rows, columns).
        limits: as in ``figures.matrix``.
        signed: as in ``figures.matrix``.
        colours: as in ``figures.matrix``.

    Raises:
        ValueError: not a matrix, or limits that do not fit.
    """
    array = as_values("matrix_rgb(values)", values)
    return to_rgb(array, scale(array, limits=limits, signed=signed, colours=colours))


def overlay_rgb(
    image: Any,
    values: Any,
    *,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
) -> np.ndarray:
    """Return a map over its image as (rows, columns, 3) uint8, e.g. for TensorBoard; needs only numpy.

    Args:
        image: (rows, columns, 3) or (3, rows, columns), uint8 or in 0..1: what the model saw, before normalisation.
        values: (rows, columns), the image's size.
        opacity: of the map, 0 to 1.
        limits: values of the first and the last colour. Default: the values' range; signed data is centred on zero.
        signed: centre on zero. Default: whether a value is negative.
        colours: from low to high. Default: Inferno, for signed data orange above zero and blue below.

    Raises:
        ValueError: shapes that disagree, an image that was normalised, or limits that do not fit.

    Example:
        >>> from mamba_attn.figures import overlay_rgb
        >>> image, heat = torch.rand(3, 224, 224), torch.rand(224, 224)
        >>> rgb = overlay_rgb(image, heat)  # writer.add_image("heat", rgb, step, dataformats="HWC")
        >>> rgb.shape, rgb.dtype
        ((224, 224, 3), dtype('uint8'))
    """
    picture = as_image("overlay_rgb(image)", image)
    array = as_values("overlay_rgb(values)", values)
    heat = to_rgb(array, scale(array, limits=limits, signed=signed, colours=colours))
    if picture.shape != heat.shape:
        raise ValueError(
            f"overlay_rgb: the map is {heat.shape[:2]} pixels, the image {picture.shape[:2]}; they must agree."
        )
    return mix(picture, heat, opacity)


def layer_grid_rgb(
    image: Any,
    maps: Sequence[Any],
    titles: Sequence[str],
    *,
    columns: int | None = None,
    shared: bool = False,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    size: int = 180,
) -> np.ndarray:
    """Return a map per layer over one image, in reading order, as (rows, columns, 3) uint8.

    Args:
        image: as in ``figures.layer_grid``.
        maps: as in ``figures.layer_grid``.
        titles: one below each.
        columns: panels in a row. Default: all in one, at most six.
        shared: one colour range for all panels.
        opacity: of the maps, 0 to 1.
        limits: as in ``figures.layer_grid``.
        signed: as in ``figures.layer_grid``.
        colours: as in ``figures.layer_grid``.
        size: height of a panel in pixels.

    Raises:
        ValueError: no maps, another number of titles, or a map that does not tile the image.
    """
    picture = as_image("layer_grid_rgb(image)", image)
    full = []
    for index, values in enumerate(maps):
        array = as_values(f"layer_grid_rgb(maps[{index}])", values)
        patch = patch_size(f"layer_grid_rgb(maps[{index}])", picture.shape[:2], array.shape)
        full.append(array.repeat(patch[0], 0).repeat(patch[1], 1))
    chosen = scales(full, shared=shared, limits=limits, signed=signed, colours=colours) if full else []
    panels = [mix(picture, to_rgb(array, its), opacity) for array, its in zip(full, chosen, strict=True)]
    return side_by_side(panels, titles, height=size, columns=columns or 6)


def side_by_side(
    panels: Sequence[np.ndarray], captions: Sequence[str], *, height: int = 256, columns: int | None = None
) -> np.ndarray:
    """Return panels in rows on white, each enlarged to the same height, its caption below it.

    Args:
        panels: (rows, columns, 3) uint8 each.
        captions: one per panel; those wider than their panel take a second line, which is cut where it is full.
        height: of the panels in pixels; taller panels keep their size.
        columns: panels in a row. Default: all.

    Raises:
        ValueError: no panels, another number of captions, or no columns.
        ImportError: Pillow is not installed.
    """
    if not panels or len(panels) != len(captions):
        raise ValueError(
            f"side_by_side: expected one caption per panel, got {len(panels)} panels and {len(captions)} captions."
        )
    if columns is not None and columns < 1:
        raise ValueError(f"side_by_side(columns={columns}): expected at least one column.")
    height = max(height, *(panel.shape[0] for panel in panels))
    columns = columns or len(panels)
    rows = [
        _row(panels[start : start + columns], captions[start : start + columns], height)
        for start in range(0, len(panels), columns)
    ]
    width = max(row.shape[1] for row in rows)
    white = [np.full((row.shape[0], width - row.shape[1], 3), 255, dtype=np.uint8) for row in rows]
    return np.concatenate([np.concatenate(pair, axis=1) for pair in zip(rows, white, strict=True)])


def scan_path_rgb(
    order: Any,
    grid: tuple[int, int],
    *,
    image: Any | None = None,
    step: int | None = None,
    marks: Iterable[int] = (),
    colours: Sequence[str] | None = None,
    size: int = 400,
) -> np.ndarray:
    """Return the path of one route as (rows, columns, 3) uint8; ``side_by_side`` takes several.

    Args:
        order: (length,): the patch visited at each step, as raster index.
        grid: (height, width) of the patch grid.
        image: as in ``figures.scan_path``.
        step: draw the first steps only. Default: all.
        marks: patches in a frame, as raster indices.
        colours: as in ``figures.scan_path``.
        size: height in pixels.

    Raises:
        ValueError: as ``figures.scan_path``.
        ImportError: matplotlib is not installed.
    """
    points, framed = as_route("scan_path_rgb", order, grid), as_marks("scan_path_rgb", marks, grid)
    count = shown_steps("scan_path_rgb", step, len(points))
    steps = to_rgb(np.arange(len(points)), Scale(0, max(len(points) - 1, 1), list(colours or PATH)))[:count]
    picture = None if image is None else as_image("scan_path_rgb(image)", image)
    patch = (1, 1) if picture is None else patch_size("scan_path_rgb(image)", picture.shape[:2], grid)
    width = max(1, round(size * grid[1] * patch[1] / (grid[0] * patch[0])))
    far, points = jumps(points)[: count - 1], points[:count]
    figure = canvas(width, size)
    axes = add_axes(figure, 0, 0, width, size)
    below, how = (_cells(points, grid, steps), "nearest") if picture is None else (picture, "bicubic")
    axes.imshow(below, extent=(-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5), aspect="auto", interpolation=how)
    cell = min(width / grid[1], size / grid[0])
    line, end = stroke(cell), mark(cell)
    moves = np.stack([points[:-1], points[1:]], axis=1)[..., ::-1]
    if picture is not None:
        _add_moves(axes, moves[~far], "white", 2 * line + 1)
    _add_moves(axes, moves, steps[:-1] / 255, np.where(far, line / 3, line))
    for colour, edge in (("white", 4), (INK, 2)):
        axes.plot(framed[:, 1], framed[:, 0], "s", ms=0.8 * cell - 2, mfc="none", mec=colour, mew=edge)
    room = (end / 2 + 1) / np.array([size / grid[0], width / grid[1]])  # the marks' half, in cells
    for place, kind in ((0, "o"), (-1, "s")):
        row, column = np.clip(points[place], room - 0.5, np.array(grid) - 0.5 - room)
        axes.plot(column, row, kind, ms=end, mfc=steps[place] / 255, mec="white", mew=2)
    return drawn(figure)


def reach_rgb(
    maps: Sequence[Any],
    titles: Sequence[str],
    *,
    marks: Sequence[tuple[float, float] | None] | None = None,
    layers: Sequence[str] = (),
    series: Mapping[str, Sequence[float]] | None = None,
    levels: Mapping[str, float] | None = None,
    title: str | None = None,
    size: int = 260,
) -> np.ndarray:
    """Return maps side by side, and below them distances by layer, as (rows, columns, 3) uint8.

    Args:
        maps: as in ``figures.reach``.
        titles: one above each; too long ones are cut.
        marks: as in ``figures.reach``.
        layers: as in ``figures.reach``.
        series: as in ``figures.reach``.
        levels: as in ``figures.reach``.
        title: above the picture.
        size: height of a map in pixels.

    Raises:
        ValueError: as ``figures.reach``.
        ImportError: matplotlib is not installed.
    """
    from mamba_attn.figures.charts import chart_series, check_reach  # which needs plotly

    arrays = check_reach("reach_rgb", maps, titles, marks, layers, series)
    lines = chart_series(series, levels) if layers else []
    widths = [max(1, round(size * array.shape[1] / array.shape[0])) for array in arrays]
    width = max(sum(widths) + _EDGE * (len(widths) + 1), 520 if layers else 0)
    top = _EDGE + (26 if title else 0) + _CAPTION
    height = top + size + _EDGE + (_CHART + 60 + _LINE * len(lines) if layers else 0)
    figure = canvas(width, height)
    if title:
        add_text(figure, width / 2, 18, title, 15, ha="center")
    left = _EDGE
    for array, across, caption, place in zip(arrays, widths, titles, marks or [None] * len(arrays), strict=True):
        add_text(figure, left, top - _CAPTION / 2, caption, most=across)
        panel = add_axes(figure, left, top, across, size)
        rgb = to_rgb(array, scale(array, colours=SEQUENTIAL, signed=False))
        panel.imshow(rgb, aspect="auto", interpolation="nearest" if len(rgb) <= size else "antialiased")
        if place is not None:
            for colour, thick in ((INK, 3), ("#00ffff", 1.5)):
                panel.plot(place[1], place[0], "+", ms=10, mew=thick, color=colour)
        left += across + _EDGE
    if layers:
        top += size + 2 * _EDGE
        chart = add_axes(figure, _LEFT, top, width - _LEFT - 2 * _EDGE, _CHART, frame=True)
        numbers = np.arange(1, len(layers) + 1)
        shown = [
            chart.axhline(values, color=colour, lw=2, ls="--")
            if isinstance(values, float)
            else chart.plot(numbers, values, "o-", color=colour, lw=2, ms=6)[0]
            for _, colour, values in lines
        ]
        chart.set(xlim=(0.5, len(layers) + 0.5), xticks=numbers[:: -(-len(layers) // 16)])
        chart.set_ylim(0, None if lines else 1)
        chart.set_xlabel("layer", fontsize=12, color=INK)
        chart.set_ylabel("mean distance in pixels", fontsize=12, color=INK)
        add_legend(figure, _LEFT, top + _CHART + 44, shown, [name for name, *_ in lines])
    return drawn(figure)


def canvas(width: int, height: int) -> "Figure":
    """Return an empty matplotlib figure that has its own canvas: pyplot and whatever it shows stay as they are.

    Args:
        width: in pixels; a point, in which matplotlib has text and lines, is one.
        height: in pixels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("charts as PNG need matplotlib: pip install 'mamba_attn[viz]'") from error
    figure = Figure((width / 72, height / 72), dpi=72, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def drawn(figure: "Figure") -> np.ndarray:
    """Return what is on a ``canvas`` as (rows, columns, 3) uint8."""
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]  # of Agg


def add_axes(figure: "Figure", left: float, top: float, width: float, height: float, *, frame: bool = False) -> "Axes":
    """Return axes at a place in pixels from the corner above left; with a frame they have ticks and lines behind."""
    across, down = figure.bbox.width, figure.bbox.height
    axes = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    if not frame:
        axes.set_axis_off()
        return axes
    axes.set_facecolor("white")
    axes.grid(True, color=GRID, lw=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def add_text(
    figure: "Figure", x: float, y: float, text: str, size: float = 12, most: float | None = None, **options: Any
) -> None:
    """Write at a place in pixels from the corner above left; what is wider than ``most`` is cut."""
    place = x / figure.bbox.width, 1 - y / figure.bbox.height
    put = figure.text(*place, text, fontsize=size, color=INK, va="center", parse_math=False, **options)

    def width(text: str) -> float:
        put.set_text(text)
        return put.get_window_extent().width

    if most is not None:
        put.set_text(_fit(text, most, width))


def add_legend(figure: "Figure", left: float, top: float, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Say what stands for what, a line each, from a place in pixels from the corner above left."""
    corner = left / figure.bbox.width, 1 - top / figure.bbox.height
    legend = figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=corner,
        frameon=False,
        fontsize=12,
        labelcolor=INK,
        borderpad=0,
        borderaxespad=0,
        labelspacing=0.4,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _add_moves(axes: "Axes", moves: np.ndarray, colours: Any, widths: Any) -> None:
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(list(moves), colors=colours, linewidths=widths, capstyle="round"))


def _cells(points: np.ndarray, grid: tuple[int, int], steps: np.ndarray) -> np.ndarray:
    """The step of every cell as a pale colour; cells that are not visited are grey."""
    cells = np.broadcast_to(EMPTY, (*grid, 3)).copy()
    cells[points[:, 0], points[:, 1]] = mix(EMPTY, steps, 0.25)
    return cells


def _fit(text: str, most: float, width: Callable[[str], float]) -> str:
    """The text, shortened until it fits."""
    kept = text
    while len(text) > 1 and width(text) > most:
        kept = kept[:-1]
        text = kept.rstrip() + "…"
    return text


def _lines(text: str, most: float, width: Callable[[str], float]) -> list[str]:
    """The text in one line, or broken between words into two, the second shortened until it fits."""
    if width(text) <= most:
        return [text]
    words = text.split()
    fitting = [at for at in range(1, len(words)) if width(" ".join(words[:at])) <= most]
    lines = [words[: fitting[-1]], words[fitting[-1] :]] if fitting else [words]
    return [_fit(" ".join(line), most, width) for line in lines]


def _row(panels: Sequence[np.ndarray], captions: Sequence[str], height: int) -> np.ndarray:
    """Panels of one height with their captions."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError("panels side by side need Pillow: pip install 'mamba_attn[viz]'") from error
    pictures = [Image.fromarray(as_image("side_by_side(panels)", panel)) for panel in panels]
    pictures = [
        picture.resize((max(1, round(picture.width * height / picture.height)), height), Image.Resampling.BICUBIC)
        for picture in pictures
    ]
    text = max(11, height // 18)
    font = ImageFont.load_default(text)
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) + 1)
    written = [
        _lines(caption, picture.width, font.getlength) for picture, caption in zip(pictures, captions, strict=True)
    ]
    step = round(1.2 * text)  # from line to line
    below = 2 * GAP + 2 * text + step * (max(map(len, written)) - 1)
    sheet = Image.new("RGB", (width, height + below), "white")
    draw, left = ImageDraw.Draw(sheet), GAP
    for picture, lines in zip(pictures, written, strict=True):
        sheet.paste(picture, (left, GAP))
        for at, line in enumerate(lines):
            draw.text((left + picture.width / 2, height + GAP + text + at * step), line, INK, font, anchor="mm")
        left += picture.width + GAP
    return np.asarray(sheet)
