"""From networks to a trained student: loaders, engine, schedule, the loop, the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fdscale.build.exports import exports_of, monitor_of
from fdscale.build.result import BACKBONE, Save, save_backbone, save_result
from fdscale.build.run import Run
from fdscale.build.run_info import open_live
from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.config.errors import UserError
from fdscale.config.settings import DistillSettings, FinetuneSettings, OptimSettings
from fdscale.data.augment import FILTERS, Augmentation
from fdscale.data.loader import EvalLoader, TrainLoader
from fdscale.data.order import accumulation_steps
from fdscale.data.randaugment import RandAugment
from fdscale.students.files import describe_student
from fdscale.students.student import Student
from fdscale.teachers.teacher import Teacher
from fdscale.terminal import terminal
from fdscale.training.amplitudes import Amplitudes
from fdscale.training.average import keep_average
from fdscale.training.canary import Canary, chip_of
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import parameter_dtype, start_engine
from fdscale.training.evaluate import SampleTerms, evaluate, evaluate_average
from fdscale.training.guards import Guards
from fdscale.training.live import Live
from fdscale.training.loop import UNWATCHED, BatchTerms, Plan, Watch, fit
from fdscale.training.optim import Schedule, adamw, layer_scales, parameter_groups
from fdscale.training.partition import divide, is_divided
from fdscale.training.progress import Progress
from fdscale.training.sinks import Sinks, open_sinks
from fdscale.training.watchdog import PATIENCE

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


WatchOf = Callable[["DeepSpeedEngine", Sinks, int], Watch]


def train(
    run: Run,
    module: nn.Module,
    student: Student,
    batch_terms: BatchTerms,
    sample_terms: SampleTerms,
    save: Save = save_backbone,
    watch_of: WatchOf | None = None,
    teachers: Mapping[str, Teacher] | None = None,
) -> bool:
    """Train `module` (whose `student` this is) to the run's last step and save it; False when stopped.

    `watch_of` makes what the loop puts around a step; `teachers`, by the setting that names each, are looked after.
    """
    chosen = run.settings.guards
    try:
        with (
            run.attempt,
            exports_of(run, live := open_live(run)) as exports,
            Guards(run.connection, run.attempt.folder, chosen.hang_seconds, chosen.skipped_in_a_row, live) as guards,
        ):
            done = _fit(run, module, student, batch_terms, sample_terms, save, watch_of, teachers or {}, guards)
            exports.done = done
            stopped_by = run.stop.received.name if run.stop.received else "a peer, or as its launcher died"
            run.attempt.end(0 if done else REQUEUE_EXIT_CODE, "complete" if done else f"stopped by {stopped_by}")
    finally:
        run.stop.restore()
    return done


def _fit(
    run: Run,
    module: nn.Module,
    student: Student,
    batch_terms: BatchTerms,
    sample_terms: SampleTerms,
    save: Save,
    watch_of: WatchOf | None,
    teachers: Mapping[str, Teacher],
    guards: Guards,
) -> bool:
    settings = run.settings
    loader = _train_loader(run, student)
    schedule = schedule_of(settings.optim, settings.data.global_batch, run.order.steps_per_epoch, run.total_steps)
    torch.manual_seed(settings.seed + run.connection.rank.rank)  # a network's own dropout; nothing of ours draws
    guards.mark("starting", None, PATIENCE, "starting the engine")
    engine = _engine(run, module, student, schedule)
    kept = settings.checkpoint
    checkpoints = Checkpoints(run.attempt, run.connection, kept.keep, kept.keep_every, kept.verify_every)
    progress, fresh = _resumed(run, student, checkpoints, engine, guards)
    sinks = _sinks(run, engine, None if fresh else progress.step, guards.live)
    try:
        guards.amplitudes = Amplitudes(student.backbone)
        _set_out_canary(run, teachers, guards)
        held_out = _held_out(run, engine, student.image_size, sample_terms, guards)
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
            guards,
            watch_of(engine, sinks, progress.step) if watch_of else UNWATCHED,
        )
        if done:
            guards.mark("writing the result", progress.step, PATIENCE)
            save_result(run, engine, module, student, save, progress.step)
            sinks.say(f"complete: {run.directory.student}")
    finally:
        sinks.close()
    return done


def _resumed(
    run: Run, student: Student, checkpoints: Checkpoints, engine: DeepSpeedEngine, guards: Guards
) -> tuple[Progress, bool]:
    """Where this run goes on from, in the engine, too; and whether nothing was there."""
    guards.mark("starting", None, PATIENCE, "loading the checkpoint")
    state = checkpoints.load(engine)
    guards.note_commit()
    progress = Progress.resumed(state)
    _record(run, student, progress, fresh=state is None)
    return progress, state is None


def _set_out_canary(run: Run, teachers: Mapping[str, Teacher], guards: Guards) -> None:
    chosen = run.settings.guards
    if chosen.canary and teachers:
        guards.mark("looking at the teachers", None, PATIENCE)
        file = run.directory.folder / "canary.json"
        guards.canary = Canary(teachers, run.placements, run.connection, chip_of(run.device), file)
        guards.canary_every = chosen.canary_every


def _sinks(run: Run, engine: DeepSpeedEngine, resumed_step: int | None, live: Live) -> Sinks:
    folder, program, monitor = run.directory.folder, run.settings.program, monitor_of(run, engine, live)
    return open_sinks(run.connection.rank, folder, program, run.last_step, resumed_step, terminal(), live, monitor)


def _record(run: Run, student: Student, progress: Progress, fresh: bool) -> None:
    """Write down what runs from here; raises UserError when the end asked for lies behind."""
    if progress.step > run.last_step:
        raise UserError(
            f"max_steps={run.settings.max_steps}: this run has {progress.step} steps behind it; "
            "leave max_steps out, or set it higher"
        )
    run.connection.on_main(lambda: _write_down(run, student, fresh))


def _write_down(run: Run, student: Student, fresh: bool) -> None:
    if fresh:
        logger.info("a fresh run: the student starts from %s", run.settings.student.weights or "scratch")
    elif changed := run.directory.changed_versions():
        logger.warning("resumed under other versions, bit for bit no longer holds: %s", ", ".join(changed))
    run.directory.record(run.settings, run.deepspeed_json, run.fingerprints())
    describe_student(student, run.directory.student)


def _engine(run: Run, module: nn.Module, student: Student, schedule: Schedule) -> DeepSpeedEngine:
    optim = run.settings.optim
    module.to(run.device)
    if any(is_divided(parameter) for parameter in module.parameters()):  # what stands beside a divided student, too
        divide(module, run.deepspeed_json, run.connection, parameter_dtype(run.deepspeed_json))
    optimizer = adamw(optimizer_groups(module, student, optim), schedule.for_step(0), optim.betas, optim.eps)
    if optim.ema_decay:
        keep_average(optimizer, optim.ema_decay)
    accumulation = accumulation_steps(run.settings.data.global_batch, run.connection.rank.world_size, run.micro_batch)
    return start_engine(module, optimizer, run.deepspeed_json, accumulation, optim.clip)


def optimizer_groups(module: nn.Module, student: Student, optim: OptimSettings) -> list[dict[str, Any]]:
    """The parameter groups of a module with a `student`: its rules by name, everything else as the head's layer."""
    undecayed = student.undecayed_parameters()
    if not optim.decay_position_bias:
        undecayed |= student.position_bias_parameters()
    scales = {} if optim.layer_decay == 1 else layer_scales(_layers(student, optim), student.layers, optim.layer_decay)
    full = {BACKBONE + name: scale for name, scale in scales.items()}
    return parameter_groups(module, optim.weight_decay, {BACKBONE + name for name in undecayed}, full)


def _layers(student: Student, optim: OptimSettings) -> dict[str, int]:
    """Layer numbers by the backbone's names; the official implementation counts a shared bias table to the head's."""
    layers = student.layer_ids()
    if optim.shared_position_bias_layer == "stem":
        shared = {name for name in student.position_bias_parameters() if layers[name] == student.layers}
        layers |= dict.fromkeys(shared, 0)
    return layers


def schedule_of(optim: OptimSettings, global_batch: int, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The schedule of a run, its rates scaled from the recipe's reference batch to the global one."""
    scale = global_batch / optim.reference_batch if optim.reference_batch else 1.0
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    rates = (optim.lr * scale, optim.warmup_lr * scale, optim.min_lr * scale)
    return Schedule(total_steps, warmup_steps, *rates, scaled=optim.layer_decay_scales)


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


def _train_loader(run: Run, student: Student) -> TrainLoader:
    data, rank = run.settings.data, run.connection.rank
    return TrainLoader(
        run.index,
        run.order,
        rank.rank,
        rank.world_size,
        run.micro_batch,
        student.image_size,
        augmentation(run.settings, student),
        run.settings.seed,
        data.workers,
        run.device,
    )


def augmentation(settings: DistillSettings | FinetuneSettings, student: Student) -> Augmentation:
    """How one view of an image is made for this student; RandAugment is fine-tuning's."""
    data = settings.data
    policy = settings.augment.randaugment if isinstance(settings, FinetuneSettings) else None
    mean = tuple(student.mean.flatten().tolist())
    distorted = RandAugment(policy, student.image_size, mean, FILTERS[data.interpolation]) if policy else None
    return Augmentation(data.crop_scale, data.crop_ratio, data.interpolation, data.flip, distorted)


def _held_out(
    run: Run, engine: DeepSpeedEngine, image_size: int, sample_terms: SampleTerms, guards: Guards
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

    def measured() -> dict[str, float]:
        found = evaluate(engine, sample_terms, guards.marking(loader), run.settings.eval.knn)
        if run.settings.optim.ema_decay:
            found |= evaluate_average(engine, sample_terms, guards.marking(loader))
        return found

    return measured
