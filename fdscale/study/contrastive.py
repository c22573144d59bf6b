"""A contrastive teacher: SimCLR (Chen et al. 2020) as a program of the study's own, through the one loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fdscale.build.networks import as_pixels, seeded, student_of
from fdscale.build.run import open_run
from fdscale.build.shards import held_out_means, shard_loader, shards_of
from fdscale.build.training import train
from fdscale.config.settings import FinetuneSettings
from fdscale.data.batches import Batch
from fdscale.data.draws import Purpose, generator
from fdscale.students.student import Student

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

TEMPERATURE = 0.2
# Of two strengths tried on a seed of its own; the stronger one (twice as much of each) gave 0.85 instead of 0.88.
ROTATION, SHEAR = 0.2, 0.1  # radians
SIDE = (0.8, 1.0)  # of the view, in sides of the image
CONTRAST, BRIGHTNESS, NOISE = 0.2, 0.1, 0.05


def contrast(settings: FinetuneSettings) -> bool:
    """Train a network to know two views of an image among those of others; True when the run is complete.

    The settings are those of a fine-tuning whose labels nobody reads; `classes` is the width in which views are
    compared. What is saved is the network alone: the projection head is dropped, as in SimCLR.
    """
    run = open_run(settings, shards_of(settings))
    if run.is_complete():
        return True
    student = student_of(run)
    with seeded(settings.seed):
        module = Contrast(student, settings.classes)

    def two_views(engine: DeepSpeedEngine, batch: Batch, step: int) -> dict[str, Tensor]:
        """One micro batch: how well the second view of each image is told from those of all others."""
        pixels = as_pixels(batch.images)
        return engine(torch.cat([view_of(pixels, batch.rows, settings.seed, step, which) for which in (0, 1)]))

    def held_out_batch(engine: DeepSpeedEngine, batch: Batch) -> dict[str, Tensor]:
        """The features of each held-out image, for the k-NN."""
        return engine(as_pixels(batch.images))

    loader, measured = shard_loader(run, settings, student), held_out_means(run, settings, student, held_out_batch)
    return train(run, module, student, loader, two_views, measured)


class Contrast(nn.Module):
    """Pixels of two views (2B, 3, H, W) -> `loss` and `accuracy`; in evaluation `features` (B, C) of each image."""

    def __init__(self, student: Student, width: int) -> None:
        super().__init__()
        self.student = student
        self.projection = nn.Sequential(nn.Linear(student.width, student.width), nn.ReLU())
        self.projection.append(nn.Linear(student.width, width))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.student(pixels)[:, self.student.prefix_tokens :].float().mean(dim=1)
        return info_nce(self.projection(features)) if self.training else {"features": features}


def info_nce(projected: Tensor, temperature: float = TEMPERATURE) -> dict[str, Tensor]:
    """InfoNCE of two views, (2B, C) with rows i and i + B of one image: SimCLR's NT-Xent (equation 1).

    `accuracy` is the share of views whose partner is the nearest of all 2B - 1 others.
    """
    unit = F.normalize(projected.float(), dim=1)
    likeness = unit @ unit.T / temperature
    likeness = likeness.masked_fill(torch.eye(len(unit), dtype=torch.bool, device=unit.device), -torch.inf)
    partner = torch.arange(len(unit), device=unit.device).roll(len(unit) // 2)
    accuracy = (likeness.detach().argmax(dim=1) == partner).float().mean()
    return {"loss": F.cross_entropy(likeness, partner), "accuracy": accuracy}


def view_of(pixels: Tensor, rows: slice, seed: int, step: int, which: int) -> Tensor:
    """A view of each image, (B, 3, H, W) in [0, 1]: turned, sheared, cropped, of another contrast, noisy.

    `which` (0 or 1) is drawn from (seed, row of the global batch, step) alone: the same on any number of ranks.
    """
    draws = [generator(seed, 2 * row + which, step, Purpose.CONTRAST) for row in range(rows.start, rows.stop)]
    matrices = torch.from_numpy(np.stack([_affine(draw) for draw in draws])).to(pixels)
    grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    gain, lift = (torch.from_numpy(values).to(pixels).view(-1, 1, 1, 1) for values in _tones(draws))
    noise = torch.from_numpy(np.stack([draw.normal(0, NOISE, pixels.shape[2:]) for draw in draws])).to(pixels)
    return ((moved - 0.5) * gain + 0.5 + lift + noise.unsqueeze(1)).clamp(0, 1)


def _affine(draw: np.random.Generator) -> NDArray[np.float64]:
    """Where the view's corners lie in the image, (2, 3), both of them from -1 to 1."""
    angle, shear, side = draw.uniform(-ROTATION, ROTATION), draw.uniform(-SHEAR, SHEAR), draw.uniform(*SIDE)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    move = draw.uniform(-1, 1, (2, 1)) * abs(1 - side)
    return np.hstack([side * turn @ np.array([[1, shear], [0, 1]]), move])


def _tones(draws: list[np.random.Generator]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    gains = [draw.uniform(1 - CONTRAST, 1 + CONTRAST) for draw in draws]
    return np.array(gains), np.array([draw.uniform(-BRIGHTNESS, BRIGHTNESS) for draw in draws])
