"""Attention with a trained position bias gives what torch's gives, and keeps the type of its inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.students.attention import biased_attention
from fdscale.students.geometry import ViTGeometry
from fdscale.students.student import build_student
from tests.students.conftest import perturb


def inputs(dtype: torch.dtype, bias_shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (*[(3, 2, 10, 8)] * 3, bias_shape)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def output_and_gradients(attention: object, given: list[Tensor]) -> list[Tensor]:
    output = attention(*given)  # type: ignore[operator]
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (output.float() * weights).sum().backward()
    return [output.detach(), *(each.grad for each in given if each.grad is not None)]


@pytest.mark.parametrize("bias_shape", [(2, 10, 10), (1, 2, 10, 10)], ids=["shared", "per block"])
def test_it_is_torchs_attention(bias_shape: tuple[int, ...]) -> None:
    found = output_and_gradients(biased_attention, inputs(torch.float32, bias_shape))
    expected = output_and_gradients(F.scaled_dot_product_attention, inputs(torch.float32, bias_shape))
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_stay_sixteen_bits_and_near() -> None:
    given = inputs(torch.bfloat16, (2, 10, 10))
    found = output_and_gradients(biased_attention, given)
    exact = output_and_gradients(biased_attention, [each.detach().double().requires_grad_() for each in given])
    for one, other in zip(found, exact, strict=True):
        assert one.dtype is torch.bfloat16
        assert float((one.double() - other).abs().max()) < 0.02 * float(other.abs().max())


@pytest.mark.parametrize("kind", ["shared", "per_block"])
def test_a_vit_computes_in_training_what_it_computes_in_evaluation(kind: str) -> None:
    geometry = ViTGeometry(32, 2, 4, patch_size=8, image_size=32, position_bias=kind)  # type: ignore[arg-type]
    student, pixels = build_student(geometry), torch.rand(2, 3, 32, 32)
    perturb(student)
    student.backbone.requires_grad_(True)
    torch.testing.assert_close(student.train()(pixels), student.eval()(pixels), rtol=1e-4, atol=1e-4)
