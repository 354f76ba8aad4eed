# SPDX-License-Identifier: GPL-2.0-or-later
"""A bar chart with a logarithmic axis, as the paper's figure 8: groups of bars, one colour a series; SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

_COLOURS = ("#4c78a8", "#f58518", "#e0ac2b", "#54a24b", "#b279a2", "#9d755d")
_HEIGHT, _LEFT, _TOP, _BOTTOM = 320, 70, 50, 40
_BAR, _GAP, _LEGEND_STEP = 14, 18, 110
#: the least width of a group, for its name
_GROUP = 95
_FONT = 'font-family="sans-serif" font-size="12"'


def bar_chart(title: str, unit: str, series: Sequence[str], groups: Mapping[str, Mapping[str, float]]) -> str:
    """An SVG document.  `groups` has for every group the values of its series, all above 0; a series that
    a group does not have leaves a space."""
    values = [value for group in groups.values() for value in group.values()]
    low = math.floor(math.log10(min(values, default=1)))
    high = max(math.ceil(math.log10(max(values, default=10))), low + 1)
    pitch = max(_BAR * len(series) + _GAP, _GROUP)
    width = max(_LEFT + pitch * len(groups) + _GAP, _LEFT + _LEGEND_STEP * len(series))
    base = _TOP + _HEIGHT

    def y(value: float) -> float:
        return base - (math.log10(value) - low) / (high - low) * _HEIGHT

    def parts() -> Iterator[str]:
        yield (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{base + _BOTTOM}" {_FONT}>')
        yield f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="white"/>'
        yield f'<text x="{_LEFT}" y="16" font-weight="bold">{escape(title)}</text>'
        yield (f'<text x="14" y="{_TOP + _HEIGHT / 2:.0f}" text-anchor="middle" '
               f'transform="rotate(-90 14 {_TOP + _HEIGHT / 2:.0f})">{escape(unit)}</text>')
        for power in range(low, high + 1):
            at = y(10.0**power)
            yield f'<line x1="{_LEFT}" x2="{width}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
            yield f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:,.10g}</text>'
        for number, name in enumerate(series):
            x = _LEFT + number * _LEGEND_STEP
            yield f'<rect x="{x}" y="26" width="12" height="12" fill="{_colour(number)}"/>'
            yield f'<text x="{x + 16}" y="36">{escape(name)}</text>'
        for place, (group, bars) in enumerate(groups.items()):
            x = _LEFT + _GAP + place * pitch
            yield (f'<text x="{x + _BAR * len(series) / 2:.1f}" y="{base + 18}" '
                   f'text-anchor="middle">{escape(group)}</text>')
            for number, name in enumerate(series):
                if name in bars:
                    at = y(bars[name])
                    yield (f'<rect x="{x + number * _BAR}" y="{at:.1f}" width="{_BAR - 2}" '
                           f'height="{base - at:.1f}" fill="{_colour(number)}">'
                           f'<title>{escape(f"{group}, {name}: {bars[name]:,.0f}")}</title></rect>')
        yield "</svg>\n"

    return "\n".join(parts())


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
