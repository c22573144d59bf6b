"""A benchmark of several parts: each measured once for a commit, kept, told, and held to an earlier report."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from fdscale.bench.gpu import surroundings
from fdscale.bench.parts import Row
from fdscale.bench.ratios import Ratio, compared, musts
from fdscale.bench.tables import Table, markdown_of, print_tables
from fdscale.config.errors import UserError, nearest

PACKAGE = Path(__file__).parents[1]
MEASURED = (PACKAGE, PACKAGE.parent / "ds_configs")  # a change anywhere else leaves a figure true

Rows = Mapping[str, Row]


@dataclass(frozen=True)
class Benchmark:
    """`parts` by name, each measured by its function; what is told of their rows; the ratios of one of them."""

    what: str
    title: str
    parts: Mapping[str, Callable[[], Row]]
    tables: Callable[[Rows], list[Table]]
    ratios: Callable[[str, Row], list[Ratio]]
    plot: Callable[[Rows, Path], None] | None = None


def conduct(
    benchmark: Benchmark,
    output: Path | None,
    only: Sequence[str],
    again: bool,
    check: Path | None,
    figure: Path | None = None,
) -> int:
    """Measure the parts (all, or `only` these) and tell them; 1 when one failed or a ratio fell below `check`'s.

    With `output` rows are kept in `bench_WHAT.json`, where those of the same commit are not measured `again`; `figure`
    is drawn of all that are kept. Raises UserError for a part that is none, and for a report that cannot be read.
    """
    if unknown := [name for name in only if name not in benchmark.parts]:
        known, name = ", ".join(benchmark.parts), unknown[0]
        meant = nearest(name, benchmark.parts)
        raise UserError(f"bench {benchmark.what}: {name!r} is none of its parts{meant}; allowed: {known}")
    kept = _read(check) if check else {}
    file = None if output is None else output / f"bench_{benchmark.what}.json"
    rows: dict[str, Row] = _read(file) if file and file.exists() else {}
    measured = {}
    for name in only or benchmark.parts:
        measured[name] = _row(benchmark, name, rows.get(name, {}), again)
        rows = {part: {**rows, name: measured[name]}[part] for part in benchmark.parts if part in {*rows, name}}
        if file:
            _write(benchmark, rows, file)
    print_tables(_tables(benchmark, measured))
    if figure and benchmark.plot and (good := _good(rows)):
        benchmark.plot(good, figure)
    return max(_failures(benchmark, measured), _fallen(benchmark, measured, kept) if check else 0)


def _row(benchmark: Benchmark, name: str, kept: Row, again: bool) -> Row:
    """The row that the same commit of a clean tree gave, else a new one."""
    commit = measured_commit()
    clean = not commit.endswith(("dirty", "unknown"))
    if not again and clean and kept.get("commit") == commit and "failed" not in kept:
        print(f"{benchmark.what} {name}: kept, this commit gave it on {kept['date']}", flush=True)
        return kept
    began = time.monotonic()
    row = benchmark.parts[name]()
    seconds = round(time.monotonic() - began, 1)
    print(f"{benchmark.what} {name}: {row.get('failed', 'measured')} ({seconds} s)", flush=True)
    return {**row, "commit": commit, "date": date.today().isoformat(), "part_seconds": seconds}


def _good(rows: Rows) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if "failed" not in row}


def _ratios(benchmark: Benchmark, rows: Rows) -> list[Ratio]:
    return [ratio for name, row in _good(rows).items() for ratio in benchmark.ratios(name, row)]


def _tables(benchmark: Benchmark, rows: Rows) -> list[Table]:
    reached = musts(_ratios(benchmark, rows))
    return [*(benchmark.tables(_good(rows)) if _good(rows) else []), *([reached] if reached.lines else [])]


def _failures(benchmark: Benchmark, rows: Rows) -> int:
    failed = {name: row["failed"] for name, row in rows.items() if "failed" in row}
    for name, why in failed.items():
        print(f"bench {benchmark.what} {name} failed: {why}")
    return int(bool(failed))


def _fallen(benchmark: Benchmark, rows: Rows, kept: Rows) -> int:
    """1 when a ratio of these parts is worse than in the kept report; the table names it."""
    before = _ratios(benchmark, {name: row for name, row in kept.items() if name in rows})
    table, fallen = compared(_ratios(benchmark, rows), before)
    print_tables([table])
    for name in fallen:
        print(f"bench {benchmark.what}: fallen: {name}")
    return int(bool(fallen))


def _read(file: Path) -> dict[str, Row]:
    try:
        parts: dict[str, Row] = json.loads(file.read_text())["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no report of a benchmark ({type(error).__name__}: {error}); write one without --check, or name "
            "another with --kept"
        ) from error
    return parts


def _write(benchmark: Benchmark, rows: Rows, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    around = surroundings()
    file.write_text(json.dumps({**around, "parts": rows}, indent=1) + "\n")
    failed = [f"- {name} failed: {row['failed']}" for name, row in rows.items() if "failed" in row]
    given = [_given_by(around, rows), *failed]
    file.with_suffix(".md").write_text(markdown_of(benchmark.title, "\n".join(given), _tables(benchmark, rows)))


def _given_by(around: dict[str, Any], rows: Rows) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in around["versions"].items())
    commits = ", ".join(sorted({f"{row['commit']} on {row['date']}" for row in rows.values()}))
    return f"{around['device']}; Python {around['python']}, {versions}. Commit {commits}."


def measured_commit() -> str:
    """The last commit that touched what is measured; `-dirty` when the tree has changes beyond it; or `unknown`."""
    paths = [str(path) for path in MEASURED if path.exists()]
    commit = _git("log", "-1", "--format=%h", "--", *paths)
    changes = _git("status", "--porcelain", "--", *paths)
    return "unknown" if not commit else commit + ("-dirty" if changes else "")


def _git(*words: str) -> str:
    try:
        run = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
