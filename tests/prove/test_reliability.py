"""Ranks killed at random moments, saves included: the run that goes on is the undisturbed one, bit for bit.

`python -m pytest -m prove tests/prove/test_reliability.py -s` writes docs/measurements/killed_runs.json and .md. Each
run is killed several times before it completes; runs that are on the page already are not repeated.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fdscale.postmortem import post_mortem
from tests.prove.lives import (
    LIFE_SECONDS,
    STEPS,
    Launch,
    Life,
    Undisturbed,
    printed_by,
    steps_of_this_life,
    uncommitted,
)
from tests.prove.page import Page
from tests.prove.reliability import write_reliability
from tests.test_runs import curve

pytestmark = [pytest.mark.prove, pytest.mark.timeout(900)]

RUNS = 10
MOMENTS = ("start-up", "step", "step", "save", "save")  # of the kills of one run, in an order of its own
END_SECONDS = 90
Row = dict[str, Any]


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
    page = Page("killed_runs")
    row = page.row(f"run {number}", lambda: killed_run(launch, tmp_path / "run", undisturbed, number))
    write_page(page)
    write_reliability()
    assert row["same_curve"]
    assert row["same_student"]


def write_page(page: Page) -> None:
    rows = page.rows
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
            "run": key.removeprefix("run "),
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
