"""Parts of a benchmark, each in a process of its own with every core, so that what fails costs that part alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fdscale.bench.parts import Row

SHORTEST = 15.0  # seconds in which a part cannot even start


def in_own_process(words: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Row:
    """What `python -m fdscale.bench WORDS --result FILE` leaves in that file, or `failed` and why.

    `environment` is added to this process's.
    """
    if seconds < SHORTEST:
        return {"failed": "no time was left for it (--seconds)"}
    own = {**os.environ, **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "fdscale.bench", *words, "--result", str(result)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=own)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after the {seconds:.0f} s that were left"}
        if run.returncode or not result.exists():
            return {"failed": f"exit code {run.returncode}: {_last_line(run.stderr)}", "stderr": run.stderr[-3000:]}
        row: Row = json.loads(result.read_text())
        return row


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
