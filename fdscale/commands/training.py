"""Commands that run a recipe, or say beforehand what running it would mean."""

from __future__ import annotations

import os
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fdscale.cluster.ranks import REQUEUE_EXIT_CODE, USER_ERROR_EXIT_CODE, hold_stop_signals
from fdscale.commands.arguments import Overrides, Recipe, Smoke, settings_of
from fdscale.config.dense_settings import DetectSettings, SegmentSettings
from fdscale.config.programs import AnySettings
from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.imports import importing
from fdscale.planning.cost import EFFICIENCY
from fdscale.terminal import terminal

if TYPE_CHECKING:
    from fdscale.planning.outlook import Outlook


def check(
    recipe: Recipe,
    overrides: Overrides = None,
    smoke: Smoke = False,
    ranks: Annotated[int, typer.Option(help="Ranks the run would have, over all nodes.")] = 1,
) -> None:
    """Validate a recipe, its DeepSpeed JSON and the batch arithmetic; nothing is started."""
    from fdscale.planning.check import load_and_check
    from fdscale.planning.report import plan_table

    settings = settings_of(None, recipe, overrides, smoke)
    plan, _ = load_and_check(settings, ranks)
    terminal().print(plan_table(settings, plan))


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    smoke: Smoke = False,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on each; default: this machine's.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A kind, e.g. H100-80GB, or cpu; default: this machine's.")] = None,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the GPUs' peak that is assumed to be reached.")
    ] = EFFICIENCY,
    json: Annotated[bool, typer.Option("--json", help="One JSON object in place of tables.")] = False,
) -> None:
    """Foresee memory, time and what would fit, for a cluster that need not be at hand; exit code 2 if it does not."""
    from fdscale.planning.outlook import as_json
    from fdscale.planning.outlook_report import outlook_tables

    settings = settings_of(None, recipe, overrides, smoke)
    outlook = outlook_of(settings, recipe, nodes, gpus_per_node, gpu, efficiency)
    if json:
        print(dumps(as_json(outlook), indent=2))
    else:
        terminal().print(outlook_tables(outlook))
    raise typer.Exit(0 if outlook.fits else USER_ERROR_EXIT_CODE)


def outlook_of(
    settings: AnySettings,
    recipe: str,
    nodes: int,
    gpus_per_node: int | None,
    gpu: str | None,
    efficiency: float = EFFICIENCY,
) -> Outlook:
    """What the planner foresees of a recipe on a cluster."""
    from fdscale.plan import plan as foresee

    with importing():
        outliner = _outliner(settings.program)
    return foresee(settings, outliner, Path(recipe).stem, nodes, gpus_per_node, gpu, efficiency)


def _outliner(program: str) -> Any:
    """What builds a program's networks in shapes alone."""
    match program:
        case "distill":
            from fdscale.train import outline
        case "finetune":
            from fdscale.downstream.classify import outline  # type: ignore[assignment]
        case "segment":
            from fdscale.downstream.segment import outline  # type: ignore[assignment]
        case _:
            from fdscale.downstream.detect import outline  # type: ignore[assignment]
    return outline


def distill(recipe: Recipe, overrides: Overrides = None, smoke: Smoke = False) -> None:
    """Distil a teacher into a student on this rank (a launcher starts the ranks)."""
    hold_stop_signals(os.environ)
    settings = settings_of("distill", recipe, overrides, smoke)
    assert isinstance(settings, DistillSettings)
    with importing():
        from fdscale.train import distill as run

    _leave(run(settings))


def finetune(recipe: Recipe, overrides: Overrides = None, smoke: Smoke = False) -> None:
    """Fine-tune a student with labels on this rank (a launcher starts the ranks)."""
    hold_stop_signals(os.environ)
    settings = settings_of("finetune", recipe, overrides, smoke)
    assert isinstance(settings, FinetuneSettings)
    with importing():
        from fdscale.downstream.classify import finetune as run

    _leave(run(settings))


def segment(recipe: Recipe, overrides: Overrides = None, smoke: Smoke = False) -> None:
    """Fine-tune a student for semantic segmentation on this rank (a launcher starts the ranks)."""
    hold_stop_signals(os.environ)
    settings = settings_of("segment", recipe, overrides, smoke)
    assert isinstance(settings, SegmentSettings)
    with importing():
        from fdscale.downstream.segment import segment as run

    _leave(run(settings))


def detect(recipe: Recipe, overrides: Overrides = None, smoke: Smoke = False) -> None:
    """Fine-tune a student for object detection on this rank (a launcher starts the ranks)."""
    hold_stop_signals(os.environ)
    settings = settings_of("detect", recipe, overrides, smoke)
    assert isinstance(settings, DetectSettings)
    with importing():
        from fdscale.downstream.detect import detect as run

    _leave(run(settings))


def _leave(complete: bool) -> None:
    """Exit 0 when the run is complete, 85 ("requeue me") when a signal stopped it."""
    raise typer.Exit(0 if complete else REQUEUE_EXIT_CODE)
