"""Fine-tuning on warm ranks, with everything that the official configurations use: ranks, resuming, what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import FinetuneSettings
from fdscale.data.index import load_index
from fdscale.data.loader import EvalLoader
from fdscale.downstream.classifier import Classifier
from fdscale.downstream.classify import finetune, seen_as_clip
from fdscale.students.files import load_weights
from fdscale.students.geometry import file_geometry
from fdscale.students.student import build_student
from fdscale.teachers.table import CLIP_MEAN, CLIP_STD
from fdscale.training.engine import Connection

SMALL_VIT = [
    "student.name=vit_b16",
    "student.image_size=32",
    "student.geometry.embed_dim=32",
    "student.geometry.depth=2",
    "student.geometry.num_heads=4",
    "student.geometry.patch_size=8",
]
SMALL_SWIN = [
    "student.name=swinv2_b",
    "student.image_size=32",
    "student.geometry.embed_dim=16",
    "student.geometry.depths=[1,1,2]",
    "student.geometry.num_heads=[1,2,4]",
    "student.geometry.window_size=4",
]
OFFICIAL = [
    "student.drop_path=0.3",
    "label_smoothing=0.1",
    "data.flip=0.5",
    "augment.randaugment=rand-m9-mstd0.5-inc1",
    "augment.erasing=0.25",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.images_per_draw=12",  # not of a micro batch's 16
    "optim.clip=5.0",
    "optim.warmup_epochs=0",
]
OFFICIAL_VIT = [
    *SMALL_VIT,
    *OFFICIAL,
    "student.position_bias=per_block",
    "head.norm=after_pooling",
    "optim.layer_decay=0.65",
]
OFFICIAL_SWIN = [*SMALL_SWIN, *OFFICIAL, "optim.layer_decay=0.8"]
SEEN = "head.init_scale=30"  # officially logits start near zero, where every loss is log 10


def settings_of(run_dir: str, digits: str, *overrides: str) -> FinetuneSettings:
    given = [f"run_dir={run_dir}", f"data.shards={digits}", "max_steps=5", "log.every=1", "checkpoint.every=100"]
    settings = load_recipe("digits_finetune", [*given, *overrides])
    assert isinstance(settings, FinetuneSettings)
    return settings


def tuned(connection: Connection, run_dir: str, digits: str, *overrides: str) -> bool | str:
    try:
        return finetune(settings_of(run_dir, digits, *overrides))
    except UserError as error:
        return str(error)


def rows_of(run_dir: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("official", [OFFICIAL_VIT, OFFICIAL_SWIN], ids=["vit", "swin_v2"])
def test_two_ranks_learn_what_one_does(
    official: list[str], tmp_path: Path, digits: Path, one_rank: Any, two_ranks: Any
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert one_rank(tuned, str(alone), str(digits), *official, SEEN) == [True]
    assert two_ranks(tuned, str(together), str(digits), *official, SEEN) == [True, True]
    losses = rows_of(alone, "loss")
    assert len(losses) == 5
    assert max(losses) - min(losses) > 0.05
    assert rows_of(together, "loss") == pytest.approx(losses, abs=1e-5)
    assert rows_of(together, "accuracy") == pytest.approx(rows_of(alone, "accuracy"))


OFF = {
    "student.drop_path": "0",
    "label_smoothing": "0",
    "augment.erasing": "0",
    "augment.mixup": "0",
    "augment.cutmix": "0",
    "augment.images_per_draw": "2",
    "head.norm": "student",
    "optim.layer_decay": "1",
}


def test_each_of_the_official_settings_is_at_work(tmp_path: Path, digits: Path, one_rank: Any) -> None:
    without_policy = [override for override in OFFICIAL_VIT if "randaugment" not in override]
    changed = {"all": OFFICIAL_VIT, "randaugment": without_policy}
    changed |= {name: [*OFFICIAL_VIT, f"{name}={value}"] for name, value in OFF.items()}
    losses = {}
    for name, overrides in changed.items():
        one_rank(tuned, str(tmp_path / name), str(digits), *overrides, SEEN, "max_steps=2")
        losses[name] = tuple(rows_of(tmp_path / name, "loss"))
    assert len(set(losses.values())) == len(changed)


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    two_ranks(tuned, str(whole), str(digits), *OFFICIAL_VIT)
    for last in (2, 5):
        assert two_ranks(tuned, str(stopped), str(digits), *OFFICIAL_VIT, f"max_steps={last}") == [True, True]
    for name in ("loss", "grad_norm", "lr"):
        assert rows_of(stopped, name) == rows_of(whole, name)
    states = [load_file(folder / "student.safetensors") for folder in (whole, stopped)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("official", [OFFICIAL_VIT, OFFICIAL_SWIN], ids=["vit", "swin_v2"])
def test_bf16_stays_close_to_fp32(official: list[str], tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    rounded = tmp_path / "bf16.json"
    zero = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    common = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": zero}
    rounded.write_text(json.dumps({**common, "bf16": {"enabled": True}}))
    two_ranks(tuned, str(tmp_path / "fp32"), str(digits), *official, "head.init_scale=1")
    two_ranks(tuned, str(tmp_path / "bf16"), str(digits), *official, "head.init_scale=1", f"deepspeed={rounded}")
    assert rows_of(tmp_path / "bf16", "loss") == pytest.approx(rows_of(tmp_path / "fp32", "loss"), abs=1e-2)
    kept = load_file(tmp_path / "bf16" / "classifier.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float32}  # the optimizer's masters


def test_the_rate_shown_is_the_heads(tmp_path: Path, digits: Path, one_rank: Any) -> None:
    """Six steps of warm-up from 1e-6 to 2e-3; the first two updates agree."""
    one_rank(tuned, str(tmp_path / "run"), str(digits), *SMALL_VIT, "optim.layer_decay=0.5")
    climb = (2e-3 - 1e-6) / 6
    assert rows_of(tmp_path / "run", "lr") == pytest.approx([1e-6, 1e-6, *(1e-6 + i * climb for i in (1, 2, 3))])


@pytest.mark.parametrize("normalisation", ["training", "clip"])
@pytest.mark.parametrize("norm", ["student", "after_pooling"])
def test_the_files_of_a_run_evaluate_as_the_run_did(
    norm: str, normalisation: str, tmp_path: Path, digits: Path, two_ranks: Any
) -> None:
    run_dir = tmp_path / "run"
    held_out = [f"eval.shards={digits}", f"eval.normalisation={normalisation}", f"head.norm={norm}"]
    two_ranks(tuned, str(run_dir), str(digits), *SMALL_VIT, "optim.lr=1e-2", "optim.warmup_epochs=0", *held_out)
    student = build_student(file_geometry(run_dir / "student.safetensors"))
    load_weights(student, run_dir / "student.safetensors")
    classifier = Classifier(student, 10, 0.0, norm).eval()  # type: ignore[arg-type]
    classifier.load_state_dict(load_file(run_dir / "classifier.safetensors"), strict=False)
    index = load_index(digits)
    (batch,) = EvalLoader(index, 0, 1, len(index), 32, "bicubic", 0, torch.device("cpu"))
    if normalisation == "clip":
        student.mean, student.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    logits = classifier.logits(batch.images.float() / 255).detach()
    assert rows_of(run_dir, "eval_loss") == [pytest.approx(float(F.cross_entropy(logits, batch.labels)), abs=1e-5)]
    accuracy = float((logits.argmax(dim=1) == batch.labels).float().mean())
    assert rows_of(run_dir, "eval_accuracy") == [pytest.approx(accuracy, abs=1e-6)]


def test_training_is_the_same_whatever_evaluation_normalises_with(tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    losses = []
    for normalisation in ("training", "clip"):
        run_dir = tmp_path / normalisation
        given = ["eval.every=2", f"eval.shards={digits}", f"eval.normalisation={normalisation}"]
        two_ranks(tuned, str(run_dir), str(digits), *SMALL_VIT, *given)
        losses.append((rows_of(run_dir, "loss"), rows_of(run_dir, "eval_loss")))
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_seen_as_clip() -> None:
    mean, std = torch.rand(1, 3, 1, 1), torch.rand(1, 3, 1, 1) + 0.1
    pixels = torch.rand(2, 3, 4, 4)
    clip_mean, clip_std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    seen = (seen_as_clip(pixels, mean, std) - mean) / std
    torch.testing.assert_close(seen, (pixels - clip_mean) / clip_std, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("augment.mixup=0.8", "augment.mixup, augment.cutmix: images are mixed in pairs"),
        ("augment.randaugment=rand-q9", "augment.randaugment: got 'rand-q9'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_the_start(
    override: str, problem: str, tmp_path: Path, digits: Path, one_rank: Any
) -> None:
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}))
    (message,) = one_rank(tuned, str(tmp_path / "run"), str(digits), *SMALL_VIT, override, f"deepspeed={odd}")
    assert str(message).startswith(problem)
    assert not (tmp_path / "run").exists()
