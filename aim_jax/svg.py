"""Charts as SVG text: lines, steps, dots, vertical marks and a heat map.

A page or file that shows them carries `CSS` once. Colours are variables of it, so that one
drawing reads on light and dark backgrounds; hues are of the Okabe-Ito palette, which
colour-blind readers tell apart, and series that share a chart differ in dash or shape too.
"""

import html
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

COLORS = 6  # hues of the palette; a colour index wraps around
POINTS = 1200  # of a line at most

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --soft: #57606a; --rule: #d8dee4;
  --c0: #0072b2; --c1: #d55e00; --c2: #008a63; --c3: #b3568b; --c4: #a87400; --c5: #1b1f24;
  --heat: #56b4e9; --bad: #b23a00;
}
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #14171b; --panel: #1c2026; --ink: #e6e8eb; --soft: #a3abb5; --rule: #3a414a;
  --c0: #56b4e9; --c1: #f0803c; --c2: #2fc49a; --c3: #e09bc2; --c4: #e6b13a; --c5: #e6e8eb;
  --heat: #00639c; --bad: #ff9a66;
} }
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) }
.c3 { --c: var(--c3) } .c4 { --c: var(--c4) } .c5 { --c: var(--c5) }
svg.plot { background: var(--page) }
svg.plot text { font: 11px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--soft) }
svg.plot text.title { font-weight: 600; font-size: 12.5px; fill: var(--ink) }
svg.plot text.value { fill: var(--ink) } svg.plot text.own { font-weight: 700 }
svg.plot text.axis { fill: var(--c, var(--soft)) }
svg.plot .grid { stroke: var(--rule); stroke-width: 1 }
svg.plot .mark { stroke: var(--soft); stroke-width: 1; opacity: .75 }
svg.plot .line { fill: none; stroke: var(--c); stroke-width: 1.7;
  stroke-linejoin: round; stroke-linecap: round }
svg.plot .faint { stroke-width: 1; opacity: .4 } svg.plot .bold { stroke-width: 2.8 }
svg.plot .dash { stroke-dasharray: 5 3.5; stroke-linecap: butt }
svg.plot .thin { stroke-width: 1.2 } svg.plot .thin.dash { stroke-dasharray: 1.5 2.5 }
svg.plot .dot { fill: var(--c); stroke: var(--page); stroke-width: 1 }
svg.plot .heat { fill: var(--heat) } svg.plot .none { fill: var(--panel) }
svg.plot rect.own { stroke: var(--ink); stroke-width: 1.5 }
"""

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LETTER = 6.8  # width of an average letter of 11 px, on the generous side


class Series(NamedTuple):
    """One line (`line`), staircase (`step`: a level a point) or point cloud (`dots`).

    None and non-finite values are gaps. `weight` is `bold`, `thin`, or `faint` for background that
    stays out of the legend; `right` puts it on the right axis; `tips` are tooltips of dots.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    color: int = 0
    kind: str = "line"
    dash: bool = False
    weight: str = ""
    right: bool = False
    tips: Sequence[str] = ()


class Mark(NamedTuple):
    """A vertical line at `x`.

    `label` is its name in the legend, `text` stands at its head, `tip` is its tooltip.
    """

    x: float
    dash: bool = False
    label: str = ""
    text: str = ""
    tip: str = ""


class Axis(NamedTuple):
    """Range of an axis, its ticks (value, label), its power of ten, and its scale."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    unit: str = ""
    log: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Where `value` is if the axis runs from `start` to `end`."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log2(low), math.log2(high), math.log2(value)
        return start + (value - low) / (high - low) * (end - start)


def axis(
    values: Sequence[float], zero: bool = True, count: int = 5, log: bool = False
) -> Axis:
    """An axis over `values` with round ticks, from zero if `zero` and none is negative.

    `log` asks for powers of two; values that are not positive get an even scale.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log and low > 0:
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        places = [2.0**k for k in range(first, max(last, first + 1) + 1)]
        return Axis(places[0], places[-1], [(v, _label(v)) for v in places], log=True)
    if zero and low >= 0:
        low = 0.0
    if low == high:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = [k * step for k in range(first, last + 1)]
    exponent = math.floor(math.log10(max(abs(places[0]), abs(places[-1]))))
    exponent = exponent if exponent < -2 or exponent > 4 else 0
    ticks = [(v, _label(v / 10.0**exponent)) for v in places]
    unit = f" (\N{MULTIPLICATION SIGN}10{str(exponent).translate(_RAISED)})"
    return Axis(places[0], places[-1], ticks, unit if exponent else "")


def thin(
    xs: Sequence[float], ys: Sequence[float | None], limit: int = POINTS
) -> tuple[list[float], list[float | None]]:
    """`xs`, `ys` with at most `limit` points that draw the same picture.

    Inner points of flat stretches and of gaps go first; what is still too long is cut into
    buckets that keep their lowest and highest value and a gap, if there is one.
    """
    ys = [y if _finite(y) else None for y in ys]
    keep = [
        i
        for i in range(len(ys))
        if not (0 < i < len(ys) - 1 and ys[i - 1] == ys[i] == ys[i + 1])
    ]
    if len(keep) > limit:
        buckets = max(1, (limit - 2) // 3)
        chosen = {keep[0], keep[-1]}
        for b in range(buckets):
            bucket = keep[b * len(keep) // buckets : (b + 1) * len(keep) // buckets]
            solid = [i for i in bucket if ys[i] is not None]
            if solid:
                chosen |= {min(solid, key=ys.__getitem__)}
                chosen |= {max(solid, key=ys.__getitem__)}
            chosen |= set([i for i in bucket if ys[i] is None][:1])
        keep = sorted(chosen)
    return [xs[i] for i in keep], [ys[i] for i in keep]


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    right_label: str = "",
    marks: Sequence[Mark] = (),
    ticks: Sequence[tuple[float, str]] | None = None,
    log: bool = False,
    size: tuple[int, int] = (480, 236),
) -> str:
    """SVG of `series` over a common x axis.

    `ticks` (value, label) replace the numbers of that axis; `log` doubles the value from
    line to line of the other.
    """
    width, height = size
    legend, rows = _legend(series, marks, width)
    top = 34 + 16 * rows + (8 if any(m.text for m in marks) else 0)
    left, right, bottom = 50, width - (46 if right_label else 22), height - 38
    across = [x for s in series for x in s.xs] + [m.x for m in marks]
    if ticks is None:
        numbers = axis(across, zero=False, count=8)
        low, high = min(across, default=0), max(across, default=1)
        ticks = [tick for tick in numbers.ticks if low <= tick[0] <= high]
        x_label += numbers.unit
    else:
        across += [v for v, _ in ticks]
        low, high = min(across) - 0.5, max(across) + 0.5
    x_axis = Axis(low, max(high, low + 1e-9), [])
    y_axes = []
    for side in (False, True):
        values = [y for s in series if s.right == side for y in s.ys if _finite(y)]
        y_axes.append(axis(values, log=log))

    def across_at(value: float) -> float:
        return x_axis.place(value, left, right)

    def up_at(value: float, side: bool) -> float:
        return y_axes[side].place(value, bottom, top)

    parts = [_text(10, 18, title, "title"), *legend]
    for value, label in y_axes[False].ticks:
        y = up_at(value, False)
        parts.append(_line(left, y, right, y, "grid"))
        parts.append(_text(left - 6, y + 4, label, anchor="end"))
    for value, label in y_axes[True].ticks if right_label else ():
        parts.append(_text(right + 6, up_at(value, True) + 4, label, "axis c1"))
    for value, label in ticks:
        parts.append(_text(across_at(value), bottom + 15, label, anchor="middle"))
    parts.append(_text((left + right) / 2, height - 7, x_label, anchor="middle"))
    parts.append(_turned(13, (top + bottom) / 2, y_label + y_axes[False].unit))
    if right_label:
        label = right_label + y_axes[True].unit
        parts.append(_turned(width - 5, (top + bottom) / 2, label, "axis c1"))
    for mark in marks:
        x = across_at(mark.x)
        parts.append(_line(x, top, x, bottom, _class("mark", mark.dash), mark.tip))
        if mark.text:
            parts.append(_text(x + 3, top - 5, mark.text))
    for one in sorted(series, key=lambda s: s.weight != "faint"):
        parts += _draw(one, across_at, lambda y, side=one.right: up_at(y, side))
    return _svg(title, width, height, parts)


def heatmap(
    title: str,
    matrix: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    corner: str,
    below: tuple[str, Sequence[float | None]] | None = None,
) -> str:
    """SVG of a matrix of scores in [0, 1], each cell with its value in percent.

    None is an empty cell; the diagonal is framed; `below` is one more row set apart.
    """
    names = [short(n) for n in (*rows, *columns, *(below or ())[:1])]
    longest = max(map(len, names), default=0) * LETTER
    cell_w, cell_h = 52, 28
    slanted = any(len(short(c)) * LETTER > cell_w for c in columns)
    left, top = 18 + round(longest), 60
    width = left + cell_w * len(columns) + 14
    if slanted:  # by 35 degrees, from the middle of the last column
        top += round(0.58 * longest) - 8
        width += max(0, round(0.86 * longest - cell_w / 2))
    height = top + cell_h * len(rows) + 12
    lines = [(n, matrix[i], top + cell_h * i) for i, n in enumerate(rows)]
    if below:
        lines.append((*below, height))
        height += cell_h + 12
    width = max(width, round(len(title) * 7.6) + 20, round(len(corner) * LETTER) + 20)
    parts = [_text(10, 18, title, "title"), _text(10, 36, corner)]
    for j, name in enumerate(columns):
        x = left + cell_w * (j + 0.5)
        turn = f' transform="rotate(-35 {_n(x)} {_n(top - 8)})"' if slanted else ""
        anchor = "start" if slanted else "middle"
        parts.append(_text(x, top - 8, short(name), anchor=anchor, more=turn))
    for i, (name, values, y) in enumerate(lines):
        parts.append(_text(left - 8, y + 18, short(name), anchor="end"))
        for j, value in enumerate(values):
            x = left + cell_w * j
            own = " own" if i == j and i < len(rows) else ""
            box = f'x="{x + 1}" y="{y + 1}" width="{cell_w - 2}" height="{cell_h - 2}"'
            if not _finite(value):
                parts.append(f'<rect class="cell none{own}" {box}/>')
                continue
            depth = 0.06 + 0.94 * min(1.0, max(0.0, value))
            fill = f'<rect class="heat" {box} fill-opacity="{depth:.2f}"/>'
            frame = f'<rect class="cell{own}" {box} fill="none"/>'
            tip = f"{name}: {100 * value:.2f} % on {columns[j]}"
            score = f"{100 * value:.1f}"
            number = _text(x + cell_w / 2, y + 18, score, f"value{own}", "middle")
            parts.append(f"<g><title>{_e(tip)}</title>{fill}{frame}{number}</g>")
    return _svg(title, width, height, parts, "heatmap")


def short(name: str, limit: int = 18) -> str:
    """`name`, cut to `limit` letters."""
    return name if len(name) <= limit else name[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def standalone(svg: str) -> str:
    """The text of an SVG file with the colours inside."""
    head, tail = svg.split(">", 1)
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{head}><style>{CSS}</style>{tail}\n"


def _svg(
    title: str, width: float, height: float, parts: Sequence[str], kind: str = "chart"
) -> str:
    return (
        f'<svg class="plot {kind}" role="img" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" aria-label="{_e(title)}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _draw(series: Series, x_at: Callable, y_at: Callable) -> list[str]:
    """Elements of one series."""
    color = f"c{series.color % COLORS}"
    if series.kind == "dots":
        tips = itertools.chain(series.tips, itertools.repeat(""))
        return [
            f'<circle class="dot {color}" cx="{_n(x_at(x))}" cy="{_n(y_at(y))}"'
            f' r="3.4">{_tip(tip)}</circle>'
            for x, y, tip in zip(series.xs, series.ys, tips, strict=False)
            if _finite(y)
        ]
    path, joined = [], False
    for x, y in zip(*thin(series.xs, series.ys), strict=True):
        if y is not None:
            # A point of no length shows between two gaps, thanks to its round cap.
            back, on = (0.5, 0.5) if series.kind == "step" else (0, 0)
            start, end = _n(x_at(x - back)), _n(x_at(x + on))
            path.append(f"{'L' if joined else 'M'}{start} {_n(y_at(y))}")
            path.append(f"H{end}" if end != start or not joined else "")
        joined = y is not None
    kind = _class("line", series.dash, series.weight)
    return [f'<path class="{kind} {color}" d="{"".join(path)}"/>']


def _legend(
    series: Sequence[Series], marks: Sequence[Mark], width: int
) -> tuple[list[str], int]:
    """Elements of the legend below the title, and its number of rows."""
    entries = []  # (swatch, its class, label)
    for one in (s for s in series if s.label and s.weight != "faint"):
        shape = "dot" if one.kind == "dots" else "line"
        kind = f"{_class(shape, one.dash, one.weight)} c{one.color % COLORS}"
        entries.append((shape, kind, one.label))
    for dash, label in sorted({(m.dash, m.label) for m in marks if m.label}):
        entries.append(("mark", _class("mark", dash), label))
    if len(entries) < 2:
        return [], 0
    parts, x, y = [], 10.0, 36.0
    for shape, kind, label in entries:
        swatch = 20 if shape == "line" else 8
        wide = swatch + 5 + len(label) * LETTER + 9
        if x + wide > width and x > 10:
            x, y = 10.0, y + 16
        if shape == "dot":
            parts.append(
                f'<circle class="{kind}" cx="{_n(x + 4)}" cy="{y - 4}" r="3.4"/>'
            )
        elif shape == "mark":
            parts.append(_line(x + 4, y - 10, x + 4, y + 2, kind))
        else:
            parts.append(_line(x, y - 4, x + 20, y - 4, kind))
        parts.append(_text(x + swatch + 5, y, label))
        x += wide
    return parts, round((y - 20) / 16)


def _text(x, y, text: str, kind: str = "", anchor: str = "", more: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{_n(x)}" y="{_n(y)}"{kind}{anchor}{more}>{_e(text)}</text>'


def _turned(x: float, y: float, text: str, kind: str = "") -> str:
    more = f' transform="rotate(-90 {_n(x)} {_n(y)})"'
    return _text(x, y, text, kind, "middle", more)


def _line(x1, y1, x2, y2, kind: str, tip: str = "") -> str:
    ends = f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
    return f'<line class="{kind}" {ends}>{_tip(tip)}</line>'


def _class(kind: str, dash: bool, weight: str = "") -> str:
    return " ".join(filter(None, (kind, "dash" if dash else "", weight)))


def _tip(text: str) -> str:
    return f"<title>{_e(text)}</title>" if text else ""


def _label(value: float) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _e(text: str) -> str:
    return html.escape(str(text))
