"""The page docs/reliability.md: one line a fault, put together from the pages that its proofs wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from tests.prove.page import PAGES, REPOSITORY, Page

Row = dict[str, Any]

INTRODUCTION = """# What a run survives

Each line was done to real runs (the smoke student: a SwinV2 with an extra norm, ZeRO-3, two CPU ranks, gloo) and
compared with the run that nothing disturbed; written by `make prove`, which goes on where it was stopped, and by
nobody's hand. The same faults, fewer of them, are part of `make test` and `make test-cluster`. Nothing here was done on
GPUs, with NCCL, on InfiniBand, or on several machines: nodes are network namespaces; SLURM, sshd and pdsh are real.
"""


def faults() -> Iterable[tuple[str, str, str, bool, str]]:
    """(fault, what was done, what came of it, whether it held, where it is from) of everything that was measured."""
    killed = _rows("killed_runs")
    if killed:
        yield _killed(list(killed.values()))
    for page in ("faults", "guard_faults", "slurm_faults"):
        for row in _rows(page).values():
            yield row["fault"], row["did"], row["found"], row["held"], _given(row)
    for row in _rows("save_rate").values():
        did = f"{row['bytes'] / 1e9:.2f} GB by two ranks, in pairs with plain writes of the same bytes"
        found = f"{row['ratio']:.2f} of the plain rate ({row['rates']['save']:,.0f} of {row['rates']['raw']:,.0f} MB/s)"
        yield "a save with hash and fsync at >= 0.7 of the disk's rate", did, found, row["ratio"] >= 0.7, _given(row)


def prove(page: str, fault: str, did: str, done: Callable[[], tuple[str, bool]]) -> None:
    """Do it unless this commit has done it, and put what it found, and whether that held, on the pages."""

    def measure() -> Row:
        found, held = done()
        return {"fault": fault, "did": did, "found": found, "held": held}

    kept = Page(page)
    row = kept.row(fault, measure)
    kept.write_table("Faults", "Each done to real runs.", ("fault", "did", "found"), [*kept.rows.values()])
    write_reliability()
    assert row["held"], row["found"]


def write_reliability() -> None:
    """Write the page from what was measured so far."""
    columns = ("fault", "done", "found", "held", "commit, date")
    head = [INTRODUCTION, f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    body = [f"| {' | '.join((*texts, 'yes' if held else '**no**', given))} |" for *texts, held, given in faults()]
    pages = [name for name in ("killed_runs", "save_rate") if (PAGES / f"{name}.md").exists()]
    details = f"In full: {', '.join(f'[{name}](measurements/{name}.md)' for name in pages)}."
    (REPOSITORY / "docs" / "reliability.md").write_text("\n".join([*head, *body, "", details, ""]))


def _killed(rows: list[Row]) -> tuple[str, str, str, bool, str]:
    kills = [kill for row in rows for kill in row["kills"]]
    saving = sum(kill["save_under_way"] or kill["save_lost"] for kill in kills)
    equal = sum(row["same_curve"] and row["same_student"] for row in rows)
    did = f"{len(kills)} kills in {len(rows)} runs, {saving} of them during a save"
    found = f"{equal} of {len(rows)} curves and student files equal the undisturbed ones, bit for bit"
    return "kill -9 of a random rank at random moments", did, found, equal == len(rows), _given(rows[-1])


def _given(row: Row) -> str:
    return f"{row['commit']}, {row['date']}"


def _rows(page: str) -> dict[str, Row]:
    path = PAGES / f"{page}.json"
    return json.loads(path.read_text()) if path.exists() else {}
