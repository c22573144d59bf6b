"""`results.jsonl`: one row a finished task, from which the report is drawn and redrawn. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What came of a task: its place in the design, what was measured, when it ended, how long it took its worker.

    `seconds` are by the clock, `cpu_seconds` those of its core; `resident_bytes` is what the worker then held.
    """

    task: str
    kind: str
    seed: int
    of: str
    network: str
    values: Mapping[str, float]
    ended: float
    seconds: float
    cpu_seconds: float
    resident_bytes: int


def append(result: Result, file: Path) -> None:
    """Add a row; the file is there from the first one on, and a line that was torn stays apart."""
    torn = file.exists() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
    with file.open("a") as rows:
        rows.write("\n" * torn + json.dumps(asdict(result)) + "\n")


def read_results(file: Path) -> list[Result]:
    """The rows of a `results.jsonl`, of each task the last one; a line torn by a kill is left out."""
    found: dict[str, Result] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(ValueError):
            row = Result(**json.loads(line))
            found[row.task] = row
    return list(found.values())


def by_seed(results: Iterable[Result], kind: str, of: str, network: str, value: str) -> dict[int, float]:
    """One quantity of one of the networks, by seed, as far as it was measured and is finite."""
    wanted = (kind, of, network)
    found = (
        row
        for row in results
        if (row.kind, row.of, row.network) == wanted and math.isfinite(row.values.get(value, math.nan))
    )
    return {row.seed: row.values[value] for row in sorted(found, key=lambda row: row.seed)}
