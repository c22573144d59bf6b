"""A classifier divided over ranks is the one of a single process: losses, gradients, and what is held out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from fdscale.data.batches import EvalBatches
from fdscale.data.index import load_index
from fdscale.data.loader import EvalLoader
from fdscale.downstream.classifier import Classifier
from fdscale.students.files import load_weights, save_student
from fdscale.students.geometry import SwinV2Geometry, ViTGeometry, file_geometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.training.engine import Connection, start_engine
from fdscale.training.optim import adamw, parameter_groups
from tests.downstream.test_classify import rows_of, tuned

VIT = ViTGeometry(32, 2, 4, patch_size=8, image_size=32, position_bias="per_block")
SWIN = SwinV2Geometry(16, (1, 1, 2), (1, 2, 4), window_size=4, image_size=32, extra_norm_period=2)
LEAN = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


def far_from_the_start(geometry: ViTGeometry | SwinV2Geometry) -> Student:
    student = build_student(geometry, seed=1)
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=drawn) * 0.05)
    return student


def three_steps(connection: Connection, stage: int, geometry: ViTGeometry | SwinV2Geometry) -> list[Any]:
    """Losses of three steps, and each step's gradients in full, recomputing every block."""
    from deepspeed.utils import safe_get_full_grad

    student = far_from_the_start(geometry)
    set_activation_checkpointing(student, "blocks")
    norm = "after_pooling" if isinstance(geometry, ViTGeometry) else "student"
    torch.manual_seed(3)
    classifier = Classifier(student, 10, 0.1, norm, init_scale=30.0)  # type: ignore[arg-type]
    optimizer = adamw(parameter_groups(classifier, 0.05, ()), 1e-2, (0.9, 0.999), 1e-8)
    zero = {"stage": stage, **(LEAN if stage == 3 else {})}
    engine = start_engine(
        classifier, optimizer, {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}, 1, 0.0
    )
    drawn = torch.Generator().manual_seed(10)
    mine = slice(4 * connection.rank.rank, 4 * connection.rank.rank + 4)
    found = []
    for _ in range(3):
        pixels, labels = torch.rand(8, 3, 32, 32, generator=drawn), torch.randint(10, (8,), generator=drawn)
        loss = engine(pixels[mine], labels[mine])["loss"]
        engine.backward(loss)
        gradients = {name: _whole_gradient(p, safe_get_full_grad) for name, p in classifier.named_parameters()}
        engine.step()
        found.append((float(loss.detach()), gradients))
    engine.destroy()
    return found


def _whole_gradient(parameter: Tensor, gather: Any) -> Tensor:
    whole = gather(parameter)
    assert whole is not None
    return whole.detach().float().clone()


@pytest.mark.parametrize("geometry", [VIT, SWIN], ids=["vit", "swin_v2"])
def test_losses_and_gradients_do_not_depend_on_the_stage(
    geometry: ViTGeometry | SwinV2Geometry, two_ranks: Any
) -> None:
    whole, divided = (two_ranks(three_steps, stage, geometry) for stage in (0, 3))
    for rank in (0, 1):
        losses = [[loss for loss, _ in steps[rank]] for steps in (whole, divided)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
        assert abs(losses[0][2] - losses[0][0]) > 0.05  # it learns
        for (_, expected), (_, found) in zip(whole[rank], divided[rank], strict=True):
            assert expected.keys() == found.keys()
            assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.1
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("geometry", [VIT, SWIN], ids=["vit", "swin_v2"])
def test_uneven_held_out_images_are_evaluated_as_by_one_process(
    geometry: ViTGeometry | SwinV2Geometry, tmp_path: Path, few_digits: Path, two_ranks: Any
) -> None:
    evaluated_as_by_one_process(geometry, 2, two_ranks, tmp_path, few_digits)


def evaluated_as_by_one_process(
    geometry: ViTGeometry | SwinV2Geometry, ranks: int, start: Any, tmp_path: Path, digits: Path
) -> None:
    """65 images in micro batches of 16: nothing divides, and under ZeRO-3 one forward more on a rank would hang."""
    shared = dataclasses.replace(geometry, position_bias="shared") if isinstance(geometry, ViTGeometry) else geometry
    student = far_from_the_start(shared)
    path = save_student(student, student.backbone.state_dict(), tmp_path / "start")
    json_file = tmp_path / "lean.json"
    common = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": 3, **LEAN}}
    json_file.write_text(json.dumps(common))
    run = tmp_path / "run"
    given = ["student.name=student_file", f"student.weights={path}", f"deepspeed={json_file}", "max_steps=2"]
    more = ["head.init_scale=30", "optim.ema_decay=0.5", "optim.warmup_epochs=0", "labelled=64"]
    more.append(f"data.global_batch={16 * ranks}")
    assert start(tuned, str(run), str(digits), *given, *more, f"eval.shards={digits}") == [True] * ranks
    for ending, prefix in (("", "eval_"), ("_ema", "eval_ema_")):
        loss, accuracy = evaluated_alone(run, ending, digits)
        assert rows_of(run, f"{prefix}loss") == [pytest.approx(loss, abs=1e-5)]
        assert rows_of(run, f"{prefix}accuracy") == [pytest.approx(accuracy, abs=1e-7)]
    assert rows_of(run, "eval_loss") != pytest.approx(rows_of(run, "eval_ema_loss"), abs=1e-3)


def evaluated_alone(run: Path, ending: str, digits: Path) -> tuple[float, float]:
    """Loss and accuracy of what a run has left, over all images at once."""
    student = build_student(file_geometry(run / f"student{ending}.safetensors"))
    load_weights(student, run / f"student{ending}.safetensors")
    classifier = Classifier(student, 10, 0.0).eval()
    classifier.load_state_dict(load_file(run / f"classifier{ending}.safetensors"), strict=False)
    index = load_index(digits)
    (batch,) = EvalLoader(EvalBatches(index, 32, "bicubic"), len(index), 0, 1, len(index), 0, torch.device("cpu"))
    logits = classifier.logits(batch.images.float() / 255).detach()
    accuracy = float((logits.argmax(dim=1) == batch.labels).double().mean())
    return float(F.cross_entropy(logits, batch.labels)), accuracy
