"""How long a start takes: from the command to the end of the first step, phase by phase as the run itself keeps them.

The smoke recipe on two ranks of this machine, started as people start it, each time in a run directory of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from fdscale.bench.parts import Row
from fdscale.bench.ratios import Ratio
from fdscale.bench.tables import Table
from fdscale.cluster.ranks import free_port
from fdscale.config.shipped import shipped

STEPS, RANKS, LONGEST = 12, 2, 300.0  # of each start; seconds
WAYS = {"bash": "bash launchers/…", "deepspeed": "deepspeed launchers/…"}
ALLOWED = {"bash": 10.0, "deepspeed": 14.0}  # seconds to the first step, files cached and extensions built
HOW = f"""The smoke recipe on {RANKS} ranks, from the command to the end of its first step; medians. The phases are
those that each run kept in `attempt.json`: each begins where the one before ended."""


def startup_rows(way: str, repeats: int) -> Row:
    """So many starts by a way, after one that is not counted: seconds of each phase, and the second step's share.

    Medians; `phases` as the runs kept them, `outside` is the whole run by this process's clock. `failed` says how one
    failed.
    """
    starts = [_start(way) for _ in range(1 + repeats)][1:]
    failed = [start["failed"] for start in starts if "failed" in start]
    if failed:
        return {"failed": failed[0]}
    phases = {phase: statistics.median(start["phases"].get(phase, 0.0) for start in starts) for phase in _names(starts)}
    figures = ("first_step", "second_step", "median_step", "second_to_median", "outside")
    return {
        "starts": starts,
        "phases": phases,
        **{name: statistics.median(s[name] for s in starts) for name in figures},
    }


def _names(starts: list[Row]) -> list[str]:
    return list(dict.fromkeys(phase for start in starts for phase in start["phases"]))


def _start(way: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        began = time.monotonic()
        try:
            ended = subprocess.run(_command(way, run), capture_output=True, text=True, timeout=LONGEST, env=_env())
        except subprocess.TimeoutExpired:
            return {"failed": f"no end within {LONGEST:.0f} s"}
        if ended.returncode != 0:
            return {"failed": f"exit code {ended.returncode}: {ended.stderr[-500:]}"}
        return {**started(run), "outside": time.monotonic() - began}


def started(run: Path) -> Row:
    """What a run kept of its start, in seconds: `phases`, which add up to `first_step`; its second and median step."""
    phases = json.loads((run / "attempts" / "0001" / "attempt.json").read_text())["startup"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step_seconds"] for row in rows if "step_seconds" in row]
    median = statistics.median(steps[1:])
    return {
        "phases": phases,
        "first_step": sum(phases.values()),
        "second_step": steps[1],
        "median_step": median,
        "second_to_median": steps[1] / median,
    }


def _command(way: str, run: Path) -> list[str]:
    launcher = str(shipped("launchers") / "fd_swinv2g.sh")
    deepspeed = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        f"--num_gpus={RANKS}",
        f"--master_port={free_port()}",
    ]
    own = {"bash": ["bash", launcher, f"--ranks={RANKS}"], "deepspeed": [*deepspeed, launcher]}
    return [*own[way], "--smoke", f"run_dir={run}", f"max_steps={STEPS}", "log.every=1"]


def _env() -> dict[str, str]:
    """This machine's, with this interpreter for the launcher, and no word of another launcher's."""
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "FDSCALE_PYTHON": sys.executable}


def startup_tables(rows: Mapping[str, Row]) -> list[Table]:
    """A line for each phase, a column for each way."""
    phases = list(dict.fromkeys(phase for row in rows.values() for phase in row["phases"]))
    lines = [[phase, *(f"{row['phases'].get(phase, 0.0):.2f} s" for row in rows.values())] for phase in phases]
    lines.append(["**to the first step's end**", *(f"{row['first_step']:.2f} s" for row in rows.values())])
    lines.append(["allowed", *(f"{ALLOWED[way]:.0f} s" for way in rows)])
    lines.append(["second step", *(f"{row['second_step']:.2f} s" for row in rows.values())])
    lines.append(["second step to the median", *(f"{row['second_to_median']:.2f}" for row in rows.values())])
    return [Table("A start, phase by phase", HOW, ["", *(WAYS[way] for way in rows)], lines)]


def startup_ratios(way: str, row: Row) -> list[Ratio]:
    """The second step beside the median one; seconds are another machine's."""
    return [Ratio(f"{WAYS[way]}: second step to the median", row["second_to_median"], 2.0, better="lower")]
