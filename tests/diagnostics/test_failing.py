"""Why something could not be measured, in a line; our own mistakes with their place, and their traceback in the log."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fdscale.data.index import load_index
from fdscale.diagnostics.catching import CatchingAttention
from fdscale.diagnostics.cka import KernelAlignment
from fdscale.diagnostics.failing import tried

TOKENS = torch.zeros(2, 3)


def under_watch() -> None:
    """A network's own mistake, which passes through what catches its attention."""
    with CatchingAttention(lambda _: None):
        F.linear(TOKENS, torch.zeros(4, 5))


def fails() -> None:
    raise TypeError("four images\nat most")


def says_nothing() -> None:
    raise AssertionError


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (fails, "four images at most"),
        (says_nothing, "AssertionError"),
        (under_watch, "mm: mat1 and mat2 shapes cannot be multiplied"),
        (lambda: load_index(Path("nowhere")), "shard folder nowhere does not exist"),
    ],
)
def test_what_a_network_or_a_user_gets_wrong_is_told_in_a_line(
    compute: Callable[[], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    failed: dict[str, str] = {}
    assert tried(compute, failed, "features") is None
    assert failed["features"].startswith(reason)
    assert not caplog.records


@pytest.mark.parametrize(
    ("compute", "told"),
    [
        (lambda: KernelAlignment("one", "other").update([torch.ones(4, 2)], [torch.ones(5, 2)]), "RuntimeError"),
        (lambda: KernelAlignment("one", "other").update(None, []), "TypeError"),  # type: ignore[arg-type]
    ],
)
def test_what_our_own_code_gets_wrong_is_told_with_its_place_and_logged(
    compute: Callable[[], None], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    failed: dict[str, str] = {}
    assert tried(compute, failed, "features") is None
    assert re.match(rf"{told} at fdscale/diagnostics/cka.py:\d+, which was not foreseen: ", failed["features"])
    assert f"{told}: " in caplog.text


def test_what_failed_is_not_tried_again() -> None:
    assert tried(fails, {"features": "before"}, "features") is None
