"""What cannot be measured is left out with its reason; what our own code did not foresee is told as that."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

import fdscale
from fdscale.config.errors import UserError
from fdscale.diagnostics.catching import CatchingAttention

logger = logging.getLogger(__name__)

# what any network raises when it is run in another way than it expects, and what is computed of it
FAILURES = (
    *(UserError, RuntimeError, ValueError, ArithmeticError),
    *(TypeError, AttributeError, LookupError, AssertionError),
)
PACKAGE, TORCH = Path(fdscale.__path__[0]), Path(torch.__path__[0])

T = TypeVar("T")


def tried(compute: Callable[[], T], failed: dict[str, str], part: str) -> T | None:
    """What `compute` gives; None where it fails, or did before, with the reason in `failed`."""
    if part in failed:
        return None
    try:
        return compute()
    except FAILURES as error:
        failed[part] = reason_of(error)
    return None


def reason_of(error: Exception) -> str:
    """An error's text in one line; where our own code raised what it did not foresee, also where.

    The traceback of such an error is logged: it may be a mistake of ours, which shall not pass for a property of the
    network.
    """
    place = _place(error)
    if isinstance(error, UserError) or place is None:
        return sentence_of(error)
    logger.error("left out, for an error that was not foreseen; if it is a fault of fdscale's:", exc_info=error)
    return f"{type(error).__name__} at {place}, which was not foreseen: {sentence_of(error)}"


def _place(error: Exception) -> str | None:
    """`FILE:LINE` of our own code that raised an error, or had torch do what raised it; None of anybody else's."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    frame = next(each for each in frames if not Path(each.filename).is_relative_to(TORCH) and not _hands_on(each))
    file = Path(frame.filename)
    return f"{file.relative_to(PACKAGE.parent)}:{frame.lineno}" if file.is_relative_to(PACKAGE) else None


def _hands_on(frame: traceback.FrameSummary) -> bool:
    """Whether it only passes on what a network asks of torch."""
    return frame.name == CatchingAttention.__torch_function__.__name__


def sentence_of(error: Exception) -> str:
    """An error's text in one line, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
