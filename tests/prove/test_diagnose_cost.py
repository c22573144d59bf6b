"""Time and peak memory of `fdscale diagnose` with a ViT-B: both presets, and the same pass on four times the images.

`python -m pytest -m prove tests/prove/test_diagnose_cost.py` writes docs/measurements/diagnose.json and diagnose.md. It
needs both cores of a machine of two for itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fdscale.data.packing.digits import pack_digits
from fdscale.diagnostics.diagnose import PRESETS
from tests.prove.page import REPOSITORY, Page

pytestmark = [pytest.mark.prove, pytest.mark.timeout(7200)]

MODEL = "timm:vit_base_patch16_224=random"
MEASURED = ("fdscale/diagnostics", "fdscale/commands/diagnosing.py", "tests/prove/test_diagnose_cost.py")
COLUMNS = ["what", "images as they pass", "images of the landscape", "times its loss is taken", "time", "peak memory"]
PASS = ("--only", "attention,features,alignment")
QUICK, THOROUGH, FEW, MANY = "quick", "thorough", "the pass alone", "the pass alone, on four times the images"
RUNS = {
    QUICK: ("--preset", "quick"),
    THOROUGH: ("--preset", "thorough"),
    FEW: (*PASS, "--images", "128"),  # eight batches, in which the allocator comes to hold what it holds from then on
    MANY: (*PASS, "--images", "512"),
}
IN_A_CHILD = "import sys; from fdscale.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "train")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_vit_b_is_diagnosed_in_bounded_memory(name: str, digits: Path, tmp_path: Path) -> None:
    page = Page("diagnose", MEASURED)
    page.row(name, lambda: cost(RUNS[name], digits, tmp_path / "out"))
    page.write_table(
        "What diagnosing costs",
        "`fdscale diagnose` of a ViT-B/16 at 224 pixels with random weights, on the embedded digits, on two CPU cores "
        "and nothing else, from the command's start to its end, page and figures included. Peak memory is that of the "
        "process that holds the network (0.33 GiB of weights); two more decode images.",
        COLUMNS,
        [line(key, page.rows[key]) for key in RUNS if key in page.rows],
    )
    if name == QUICK:
        assert page.rows[name]["seconds"] < 90
    if name == MANY:
        assert page.rows[MANY]["peak_mib"] < 1.05 * page.rows[FEW]["peak_mib"]


def cost(options: tuple[str, ...], digits: Path, output: Path) -> dict[str, Any]:
    """Seconds and peak resident MiB of one command."""
    command = [sys.executable, "-c", IN_A_CHILD, "diagnose", MODEL, "--data", str(digits), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    began = time.monotonic()
    process = subprocess.Popen([*command, *options], env=environment)
    _, status, used = os.wait4(process.pid, 0)  # this child's alone: RUSAGE_CHILDREN keeps the largest of all
    assert status == 0
    return {"seconds": round(time.monotonic() - began, 1), "peak_mib": round(used.ru_maxrss / 1024)}


def line(name: str, row: dict[str, Any]) -> dict[str, str]:
    preset = PRESETS.get(name)
    images = preset.images if preset else int(RUNS[name][-1])
    told = [name, str(images)]
    told += [str(preset.landscape_images), str(preset.plan.evaluations)] if preset else ["none", "none"]
    minutes = f"{row['seconds'] / 60:.1f} min" if row["seconds"] >= 120 else f"{row['seconds']:.0f} s"
    return dict(zip(COLUMNS, [*told, minutes, f"{row['peak_mib'] / 1024:.2f} GiB"], strict=True))
