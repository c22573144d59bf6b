"""A page of measurements: rows kept as they come, with the commit, the day and the machine that gave them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PAGES = REPOSITORY / "docs" / "measurements"
MEASURED = ("fdscale", "ds_configs", "tests/prove")  # a change anywhere else leaves a figure true

Row = dict[str, Any]


class Page:
    """`docs/measurements/NAME.json`, and its tables as NAME.md; a stopped measurement goes on where it stopped.

    `measured` are the paths whose change makes a figure old.
    """

    def __init__(self, name: str, measured: Sequence[str] = MEASURED) -> None:
        self.path, self.measured = PAGES / f"{name}.json", measured
        self.rows: dict[str, Row] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def row(self, key: str, measure: Callable[[], Row]) -> Row:
        """The row of that key: the one that is there when the same commit of a clean tree gave it, else a new one.

        One that says that it did not hold is measured again.
        """
        commit = measured_commit(self.measured)
        kept = self.rows.get(key, {})
        if kept.get("commit") != commit or commit.endswith("dirty") or not kept.get("held", True):
            self.rows[key] = {**measure(), "commit": commit, "date": date.today().isoformat(), "machine": machine()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
        return self.rows[key]

    def write_table(self, title: str, how: str, columns: Sequence[str], lines: Sequence[Mapping[str, str]]) -> None:
        """The Markdown beside the JSON: what was measured and how, one line a row."""
        head = [f"# {title}", "", how, "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        body = [f"| {' | '.join(line[column] for column in columns)} |" for line in lines]
        given = sorted({f"commit {row['commit']}, {row['date']}, {row['machine']}" for row in self.rows.values()})
        self.path.with_suffix(".md").write_text(
            "\n".join([*head, *body, "", *(f"Given by {one}." for one in given), ""])
        )


def measured_commit(measured: Sequence[str]) -> str:
    """The last commit that touched what is measured; `-dirty` when the tree has changes beyond it."""
    commit = _git("log", "-1", "--format=%h", "--", *measured)
    return commit + ("-dirty" if _git("status", "--porcelain", "--", *measured) else "")


def machine() -> str:
    """Processors and versions, as far as they move a figure; never a name of a machine."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "timm"))
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {packages}"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
