"""Models by their texts: what each becomes, and how mistakes are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fdscale.config.errors import SettingsError
from fdscale.diagnostics.models import asked_models, build_subjects, not_finite
from fdscale.students.files import write_weights
from fdscale.students.student import Student

CPU = torch.device("cpu")
TINY = "timm:test_vit"
Saved = Callable[..., Student]


def mistakes(*texts: str, names: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        build_subjects(asked_models(texts, names), CPU)
    return caught.value.problems


@pytest.mark.parametrize("family", ["beit", "vit", "swin_v2"])
@pytest.mark.parametrize("ending", ["", "/student.safetensors"], ids=["folder", "file"])
def test_a_students_folder_or_file_is_that_student(saved: Saved, family: str, ending: str, tmp_path: Path) -> None:
    student, pixels = saved(tmp_path / "run", family), torch.rand(2, 3, 32, 32)
    (subject,) = build_subjects(asked_models([f"{tmp_path}/run{ending}"]), CPU)
    assert (subject.name, subject.head) == ("run", None)
    assert torch.equal(subject.tokens(pixels), student(pixels))
    assert not any(parameter.requires_grad for parameter in subject.network.parameters())


@pytest.mark.parametrize("new_norm", [False, True])
def test_a_run_brings_its_classifier(saved: Saved, new_norm: bool, tmp_path: Path) -> None:
    student, pixels = saved(tmp_path), torch.rand(2, 3, 32, 32)
    head = nn.Linear(32, 5)
    held = {f"head.{name}": value.detach() for name, value in head.state_dict().items()}
    norm = student.backbone.norm
    assert isinstance(norm, nn.Module)
    if new_norm:  # as a fine-tuning leaves it: in both files, and trained behind the pooling
        held |= {f"fc_norm.{name}": value.clone() for name, value in norm.state_dict().items()}
        student.backbone.norm = nn.Identity()
    write_weights(held, tmp_path / "classifier.safetensors")
    (subject,) = build_subjects(asked_models([str(tmp_path)]), CPU)
    pooled = student(pixels)[:, student.prefix_tokens :].mean(dim=1)
    assert subject.head is not None
    logits = subject.head(subject.pooled(pixels))
    assert torch.allclose(logits, head(norm(pooled) if new_norm else pooled), atol=1e-6)


def test_networks_by_name_are_random_where_that_is_asked_for() -> None:
    named = [TINY + "=random", "timm:resnet18=random"]
    first, second = build_subjects(asked_models(named), CPU)
    assert (first.name, second.name) == ("test_vit (random)", "resnet18 (random)")
    assert first.tokens(torch.rand(1, 3, 160, 160)).shape[0] == 1


def test_a_file_in_its_original_layout_fills_a_network_by_name(tmp_path: Path) -> None:
    import timm

    network = timm.create_model("test_vit", num_classes=0, global_pool="").eval()
    write_weights(network.state_dict(), tmp_path / "vit.safetensors")
    (subject,) = build_subjects(asked_models([f"{TINY}={tmp_path}/vit.safetensors"]), CPU)
    pixels = torch.rand(1, 3, 160, 160)
    assert torch.allclose(subject.tokens(pixels), network(subject.network.prepare(pixels)), atol=1e-5)  # type: ignore[operator]


def test_names_are_those_given_or_distinct(saved: Saved, tmp_path: Path) -> None:
    saved(tmp_path / "run")
    text = f"{tmp_path}/run"
    assert [one.name for one in asked_models([text, text])] == ["run", "run (2)"]
    assert [one.name for one in asked_models([text, text], ["before", "after"])] == ["before", "after"]


def test_all_mistakes_of_all_models_are_told_at_once(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.pt").write_bytes(b"")
    saved(tmp_path / "run")
    told = mistakes(
        "clip_vit_b6=random",
        "timm:vit_bas_patch16_224=random",
        "test_vit=random",
        "runs/nothing",
        f"{tmp_path}/empty",
        f"{tmp_path}/some.pt",
        f"{tmp_path}/run=random",
        TINY,
        f"{TINY}={tmp_path}/missing.pt",
    )
    wanted = [
        "did you mean 'clip_vit_b16'?",
        "timm has no model 'vit_bas_patch16_224'; did you mean 'vit_base_patch16_224",
        "did you mean 'timm:test_vit=random'?",
        "runs/nothing: no such file or folder",
        "no student.safetensors in it",
        "other files as NAME=",
        "has its own weights; leave =random out",
        f"{TINY}: which weights? Nothing is downloaded here",
        "no such file",
    ]
    assert len(told) == len(wanted)
    assert [part for problem, part in zip(told, wanted, strict=True) if part not in problem] == []
    assert not any("teacher" in problem.replace("TEACHER=", "") for problem in told)


def test_a_student_by_another_networks_name_is_told_to_come_alone(saved: Saved, tmp_path: Path) -> None:
    saved(tmp_path / "run")
    file = tmp_path / "run" / "student.safetensors"
    for name, weights in {"vit_s16": file, "clip_vit_b16": file, TINY: file, "vit_b16": tmp_path / "run"}.items():
        assert mistakes(f"{name}={weights}") == [
            f"{name}={weights}: {weights} is a student and no {name}; name it alone, {weights}"
        ]


def test_published_weights_of_a_student_are_told_to_be_imported(saved: Saved, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "student.json").unlink()
    (told,) = mistakes(f"{TINY}={tmp_path}/student.safetensors")
    assert told.endswith("run `fdscale import` on it and name the student file that it leaves")


def test_weights_that_are_no_student_are_told_what_is_missing(saved: Saved, tmp_path: Path) -> None:
    saved(tmp_path, classes=3)
    write_weights({"head.weight": torch.zeros(3, 32)}, tmp_path / "other.safetensors")
    assert mistakes(f"{tmp_path}/classifier.safetensors", f"{tmp_path}/other.safetensors") == [
        f"{tmp_path}/classifier.safetensors: a run's classifier is no network; "
        f"name {tmp_path}/student.safetensors, which it comes with",
        f"{tmp_path}/other.safetensors: no other.json beside it, which tells a student's network; "
        f"weights of a named one as NAME={tmp_path}/other.safetensors",
    ]


def test_names_that_do_not_fit_are_told() -> None:
    assert mistakes(TINY + "=random", names=("a", "b")) == [
        "--name: given 2 times for 1 models; give one for each, in their order, or none"
    ]
    assert mistakes(*[TINY + "=random"] * 2, names=("a", "a")) == ["--name a: given twice; each model needs its own"]


def test_files_that_do_not_fit_their_networks_are_told_together(saved: Saved, tmp_path: Path) -> None:
    saved(tmp_path / "run")
    write_weights({"head.weight": torch.zeros(3, 7)}, tmp_path / "run" / "classifier.safetensors")
    write_weights({"nothing": torch.zeros(1)}, tmp_path / "other.safetensors")
    told = mistakes(f"{tmp_path}/run", f"{TINY}={tmp_path}/other.safetensors")
    assert len(told) == 2
    assert "not the classifier of a student of width 32" in told[0]


def test_weights_that_are_no_numbers_are_counted(saved: Saved, tmp_path: Path) -> None:
    saved(tmp_path)
    (subject,) = build_subjects(asked_models([str(tmp_path)]), CPU)
    assert not_finite(subject) is None
    with torch.no_grad():
        subject.backbone.get_parameter("blocks.1.mlp.fc1.weight")[:2, 0] = float("nan")
    assert not_finite(subject) == "2 of its weights are NaN or infinite, the first in backbone.blocks.1.mlp.fc1.weight"
