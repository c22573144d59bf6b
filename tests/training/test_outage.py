"""A way out that fails is told once, counted always, and waited for briefly."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fdscale.training import outage as module
from fdscale.training.live import Live
from fdscale.training.outage import Outage, within

COUNT = "telemetry_failures_total/targets"


def fail() -> None:
    raise OSError(13, "Permission denied")


def test_each_outage_is_one_warning_and_every_failure_counts(caplog: pytest.LogCaptureFixture):
    live = Live()
    outage = Outage(live, "targets")
    for _ in range(3):
        assert not outage.spare("no file", fail)
    (record,) = caplog.records
    assert (record.levelname, record.message) == (
        "WARNING",
        "no file (Permission denied); training goes on without it",
    )
    outage.is_over()
    assert outage.spare("no file", lambda: None)
    assert not outage.spare("no file", fail)
    assert len(caplog.records) == 2
    assert live.values[COUNT] == 4


def test_what_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    os.mkfifo(tmp_path / "hangs")  # opened for writing it waits for a reader, as a share does for its server
    live, began = Live(), time.monotonic()
    assert not Outage(live, "targets").spare("no file", lambda: (tmp_path / "hangs").write_text(""))
    assert time.monotonic() - began < 2
    assert live.values[COUNT] == 1
    (tmp_path / "hangs").read_text()  # lets it go


def test_what_is_raised_inside_is_raised():
    with pytest.raises(OSError, match="Permission"):
        within(5, fail)
