"""Ranks killed at random moments, saves included: the run that goes on is the undisturbed one, bit for bit.

`python -m pytest -m prove tests/prove/test_reliability.py -s` writes docs/measurements/reliability.json and .md. Each
run is killed several times before it completes; runs that are on the page already are not repeated.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from fdscale.postmortem import post_mortem
from fdscale.training.metrics import read_rows
from tests.prove.page import Page
from tests.test_runs import curve, ranks_of

pytestmark = [pytest.mark.prove, pytest.mark.timeout(900)]

RUNS, STEPS = 10, 24
MOMENTS = ("start-up", "step", "step", "save", "save")  # of the kills of one run, in an order of its own
LIFE_SECONDS, END_SECONDS = 120, 90
SETTINGS = [
    "swinv2_g",
    "--smoke",
    "student.geometry.depths=[1,1,2,1]",
    "student.geometry.extra_norm_period=2",
    f"max_steps={STEPS}",
    "checkpoint.every=2",
    "log.every=1",
    "guards.attempts=10",  # a kill before the first commit is no crash loop
]
Row = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """How every life of every run is started; `shards` hold the data."""

    shards: Path
    environment: dict[str, str]

    def __call__(self, run: Path) -> subprocess.Popen[bytes]:
        run.parent.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, "-m", "fdscale", "launch", "distill"]
        command = [*program, *SETTINGS, f"run_dir={run}", f"data.shards={self.shards}", "--ranks", "2"]
        with (run.parent / "printed.txt").open("ab") as printed:
            return subprocess.Popen(command, env=self.environment, stdout=printed, stderr=printed)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    from fdscale.data.pack import pack_digits

    shards = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(shards, "test")
    mine = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return Launch(shards, {**os.environ, **mine})


@dataclass(frozen=True)
class Undisturbed:
    """The run that nothing disturbed, and its seconds: from the ranks' start to the end of a step, a step, a save."""

    run: Path
    start_up: float
    step: float
    save: float


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    life = Life(launch(run), run, time.time(), [])
    life.wait_for_ranks()
    ranks_began = time.time()
    assert life.process.wait(LIFE_SECONDS) == 0, printed_by(run)
    rows = read_rows(run / "metrics.jsonl")
    ends = [row["time"] for row in rows if "loss" in row]
    saves = [row["checkpoint_seconds"] for row in rows if "checkpoint_seconds" in row]
    return Undisturbed(run, ends[0] - ranks_began, median(b - a for a, b in pairwise(ends)), median(saves))


def printed_by(run: Path) -> str:
    return (run.parent / "printed.txt").read_text()


def uncommitted(run: Path) -> list[str]:
    """Checkpoint folders without a manifest: a save is under way, or was lost."""
    folders = [folder for folder in run.rglob("step_*") if folder.is_dir()]
    return sorted(str(folder.relative_to(run)) for folder in folders if not (folder / "manifest.json").exists())


def steps_of_this_life(run: Path, since: float) -> int:
    rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    return sum("loss" in row and row["time"] >= since for row in rows)


@dataclass
class Life:
    """One start of a run, which is to be killed."""

    process: subprocess.Popen[bytes]
    run: Path
    began: float
    before: list[str]

    def goes_on(self) -> bool:
        assert time.time() - self.began < LIFE_SECONDS, printed_by(self.run)
        time.sleep(0.002)
        return self.process.poll() is None

    def wait_for_ranks(self) -> dict[int, int]:
        while self.goes_on() and len(ranks_of(self.process.pid)) < 2:
            pass
        return ranks_of(self.process.pid)

    def wait_for_steps(self, count: int, at_most: float = LIFE_SECONDS) -> None:
        end = time.time() + at_most
        while self.goes_on() and time.time() < end and steps_of_this_life(self.run, self.began) < count:
            pass

    def saving(self) -> list[str]:
        return [folder for folder in uncommitted(self.run) if folder not in self.before]

    def wait_for_a_save(self) -> None:
        while self.goes_on() and not self.saving():
            pass


def named_by_doctor(life: Life, rank: int) -> bool | None:
    """Whether `fdscale doctor RUN` says that this rank ended the attempt; None when none had been claimed yet."""
    if not any(folder.stat().st_ctime >= life.began for folder in life.run.glob("attempts/*/attempt.json")):
        return None
    last = [line for line in post_mortem(life.run) if line.startswith("attempt ")][-1]
    return f": rank {rank} on " in last


def kill_once(launch: Launch, run: Path, moment: str, draw: random.Random, usual: Undisturbed) -> Row:
    """One life, ended by SIGKILL of a random rank at a random instant of such a moment; what was seen."""
    life = Life(launch(run), run, time.time(), uncommitted(run))
    ranks = life.wait_for_ranks()
    if moment == "start-up":
        life.wait_for_steps(1, draw.uniform(0, usual.start_up))  # with warm caches it may be over sooner
    elif moment == "step":
        life.wait_for_steps(draw.choice((1, 2, 3)))
        time.sleep(draw.uniform(0, usual.step))
    else:
        life.wait_for_a_save()
        time.sleep(draw.uniform(0, usual.save))
    rank, saving = draw.choice((0, 1)), life.saving()
    os.kill(ranks[rank], signal.SIGKILL)
    seconds, steps = time.time() - life.began, steps_of_this_life(run, life.began)
    code = life.process.wait(END_SECONDS)
    lost = [folder for folder in uncommitted(run) if folder not in life.before]
    row = {"moment": moment, "rank": rank, "seconds": round(seconds, 2), "steps": steps, "code": code}
    return {**row, "save_under_way": bool(saving), "save_lost": bool(lost), "named": named_by_doctor(life, rank)}


def killed_run(launch: Launch, run: Path, undisturbed: Undisturbed, number: int) -> Row:
    """A run that is killed again and again, then left alone until it is complete."""
    draw, began = random.Random(number), time.time()
    kills = []
    for moment in draw.sample(MOMENTS, len(MOMENTS)):
        kills.append(kill_once(launch, run, moment, draw, undisturbed))
        print(f"run {number}: {kills[-1]}", flush=True)
        assert kills[-1]["code"] not in (0, 2, 85), printed_by(run)
    assert launch(run).wait(LIFE_SECONDS) == 0, printed_by(run)
    student = "student.safetensors"
    return {
        "kills": kills,
        "same_curve": curve(run) == curve(undisturbed.run) and len(curve(run)) == STEPS,
        "same_student": (run / student).read_bytes() == (undisturbed.run / student).read_bytes(),
        "minutes": round((time.time() - began) / 60, 1),
    }


@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(
    number: int, launch: Launch, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    page = Page("reliability")
    row = page.row(f"killed run {number}", lambda: killed_run(launch, tmp_path / "run", undisturbed, number))
    write_page(page)
    assert row["same_curve"]
    assert row["same_student"]


def write_page(page: Page) -> None:
    rows = {key: row for key, row in page.rows.items() if key.startswith("killed run")}
    kills = [kill for row in rows.values() for kill in row["kills"]]
    saving, lost = (sum(kill[name] for kill in kills) for name in ("save_under_way", "save_lost"))
    claimed, named = (sum(kill.get("named") in wanted for kill in kills) for wanted in ((True, False), (True,)))
    how = (
        f"SIGKILL of a random rank of two at {len(kills)} seeded random moments of {len(rows)} runs of {STEPS} steps, "
        f"with a checkpoint every second step; a save was under way at {saving} of them, and {lost} were left "
        "uncommitted. Compared with a run that nothing disturbed: loss and gradient norm of every step, and every byte "
        f"of the student file. `fdscale doctor` named the killed rank in {named} of the {claimed} attempts."
    )
    lines = [
        {
            "run": key.removeprefix("killed run "),
            "killed in (rank, after seconds)": ", ".join(_told(kill) for kill in row["kills"]),
            "curve": "equal" if row["same_curve"] else "differs",
            "student file": "equal" if row["same_student"] else "differs",
        }
        for key, row in rows.items()
    ]
    page.write_table("Killed runs", how, tuple(lines[0]), lines)


def _told(kill: Row) -> str:
    saving = ", save under way" if kill["save_under_way"] else ""
    return f"{kill['moment']} ({kill['rank']}, {kill['seconds']:.1f} s{saving})"
