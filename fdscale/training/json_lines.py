"""`metrics.jsonl`: the rows of a run on disk, cut where a resumed run goes on."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """`metrics.jsonl`: one JSON object a row with `step`, `time` (Unix seconds) and the values.

    Floats read back bit for bit; a value that is not finite becomes null, so that the file stays valid JSON.
    `resumed_step` is the step of the checkpoint that was loaded: later rows belong to work that was lost and
    will be done again, so they are cut off, as is a line torn by a kill. Without it the file starts empty.
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        self._path = path
        self._file = self._opened(resumed_step)

    def _opened(self, resumed_step: int | None) -> FileIO:
        rows = read_rows(self._path) if resumed_step is not None and self._path.exists() else []
        _replace(self._path, [row for row in rows if resumed_step is not None and row["step"] <= resumed_step])
        return FileIO(self._path, "a")  # without a buffer: a row that did not fit is not written later

    def cut(self, step: int) -> None:
        """Leave out the rows after `step`, as if the file were opened anew."""
        self._file.close()
        self._file = self._opened(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step, "time": time.time()} | {name: _plain(values[name]) for name in values if name != "step"}
        try:
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        except OSError as error:  # a full disk: a checkpoint will say so, what is only told must not end a run
            logger.warning("%s: the row of step %d could not be written: %s", self._path, step, error)

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` in file order; a line torn by a kill is named and left out."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row = _row(line)
        if row is None:
            logger.warning("%s line %d is not a whole row; left out", path, number)
        else:
            rows.append(row)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError, or UnicodeDecodeError of a torn line
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _replace(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the whole file anew beside itself and renames it: a kill leaves the old one or the new."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _plain(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None
