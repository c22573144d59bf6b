"""Each part in a process of its own, so that a failure or a full GPU costs that part alone; a report of them all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fdscale.bench.measured import ceiling, forward, training_step
from fdscale.bench.parts import FULL, TINY, Ceiling, Row, TrainingStep
from fdscale.bench.report import markdown
from fdscale.cluster.ranks import rank_from_environment
from fdscale.config.errors import UserError
from fdscale.training.engine import connect

SHORTEST = 15.0  # seconds in which a part cannot even start


def bench(tiny: bool, output: Path, seconds: float, only: Sequence[str] | None) -> int:
    """Run the parts, writing the report after each; 1 when one failed. Raises UserError without a CUDA device."""
    if not torch.cuda.is_available() and not tiny:
        raise UserError(
            "bench gpu: no CUDA device is visible here; run it where there is one, or add --tiny for the same path "
            "with tiny networks on the CPU"
        )
    deadline = time.monotonic() + seconds
    report: dict[str, Any] = {**surroundings(), "networks": "tiny" if tiny else "full", "parts": {}}
    for name in only or (TINY if tiny else FULL):
        began = time.monotonic()
        report["parts"][name] = _part(name, tiny, deadline)
        report["parts"][name]["part_seconds"] = round(time.monotonic() - began, 1)
        print(f"{name}: {json.dumps(report['parts'][name])}", flush=True)
        write(report, output, "gpu-tiny" if tiny else "gpu")
    return int(any("failed" in row for row in report["parts"].values()))


def _part(name: str, tiny: bool, deadline: float) -> Row:
    """The figures of a part; after running out of memory again with half the images, down to one."""
    micro_batch: int | None = None
    while True:
        row = _in_own_process(name, tiny, micro_batch, deadline - time.monotonic())
        full = row.get("out_of_memory")
        if full is None:
            return row
        if full == 1:
            return {"failed": f"out of memory with one image: {row['told']}"}
        micro_batch = full // 2


def _in_own_process(name: str, tiny: bool, micro_batch: int | None, seconds: float) -> Row:
    if seconds < SHORTEST:
        return {"failed": "no time was left for it (--seconds)"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "fdscale.bench", "gpu", "--part", name, "--result", str(result)]
        command += ["--tiny"] * tiny + ([] if micro_batch is None else ["--micro-batch", str(micro_batch)])
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after the {seconds:.0f} s that were left"}
        if run.returncode or not result.exists():
            return {"failed": f"exit code {run.returncode}: {_last_line(run.stderr)}", "stderr": run.stderr[-3000:]}
        row: Row = json.loads(result.read_text())
        return row


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def part_alone(name: str, tiny: bool, micro_batch: int | None, result: Path) -> None:
    """One part in this process, its figures to a file: how `bench` runs it."""
    part = (TINY if tiny else FULL)[name]
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if isinstance(part, Ceiling):
        row = ceiling(part, torch.device("cuda" if on_gpu else "cpu"))
    else:
        connection = connect(rank_from_environment(os.environ))
        if isinstance(part, TrainingStep):
            row = training_step(part, micro_batch, connection)
        elif part.placement == "fairscale" and not on_gpu:
            row = {"left_out": "fairscale needs CUDA streams"}
        else:
            row = forward(part, connection)
    result.write_text(json.dumps(row))


def surroundings() -> Row:
    """What gave the figures: device, versions, commit, day."""
    on_gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if on_gpu else None
    return {
        "device": properties.name if properties else f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "device_bytes": properties.total_memory if properties else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "deepspeed", "fairscale", "timm")},
        "commit": _told("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "date": date.today().isoformat(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "no version found"


def _told(*command: str) -> str:
    """The first line that a command prints, or that it could not be asked."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return run.stdout.splitlines()[0].strip() if run.returncode == 0 and run.stdout else "unknown"


def write(report: Row, output: Path, name: str) -> None:
    """The report as it stands, as `NAME.json` and `NAME.md`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / f"{name}.md").write_text(markdown(report))
