"""Real runs, started by torchrun, that go on on another number of ranks: the next ten losses, and every sample.

python -m pytest -m prove tests/prove/test_elastic.py -s
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fdscale.config.deepspeed_json import load_deepspeed_json

pytestmark = pytest.mark.prove

OBSERVED = Path(__file__).parent / "observed.py"
HALF, LAST, GLOBAL_BATCH = 10, 20, 32
ZERO = load_deepspeed_json("laptop")["zero_optimization"] | {"sub_group_size": 200_000}  # several flat tensors a group
RUN = [
    "distill",
    "swinv2_g",
    "--smoke",
    "student.geometry.depths=[1,1,2,1]",
    "student.geometry.extra_norm_period=2",
    "student.drop_path=0.3",
    "optim.layer_decay=0.8",
    "optim.ema_decay=0.9",
    f"checkpoint.every={HALF}",
    "log.every=1",
]
Start = Callable[[Path, int, int], str]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, port: Callable[[], int]) -> Start:
    """`start(folder, ranks, last step)` runs the program and returns what it printed."""
    from fdscale.data.packing.digits import pack_digits

    shared = tmp_path_factory.mktemp("shared")
    pack_digits(shared / "digits", "test")
    (shared / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, "zero_optimization": ZERO}))

    def run(folder: Path, ranks: int, last: int) -> str:
        (folder / "seen").mkdir(parents=True, exist_ok=True)
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            f"--master_port={port()}",
        ]
        settings = [f"run_dir={folder}/run", f"data.shards={shared}/digits", f"deepspeed={shared}/ds.json"]
        environment = {**os.environ, "SEEN": str(folder / "seen"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [*launcher, f"--master_port={port()}", str(OBSERVED), *RUN, *settings, f"max_steps={last}"]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def rows_of(folder: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "loss" in row}


def samples_of(folder: Path) -> dict[int, list[int]]:
    """The keys of each step's global batch, in the order of its rows."""
    noted = [json.loads(line) for path in (folder / "seen").iterdir() for line in path.read_text().splitlines()]
    found: dict[int, dict[int, int]] = {}
    for batch in noted:
        found.setdefault(batch["step"], {}).update(enumerate(batch["keys"], start=batch["row"]))
    assert all(sorted(rows) == list(range(GLOBAL_BATCH)) for rows in found.values())
    return {step: [rows[row] for row in range(GLOBAL_BATCH)] for step, rows in found.items()}


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Twenty steps on two ranks, and on one, with a checkpoint after ten."""
    folders = {ranks: tmp_path_factory.mktemp(f"undisturbed_{ranks}") for ranks in (2, 1)}
    for ranks, folder in folders.items():
        start(folder, ranks, LAST)
    return folders


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_real_run_goes_on(
    before: int, after: int, start: Start, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    interrupted_after_half(undisturbed[before], tmp_path)
    printed = start(tmp_path, after, LAST)
    assert f"step_{HALF:08d}, saved by {before} ranks, on {after}" in printed
    expected, found = rows_of(undisturbed[before]), rows_of(tmp_path)
    steps = range(HALF + 1, LAST + 1)
    differences = {
        name: max(abs(expected[step][name] - found[step][name]) for step in steps)
        for name in ("loss", "grad_norm", "lr")
    }
    print(f"\n{before} -> {after}: largest difference over {len(steps)} steps: {differences}")
    print(f"losses undisturbed: {[expected[step]['loss'] for step in steps]}")
    assert differences["loss"] <= 1e-5
    assert differences["lr"] == 0.0
    assert samples_of(tmp_path) == {step: samples_of(undisturbed[before])[step] for step in range(HALF, LAST)}
    average = largest_difference(tmp_path / "run", undisturbed[before] / "run", "student_ema.safetensors")
    weights = largest_difference(tmp_path / "run", undisturbed[before] / "run", "student.safetensors")
    print(f"weights at step {LAST}: {weights:.2e}, their average: {average:.2e}")
    assert max(weights, average) <= 1e-4


def interrupted_after_half(undisturbed: Path, folder: Path) -> None:
    """A copy of the run as it would lie there had it been killed after its first checkpoint."""
    shutil.copytree(undisturbed / "run", folder / "run")
    shutil.rmtree(folder / "run" / "attempts" / "0001" / f"step_{LAST:08d}")
    for name in ("complete.json", "student.safetensors", "student_ema.safetensors"):
        (folder / "run" / name).unlink()


def largest_difference(a: Path, b: Path, name: str) -> float:
    from safetensors.torch import load_file

    one, other = load_file(a / name), load_file(b / name)
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)
