"""From networks to a trained student: loaders, engine, schedule, the loop, the result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from fdscale.build.run import Run
from fdscale.config.errors import UserError
from fdscale.data.augment import Augmentation
from fdscale.data.loader import EvalLoader, TrainLoader
from fdscale.data.order import accumulation_steps
from fdscale.students.files import save_student
from fdscale.students.student import Student
from fdscale.terminal import terminal
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import full_state, start_engine
from fdscale.training.evaluate import SampleTerms, evaluate
from fdscale.training.loop import BatchTerms, Plan, Progress, fit
from fdscale.training.optim import Schedule, adamw, parameter_groups
from fdscale.training.sinks import open_sinks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


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
    torch.manual_seed(settings.seed + run.connection.rank.rank)  # a network's own dropout; nothing of ours draws
    engine = _engine(run, module, student, schedule)
    checkpoints = Checkpoints(run.directory.checkpoints, run.connection, settings.checkpoint.keep)
    state = checkpoints.load(engine)
    progress = Progress.resumed(state)
    _record(run, progress, fresh=state is None)
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
            run.stop,
            held_out,
        )
        if done:
            save_result(run, engine, student, progress.step)
            sinks.say(f"complete: {run.directory.student}")
    finally:
        sinks.close()
        run.stop.restore()
    return done


def _record(run: Run, progress: Progress, fresh: bool) -> None:
    """Write down what runs from here; raises UserError when the end asked for lies behind."""
    if progress.step > run.last_step:
        raise UserError(
            f"max_steps={run.settings.max_steps}: this run has {progress.step} steps behind it; "
            "leave max_steps out, or set it higher"
        )
    if not run.connection.rank.is_main:
        return
    if fresh:
        logger.info("a fresh run: the student starts from %s", run.settings.student.weights or "scratch")
    elif changed := run.directory.changed_versions():
        logger.warning("resumed under other versions, bit for bit no longer holds: %s", ", ".join(changed))
    run.directory.record(run.settings, run.deepspeed_json, run.fingerprints())


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


def save_result(run: Run, engine: DeepSpeedEngine, student: Student, step: int) -> None:
    """Write the student file of a completed run from the gathered weights, then mark the run complete."""
    main = run.connection.rank.is_main
    state = full_state(engine, student.backbone, wanted=main)
    if main:
        save_student(student, state, run.directory.folder)
        run.directory.mark_complete(step)
    dist.barrier(group=run.connection.control)
