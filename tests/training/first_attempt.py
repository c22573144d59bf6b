"""An attempt in a folder of a test's, for what saves and loads checkpoints without a whole run."""

from __future__ import annotations

from pathlib import Path

from fdscale.training.attempts import Attempt


def first_attempt(folder: str | Path) -> Attempt:
    """Attempt 1 there; every rank may ask for it."""
    Path(folder, "0001").mkdir(exist_ok=True)
    return Attempt(Path(folder, "0001"))
