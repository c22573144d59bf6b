"""A start's phases add up to the time that passed, and what no run needs is not imported on the way to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from fdscale.cluster.orphans import NOTED, process_start
from fdscale.training.startup import Startup, note_command, since_boot, this_start

UNNEEDED = """
import sys, fdscale.train
from fdscale.training.engine import quiet_deepspeed
deepspeed = quiet_deepspeed()
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
import deepspeed.runtime.zero.muon.original_muon as muon
from deepspeed.runtime import compiler
assert compiler.compile.__module__ == compiler.__name__, "compiling is as it was"
assert "__compatible_ops__" not in vars(deepspeed.ops), "each operation was tried with a compiler"
print({"torch._inductor.compile_fx", "transformers", "sklearn", "scipy", "matplotlib", "open_clip"} & set(sys.modules))
"""


def test_phases_add_up_to_the_time_that_passed() -> None:
    began = since_boot()
    startup = Startup(began)
    for phase in ("imports", "preflight", "data", "preflight"):
        time.sleep(0.01)
        startup.ends(phase)
    ended = since_boot()
    assert list(startup.seconds) == ["imports", "preflight", "data"]
    assert startup.seconds["preflight"] >= 0.02
    assert 0.04 <= sum(startup.seconds.values()) <= ended - began


def test_it_is_told_in_the_order_of_its_phases() -> None:
    startup = Startup(since_boot(), {"launchers": 1.25, "imports": 3.0, "canary": 0.01, "engine": 0.5})
    assert startup.told() == "started in 4.8 s: launchers 1.2, imports 3.0, engine 0.5"


def test_a_run_begins_with_the_process_of_its_command_and_the_next_one_where_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, ticks = process_start(os.getpid()), os.sysconf("SC_CLK_TCK")
    assert own is not None
    monkeypatch.setenv(NOTED, f"77:{own - 3 * ticks} 66:{own - 5 * ticks}")
    note_command(os.environ)
    first, second = this_start(), this_start()
    first.ends("imports")
    second.ends("imports")
    assert first.seconds["launchers"] == pytest.approx(5)
    assert first.seconds["imports"] == pytest.approx(since_boot() - own / ticks, abs=1)
    assert list(second.seconds) == ["imports"]
    assert second.seconds["imports"] < 1


def test_what_no_run_needs_is_not_imported() -> None:
    ended = subprocess.run([sys.executable, "-c", UNNEEDED], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().splitlines()[-1] == "set()"
