"""What the engine or the device cannot do is told in one sentence, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from fdscale.config.errors import SettingsError
from fdscale.config.recipe import load_recipe
from fdscale.planning import engine_check
from fdscale.planning.check import check

JSON: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
FAIRSCALE = "teacher.placement=fairscale"


def problems(*overrides: str, deepspeed_json: dict[str, Any] = JSON, local_ranks: int | None = None) -> list[str]:
    given = ["data.shards=digits", "data.global_batch=8", "teacher.weights=random", *overrides]
    try:
        check(load_recipe("vit_b_clip_b", given), deepspeed_json, 2, local_ranks)
    except SettingsError as error:
        return error.problems
    return []


def test_fairscale_needs_a_gpu_where_the_ranks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(engine_check, "visible_gpus", lambda env: ())
    (told,) = problems(FAIRSCALE, local_ranks=2)
    assert told == "teacher.placement=fairscale needs CUDA, and no GPU is visible here; use zero3"
    assert problems(FAIRSCALE) == []  # a login node plans for others
    assert problems("teacher.placement=zero3", local_ranks=2) == []
    monkeypatch.setattr(engine_check, "visible_gpus", lambda env: (80 * 2**30, 80 * 2**30))
    assert problems(FAIRSCALE, local_ranks=2) == []
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # GPUs are there and not used
    assert len(problems(FAIRSCALE, local_ranks=2)) == 1


def test_each_teacher_is_looked_at() -> None:
    further = ["further_teachers.second.name=dino_vit_b16", "further_teachers.second.weights=random"]
    settings = load_recipe(
        "vit_b_clip_b",
        ["data.shards=digits", "data.global_batch=8", *further, "further_teachers.second.placement=fairscale"],
    )
    (told,) = engine_check.engine_problems(settings, JSON, here=True)
    assert told.startswith("further_teachers.second.placement=fairscale needs CUDA")


def test_offload_under_torch_autocast_is_refused() -> None:
    autocast = {**JSON, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    (told,) = problems("student.activation_checkpointing=offload", deepspeed_json=autocast)
    assert "wrong gradients under torch_autocast" in told
    assert "use 'blocks', or bf16" in told
    assert problems("student.activation_checkpointing=blocks", deepspeed_json=autocast) == []
    assert problems("student.activation_checkpointing=offload") == []
