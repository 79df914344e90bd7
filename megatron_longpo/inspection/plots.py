"""Plots as inline SVG, drawn with the page's own colours, so that they follow its light and its dark scheme."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from megatron_longpo.inspection.numbers import Histogram, round_step

_WIDTH, _HEIGHT = 340, 168
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 8, 22


def bars(labels: Sequence[str], values: Sequence[float], titles: Sequence[str]) -> Markup:
    """Bars beside one another, each with a label below and a title that shows when pointed at."""
    plot = _Plot(max(values, default=0.0), is_share=False)
    step = (plot.right - plot.left) / len(values)
    for number, (label, value, title) in enumerate(zip(labels, values, titles, strict=True)):
        x = plot.left + number * step
        width = min(step * 0.82, 56)
        plot.rectangle(x + (step - width) / 2, width, value, "bar", title)
        plot.text(x + step / 2, _HEIGHT - 7, label, "middle")
    return plot.svg()


def distribution(shown: Histogram) -> Markup:
    """A histogram with its scale below."""
    plot = _Plot(max(shown.counts), is_share=False)
    step = (plot.right - plot.left) / len(shown.counts)
    for number, count in enumerate(shown.counts):
        low, high = shown.edges[number], shown.edges[number + 1]
        above = " and more" if shown.has_more_above and number == len(shown.counts) - 1 else ""
        title = f"{short_number(low)} to {short_number(high)}{above}: {count:,}"
        plot.rectangle(plot.left + number * step + 0.5, step - 1, count, "bar", title)
    plot.scale(shown.edges[-1], shown.has_more_above)
    return plot.svg()


def two_distributions(first: Histogram, second: Histogram) -> Markup:
    """Two histograms with the same edges over one another: chosen and rejected."""
    assert first.edges == second.edges, "both need the same bins"
    plot = _Plot(max(*first.counts, *second.counts), is_share=False)
    step = (plot.right - plot.left) / len(first.counts)
    for style, shown in (("chosen", first), ("rejected", second)):
        points = [f"{plot.left:.1f},{plot.y(0):.1f}"]
        for number, count in enumerate(shown.counts):
            x, y = plot.left + number * step, plot.y(count)
            points += [f"{x:.1f},{y:.1f}", f"{x + step:.1f},{y:.1f}"]
        points.append(f"{plot.right:.1f},{plot.y(0):.1f}")
        plot.add(f'<polygon class="{style}" points="{" ".join(points)}"><title>{style}</title></polygon>')
    plot.scale(first.edges[-1], first.has_more_above or second.has_more_above)
    return plot.svg()


def shares_over(values: Sequence[float], ends: tuple[str, str]) -> Markup:
    """Shares of 0 to 1 along something that has two ends: the place of chunks in their document."""
    plot = _Plot(max(values, default=0.0), is_share=True)
    step = (plot.right - plot.left) / len(values)
    for number, value in enumerate(values):
        title = f"{number * 100 // len(values)} to {(number + 1) * 100 // len(values)} %: {value * 100:.1f} %"
        plot.rectangle(plot.left + number * step + 0.5, step - 1, value, "accent", title)
    plot.text(plot.left, _HEIGHT - 7, ends[0], "start")
    plot.text(plot.right, _HEIGHT - 7, ends[1], "end")
    return plot.svg()


class _Plot:
    """An empty plot with a vertical axis from zero; marks are added to it."""

    def __init__(self, top: float, is_share: bool) -> None:
        self.left, self.right = float(_LEFT), float(_WIDTH - _RIGHT)
        step = round_step(max(top, 1e-9) / 4)
        if not is_share:
            step = max(step, 1.0)
        self._top = step * max(1, -(-top // step))
        self._parts: list[str] = []
        for number in range(round(self._top / step) + 1):
            value = number * step
            y = self.y(value)
            style = "axis" if number == 0 else "grid"
            self.add(f'<line class="{style}" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.text(self.left - 6, y + 3.5, f"{value * 100:.3g} %" if is_share else short_number(value), "end")

    def y(self, value: float) -> float:
        """Where a value lies, in units of the picture from its top."""
        return _HEIGHT - _BOTTOM - value / self._top * (_HEIGHT - _BOTTOM - _TOP)

    def add(self, part: str) -> None:
        """A piece of SVG; whatever text it holds is escaped already."""
        self._parts.append(part)

    def rectangle(self, x: float, width: float, value: float, style: str, title: str) -> None:
        """A bar from zero up."""
        y = self.y(value)
        self.add(
            f'<rect class="{style}" x="{x:.1f}" width="{max(width, 0.5):.1f}" y="{y:.1f}" '
            f'height="{self.y(0) - y:.1f}"><title>{Markup.escape(title)}</title></rect>'
        )

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        """A label."""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{Markup.escape(text)}</text>')

    def scale(self, top: float, has_more_above: bool) -> None:
        """Numbers from zero to ``top`` below the plot."""
        step = round_step(top / 5)
        number = 0
        while number * step <= top * 1.0001:
            x = self.left + number * step / top * (self.right - self.left)
            more = "+" if has_more_above and (number + 1) * step > top * 1.0001 else ""
            anchor = "end" if number * step > top * 0.93 else "middle"
            self.text(x, _HEIGHT - 7, short_number(number * step) + more, anchor)
            number += 1

    def svg(self) -> Markup:
        """The picture."""
        return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(self._parts)}</svg>')


def short_number(value: float) -> str:
    """A number in few characters: 250, 1.5k, 40k, 2M."""
    for size, name in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"
