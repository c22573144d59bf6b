"""Settings to things that run: what every program does around the loop.

Starting has an order, written here once: settings are checked without torch and memory is compared with what the
machine has; the run directory is opened; the networks are built; then this run is resumed, or the student starts
from weights, or from scratch. The log names the branch.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdscale.cluster.ranks import rank_from_environment
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.settings import DistillSettings, FinetuneSettings, StudentSettings, TeacherSettings
from fdscale.data.augment import Augmentation
from fdscale.data.batches import Batch
from fdscale.data.index import Index, load_index
from fdscale.data.loader import EvalLoader, TrainLoader
from fdscale.data.order import GlobalOrder, accumulation_steps
from fdscale.data.pack import pack_digits
from fdscale.planning.start import check_start
from fdscale.students.files import load_weights, save_student
from fdscale.students.geometry import file_geometry, student_geometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.teachers.teacher import Float32LayerNorm, Teacher, build_teacher
from fdscale.terminal import terminal
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, compute_dtype, connect, full_state, start_engine
from fdscale.training.evaluate import evaluate
from fdscale.training.loop import BatchTerms, Plan, Progress, fit
from fdscale.training.optim import Schedule, adamw, parameter_groups
from fdscale.training.run_directory import RunDirectory
from fdscale.training.sinks import open_sinks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

DIGITS = "digits"  # as data.shards or eval.shards: the embedded sample, packed into the run directory
SampleTerms = Callable[["DeepSpeedEngine", Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class Run:
    """One attempt at a run: who we are, where it is kept, what it reads."""

    settings: DistillSettings | FinetuneSettings
    deepspeed_json: dict[str, Any]
    connection: Connection
    directory: RunDirectory
    index: Index
    held_out: Index | None

    @property
    def device(self) -> torch.device:
        return self.connection.device

    @property
    def micro_batch(self) -> int:
        return int(self.deepspeed_json["train_micro_batch_size_per_gpu"])

    @property
    def order(self) -> GlobalOrder:
        return GlobalOrder(len(self.index), self.settings.data.global_batch, self.settings.seed)

    @property
    def total_steps(self) -> int:
        """Steps of the schedule."""
        return math.ceil(self.settings.epochs * self.order.steps_per_epoch)

    @property
    def last_step(self) -> int:
        """The step at which this attempt ends, unless it is stopped."""
        return min(self.total_steps, self.settings.max_steps or self.total_steps)

    def is_complete(self) -> bool:
        """Whether an earlier attempt finished this run (said in the log)."""
        done = self.directory.completed_steps()
        if done is None or done < self.last_step:
            return False
        logger.info("already complete at step %d: %s", done, self.directory.student)
        return True


@contextmanager
def open_run(settings: DistillSettings | FinetuneSettings, samples: int | None = None) -> Iterator[Run]:
    """Check everything, join the other ranks and open the run directory; `samples` trains on that many only.

    Raises UserError before anything is written or a GPU is touched.
    """
    assert settings.run_dir, "the command line names a run directory"
    rank = rank_from_environment(os.environ)
    deepspeed_json = load_deepspeed_json(settings.deepspeed)
    check_start(settings, deepspeed_json, rank.world_size, rank.local_world_size)
    directory = RunDirectory(Path(settings.run_dir))
    directory.check(settings, deepspeed_json)
    connection = connect(rank)
    dist.barrier(group=connection.control)  # every rank has looked before the first one writes
    if rank.is_main:
        directory.record(settings, deepspeed_json)
    index = _open_shards(settings.data.shards, "train", directory, connection)
    if samples is not None:
        index = _first(index, samples, settings.seed)
    held_out = settings.eval.shards and _open_shards(settings.eval.shards, "test", directory, connection)
    yield Run(settings, deepspeed_json, connection, directory, index, held_out or None)


def _open_shards(
    shards: str, split: Literal["train", "test"], directory: RunDirectory, connection: Connection
) -> Index:
    if shards != DIGITS:
        return load_index(shards)
    folder = directory.folder / "digits" / split
    if connection.rank.is_main and not folder.exists():
        pack_digits(folder, split)
    dist.barrier(group=connection.control)
    return load_index(folder)


def _first(index: Index, samples: int, seed: int) -> Index:
    """A subset of `samples` samples, drawn by `seed`: few labels, the same ones for every network compared."""
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(index))[:samples]
    return replace(index, samples=index.samples[np.sort(chosen)])


def prepare_student(settings: StudentSettings, seed: int) -> Student:
    """The student of the settings, from scratch or from a student file's weights."""
    geometry = student_geometry(settings.name, settings.image_size, settings.geometry, settings.weights)
    student = build_student(geometry, settings.drop_path, seed)
    set_activation_checkpointing(student, settings.activation_checkpointing)
    if settings.weights:
        load_weights(student, Path(settings.weights))
        logger.info("student %s starts from %s", settings.name, settings.weights)
    return student


def prepare_teacher(settings: TeacherSettings, run: Run) -> Teacher:
    """The frozen teacher of the settings, in the run's precision."""
    dtype = compute_dtype(run.deepspeed_json)
    if settings.name == "student_file":
        teacher = _teacher_from_student(Path(str(settings.weights)))
        teacher.backbone.to(dtype)
        return teacher
    return build_teacher(
        settings.name, settings.weights, settings.image_size, settings.geometry, settings.after_norm, dtype
    )


def _teacher_from_student(weights: Path) -> Teacher:
    """A distilled or fine-tuned student as the next teacher."""
    geometry = file_geometry(weights)
    student = build_student(geometry)
    load_weights(student, weights)
    mean, std = (tuple(values.flatten().tolist()) for values in (student.mean, student.std))
    return Teacher(
        student.backbone,
        width=student.width,
        grid=student.grid,
        prefix_tokens=student.prefix_tokens,
        mean=mean,
        std=std,
        image_size=student.image_size,
        final_norm=_take_norm(student.backbone),
    )


def _take_norm(backbone: nn.Module) -> Float32LayerNorm | None:
    """The final norm, apart, so that it is computed in fp32; None where the network names it in another way."""
    if not isinstance(backbone.norm, nn.LayerNorm):
        return None
    norm = Float32LayerNorm.of(backbone.norm)
    backbone.norm = nn.Identity()
    return norm


def as_pixels(images: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W) -> pixels fp32 in [0, 1]."""
    return images.float() / 255


def train(
    run: Run,
    module: nn.Module,
    student: Student,
    batch_terms: BatchTerms,
    sample_terms: SampleTerms,
) -> bool:
    """Train `module` (which holds `student`) to the run's last step and save the student; False when stopped."""
    settings, log = run.settings, run.settings.log
    schedule = _schedule(run)
    engine = _engine(run, module, student, schedule)
    checkpoints = Checkpoints(run.directory.checkpoints, run.connection, settings.checkpoint.keep)
    state = checkpoints.load(engine)
    progress = Progress.resumed(state)
    held_out = _held_out(run, engine, student.image_size, sample_terms)
    sinks = open_sinks(
        run.connection.rank,
        run.directory.folder,
        settings.program,
        run.last_step,
        progress.step if state else None,
        log.prometheus_host,
        log.prometheus_port,
        terminal(),
    )
    try:
        loader = _train_loader(run, student.image_size)
        done = fit(
            engine,
            batch_terms,
            loader,
            schedule,
            _plan(run),
            run.connection,
            checkpoints,
            sinks,
            progress,
            held_out,
        )
        if done:
            save_result(run, engine, student)
            sinks.say(f"complete: {run.directory.student}")
    finally:
        sinks.close()
    return done


def _engine(run: Run, module: nn.Module, student: Student, schedule: Schedule) -> DeepSpeedEngine:
    optim = run.settings.optim
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    wanted = student.undecayed_parameters()
    undecayed = {names[id(p)] for name, p in student.backbone.named_parameters() if name in wanted}
    module.to(run.device)
    groups = parameter_groups(module, optim.weight_decay, undecayed)
    optimizer = adamw(groups, schedule.for_step(0), optim.betas, optim.eps)
    accumulation = accumulation_steps(run.settings.data.global_batch, run.connection.rank.world_size, run.micro_batch)
    return start_engine(module, optimizer, run.deepspeed_json, accumulation, optim.clip)


def _schedule(run: Run) -> Schedule:
    optim = run.settings.optim
    scale = run.settings.data.global_batch / optim.reference_batch if optim.reference_batch else 1.0
    warmup_steps = round(optim.warmup_epochs * run.order.steps_per_epoch)
    return Schedule(run.total_steps, warmup_steps, optim.lr * scale, optim.warmup_lr * scale, optim.min_lr * scale)


def _plan(run: Run) -> Plan:
    settings = run.settings
    return Plan(
        last=run.last_step,
        steps_per_epoch=run.order.steps_per_epoch,
        global_batch=settings.data.global_batch,
        log_every=settings.log.every,
        eval_every=settings.eval.every,
        checkpoint_every=settings.checkpoint.every,
        samples=len(run.index),
        max_bad_ratio=settings.data.max_bad_ratio,
    )


def _train_loader(run: Run, image_size: int) -> TrainLoader:
    data, rank = run.settings.data, run.connection.rank
    augmentation = Augmentation(data.crop_scale, data.crop_ratio, data.interpolation, data.flip)
    return TrainLoader(
        run.index,
        run.order,
        rank.rank,
        rank.world_size,
        run.micro_batch,
        image_size,
        augmentation,
        run.settings.seed,
        data.workers,
        run.device,
    )


def _held_out(
    run: Run, engine: DeepSpeedEngine, image_size: int, sample_terms: SampleTerms
) -> Callable[[], dict[str, float]] | None:
    if run.held_out is None:
        return None
    data, rank = run.settings.data, run.connection.rank
    loader = EvalLoader(
        run.held_out,
        rank.rank,
        rank.world_size,
        run.micro_batch,
        image_size,
        data.interpolation,
        data.workers,
        run.device,
    )
    return lambda: evaluate(engine, sample_terms, loader, run.settings.eval.knn)


def save_result(run: Run, engine: DeepSpeedEngine, student: Student) -> None:
    """Write the student file of a completed run from the gathered weights, then mark the run complete."""
    main = run.connection.rank.is_main
    state = full_state(engine, student.backbone, wanted=main)
    if main and student.geometry is not None:
        save_student(student, state, run.directory.folder)
    if main:
        run.directory.mark_complete(run.last_step)
    dist.barrier(group=run.connection.control)
