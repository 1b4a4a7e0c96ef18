"""Inline SVG drawn in Python: no script, no style attributes (a strict content policy allows neither), colours by class.

Numbers are rounded, so equal data gives equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

MAX_CURVES = 6
"""Lines in one plot, as many as there are colours."""
MAX_POINTS = 4000
"""Points drawn in a scatter; more would only hide each other."""


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def domain_of(values: Sequence[float | None]) -> tuple[float, float]:
    """Return the axis of a metric: 0..1, or -1..1 for correlations, or whatever the values need."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= -1 and high <= 1:
        return -1.0, 1.0
    return min(0.0, math.floor(low)), max(1.0, math.ceil(high))


def interval_bar(
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    chance: float | None,
    control: float | None,
    domain: tuple[float, float] = (0.0, 1.0),
    width: int = 190,
) -> Markup:
    """Return a value with its interval on an axis, a tick at chance and a diamond at the control."""
    left, right = domain

    def x(v: float) -> str:
        return _n(6 + (min(max(v, left), right) - left) / (right - left) * (width - 12))

    label = f"{value:.3f}" if value is not None else "no value"
    parts = [f'<svg class="bar" role="img" width="{width}" height="18" viewBox="0 0 {width} 18"><title>{label}']
    parts.append(f", interval {low:.3f} to {high:.3f}" if low is not None and high is not None else "")
    parts.append(f", chance {chance:.3g}" if chance is not None else "")
    parts.append(f", control {control:.3f}" if control is not None else "")
    parts.append(f'</title><path class="track" d="M6 9H{width - 6}"/>')
    if chance is not None:
        parts.append(f'<path class="chance" d="M{x(chance)} 2V16"/>')
    if low is not None and high is not None:
        parts.append(f'<path class="ci" d="M{x(low)} 9H{x(high)}"/>')
    if control is not None:
        at = x(control)
        parts.append(f'<path class="control" d="M{at} 4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>')
    if value is not None:
        parts.append(f'<circle class="dot" cx="{x(value)}" cy="9" r="4"/>')
    return Markup("".join(parts) + "</svg>")  # numbers only


def histogram(values: np.ndarray, control: np.ndarray, *, chance: float | None, label: str, bins: int = 25) -> Markup:
    """Return the distribution of scores over latents as bars, the control's as an outline, and chance as a line."""
    width, height, base, top = 360, 170, 140, 14
    domain = domain_of([*values.tolist(), *control.tolist()])
    counts, edges = np.histogram(values, bins=bins, range=domain)
    shadow, _ = np.histogram(control, bins=bins, range=domain)
    # Shares, so that a control scored on fewer latents compares.
    share = counts / max(1, len(values))
    other = shadow / max(1, len(control))
    peak = max(float(share.max(initial=0)), float(other.max(initial=0)), 1e-9)

    def x(v: float) -> str:
        return _n(34 + (v - domain[0]) / (domain[1] - domain[0]) * (width - 46))

    def y(v: float) -> str:
        return _n(base - v / peak * (base - top))

    bars = "".join(
        f'<rect class="fill" x="{x(edges[i])}" y="{y(share[i])}" width="{_n(float(x(edges[i + 1])) - float(x(edges[i])) - 1)}" '
        f'height="{_n(base - float(y(share[i])))}"><title>{edges[i]:.2f} to {edges[i + 1]:.2f}: {counts[i]} latents, '
        f"control {shadow[i]}</title></rect>"
        for i in range(bins)
        if counts[i]
    )
    outline = ""
    if len(control):
        steps = "".join(f"V{y(other[i])}H{x(edges[i + 1])}" for i in range(bins))
        outline = f'<path class="outline" d="M{x(edges[0])} {base}{steps}V{base}"/>'
    line = f'<path class="chance" d="M{x(chance)} {top - 6}V{base}"/>' if chance is not None else ""
    scale = f'<text x="30" y="{top + 4}" text-anchor="end">{100 * peak:.0f}%</text>'
    scale += f'<text x="30" y="{base}" text-anchor="end">0</text>'
    return _frame(width, height, label, _x_axis(domain, x, base) + scale + bars + outline + line)


def scatter(density: np.ndarray, values: np.ndarray, *, chance: float | None, label: str) -> Markup:
    """Return score against firing rate (log axis), a point per latent; at most `MAX_POINTS` evenly picked ones are drawn."""
    width, height, base, top = 360, 170, 140, 14
    keep = np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).astype(int)
    logs, scores = np.log10(density[keep]), values[keep]
    domain = domain_of(scores.tolist())
    first, last = math.floor(logs.min()), math.ceil(logs.max())
    last = max(last, first + 1)

    def x(v: float) -> str:
        return _n(40 + (v - first) / (last - first) * (width - 52))

    def y(v: float) -> str:
        return _n(base - (v - domain[0]) / (domain[1] - domain[0]) * (base - top))

    dots = "".join(f"M{x(a)} {y(b)}h0" for a, b in zip(logs.tolist(), scores.tolist(), strict=True))
    ticks = "".join(
        f'<text x="{x(e)}" y="{base + 15}" text-anchor="middle">{_power(e)}</text><path class="grid" d="M{x(e)} {top}V{base}"/>'
        for e in range(first, last + 1)
    )
    levels = "".join(
        f'<text x="34" y="{_n(float(y(v)) + 4)}" text-anchor="end">{v:.2g}</text>'
        f'<path class="grid" d="M40 {y(v)}H{width - 12}"/>'
        for v in np.linspace(*domain, 5)
    )
    line = f'<path class="chance" d="M40 {y(chance)}H{width - 12}"/>' if chance is not None else ""
    return _frame(
        width,
        height,
        label,
        ticks + levels + line + f'<path class="points" d="{dots}"/>',
        caption="share of tokens it fires on",
    )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a quantile plot."""

    name: str
    points: list[tuple[int, float, float | None, float | None]]
    """(quantile, value, low, high), by quantile."""
    control: list[tuple[int, float]]
    """(quantile, value) under the control."""


def quantile_plot(
    curves: Sequence[Curve],
    *,
    chance: float | None,
    label: str,
    ticks: Sequence[str] | None = None,
    caption: str = "activation quantile, 0 the strongest",
) -> Markup:
    """Return rates by activation quantile, strongest left: a line per scorer with intervals, dashed for its control.

    With `ticks` and `caption` the whole numbers on the axis stand for something else than quantiles.
    """
    width, height, base, top = 400, 200, 160, 14
    last = max((curve.points[-1][0] for curve in curves), default=0)

    def x(q: float, shift: float = 0.0) -> str:
        return _n(46 + (q + 0.5) / (last + 1) * (width - 58) + shift)

    def y(v: float) -> str:
        return _n(base - min(max(v, 0.0), 1.0) * (base - top))

    parts = [
        f'<text x="38" y="{_n(float(y(v)) + 4)}" text-anchor="end">{v:.2g}</text>'
        f'<path class="grid" d="M44 {y(v)}H{width - 12}"/>'
        for v in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    names = [str(q) for q in range(last + 1)] if ticks is None else ticks
    parts += [
        f'<text x="{x(q)}" y="{base + 15}" text-anchor="middle">{escape(name)}</text>'
        for q, name in enumerate(names[: last + 1])
    ]
    if chance is not None:
        parts.append(f'<path class="chance" d="M44 {y(chance)}H{width - 12}"/>')
    at = "quantile " if ticks is None else ""
    for number, curve in enumerate(curves):
        shift = (number - (len(curves) - 1) / 2) * 5
        name = escape(curve.name)
        parts.append(f'<g class="c{number}"><title>{name}</title>')
        for q, _, low, high in curve.points:
            if low is not None and high is not None:
                parts.append(f'<path class="whisker" d="M{x(q, shift)} {y(low)}V{y(high)}"/>')
        if curve.control:
            parts.append(f'<path class="line dashed" d="M{"L".join(f"{x(q, shift)} {y(v)}" for q, v in curve.control)}"/>')
        parts.append(f'<path class="line" d="M{"L".join(f"{x(q, shift)} {y(v)}" for q, v, _, _ in curve.points)}"/>')
        for q, v, _, _ in curve.points:
            parts.append(
                f'<circle cx="{x(q, shift)}" cy="{y(v)}" r="3"><title>{name}, {at}{escape(names[q])}: {v:.2f}</title></circle>'
            )
        parts.append("</g>")
    return _frame(width, height, label, "".join(parts), caption=caption)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One line of a plot of marks: a value with its interval, and the same under a control."""

    name: str
    value: float
    low: float | None
    high: float | None
    control: float | None
    is_inner: bool = False
    """Whether the name is set in, as belonging to the one above."""


def marks_plot(marks: Sequence[Mark], *, chance: float | None, label: str) -> Markup:
    """Return values one below the other on one axis, each with its interval and control; the axis fits them, in tenths."""
    width, left, step, top = 400, 150, 24, 10
    base = top + step * len(marks)
    shown = [v for m in marks for v in (m.value, m.low, m.high, m.control) if v is not None and math.isfinite(v)]
    shown += [chance] if chance is not None else []
    first, last = math.floor(10 * min(shown)) / 10, math.ceil(10 * max(shown)) / 10
    last = max(last, first + 0.1)

    def x(v: float) -> str:
        return _n(left + (v - first) / (last - first) * (width - left - 14))

    parts = [
        f'<text x="{x(v)}" y="{base + 15}" text-anchor="middle">{v:.3g}</text><path class="grid" d="M{x(v)} {top - 6}V{base}"/>'
        for v in np.arange(round(10 * first), round(10 * last) + 1, math.ceil((last - first) * 10 / 6)) / 10
    ]
    if chance is not None:
        parts.append(f'<path class="chance" d="M{x(chance)} {top - 6}V{base}"/>')
    for number, mark in enumerate(marks):
        y = top + step * number + step // 2
        known = mark.low is not None and mark.high is not None and math.isfinite(mark.low + mark.high)
        words = f"{mark.name}: {mark.value:.3f}" + (f", interval {mark.low:.3f} to {mark.high:.3f}" if known else "")
        words += f", control {mark.control:.3f}" if mark.control is not None else ""
        name = mark.name if len(mark.name) <= 22 else mark.name[:21] + "\u2026"
        parts.append(
            f'<g><title>{escape(words)}</title><text x="{14 if mark.is_inner else 4}" y="{y + 4}">{escape(name)}</text>'
        )
        if known and mark.low is not None and mark.high is not None:
            parts.append(f'<path class="ci" d="M{x(mark.low)} {y}H{x(mark.high)}"/>')
        if mark.control is not None:
            parts.append(f'<path class="control" d="M{x(mark.control)} {_n(y - 4.5)}l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>')
        parts.append(f'<circle class="dot" cx="{x(mark.value)}" cy="{y}" r="4"/></g>')
    return _frame(width, base + 20, label, "".join(parts))


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"1e{exponent}"


def _x_axis(domain: tuple[float, float], x: Callable[[float], str], base: int) -> str:
    return f'<path class="axis" d="M34 {base}H{348}"/>' + "".join(
        f'<text x="{x(v)}" y="{base + 15}" text-anchor="middle">{v:.2g}</text>' for v in np.linspace(*domain, 5)
    )


def _frame(width: int, height: int, label: str, body: str, *, caption: str = "") -> Markup:
    under = (
        f'<text class="caption" x="{width // 2 + 12}" y="{height - 2}" text-anchor="middle">{escape(caption)}</text>'
        if caption
        else ""
    )
    return Markup(
        f'<svg class="plot" role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"<title>{escape(label)}</title>{body}{under}</svg>"
    )  # numbers and escaped labels only
