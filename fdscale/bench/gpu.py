"""Each part in a process of its own, so that a failure or a full GPU costs that part alone; a report of them all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fdscale.bench.apart import in_own_process
from fdscale.bench.measured import ceiling, forward, training_step
from fdscale.bench.parts import FULL, TINY, Ceiling, Row, TrainingStep
from fdscale.bench.report import markdown
from fdscale.cluster.ranks import rank_from_environment
from fdscale.config.errors import UserError
from fdscale.training.engine import connect


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
        words = ["gpu", "--part", name, *(["--tiny"] if tiny else [])]
        words += [] if micro_batch is None else ["--micro-batch", str(micro_batch)]
        row = in_own_process(words, deadline - time.monotonic())
        full = row.get("out_of_memory")
        if full is None:
            return row
        if full == 1:
            return {"failed": f"out of memory with one image: {row['told']}"}
        micro_batch = full // 2


def part_alone(name: str, tiny: bool, micro_batch: int | None) -> Row:
    """One part in this process: how `bench` runs it."""
    part = (TINY if tiny else FULL)[name]
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if isinstance(part, Ceiling):
        return ceiling(part, torch.device("cuda" if on_gpu else "cpu"))
    connection = connect(rank_from_environment(os.environ))
    if isinstance(part, TrainingStep):
        return training_step(part, micro_batch, connection)
    if part.placement == "fairscale" and not on_gpu:
        return {"left_out": "fairscale needs CUDA streams"}
    return forward(part, connection)


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
