"""`fdscale` on every rank, with faults put in from outside: `torchrun … faulty_run.py distill RECIPE …`.

Rank 1 reads slowly; three steps in a row are not finite, once; the save of step 8 does not come to an end.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from PIL import Image

from fdscale.cli import main
from fdscale.data.images import ImageReader, Stored
from fdscale.training import loop
from fdscale.training.checkpoint import Checkpoints

SECONDS_A_SAMPLE = 0.04
NOT_FINITE = {5, 6, 7}  # steps, counted from 0
HANGING_SAVE, HANGING_SECONDS = 8, 300.0

opened, train_step, save = ImageReader.opened, loop.train_step, Checkpoints.save


def open_slowly(self: ImageReader, sample: int, stored: Stored) -> Image.Image:
    if os.environ["RANK"] == "1":
        time.sleep(SECONDS_A_SAMPLE)
    return opened(self, sample, stored)


def step_without_numbers(engine: Any, batch_terms: Any, micro_batches: Any, step: int, *phase: Any) -> Any:
    def broken(*arguments: Any) -> Any:
        return {name: value * torch.nan for name, value in batch_terms(*arguments).items()}

    terms = broken if step in NOT_FINITE else batch_terms
    NOT_FINITE.discard(step)
    return train_step(engine, terms, micro_batches, step, *phase)


def save_for_long(self: Checkpoints, engine: Any, step: int, state: Any) -> Any:
    if step == HANGING_SAVE:
        time.sleep(HANGING_SECONDS)
    return save(self, engine, step, state)


if __name__ == "__main__":
    ImageReader.opened, loop.train_step, Checkpoints.save = open_slowly, step_without_numbers, save_for_long
    sys.exit(main())
