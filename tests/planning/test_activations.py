"""The trace beside real tensors, and what a replay of DeepSpeed makes of it, on networks small enough to follow."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.planning.activations import trace_step
from fdscale.planning.engine_rules import engine_rules
from fdscale.planning.gathering import Coordinator
from fdscale.planning.replay import Added, optimizer_peak, step_peak
from fdscale.planning.trace import Trace
from fdscale.students.geometry import Geometry, SwinV2Geometry, ViTGeometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.training.allocator import live_bytes, memory_profile
from fdscale.training.optim import parameter_groups

VIT = ViTGeometry(64, 3, 4, patch_size=8, image_size=64)
SWIN = SwinV2Geometry(32, (2, 2), (2, 4), window_size=4, image_size=64, extra_norm_period=2)
B, WIDTH = 8, 48


def distiller_of(geometry: Geometry, mode: str, device: str, skips: bool = False) -> tuple[Distiller, Student]:
    student = build_student(geometry, 0.1, seed=1, device=device)
    student.draws.skip_dropped = skips
    set_activation_checkpointing(student, "blocks" if mode == "offload" else mode)
    layout = TokenLayout(student.grid, student.prefix_tokens)
    with torch.device(device):
        return Distiller(student, student.width, [Lesson("teacher", WIDTH, TargetMaker(layout, layout))], 2.0), student


def inputs_of(student: Student) -> tuple[Tensor, list[Tensor], Tensor | None]:
    tokens = student.grid[0] * student.grid[1] + student.prefix_tokens
    side = student.image_size
    draws = torch.ones(student.drop_path_sites, B) if student.drop_path_sites else None
    return torch.zeros(B, 3, side, side), [torch.zeros(B, tokens, WIDTH)], draws


def traced(
    geometry: Geometry, mode: str = "none", cuda: bool = False, dtype: torch.dtype = torch.float32, skips: bool = False
) -> Trace:
    distiller, student = distiller_of(geometry, mode, "meta", skips)
    groups = [group["params"] for group in parameter_groups(distiller, 0.1, ())]
    return trace_step(distiller, groups, lambda: inputs_of(student), dtype, None, cuda, False, mode == "offload")


def measured(geometry: Geometry, mode: str, dropped: int = 0) -> int:
    """The most bytes beside the weights in a real step, gradients let go of as soon as they are there."""
    distiller, student = distiller_of(geometry, mode, "cpu", dropped > 0)
    pixels, targets, draws = inputs_of(student)
    if draws is not None:
        draws[:, :dropped] = 0
    for weight in distiller.parameters():
        weight.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    gc.collect()
    with memory_profile() as profiler:
        distiller(pixels, targets, draws)["loss"].backward()
    return max(live for _, live in live_bytes(profiler))


@pytest.mark.parametrize("geometry", [VIT, SWIN], ids=["vit", "swin_v2"])
@pytest.mark.parametrize("mode", ["none", "blocks"])
def test_a_trace_holds_what_a_real_step_holds(geometry: Geometry, mode: str) -> None:
    assert traced(geometry, mode).peak == pytest.approx(measured(geometry, mode), rel=0.06)
    assert traced(geometry, mode, skips=True).peak > 0.99 * measured(geometry, mode, dropped=1)


def test_a_trace_counts_operations_and_weights() -> None:
    trace = traced(VIT)
    projector = (VIT.width + 1) * WIDTH
    assert trace.parameters == VIT.parameters() + projector
    tokens = 65
    assert trace.forward_flops == pytest.approx(B * (VIT.flops() + 2 * tokens * VIT.width * WIDTH), rel=0.01)
    assert trace.backward_flops == pytest.approx(2 * trace.forward_flops, rel=0.05)
    assert traced(VIT, "blocks").backward_flops == pytest.approx(3 * trace.forward_flops, rel=0.1)


def test_cuda_keeps_no_probabilities_where_a_cpu_does() -> None:
    """B x H x N x N of each block, in fp32; CUDA has the log-sum-exp and a padded bias in their place."""
    probabilities = VIT.depth * B * VIT.num_heads * 65 * 65 * 4
    saved = traced(VIT).peak - traced(VIT, cuda=True).peak
    assert 0.5 * probabilities < saved < 2 * probabilities
    assert traced(VIT, cuda=True).forward_flops == pytest.approx(traced(VIT).forward_flops, rel=0.01)


def test_offloaded_inputs_wait_elsewhere() -> None:
    blocks, offload = traced(SWIN, "blocks"), traced(SWIN, "offload")
    stages = ((16, 32), (8, 64))
    assert offload.offloaded == sum(2 * B * side * side * width * 4 for side, width in stages)
    assert offload.peak < blocks.peak


def replayed(trace: Trace, stage: int, ranks: int = 2, accumulation: int = 1, **zero: int | bool) -> Added:
    rules = engine_rules({"zero_optimization": {"stage": stage, **zero}})
    return step_peak(trace, rules, ranks, accumulation)


LEAN = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


def most_gathered(trace: Trace, **zero: object) -> int:
    coordinator = Coordinator(trace, engine_rules({"zero_optimization": {"stage": 3, **LEAN, **zero}}))
    return max(coordinator.follow(moment) for moment in trace.moments)


def test_weights_are_whole_while_they_are_used() -> None:
    trace = traced(VIT)
    layer = 4 * max(trace.weights)
    assert layer <= most_gathered(trace) <= 2.1 * layer  # in a buffer, and copied out of it
    assert most_gathered(trace, stage3_max_reuse_distance=10**9) >= 4 * trace.parameters * 0.99
    far = {"stage3_prefetch_bucket_size": 10**9, "stage3_max_live_parameters": 10**9}
    assert most_gathered(trace, **far) >= 4 * trace.parameters * 0.99
    assert most_gathered(trace, stage3_param_persistence_threshold=10**9) == 0


def test_nothing_is_gathered_on_one_rank() -> None:
    assert replayed(traced(VIT), 3, ranks=1, stage3_max_reuse_distance=10**9).gathered == 0


def test_gradients_are_whole_until_they_are_reduced() -> None:
    trace = traced(VIT)
    whole = 4 * trace.parameters
    assert replayed(trace, 0, accumulation=2).gradients == whole
    assert replayed(trace, 1, accumulation=2).gradients == whole
    assert replayed(trace, 2, accumulation=2).gradients == pytest.approx(whole / 2, rel=0.01)
    assert replayed(trace, 3, accumulation=2).gradients == 0  # resident, and counted there


def test_bf16_lets_go_of_gradients_that_it_adds_at_once() -> None:
    trace = traced(VIT, dtype=torch.bfloat16)
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}
    late, at_once = (
        engine_rules({"bf16": {"enabled": True, "immediate_grad_update": chosen}, **fp32_sums})
        for chosen in (False, True)
    )
    assert step_peak(trace, late, 2, accumulation=2).gradients == 2 * trace.parameters
    assert step_peak(trace, at_once, 2, accumulation=2).gradients == 0
    assert optimizer_peak(trace, late, 2) - optimizer_peak(trace, at_once, 2) == 2 * trace.parameters


def test_the_optimizer_copies_gradients() -> None:
    trace, config = traced(VIT), {"zero_optimization": {"stage": 3, "sub_group_size": 1}}
    largest = max(trace.weights) // 2
    assert optimizer_peak(trace, engine_rules(config), 2) == 4 * largest


def test_a_leaf_gathers_everything_inside_at_once() -> None:
    trace = traced(VIT)
    block = sum(trace.weights[index] for index in next(m.inside for m in trace.modules if m.name == "ViTBlock"))
    assert most_gathered(trace) < 4 * block
    assert most_gathered(trace, leaf_module={"classes": ["students.vit.ViTBlock"]}) >= 4 * block


def test_shared_weights_stay_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4, device="meta")
            self.two = self.one

        def forward(self, pixels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.two(self.one(pixels)).sum()}

    module = Twice()
    trace = trace_step(
        module, [list(module.parameters())], lambda: (torch.zeros(2, 4),), torch.float32, None, False, False
    )
    assert trace.weights == (16, 4)
