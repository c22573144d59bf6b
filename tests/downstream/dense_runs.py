"""Small dense runs on rendered scenes, for tests on ranks: settings, and what a run has told."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from fdscale.config.recipe import load_recipe
from fdscale.downstream import detect as detect_program
from fdscale.downstream import segment as segment_program
from fdscale.downstream.detect import detect
from fdscale.downstream.evaluate import evaluate
from fdscale.downstream.segment import segment
from fdscale.training.engine import Connection

LEAN = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
SMALL = [
    "student.geometry.embed_dim=16",
    "student.geometry.depths=[1,1,2,1]",
    "student.geometry.num_heads=[1,1,2,2]",
    "student.geometry.extra_norm_period=2",
    "student.drop_path=0.2",
    "head.channels=16",
    "data.global_batch=4",
    "data.crop=64",
    "eval.short_side=64",
    "optim.warmup_epochs=0",
    "optim.layer_decay=0.9",
    "checkpoint.every=100",
    "log.every=1",
    "max_steps=4",
]
SEGMENT = [*SMALL, "eval.crop=64", "eval.stride=40"]
DETECT = [*SMALL, "head.box_width=32", "head.proposals=40", "head.box_samples=16"]
PROGRAMS: dict[str, Any] = {"scenes_segment": (segment, SEGMENT), "scenes_detect": (detect, DETECT)}


def run(_: Connection | None, recipe: str, run_dir: str, *overrides: str) -> bool:
    """Train a miniature on this rank, with all others."""
    program, small = PROGRAMS[recipe]
    complete: bool = program(load_recipe(recipe, [f"run_dir={run_dir}", *small, *overrides]))
    return complete


def measure(_: Connection | None, run_dir: str, *overrides: str) -> dict[str, float]:
    """What a finished run is worth, measured by all ranks."""
    return evaluate(Path(run_dir), overrides)


def engine_json(folder: Path, name: str, stage: int, micro_batch: int = 2) -> str:
    """A DeepSpeed JSON of this stage; under ZeRO-3 nothing stays gathered, as in a giant."""
    path = folder / f"{name}.json"
    zero = {"stage": stage, **(LEAN if stage == 3 else {})}
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero}))
    return f"deepspeed={path}"


def told(run_dir: Path, name: str) -> list[float]:
    """A metric's values, row by row."""
    rows = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]


def run_as_a_giant(_: Connection | None, recipe: str, run_dir: str, *overrides: str) -> bool:
    """The same, its student built by rank 0 alone and divided before heads stand on it."""
    module: Any = {"scenes_segment": segment_program, "scenes_detect": detect_program}[recipe]
    built = module.student_of
    module.student_of = partial(built, whole_up_to=0)
    try:
        return run(None, recipe, run_dir, *overrides)
    finally:
        module.student_of = built
