"""From networks to a trained student: loaders, engine, schedule, the loop, the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fdscale.build.exports import exports_of, monitor_of
from fdscale.build.first_step import FirstStep
from fdscale.build.result import Save, save_backbone, save_result
from fdscale.build.run import Run
from fdscale.build.run_info import open_live
from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.config.errors import UserError
from fdscale.config.settings import OptimSettings
from fdscale.data.order import accumulation_steps
from fdscale.students.files import describe_student
from fdscale.students.student import Student
from fdscale.teachers.teacher import Teacher
from fdscale.terminal import terminal
from fdscale.training.amplitudes import Amplitudes
from fdscale.training.average import keep_average
from fdscale.training.canary import Canary, chip_of
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import parameter_dtype, start_engine
from fdscale.training.guards import Guards
from fdscale.training.live import Live
from fdscale.training.loop import UNWATCHED, BatchTerms, Loader, Plan, Watch, fit
from fdscale.training.optim import Schedule, adamw, layer_scales, parameter_groups
from fdscale.training.partition import divide, is_divided
from fdscale.training.progress import Progress
from fdscale.training.sinks import Sinks, open_sinks
from fdscale.training.watchdog import PATIENCE

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


WatchOf = Callable[["DeepSpeedEngine", Sinks, int], Watch]
Measured = Callable[["DeepSpeedEngine", Guards], dict[str, float]]
"""What is measured on held-out data, on all ranks together; the engine is left in evaluation mode."""


def train(
    run: Run[Any, Any],
    module: nn.Module,
    student: Student,
    loader: Loader,
    batch_terms: BatchTerms,
    measured: Measured | None,
    save: Save = save_backbone,
    watch_of: WatchOf | None = None,
    teachers: Mapping[str, Teacher] | None = None,
) -> bool:
    """Train `module` (whose `student` this is) to the run's last step and save it; False when stopped.

    `watch_of` makes what the loop puts around a step; `teachers`, by the setting that names each, are looked after.
    """
    chosen = run.settings.guards
    run.startup.ends("networks")
    try:
        with (
            run.attempt,
            exports_of(run, live := open_live(run)) as exports,
            Guards(run.connection, run.attempt.folder, chosen.hang_seconds, chosen.skipped_in_a_row, live) as guards,
        ):
            done = _fit(run, module, student, loader, batch_terms, measured, save, watch_of, teachers or {}, guards)
            exports.done = done
            stopped_by = run.stop.received.name if run.stop.received else "a peer, or as its launcher died"
            run.attempt.end(0 if done else REQUEUE_EXIT_CODE, "complete" if done else f"stopped by {stopped_by}")
    finally:
        run.stop.restore()
    return done


def _fit(
    run: Run[Any, Any],
    module: nn.Module,
    student: Student,
    loader: Loader,
    batch_terms: BatchTerms,
    measured: Measured | None,
    save: Save,
    watch_of: WatchOf | None,
    teachers: Mapping[str, Teacher],
    guards: Guards,
) -> bool:
    settings = run.settings
    schedule = schedule_of(settings.optim, settings.data.global_batch, run.order.steps_per_epoch, run.total_steps)
    torch.manual_seed(settings.seed + run.connection.rank.rank)  # a network's own dropout; nothing of ours draws
    guards.mark("starting", None, PATIENCE, "starting the engine")
    engine = _engine(run, module, student, schedule)
    kept = settings.checkpoint
    checkpoints = Checkpoints(run.attempt, run.connection, kept.keep, kept.keep_every, kept.verify_every)
    run.startup.ends("engine")
    progress, fresh = _resumed(run, student, checkpoints, engine, guards)
    run.startup.ends("checkpoint")
    sinks = _sinks(run, engine, None if fresh else progress.step, guards.live)
    try:
        guards.amplitudes = Amplitudes(student.backbone)
        _set_out_canary(run, teachers, guards)
        run.startup.ends("canary")
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
            None if measured is None else partial(measured, engine, guards),
            guards,
            FirstStep(run, sinks, watch_of(engine, sinks, progress.step) if watch_of else UNWATCHED),
        )
        if done:
            guards.mark("writing the result", progress.step, PATIENCE)
            save_result(run, engine, module, student, save, progress.step)
            sinks.say(f"complete: {run.directory.folder}")
    finally:
        sinks.close()
    return done


def _resumed(
    run: Run[Any, Any], student: Student, checkpoints: Checkpoints, engine: DeepSpeedEngine, guards: Guards
) -> tuple[Progress, bool]:
    """Where this run goes on from, in the engine, too; and whether nothing was there."""
    guards.mark("starting", None, PATIENCE, "loading the checkpoint")
    state = checkpoints.load(engine)
    guards.note_commit()
    progress = Progress.resumed(state)
    _record(run, student, progress, fresh=state is None)
    return progress, state is None


def _set_out_canary(run: Run[Any, Any], teachers: Mapping[str, Teacher], guards: Guards) -> None:
    chosen = run.settings.guards
    if chosen.canary and teachers:
        guards.mark("looking at the teachers", None, PATIENCE)
        file = run.directory.folder / "canary.json"
        guards.canary = Canary(teachers, run.placements, run.connection, chip_of(run.device), file)
        guards.canary_every = chosen.canary_every


def _sinks(run: Run[Any, Any], engine: DeepSpeedEngine, resumed_step: int | None, live: Live) -> Sinks:
    folder, program, monitor = run.directory.folder, run.settings.program, monitor_of(run, engine, live)
    return open_sinks(run.connection.rank, folder, program, run.last_step, resumed_step, terminal(), live, monitor)


def _record(run: Run[Any, Any], student: Student, progress: Progress, fresh: bool) -> None:
    """Write down what runs from here; raises UserError when the end asked for lies behind."""
    if progress.step > run.last_step:
        raise UserError(
            f"max_steps={run.settings.max_steps}: this run has {progress.step} steps behind it; "
            "leave max_steps out, or set it higher"
        )
    run.connection.on_main(lambda: _write_down(run, student, fresh))


def _write_down(run: Run[Any, Any], student: Student, fresh: bool) -> None:
    if fresh:
        logger.info("a fresh run: the student starts from %s", run.settings.student.weights or "scratch")
    elif changed := run.directory.changed_versions():
        logger.warning("resumed under other versions, bit for bit no longer holds: %s", ", ".join(changed))
    if student.discarded_work:
        logger.info("student.drop_path: %.0f%% of what the blocks compute is discarded", 100 * student.discarded_work)
    run.directory.record(run.settings, run.deepspeed_json, run.fingerprints())
    describe_student(student, run.directory.student)


def _engine(run: Run[Any, Any], module: nn.Module, student: Student, schedule: Schedule) -> DeepSpeedEngine:
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
    """The parameter groups of a module with a `student`: its rules by name, everything else as the head's layer.

    Embeddings (Mask2Former's queries) are not decayed.
    """
    undecayed = student.undecayed_parameters()
    if not optim.decay_position_bias:
        undecayed |= student.position_bias_parameters()
    scales = {} if optim.layer_decay == 1 else layer_scales(_layers(student, optim), student.layers, optim.layer_decay)
    place = place_of(student.backbone, module)
    embeddings = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    full = {place + name: scale for name, scale in scales.items()}
    return parameter_groups(module, optim.weight_decay, embeddings | {place + name for name in undecayed}, full)


def place_of(part: nn.Module, module: nn.Module) -> str:
    """What stands before the names of a part's parameters in a module."""
    return next(name for name, each in module.named_modules() if each is part) + "."


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
    rates = (optim.lr * scale, optim.warmup_lr * scale, optim.min_lr * scale)
    shape = (optim.layer_decay_scales, optim.decay, optim.milestones)
    return Schedule(total_steps, optim.warmup(steps_per_epoch), *rates, *shape)


def _plan(run: Run[Any, Any]) -> Plan:
    settings = run.settings
    return Plan(
        last=run.last_step,
        steps_per_epoch=run.order.steps_per_epoch,
        global_batch=settings.data.global_batch,
        log_every=settings.log.every,
        eval_every=settings.eval.every,
        checkpoint_every=settings.checkpoint.every,
        samples=len(run.samples),
        max_bad_ratio=settings.data.max_bad_ratio,
    )
