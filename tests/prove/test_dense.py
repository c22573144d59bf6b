"""ADE20K and COCO in miniature: rendered scenes in both layouts, learned by one process, and by two under ZeRO-3.

`python -m pytest -m prove tests/prove/test_dense.py` writes docs/measurements/dense_miniature.json and .md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.downstream.dense_runs import engine_json, told
from tests.prove.page import REPOSITORY, Page

pytestmark = [pytest.mark.prove, pytest.mark.timeout(5400)]

MEASURED = ("fdscale", "tests/prove/test_dense.py")
JUDGED = {
    "segment": {"miou": 0.9},
    "detect": {
        "ap/box/50": 0.9,
        "ap/mask/50": 0.9,
        "ap/box/all": 0.5,
        "ap/mask/all": 0.5,
    },
}
CASES = {  # head: program and settings
    "UperNet": ("segment", []),
    "Mask R-CNN": ("detect", []),
    "Cascade Mask R-CNN": ("detect", ["epochs=6", "head.kind=cascade"]),
    "Mask2Former": (
        "segment",
        [
            "epochs=10",
            "head.kind=mask2former",
            "head.queries=20",
            "head.decoder_layers=3",
        ],
    ),
}
MUST = ("UperNet", "Mask R-CNN")  # of the shipped recipes
MINUTES, STEPS = 6.0, 20
SHORT = {"segment": 3, "detect": 2}  # epochs of the table before and after
HEADS = {"segment": "UperNet", "detect": "Mask R-CNN"}
STARTS = {
    "a SwinV2 from scratch": [],
    "the SwinV2 distilled": ['student={name="student_file", weights="runs/demo/distilled/student.safetensors"}'],
    "its ViT teacher": ['student={name="student_file", weights="runs/demo/teacher/student.safetensors"}'],
}
COLUMNS = ("head", "held out", "training", "again", "ZeRO-3", "rounding")
TITLE = "ADE20K and COCO in miniature"
HOW = (
    "480 rendered scenes to train on and 48 held out, 128 pixels long, in the layouts of ADEChallengeData2016 (eight "
    "classes) and COCO (five categories, crowds, images without objects), which `scenes_segment` and `scenes_detect` "
    "render themselves; SwinV2-G shrunk to 3.1 M parameters, from scratch, one CPU process with two threads. *Again*: "
    "`fdscale evaluate` on what the run left. *ZeRO-3*: the largest difference of the loss in 20 steps between that "
    "process under ZeRO-0 and two ranks under ZeRO-3 with live parameters forced to 0. *Rounding*: the same between "
    "that process and itself with one thread: detectors choose boxes, and a choice that rounding turns grows from 1e-5 "
    "in the first step to this. Rows with epochs: shorter "
    "trainings from what `make demo` leaves. It shows that the path is whole; it says nothing of the real data."
)


def fdscale(*words: str, threads: int = 2) -> None:
    env = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "fdscale", *words]
    answer = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def learned(folder: Path, head: str) -> dict[str, Any]:
    """What one process learns, what its files are worth, and how two divided ranks differ from it."""
    program, settings = CASES[head]
    recipe, run = f"scenes_{program}", folder / "run"
    began = time.perf_counter()
    fdscale(program, recipe, f"run_dir={run}", *settings, "log.every=50")
    minutes = (time.perf_counter() - began) / 60
    found = {name: told(run, f"eval_{name}")[-1] for name in JUDGED[program]}
    fdscale("evaluate", str(run), "--ranks", "1", "--output", str(folder / "again.json"))
    again = json.loads((folder / "again.json").read_text())
    return {
        "found": found,
        "minutes": minutes,
        "again": max(abs(again[name] - value) for name, value in found.items()),
        **differences(folder, program, recipe, settings),
    }


def differences(folder: Path, program: str, recipe: str, settings: list[str]) -> dict[str, float]:
    """The largest difference of the loss in the first steps between one process and two divided ranks (`zero3`).

    `rounding` is that of the same process with one thread in place of two, whose sums round in another order.
    """
    few = [
        *settings,
        "log.every=1",
        f"max_steps={STEPS}",
        "eval.every=0",
        "data.global_batch=8",
    ]
    micro = partial(engine_json, folder, micro_batch=4)
    whole, divided = micro(name="whole", stage=0), micro(name="lean", stage=3)
    for threads, name in ((2, "whole"), (1, "one_thread")):
        fdscale(program, recipe, f"run_dir={folder}/{name}", *few, whole, threads=threads)
    lean = [divided, "student.activation_checkpointing=blocks", "--ranks", "2"]
    fdscale("launch", program, recipe, f"run_dir={folder}/divided", *few, *lean, threads=1)
    losses = {name: told(folder / name, "loss") for name in ("whole", "one_thread", "divided")}
    away = {
        name: max(abs(one - other) for one, other in zip(losses["whole"], values, strict=True))
        for name, values in losses.items()
    }
    return {"zero3": away["divided"], "rounding": away["one_thread"]}


def from_start(folder: Path, program: str, start: str) -> dict[str, Any]:
    """What a short training makes of one start."""
    run, length = folder / "run", f"epochs={SHORT[program]}"
    fdscale(
        program,
        f"scenes_{program}",
        f"run_dir={run}",
        *STARTS[start],
        length,
        "log.every=50",
    )
    return {"found": {name: told(run, f"eval_{name}")[-1] for name in JUDGED[program]}}


def shares(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.removeprefix('ap/').replace('/', ' ')} {value:.1%}" for name, value in row["found"].items()
    )


def test_both_miniatures_are_learned_and_what_is_left_is_as_good(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    page, lines = Page("dense_miniature", MEASURED), []
    for head in CASES:
        row = page.row(head, lambda head=head: learned(tmp_path_factory.mktemp("dense"), head))
        cells = (
            head,
            shares(row),
            f"{row['minutes']:.1f} min",
            f"{row['again']:.0e}",
            f"{row['zero3']:.0e}",
            f"{row['rounding']:.0e}",
        )
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    for program, start in product(SHORT, STARTS):
        row = page.row(
            f"{program}: {start}",
            lambda p=program, s=start: from_start(tmp_path_factory.mktemp("from"), p, s),
        )
        cells = (
            f"{HEADS[program]}, {SHORT[program]} epochs from {start}",
            shares(row),
            "",
            "",
            "",
            "",
        )
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    page.write_table(TITLE, HOW, COLUMNS, lines)
    for head in CASES:
        row = page.rows[head]
        assert row["again"] <= 1e-6, head
        assert row["zero3"] <= max(1e-4, 3 * row["rounding"]), head
    for head in MUST:
        row = page.rows[head]
        for name, least in JUDGED[CASES[head][0]].items():
            assert row["found"][name] >= least, (head, name)
        assert row["minutes"] <= MINUTES, head
