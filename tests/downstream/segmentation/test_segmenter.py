"""Both heads: their losses are the references', every parameter learns, whatever the labels; 16 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former import modeling_mask2former

from fdscale.config.errors import UserError
from fdscale.downstream.segmentation.files import save_segmenter
from fdscale.downstream.segmentation.networks import DroppedConv, groups_of
from fdscale.downstream.segmentation.segmenter import Segmenter, build_segmenter
from fdscale.planning.activations import trace_step
from fdscale.students.geometry import TimmGeometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.training.optim import parameter_groups
from tests.downstream.segmentation.test_sharded import GEOMETRIES, SMALL, segmenter_of
from tests.downstream.test_backbone import pixels

HEADS = ("upernet", "mask2former")
CASES = [(head, kind) for head in HEADS for kind in GEOMETRIES]


def labels_of(rows: int, height: int, width: int, seed: int = 4) -> Tensor:
    """Labels of five classes, the upper third ignored; the last image has two classes only."""
    labels = torch.randint(5, (rows, height, width), generator=torch.Generator().manual_seed(seed))
    labels[-1] = labels[-1] % 2 + 1
    labels[:, : height // 3] = 255
    return labels.to(torch.uint8)


def stepped(segmenter: Segmenter, given: Tensor, labels: Tensor) -> dict[str, Tensor]:
    segmenter.zero_grad()
    torch.manual_seed(6)
    found = segmenter(given, labels)
    found["loss"].backward()
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize(("head", "kind"), CASES)
def test_every_parameter_has_a_gradient_whatever_the_labels(head: str, kind: str) -> None:
    segmenter = segmenter_of(head, kind, drop_path=0.0).train()
    given, labels = pixels(2, 50, 70), labels_of(2, 50, 70)
    for of_case in (labels, torch.full_like(labels, 255)):
        found = stepped(segmenter, given, of_case)
        assert all(value.isfinite() and value.ndim == 0 for value in found.values())
        assert [name for name, p in segmenter.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    empty = {"upernet": {"loss": 0.0, "pixel_accuracy": 0.0}, "mask2former": {"loss_mask": 0.0, "loss_dice": 0.0}}[head]
    assert {name: float(found[name]) for name in empty} == empty
    stepped(segmenter, given, labels)
    still = [name for name, p in segmenter.named_parameters() if p.grad is not None and not p.grad.any()]
    assert still == []


def test_upernets_loss_is_the_mean_over_labelled_pixels_of_two_heads() -> None:
    segmenter = segmenter_of("upernet", "swin_v2", drop_path=0.0).eval()
    given, labels = pixels(2, 50, 70), labels_of(2, 50, 70)
    found = stepped(segmenter, given, labels)
    maps, model = segmenter.backbone(given), segmenter.model
    known = labels != 255
    means = []
    for logits in (model.decode_head(maps), model.auxiliary_head(maps)):
        whole = F.interpolate(logits, (50, 70), mode="bilinear", align_corners=False)
        chosen = whole.log_softmax(dim=1).permute(0, 2, 3, 1)[known]
        means.append(-chosen[torch.arange(len(chosen)), labels[known].long()].mean())
        correct = (chosen.argmax(dim=1) == labels[known]).float().mean()
        if len(means) == 1:
            torch.testing.assert_close(found["pixel_accuracy"], correct)
    torch.testing.assert_close(found["loss"], means[0] + 0.4 * means[1])
    torch.testing.assert_close(found["loss_auxiliary"], 0.4 * means[1])


def test_mask2formers_loss_and_gradients_are_transformers(tmp_path: Path) -> None:
    segmenter = segmenter_of("mask2former", "swin_v2", drop_path=0.0).train()
    given, labels = pixels(2, 50, 70), labels_of(2, 50, 70)
    save_segmenter(segmenter, segmenter.state_dict(), tmp_path)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path).train()
    classes = [torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 2])]
    masks = [
        torch.stack([image == number for number in kinds]).float() for image, kinds in zip(labels, classes, strict=True)
    ]
    torch.manual_seed(6)
    theirs = model(pixel_values=given, mask_labels=masks, class_labels=classes)
    theirs.loss.backward()
    found = stepped(segmenter, given, labels)
    torch.testing.assert_close(found["loss"], theirs.loss.detach().reshape(()), rtol=1e-5, atol=1e-5)
    parts = found["loss_class"] + found["loss_mask"] + found["loss_dice"]
    torch.testing.assert_close(parts, found["loss"])
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in segmenter.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_mask2former_has_the_references_numbers() -> None:
    config = build_segmenter(build_student(GEOMETRIES["vit"]), "mask2former").config
    assert (config.train_num_points, config.oversample_ratio, config.importance_sample_ratio) == (12544, 3.0, 0.75)
    assert (config.class_weight, config.mask_weight, config.dice_weight) == (2.0, 5.0, 5.0)
    assert (config.no_object_weight, config.num_queries, config.num_labels) == (0.1, 100, 150)
    assert (config.encoder_layers, config.encoder_feedforward_dim, config.dim_feedforward) == (6, 1024, 2048)
    assert config.decoder_layers == 10  # 9, and the prediction before the first


def test_ranks_exchange_nothing_where_accelerate_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started:
        _shared_state = ("started",)

    def reduce(*_: object) -> None:
        raise AssertionError("a collective call")

    segmenter = segmenter_of("mask2former", "vit", drop_path=0.0).train()
    given, labels = pixels(2, 50, 70), labels_of(2, 50, 70)
    expected = stepped(segmenter, given, labels)
    monkeypatch.setattr(modeling_mask2former, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(modeling_mask2former, "PartialState", Started, raising=False)
    monkeypatch.setattr(modeling_mask2former, "reduce", reduce, raising=False)
    assert stepped(segmenter, given, labels) == expected


@pytest.mark.parametrize("head", HEADS)
def test_draws_come_from_torchs_generator_alone(head: str) -> None:
    segmenter = segmenter_of(head, "vit", drop_path=0.0).train()
    given, labels = pixels(2, 50, 70), labels_of(2, 50, 70)
    first, second = stepped(segmenter, given, labels), stepped(segmenter, given, labels)
    assert first == second
    assert segmenter(given, labels)["loss"].detach() != first["loss"]  # UperNet's dropout, Mask2Former's points


@pytest.mark.parametrize(("head", "kind"), [("upernet", "vit"), ("mask2former", "swin_v2")])
def test_sixteen_bits_by_autocast(head: str, kind: str) -> None:
    segmenter = segmenter_of(head, kind, drop_path=0.0).train()
    given, labels = pixels(2, 50, 70), labels_of(2, 50, 70)
    expected = stepped(segmenter, given, labels)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = stepped(segmenter, given, labels)["loss"]
        scores = segmenter.eval()(given)
    assert found.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_sixteen_bit_weights_are_upernets_alone(kind: str) -> None:
    """What bf16.enabled does: parameters are cast, buffers are not."""
    segmenters = [segmenter_of(head, kind, drop_path=0.0).train() for head in HEADS]
    given, labels = pixels(2, 50, 70), labels_of(2, 50, 70)
    expected = stepped(segmenters[0], given, labels)["loss"]
    for segmenter in segmenters:
        for parameter in segmenter.parameters():
            parameter.data = parameter.data.bfloat16()
    torch.testing.assert_close(stepped(segmenters[0], given, labels)["loss"], expected, rtol=0.05, atol=0)
    with pytest.raises(UserError, match=r"bf16.enabled.*torch_autocast"):
        segmenters[1](given, labels)


@pytest.mark.parametrize("head", HEADS)
def test_the_student_is_left_as_it_is_and_the_heads_start_as_published(head: Any) -> None:
    student = build_student(GEOMETRIES["swin_v2"], seed=1)
    before = copy.deepcopy(student.state_dict())
    torch.manual_seed(3)
    segmenter = build_segmenter(student, head, classes=5)
    after = student.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)
    torch.manual_seed(3)
    again = build_segmenter(build_student(GEOMETRIES["swin_v2"], seed=1), head, classes=5)
    theirs = dict(again.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in segmenter.named_parameters())
    assert all(name.startswith(("backbone.", "model.")) for name in segmenter.state_dict())
    model = segmenter.model
    if head == "upernet":
        assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == 4 + 1 + 6 + 1 + 1
        assert sum(isinstance(module, DroppedConv) for module in model.modules()) == 2
        assert float(model.decode_head.classifier.weight.std()) == pytest.approx(0.01, rel=0.1)
        convolution = model.decode_head.fpn_bottleneck.conv.weight
        assert float(convolution.std()) == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    else:
        attention = model.model.pixel_level_module.decoder.encoder.layers[0].self_attn
        assert float(attention.sampling_offsets.bias.abs().max()) == 4  # a ring of four points
        assert float(model.model.transformer_module.queries_embedder.weight.std()) == pytest.approx(1, rel=0.1)
        assert model.criterion.empty_weight.tolist() == pytest.approx([1.0] * 5 + [0.1])


def test_few_channels_have_fewer_groups() -> None:
    assert [groups_of(channels) for channels in (512, 256, 128, 64, 32, 4)] == [32, 32, 16, 8, 4, 1]


def test_students_that_are_no_backbone_are_refused() -> None:
    own = Student(nn.Conv2d(3, 8, 8, 8), width=8, grid=(4, 4), prefix_tokens=0, image_size=32)
    with pytest.raises(UserError, match="own"):
        build_segmenter(own)
    two = TimmGeometry("swinv2_cr_tiny_224", 64, {"depths": (1, 2), "embed_dim": 32, "num_heads": (2, 4)})
    with pytest.raises(UserError, match=r"upernet head needs maps of strides \(4, 8, 16, 32\)"):
        build_segmenter(build_student(two))


class Sketched(nn.Module):
    """What a planner traces."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, given: Tensor, labels: Tensor, draws: Tensor) -> dict[str, Tensor]:
        return self.segmenter.sketch(given, labels, draws)


@pytest.mark.parametrize(("head", "kind"), [("upernet", "swin_v2"), ("mask2former", "vit")])
def test_a_planner_can_trace_a_step(head: Any, kind: str) -> None:
    student = build_student(GEOMETRIES[kind], 0.1, device="meta")
    set_activation_checkpointing(student, "blocks")
    with torch.device("meta"):
        module = Sketched(build_segmenter(student, head, channels=32, **SMALL))
    assert all(parameter.is_meta for parameter in module.parameters())
    groups = [group["params"] for group in parameter_groups(module, 0.1, ())]

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
        return torch.zeros(2, 3, 64, 64), labels, torch.zeros(student.drop_path_sites, 2)

    trace = trace_step(module, groups, inputs, torch.float32, torch.bfloat16, True, True)
    assert trace.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert trace.peak > 0


@pytest.mark.parametrize("head", HEADS)
def test_a_sketch_is_a_step_in_all_but_values(head: str) -> None:
    """The same modules in the same order, and a gradient for every parameter."""
    segmenter = segmenter_of(head, "swin_v2", drop_path=0.0).train()
    given, labels = pixels(2, 64, 64), labels_of(2, 64, 64)
    called: list[list[str]] = []
    for name, module in segmenter.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called[-1].append(name) if name else None)
    for step in (segmenter.__call__, segmenter.sketch):
        called.append([])
        segmenter.zero_grad()
        step(given, labels)["loss"].backward()
        assert all(parameter.grad is not None for parameter in segmenter.parameters())
    real, sketched = ([name for name in names if "matcher" not in name] for names in called)
    assert real == sketched
