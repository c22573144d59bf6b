"""What the loop must know to go on: saved with every checkpoint, equal on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Where a run stands.

    `step` is also the position in the data and in the schedule: the order of samples and the rate are pure functions
    of it. A step whose update was left out counts in it, and in `skipped_steps`. `training_seconds` is the time of all
    steps that count, up to the last row of metrics: what was lost between checkpoints is no longer in it.
    """

    step: int = 0
    bad_samples: int = 0
    bad_this_epoch: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    training_seconds: float = 0.0

    @classmethod
    def resumed(cls, state: Mapping[str, Any] | None) -> Progress:
        """From the state of a loaded checkpoint (which also holds DeepSpeed's own entries); None: a fresh start.

        What an older checkpoint does not know begins at 0.
        """
        return cls(**{name: state[name] for name in vars(cls()) if name in state}) if state else cls()

    def become(self, other: Progress) -> None:
        """Take over another's values, for everyone who holds this one."""
        vars(self).update(vars(other))
