"""Where names go in a plot so that none lies on another: at the ends of lines, and beside points.

Both are greedy and take no time to speak of; where there is no free place, a name is put where it covers least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def spread(places: Sequence[float], gap: float) -> list[float]:
    """``places``, moved as little as that takes until neighbours are ``gap`` apart; the order stays.

    Neighbours that are too close form a group around their mean, and groups that touch become one.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list[int]] = []
    centres: list[float] = []
    for i in order:
        groups.append([i])
        centres.append(places[i])
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            last = groups.pop()
            groups[-1] += last
            centres.pop()
            centres[-1] = sum(places[k] for k in groups[-1]) / len(groups[-1])
    found = list(places)
    for group, centre in zip(groups, centres, strict=True):
        for n, i in enumerate(group):
            found[i] = centre + (n - (len(group) - 1) / 2) * gap
    return found


Box = tuple[float, float, float, float]


def covered(box: Box, others: Sequence[Box] | np.ndarray) -> float:
    """The area of ``box`` (left, bottom, right, top) that lies on others."""
    if not len(others):
        return 0.0
    left, bottom, right, top = np.asarray(others, dtype=float).T
    wide = np.minimum(box[2], right) - np.maximum(box[0], left)
    tall = np.minimum(box[3], top) - np.maximum(box[1], bottom)
    return float((wide.clip(0) * tall.clip(0)).sum())


def free_box(
    point: tuple[float, float], size: tuple[float, float], frame: Box, taken: Sequence[Box] | np.ndarray, reach: float
) -> Box:
    """A box of ``size`` near ``point``, within ``frame`` and off what is taken; else the one that covers least."""
    best, least, taken = None, math.inf, np.asarray(taken, dtype=float)
    for ring in range(8):
        for turn in range(16):
            angle = turn * math.pi / 8
            away = reach * (1 + 0.8 * ring)
            # The box's side that faces the point is what is that far away, not its middle.
            x = point[0] + math.cos(angle) * (away + size[0] / 2)
            y = point[1] + math.sin(angle) * (away + size[1] / 2)
            box = (x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)
            outside = size[0] * size[1] - covered(box, [frame])
            cost = covered(box, taken) + 4 * outside + 0.02 * ring * size[1] ** 2
            if cost < least:
                best, least = box, cost
        if least < 0.02 * (ring + 1) * size[1] ** 2:
            break  # no place further out is better
    assert best is not None
    return best


def place_labels(
    figure: Figure,
    panel: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colour: str,
    halo: Any,
    lines: Sequence[Sequence[tuple[float, float]]] = (),
) -> None:
    """Writes a text beside each point, with a thin line to it where it is not close; ``halo`` are more properties of
    it, and ``lines`` what else it should not lie on."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.set_layout_engine("none")
    pixel = figure.dpi / 72
    frame = panel.get_window_extent(renderer)
    edge = (frame.x0, frame.y0, frame.x1, frame.y1)
    dots = [tuple(panel.transData.transform(p)) for p in points]
    taken: list[Box] = [(x - 8 * pixel, y - 8 * pixel, x + 8 * pixel, y + 8 * pixel) for x, y in dots]
    taken += [
        (x - 2 * pixel, y - 2 * pixel, x + 2 * pixel, y + 2 * pixel)
        for line in lines
        for x, y in _along(panel, line, 4 * pixel)
    ]
    taken += [_box(t.get_window_extent(renderer)) for t in panel.texts]
    for (x, y), text in zip(dots, texts, strict=True):
        label = panel.text(
            0.5,
            0.5,
            text,
            fontsize=9,
            color=colour,
            ha="center",
            va="center",
            zorder=5,
            linespacing=1.15,
            transform=panel.transAxes,
            **halo,
        )
        extent = label.get_window_extent(renderer)
        size = (extent.width + 4 * pixel, extent.height + 2 * pixel)
        box = free_box((x, y), size, edge, taken, 9 * pixel)
        taken.append(box)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        label.set_position(tuple(panel.transAxes.inverted().transform(middle)))
        _lead(panel, (x, y), box, colour, 16 * pixel)


def _along(panel: Axes, line: Sequence[tuple[float, float]], apart: float) -> list[tuple[float, float]]:
    """Points of a line in pixels, so far apart."""
    found: list[tuple[float, float]] = []
    corners = [tuple(panel.transData.transform(p)) for p in line]
    for (x, y), (u, v) in zip(corners, corners[1:], strict=False):
        n = max(1, math.ceil(math.dist((x, y), (u, v)) / apart))
        found += [(x + (u - x) * i / n, y + (v - y) * i / n) for i in range(n + 1)]
    return found


def _box(extent: Any) -> Box:
    return extent.x0, extent.y0, extent.x1, extent.y1


def _lead(panel: Axes, dot: tuple[float, float], box: Box, colour: str, close: float) -> None:
    """A thin line from a point to the nearest edge of its box, where that is further than ``close``."""
    near = (min(max(dot[0], box[0]), box[2]), min(max(dot[1], box[1]), box[3]))
    if math.dist(near, dot) > close:
        ends = panel.transAxes.inverted().transform([dot, near])
        panel.plot(*zip(*ends, strict=True), color=colour, linewidth=0.6, transform=panel.transAxes, zorder=2)
