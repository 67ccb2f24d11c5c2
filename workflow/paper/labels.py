"""Labels beside points and lines instead of legends, moved where they cover nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

Box = tuple[float, float, float, float]
"""Left, bottom, right, top; in pixels unless said otherwise."""
Label = tuple[float, float, str, str]
"""x and y in data units, text, colour."""

SIZE = 9.5
"""Points."""
_RADII = (9, 15, 22, 30, 40, 52)
_ANGLES = tuple(math.radians(angle) for angle in (0, 30, -30, 60, -60, 90, -90, 120, -120, 150, -150, 180))
_FAR = 10
"""Points from which a label is tied to its point by a line."""


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart, as little as it takes, until neighbours are ``gap`` apart; their order is kept."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    clusters: list[tuple[list[int], float]] = []  # members in order, centre
    for index in order:
        clusters.append(([index], positions[index]))
        while len(clusters) > 1:
            (left, a), (right, b) = clusters[-2:]
            if b - a >= gap * (len(left) + len(right)) / 2 - 1e-12:
                break
            members = left + right
            clusters[-2:] = [(members, sum(positions[i] for i in members) / len(members))]
    placed = list(positions)
    for members, centre in clusters:
        for place, index in enumerate(members):
            placed[index] = centre + gap * (place - (len(members) - 1) / 2)
    return placed


def label_ends(axes: Axes, ends: Sequence[Label], points: float = 13) -> None:
    """Write labels to the right of line ends, moved apart vertically where they would overlap.

    Args:
        axes: with its limits already final.
        ends: where the lines end.
        points: height of a label.
    """
    if not ends:
        return
    figure = axes.get_figure()
    assert figure is not None
    figure.canvas.draw()  # the layout is known only then
    height = axes.get_window_extent().height * 72 / figure.dpi
    low, high = axes.get_ylim()
    placed = spread([y for _, y, _, _ in ends], points * (high - low) / height)
    for (x, y, text, tint), at in zip(ends, placed, strict=True):
        axes.annotate(
            text, (x, y), xytext=(1.04, at), textcoords=axes.get_yaxis_transform(), color=tint, va="center",
            fontsize=9.5, fontweight="bold", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": tint, "lw": 0.8, "alpha": 0.5, "relpos": (0, 0.5),
                        "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip


def place_labels(axes: Axes, points: Sequence[Label], obstacles: Sequence[Box] = ()) -> None:
    """Write a label near each point of a scatter plot where it covers neither a point nor another label.

    The most crowded points choose first; of all places around a point, the nearest free one wins, to the right before
    to the left. A label that had to move away is tied to its point. Call with final limits.

    Args:
        axes: where the points are drawn.
        points: with their labels.
        obstacles: lines that labels should not cover either, as boxes in data units.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # the layout is known only then
    scale = figure.dpi / 72
    at = [tuple(axes.transData.transform(point[:2])) for point in points]
    taken = [(x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale) for x, y in at]
    window = axes.get_window_extent()
    frame = (window.x0, window.y0, window.x1, window.y1)
    walls = []
    for left, bottom, right, top in obstacles:
        (x0, y0), (x1, y1) = axes.transData.transform([(left, bottom), (right, top)])
        walls.append((x0 - 2 * scale, y0 - 2 * scale, x1 + 2 * scale, y1 + 2 * scale))

    def crowding(index: int) -> float:
        return sorted(math.dist(at[index], other) for other in at)[min(2, len(at) - 1)]

    for index in sorted(range(len(points)), key=crowding):
        x, y, text, tint = points[index]
        probe = axes.text(0, 0, text, fontsize=SIZE, fontweight="bold")
        extent = probe.get_window_extent(canvas.get_renderer())
        probe.remove()
        others = taken[:index] + taken[index + 1 :] + walls
        best: tuple[float, float, float, Box] | None = None
        for radius, angle in product(_RADII, _ANGLES):
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            box = _box(at[index], (dx * scale, dy * scale), extent.width, extent.height)
            cost = sum(_overlap(box, other) for other in others) + 50 * _outside(box, frame)
            cost += 2 * scale * radius + (6 * scale if dx < -1 else 0)
            if best is None or cost < best[0]:
                best = (cost, dx, dy, box)
        assert best is not None
        _, dx, dy, box = best
        taken.append(box)
        tie = {"arrowstyle": "-", "color": tint, "lw": 0.8, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            text, (x, y), xytext=(dx, dy), textcoords="offset points", color=tint, fontsize=SIZE, fontweight="bold",
            ha=_side(dx), va="center", arrowprops=tie if math.hypot(dx, dy) > _FAR else None,
        )  # fmt: skip


def _side(dx: float) -> str:
    return "left" if dx > 1 else "right" if dx < -1 else "center"


def _box(at: Sequence[float], offset: tuple[float, float], width: float, height: float) -> Box:
    """Where a label lies that is moved by ``offset`` from its point."""
    left = at[0] + offset[0] - {"left": 0.0, "right": width, "center": width / 2}[_side(offset[0])]
    bottom = at[1] + offset[1] - height / 2
    return left, bottom, left + width, bottom + height


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share, in square pixels."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, frame: Box) -> float:
    """Pixels by which a box leaves the frame."""
    sides = (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
    return sum(max(0.0, side) for side in sides)
