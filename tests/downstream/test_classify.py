"""Fine-tuning on warm ranks, with everything that the official configurations use: ranks, resuming, what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import FinetuneSettings
from fdscale.data.batches import EvalBatches
from fdscale.data.index import load_index
from fdscale.data.loader import EvalLoader
from fdscale.data.packing.pack import pack
from fdscale.downstream.classifier import Classifier
from fdscale.downstream.classify import finetune, seen_as_clip
from fdscale.students.files import load_weights, save_student
from fdscale.students.geometry import file_geometry, student_geometry
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
    given = [f"run_dir={run_dir}", f"data.shards={digits}", "max_steps=4", "log.every=1", "checkpoint.every=100"]
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
    assert len(losses) == 4
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
    for last in (2, 4):
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
    assert rows_of(tmp_path / "run", "lr") == pytest.approx([1e-6, 1e-6, *(1e-6 + i * climb for i in (1, 2))])


@pytest.mark.parametrize("normalisation", ["training", "clip"])
@pytest.mark.parametrize("norm", ["student", "after_pooling"])
def test_the_files_of_a_run_evaluate_as_the_run_did(
    norm: str, normalisation: str, tmp_path: Path, digits: Path, few_digits: Path, two_ranks: Any
) -> None:
    run_dir = tmp_path / "run"
    held_out = [f"eval.shards={few_digits}", f"eval.normalisation={normalisation}", f"head.norm={norm}"]
    two_ranks(tuned, str(run_dir), str(digits), *SMALL_VIT, "optim.lr=1e-2", "optim.warmup_epochs=0", *held_out)
    student = build_student(file_geometry(run_dir / "student.safetensors"))
    load_weights(student, run_dir / "student.safetensors")
    classifier = Classifier(student, 10, 0.0, norm).eval()  # type: ignore[arg-type]
    classifier.load_state_dict(load_file(run_dir / "classifier.safetensors"), strict=False)
    index = load_index(few_digits)
    (batch,) = EvalLoader(EvalBatches(index, 32, "bicubic"), len(index), 0, 1, len(index), 0, torch.device("cpu"))
    if normalisation == "clip":
        student.mean, student.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    logits = classifier.logits(batch.images.float() / 255).detach()
    assert rows_of(run_dir, "eval_loss") == [pytest.approx(float(F.cross_entropy(logits, batch.labels)), abs=1e-5)]
    accuracy = float((logits.argmax(dim=1) == batch.labels).float().mean())
    assert rows_of(run_dir, "eval_accuracy") == [pytest.approx(accuracy, abs=1e-6)]


def test_training_is_the_same_whatever_evaluation_normalises_with(
    tmp_path: Path, digits: Path, few_digits: Path, two_ranks: Any
) -> None:
    losses = []
    for normalisation in ("training", "clip"):
        run_dir = tmp_path / normalisation
        given = ["eval.every=2", f"eval.shards={few_digits}", f"eval.normalisation={normalisation}"]
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


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, digits: Path, one_rank: Any) -> Path:
    """A fine-tuned ViT of 32 pixels, with a norm after pooling."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    one_rank(tuned, str(folder), str(digits), *SMALL_VIT, "head.norm=after_pooling", SEEN)
    return folder


def test_it_goes_on_from_a_fine_tuned_run_at_another_size(
    earlier: Path, tmp_path: Path, digits: Path, few_digits: Path, two_ranks: Any
) -> None:
    """Everything is kept: what is evaluated before it learns is the earlier classifier at the new size."""
    given = [f"student.weights={earlier}/student.safetensors", "student.name=student_file", "student.image_size=48"]
    head = ["head.norm=after_pooling", f"head.weights={earlier}/classifier.safetensors"]
    rate = ["optim.lr=1e-30", "optim.warmup_lr=0", "optim.min_lr=0", "max_steps=1", f"eval.shards={few_digits}"]
    all_given = [*given, "student.resize=true", *head, *rate]
    assert two_ranks(tuned, str(tmp_path / "run"), str(digits), *all_given) == [True, True]
    student = build_student(file_geometry(tmp_path / "run" / "student.safetensors"))
    assert student.image_size == 48
    load_weights(student, earlier / "student.safetensors", resize=True)
    classifier = Classifier(student, 10, 0.0, "after_pooling").eval()
    classifier.load_state_dict(load_file(earlier / "classifier.safetensors"), strict=False)
    index = load_index(few_digits)
    (batch,) = EvalLoader(EvalBatches(index, 48, "bicubic"), len(index), 0, 1, len(index), 0, torch.device("cpu"))
    loss = float(F.cross_entropy(classifier.logits(batch.images.float() / 255).detach(), batch.labels))
    assert rows_of(tmp_path / "run", "eval_loss") == [pytest.approx(loss, abs=1e-5)]
    assert loss > 2.4  # far from that of a new head
    recorded = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert recorded["head"]["path"] == f"{earlier}/classifier.safetensors"


def test_a_norm_is_kept_and_the_linear_layer_new_where_the_classes_are_others(
    earlier: Path, tmp_path: Path, digits: Path, one_rank: Any
) -> None:
    given = [f"student.weights={earlier}/student.safetensors", "student.name=student_file", "classes=12"]
    head = ["head.norm=after_pooling", f"head.weights={earlier}/classifier.safetensors", "head.keep=norm"]
    still = ["optim.lr=1e-30", "optim.warmup_lr=0", "optim.min_lr=0", "optim.weight_decay=0", "max_steps=1"]
    assert one_rank(tuned, str(tmp_path / "run"), str(digits), *given, *head, *still) == [True]
    before, after = (load_file(folder / "classifier.safetensors") for folder in (earlier, tmp_path / "run"))
    assert torch.equal(before["fc_norm.weight"], after["fc_norm.weight"])
    assert after["head.weight"].shape == (12, 32)
    assert float(after["head.weight"].abs().max()) < 1e-3


REFUSED = {
    "another size": (["student.image_size=48"], "holds image_size 32 (settings: 48); set student.resize=true"),
    "another student": (["student.geometry.depth=3"], "holds depth 2 (settings: 3)"),
    "resized, but another student": (
        ["student.geometry.depth=3", "student.image_size=48", "student.resize=true"],
        "holds depth 2 (settings: 3); set student.geometry to match",
    ),
    "a size that its patches do not divide": (
        ["student.image_size=44", "student.resize=true"],
        "image_size 44 is not a multiple of patch_size 8",
    ),
    "other classes": (
        ["head.norm=after_pooling", "head.weights={earlier}/classifier.safetensors", "classes=12"],
        'classes: got 12, but {earlier}/classifier.safetensors has 10: for a new linear layer set head.keep="norm"',
    ),
    "another kind of head": (
        ["head.weights={earlier}/classifier.safetensors"],
        'is of a head with head.norm="after_pooling"; set that, or leave head.weights out',
    ),
    "no classifier": (
        ["head.norm=after_pooling", "head.weights={earlier}/student.safetensors"],
        "allowed: the classifier.safetensors of an earlier fine-tuning",
    ),
    "no file": (["head.weights=absent"], "head.weights: absent cannot be read"),
    "nothing to keep": (["head.keep=norm"], 'head.keep: got "norm" without head.weights'),
    "too few classes": (["classes=9"], "classes: got 9, but data.shards has label 9; allowed: at least 10"),
    "held-out labels out of range": (
        ["classes=10", "eval.shards={eleven}"],
        "classes: got 10, but eval.shards has label 10; allowed: at least 11",
    ),
    "a synset that is held out alone": (
        ["data.shards={eleven}", "classes=12", "eval.shards={twelve}"],
        "eval.shards: its 12 classes are not the 11 of data.shards (with unknown n00000011)",
    ),
    "a synset that is not held out": (
        ["data.shards={twelve}", "classes=12", "eval.shards={eleven}"],
        "eval.shards: its 11 classes are not the 12 of data.shards (without n00000011), so that one number means two",
    ),
    "held-out images without labels": (
        ["eval.shards={flat}"],
        "eval.shards: 4 of 4 samples have no label; fine-tuning needs one for each",
    ),
}


def image_folder(folder: Path, classes: int) -> Path:
    """An image of each class, or four without, in shards."""
    for number in range(classes or 4):
        place = folder / "images" / (f"n{number:08d}" if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / f"{number}.png")
    pack(folder / "images", folder / "shards", 100)
    return folder / "shards"


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_a_run_begins(
    case: str, earlier: Path, tmp_path: Path, digits: Path
) -> None:
    overrides, told = REFUSED[case]
    places = {"earlier": str(earlier)}
    for name, classes in (("eleven", 11), ("twelve", 12), ("flat", 0)):
        if any(f"{{{name}}}" in text for text in overrides):
            places[name] = str(image_folder(tmp_path / name, classes))
    given = [text.format(**places) for text in (f"student.weights={earlier}/student.safetensors", *overrides)]
    settings = settings_of(str(tmp_path / "run"), str(digits), *SMALL_VIT, *given)
    with pytest.raises(UserError) as error:
        finetune(settings)
    assert told.format(**places) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_size_that_a_window_cannot_take(tmp_path: Path, digits: Path) -> None:
    geometry = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    student = build_student(student_geometry("swinv2_b", 32, geometry))
    path = save_student(student, student.backbone.state_dict(), tmp_path / "student")
    given = ["student.name=student_file", f"student.weights={path}", "student.image_size=40", "student.resize=true"]
    with pytest.raises(UserError, match="stage 0: window_size 4 does not divide its 10x10 map"):
        finetune(settings_of(str(tmp_path / "run"), str(digits), *given))
