"""Drop path is a pure function of (seed, step): no split of the global batch changes a sample's draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdscale.students.drop_path import Draws, TableDropPath, drop_path_rows, drop_path_table
from fdscale.students.geometry import SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import Student, build_student

SWIN = SwinV2Geometry(16, (2, 3), (2, 4), window_size=4, image_size=32)
VIT = ViTGeometry(16, 5, 2, patch_size=8, image_size=32)
SEEDS = st.integers(0, 2**31)


def test_the_same_step_draws_the_same_and_no_other_does() -> None:
    table = drop_path_table(seed=7, step=11, sites=3, global_batch=8)
    torch.manual_seed(99)
    torch.rand(5)  # the caller's generator is not asked
    assert torch.equal(table, drop_path_table(7, 11, 3, 8))
    others = [drop_path_table(7, 12, 3, 8), drop_path_table(8, 11, 3, 8), drop_path_table(11, 7, 3, 8)]
    assert not any(torch.equal(table, other) for other in others)
    assert (table.shape, table.dtype) == ((3, 8), torch.float32)


def test_drawing_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    drop_path_table(0, 0, 4, 16)
    assert torch.equal(torch.rand(3), expected)


@given(SEEDS, SEEDS, st.integers(1, 6), st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_rows_of_any_split_are_rows_of_the_whole(seed: int, step: int, sites: int, sizes: list[int]) -> None:
    ends = [sum(sizes[: part + 1]) for part in range(len(sizes))]
    rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    parts = [drop_path_rows(seed, step, sites, sum(sizes), part) for part in rows]
    assert torch.equal(torch.cat([part for part in parts if part is not None], dim=1),
                       drop_path_table(seed, step, sites, sum(sizes)))  # fmt: skip


def test_a_network_without_drop_path_needs_no_draws() -> None:
    assert drop_path_rows(0, 0, 0, 8, slice(0, 4)) is None


def test_draws_are_uniform() -> None:
    table = drop_path_table(0, 0, 100, 1000)
    counts = torch.histc(table, bins=10, min=0, max=1) / table.numel()
    assert torch.allclose(counts, torch.full((10,), 0.1), atol=0.005)
    assert 0 <= float(table.min()) < float(table.max()) < 1


@pytest.mark.parametrize("geometry", [SWIN, VIT], ids=["swin_v2", "vit"])
def test_rates_grow_linearly_over_depth_on_both_branches(geometry: Any) -> None:
    student = build_student(geometry, drop_path=0.4)
    blocks = [module for module in student.backbone.modules() if hasattr(module, "drop_path1")]
    assert len(blocks) == geometry.blocks == 5
    rates = [[getattr(site, "drop_prob", 0.0) for site in (b.drop_path1, b.drop_path2)] for b in blocks]
    assert rates == [pytest.approx([rate, rate]) for rate in (0.0, 0.1, 0.2, 0.3, 0.4)]
    assert student.drop_path_sites == 8  # the first block drops nothing
    sites = [site.site for b in blocks[1:] for site in (b.drop_path1, b.drop_path2)]
    assert sorted(sites) == list(range(8))


def test_a_rate_of_zero_has_no_sites() -> None:
    assert build_student(SWIN, drop_path=0.0).drop_path_sites == 0


def site_of(rate: float, table: torch.Tensor | None, divided: bool = False) -> TableDropPath:
    draws = Draws()
    draws.rates = [rate, rate]
    draws.skip_dropped = True
    draws.take(table, torch.device("cpu"), divided)
    return TableDropPath(rate, 1, draws)


def test_a_sample_is_kept_and_scaled_or_dropped_as_its_draw_says() -> None:
    table = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.1, 0.25, 0.24, 0.9]])
    found = site_of(0.25, table)(torch.ones(4, 2, 3))
    assert torch.equal(found, torch.tensor([0, 4 / 3, 0, 4 / 3]).view(4, 1, 1).expand(4, 2, 3))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_expected_value_is_kept(rate: float) -> None:
    found = site_of(rate, drop_path_table(0, 0, 2, 20_000))(torch.ones(20_000, 1))
    kept = found != 0
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=0.01)
    assert torch.allclose(found[kept], torch.tensor(1 / (1 - rate)))
    assert float(found.mean()) == pytest.approx(1, abs=0.08)


def test_the_type_of_the_tokens_stays() -> None:
    assert site_of(0.5, torch.rand(2, 4))(torch.ones(4, 3, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_evaluation_is_the_identity_without_draws() -> None:
    tokens = torch.randn(4, 3)
    assert site_of(0.5, None).eval()(tokens) is tokens


def test_training_without_draws_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="needs this micro batch's draws"):
        build_student(SWIN, drop_path=0.1)(torch.rand(1, 3, 32, 32))


def student_in_training(geometry: Any) -> Student:
    student = build_student(geometry, drop_path=0.5)
    student.draws.skip_dropped = True
    with torch.no_grad():
        for norm in (m for name, m in student.named_modules() if name.endswith(("norm1", "norm2"))):
            norm.weight.fill_(1.0)  # SwinV2's branches are almost nothing at the start
    return student


@pytest.mark.parametrize("geometry", [SWIN, VIT], ids=["swin_v2", "vit"])
def test_a_student_sees_each_samples_own_draws_however_the_batch_is_split(geometry: Any) -> None:
    student, pixels = student_in_training(geometry), torch.rand(6, 3, 32, 32)
    table = drop_path_table(0, 3, student.drop_path_sites, 6)
    whole = student(pixels, table)
    parts = [student(pixels[rows], table[:, rows]) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    assert not torch.allclose(student(pixels, drop_path_table(0, 4, student.drop_path_sites, 6)), whole, atol=1e-2)
    assert not torch.allclose(student.eval()(pixels), whole, atol=1e-2)


TABLES = {
    "mixed": drop_path_table(0, 3, 8, 6),
    "all dropped": torch.zeros(8, 6),
    "all kept": torch.full((8, 6), 0.99),
    "one kept": torch.zeros(8, 6).index_fill(1, torch.tensor([4]), 0.99),
}


def output_and_gradients(student: Student, table: torch.Tensor) -> dict[str, torch.Tensor]:
    student.zero_grad()
    tokens = student(torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(4)), table)
    tokens.square().mean().backward()
    gradients = {name: weight.grad for name, weight in student.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), "ZeRO-3 would wait for it for ever"
    return {"": tokens.detach(), **gradients}  # type: ignore[dict-item]


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("geometry", [SWIN, VIT], ids=["swin_v2", "vit"])
def test_work_that_is_skipped_changes_neither_output_nor_gradient(geometry: Any, table: torch.Tensor) -> None:
    student = student_in_training(geometry)
    skipped = output_and_gradients(student, table)
    student.draws.skip_dropped = False
    discarded = output_and_gradients(student, table)
    for name, expected in discarded.items():
        assert torch.allclose(skipped[name], expected, rtol=1e-4, atol=1e-5), name  # outputs are up to 3.4


def rows_seen(student: Student, table: torch.Tensor) -> list[int]:
    """How many samples the second branch of each block computes; a window attention sees windows."""
    seen: list[int] = []
    for name, module in student.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    student(torch.rand(6, 3, 32, 32), table)
    return seen


def test_a_branch_sees_the_samples_that_it_keeps_and_never_none() -> None:
    draws = torch.tensor([0.9, 0.3, 0.6, 0.3, 0.9, 0.1]).expand(8, 6)
    student = student_in_training(VIT)  # at rates 0, 0.125, 0.25, 0.375 and 0.5
    assert rows_seen(student, draws) == [6, 5, 5, 3, 3]
    assert rows_seen(student_in_training(VIT), torch.zeros(8, 6)) == [6, 1, 1, 1, 1]
    student = student_in_training(VIT)
    student.draws.skip_dropped = False
    assert rows_seen(student, draws) == [6] * 5


def test_where_all_are_kept_rows_are_gathered_only_for_divided_weights() -> None:
    """A recomputation under ZeRO-3 stops at what the backward pass needs, which must not depend on a rank's draws."""
    x = torch.randn(4, 3, requires_grad=True)
    made = {}
    for divided in (False, True):
        out = site_of(0.5, torch.full((2, 4), 0.9), divided).residual(x, torch.sin)
        assert torch.allclose(out, x + 2 * x.sin())
        made[divided] = type(out.grad_fn).__name__
    assert made == {False: "AddBackward0", True: "IndexAddBackward0"}


@pytest.mark.parametrize(("chosen", "skips"), [(None, False), (True, True), (False, False)])
def test_a_cpu_skips_nothing_unless_it_is_told_to(chosen: bool | None, skips: bool) -> None:
    student = student_in_training(VIT)
    student.draws.skip_dropped = chosen
    assert (rows_seen(student, torch.zeros(8, 6)) == [6, 1, 1, 1, 1]) == skips


def test_what_overflows_in_a_dropped_branch_harms_nothing() -> None:
    x = torch.full((3, 2), 200.0, requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    out = site_of(0.5, torch.zeros(2, 3)).residual(x, lambda rows: (rows * weight).exp())
    out.sum().backward()
    assert torch.equal(out, x)
    assert torch.equal(x.grad, torch.ones(3, 2))  # type: ignore[arg-type]
    assert torch.equal(weight.grad, torch.zeros(2))  # type: ignore[arg-type]


def test_a_branch_of_another_type_gives_what_a_sum_gives() -> None:
    x, site = torch.randn(4, 3), site_of(0.5, torch.tensor([[0.0] * 4, [0.9, 0.1, 0.9, 0.9]]))
    found = site.residual(x.bfloat16(), lambda rows: rows.float())
    assert found.dtype is torch.float32
    assert torch.equal(found[1], x.bfloat16()[1].float())
    assert site.eval().residual(x, lambda rows: rows).equal(2 * x)


def test_a_student_tells_what_share_it_discards() -> None:
    rates = [0.1, 0.2, 0.3, 0.4]
    student = build_student(VIT, drop_path=0.4)
    assert student.discarded_work == 0
    student.draws.skip_dropped = False
    assert student.discarded_work == pytest.approx(sum(rates) / 4)
    assert build_student(TimmGeometry("vit_tiny_patch16_224", 32, {"depth": 5}), 0.4).discarded_work == pytest.approx(
        sum(rates) / 4
    )
    assert build_student(TimmGeometry("vit_tiny_patch16_224", 32, {"depth": 2})).discarded_work == 0


def test_draws_that_are_not_on_the_host_are_refused() -> None:
    with pytest.raises((TypeError, RuntimeError), match="meta"):
        build_student(VIT, drop_path=0.1)(torch.rand(1, 3, 32, 32), torch.rand(8, 1, device="meta"))
