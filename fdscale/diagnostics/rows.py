"""One measurement, and the file of them: JSON lines, from which every figure is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Measurement:
    """One row of `measurements.jsonl`: what was measured of which model, where in it, on how many images.

    `layer` counts blocks from 0 over the whole depth, `head` attention heads within it; `other` and `other_layer` name
    the second model where two are compared; `direction` counts random directions, `at` is where on one, or on two, the
    value was taken, and `classifier` whose loss it is: of the one that the `run` left, which moves with the network, or
    of one `fitted` to the same images, which stays. `low` and `high` are a 95 % interval. `reason` says why there is
    no value.
    """

    model: str
    measure: str
    value: float | None
    unit: str
    images: int
    layer: int | None = None
    head: int | None = None
    other: str | None = None
    other_layer: int | None = None
    direction: int | None = None
    at: tuple[float, ...] | None = None
    classifier: Literal["run", "fitted"] | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


def write_rows(rows: Iterable[Measurement], file: Path) -> None:
    """Write measurements as JSON lines, what is not known left out of each."""
    told = ({name: value for name, value in asdict(row).items() if value is not None} for row in rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in told))


def read_rows(file: Path) -> list[Measurement]:
    """The measurements of a file that `write_rows` left."""
    rows = map(json.loads, file.read_text().splitlines())
    return [Measurement(**{"value": None, **row, **_at(row)}) for row in rows]


def _at(row: dict[str, object]) -> dict[str, object]:
    at = row.get("at")
    return {"at": tuple(at)} if isinstance(at, list) else {}
