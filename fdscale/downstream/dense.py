"""What segmentation and detection share: micro batches, held-out images one by one, draws, the moving average."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fdscale.build.result import AVERAGED
from fdscale.build.run import Run
from fdscale.build.training import Measured
from fdscale.config.programs import DenseSettings
from fdscale.data.loader import EvalLoader, MicroBatches, TrainLoader, check_bad_ratio
from fdscale.planning.dense_check import SCENES
from fdscale.students.files import new_folder
from fdscale.students.student import Student
from fdscale.training.engine import Connection, averaged_weights, gather_lists, has_average
from fdscale.training.guards import Guards
from fdscale.training.run_directory import RunDirectory
from fdscale.training.watchdog import PATIENCE

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

SHOWN = 10  # names of a rank's images that could not be read
SCENES_MADE = (480, 48)  # embedded scenes: to train on, held out

Look = Callable[[Any, Iterator[Any], str], dict[str, float]]
"""Measures a network in evaluation mode, or the engine around it, on this rank's held-out images; all ranks call it.

The text ends the names of what is written beside: "" or AVERAGED."""


def dense_loader(run: Run[Any, Any], batches: MicroBatches) -> TrainLoader:
    """The training micro batches of this rank."""
    rank, workers = run.connection.rank, run.settings.data.workers
    return TrainLoader(batches, run.order, rank.rank, rank.world_size, run.micro_batch, workers, run.device)


def image_loader(batches: MicroBatches, images: int, workers: int, connection: Connection) -> EvalLoader:
    """Held-out images one by one, equally many on every rank: some may be padding."""
    rank = connection.rank
    return EvalLoader(batches, images, rank.rank, rank.world_size, 1, workers, connection.device)


def by_parts(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's terms as the table of metrics has them: `loss_class` is `loss_part/class` there."""
    return {f"loss_part/{name[5:]}" if name.startswith("loss_") else name: value for name, value in terms.items()}


def mean_of(student: Student) -> tuple[float, float, float]:
    """The colour, from 0 to 1, that a student normalises to zero."""
    red, green, blue = student.mean.flatten().tolist()
    return red, green, blue


def as_bytes(colour: tuple[float, float, float]) -> tuple[float, float, float]:
    """The same colour from 0 to 255."""
    red, green, blue = (255 * part for part in colour)
    return red, green, blue


def seed_network(seed: int, step: int, rows: slice) -> None:
    """Let what a network draws itself (sampled boxes and points, dropout) come from this micro batch alone.

    So it computes the same on any number of ranks, and after a resume.
    """
    state = np.random.SeedSequence((seed, step, rows.start)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def measured_by(look: Look, loader: EvalLoader, settings: DenseSettings) -> Measured:
    """What `look` measures, as `eval_` metrics, and again as `eval_ema_` ones where a moving average is kept."""

    def watched(guards: Guards) -> Iterator[Any]:
        yield from readable(guards.marking(loader), settings.data.max_bad_ratio, guards.connection)
        guards.mark("evaluating", None, PATIENCE, "measuring what was found")

    def measured(engine: DeepSpeedEngine, guards: Guards) -> dict[str, float]:
        engine.eval()
        found = {f"eval_{name}": value for name, value in look(engine, watched(guards), "").items()}
        if settings.optim.ema_decay and has_average(engine):
            with averaged_weights(engine):
                averaged = look(engine, watched(guards), AVERAGED)
            found |= {f"eval_ema_{name}": averaged[name] for name in averaged if name.startswith(("miou", "ap/"))}
        return found

    return measured


def rendered(directory: RunDirectory, connection: Connection, write: Callable[[Path, int, int], object]) -> Path:
    """The folder of the embedded scenes in the run directory, written whole by the main rank if it is not there."""
    folder = directory.folder / SCENES

    def render() -> None:
        if not folder.exists():
            with new_folder(folder) as making:
                write(making, *SCENES_MADE)

    connection.on_main(render)
    return folder


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Write what only helps people to see; where that fails it is said, and training goes on."""
    try:
        path.parent.mkdir(exist_ok=True)
        write(path)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)


def readable(images: Iterator[Any], max_ratio: float, connection: Connection) -> Iterator[Any]:
    """The images of this rank, what cannot be decoded said; in the end all ranks hold it against what there was.

    All ranks must read theirs to the end. Raises UserError as `check_readable`.
    """
    seen = 0
    left_out: list[str] = []
    for image in images:
        for bad in image.bad:
            logger.warning("held-out image left out, it cannot be decoded: %s", bad)
        seen += image.valid
        left_out += image.bad
        yield image
    check_readable(len(left_out), left_out, seen + len(left_out), max_ratio, connection)


def check_readable(bad: int, names: Sequence[str], images: int, max_ratio: float, connection: Connection) -> None:
    """Raise UserError on every rank where the ranks together could not read more than `max_ratio` of the images.

    `bad` of this rank's `images` could not be read, and have these `names`; all ranks must call this.
    """
    parts = gather_lists([(bad, list(names[:SHOWN]), images)], connection)
    shown = [name for _, some, _ in parts for name in some]
    check_bad_ratio(sum(part[0] for part in parts), sum(part[2] for part in parts), max_ratio, shown)
