"""A mask as COCO writes it: polygons along its pixels' edges, or run lengths; exact, so that the mask comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Point = tuple[int, int]

# The edges of a pixel at (0, 0), clockwise as seen on a screen, each with the neighbour (row, column) beyond it.
EDGES = (((0, 0), (1, 0), (-1, 0)), ((1, 0), (1, 1), (0, 1)), ((1, 1), (0, 1), (1, 0)), ((0, 1), (0, 0), (0, -1)))


def segmentation(mask: NDArray[np.bool_]) -> list[list[float]] | dict[str, Any]:
    """Polygons of a mask (h, w), one for each part; an uncompressed RLE where a part has a hole."""
    loops = _loops(mask)
    if any(_twice_area(loop) < 0 for loop in loops):
        return run_lengths(mask)
    return [[float(number) for point in _corners(loop) for number in point] for loop in loops]


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's uncompressed RLE of a mask (h, w): down the columns, zeros first."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    ends = np.concatenate([changes, [mask.size]]) if not changes.size or changes[-1] != mask.size else changes
    counts = np.diff(np.concatenate([[0], ends]))
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def _loops(mask: NDArray[np.bool_]) -> list[list[Point]]:
    """Closed walks (x, y) around the parts, clockwise, and around holes, the other way."""
    following: dict[Point, list[Point]] = {}
    around = np.pad(mask, 1)
    for start, end, (down, right) in EDGES:
        outside = ~around[1 + down : 1 + down + mask.shape[0], 1 + right : 1 + right + mask.shape[1]]
        for y, x in np.argwhere(mask & outside).tolist():
            following.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))
    loops = []
    while following:
        loops.append(_walk(following))
    return loops


def _walk(following: dict[Point, list[Point]]) -> list[Point]:
    """One closed walk, taken out of `following`."""
    start = next(iter(following))
    loop = [start, _taken(following, start, None)]
    while loop[-1] != start:
        loop.append(_taken(following, loop[-1], loop[-2]))
    return loop[:-1]


def _taken(following: dict[Point, list[Point]], at: Point, before: Point | None) -> Point:
    """Where two parts touch at a corner, turn right: each stays a walk of its own."""
    ends = following[at]
    if before is not None and len(ends) == 2:
        ahead = at[0] - before[0], at[1] - before[1]
        right = at[0] - ahead[1], at[1] + ahead[0]
        end = ends.pop(ends.index(right))
    else:
        end = ends.pop()
    if not ends:
        del following[at]
    return end


def _corners(loop: list[Point]) -> list[Point]:
    """The points where a walk turns."""
    beside = zip(loop[-1:] + loop[:-1], loop, loop[1:] + loop[:1], strict=True)
    return [at for before, at, after in beside if before[0] != after[0] and before[1] != after[1]]


def _twice_area(loop: list[Point]) -> int:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, loop[1:] + loop[:1], strict=True))
