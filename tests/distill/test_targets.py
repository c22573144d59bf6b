"""Targets: each teacher token whitened, on the student's grid, or an error that names the choices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdscale.config.errors import UserError
from fdscale.distill.layout import TokenLayout, layout_problems
from fdscale.distill.targets import TargetMaker, match_grid, whiten

SIDES = st.integers(1, 6)
WIDTH = 8


def tokens_of(layout: TokenLayout, images: int = 2) -> torch.Tensor:
    count = layout.prefix_tokens + layout.grid[0] * layout.grid[1]
    return torch.randn(images, count, WIDTH, generator=torch.Generator().manual_seed(0)) * 3 + 1


def test_whitening_is_a_layer_norm_of_each_token_without_affine() -> None:
    tokens = tokens_of(TokenLayout((4, 4), 1))
    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, unbiased=False, keepdim=True)
    assert torch.allclose(whiten(tokens), (tokens - mean) / (variance + 1e-5).sqrt(), atol=1e-6)
    assert torch.allclose(whiten(tokens), torch.nn.LayerNorm(WIDTH, elementwise_affine=False)(tokens))


def test_whitening_keeps_a_constant_token_finite() -> None:
    assert torch.equal(whiten(torch.full((1, 1, 4), 7.0)), torch.zeros(1, 1, 4))


@given(SIDES, SIDES, st.integers(1, 4), st.integers(1, 4))
def test_pooling_is_the_mean_of_each_cell(height: int, width: int, down: int, right: int) -> None:
    teacher = TokenLayout((height * down, width * right), 0)
    patches = tokens_of(teacher, 1)
    found = match_grid(patches, teacher.grid, (height, width), "pool").view(height, width, WIDTH)
    maps = patches.view(*teacher.grid, WIDTH)
    for y in range(height):
        for x in range(width):
            cell = maps[y * down : (y + 1) * down, x * right : (x + 1) * right]
            assert torch.allclose(found[y, x], cell.mean((0, 1)), atol=1e-5)


@given(SIDES, SIDES, SIDES, SIDES)
def test_interpolation_gives_any_grid_and_keeps_what_is_constant(th: int, tw: int, sh: int, sw: int) -> None:
    row = torch.arange(float(WIDTH))
    found = match_grid(row.expand(1, th * tw, WIDTH), (th, tw), (sh, sw), "interpolate")
    assert found.shape == (1, sh * sw, WIDTH)
    assert torch.allclose(found, row.expand_as(found), atol=1e-4)


def test_interpolation_keeps_rows_and_columns_where_they_are() -> None:
    columns = torch.arange(4.0).repeat(4).view(1, 16, 1)  # brightens to the right
    found = match_grid(columns, (4, 4), (2, 3), "interpolate").view(2, 3)
    assert bool((found.diff(dim=1) > 0.5).all())
    assert torch.allclose(found[0], found[1])


@pytest.mark.parametrize("how", ["exact", "pool", "interpolate"])
def test_an_equal_grid_is_left_as_it_is(how: str) -> None:
    patches = tokens_of(TokenLayout((3, 5), 0))
    assert match_grid(patches, (3, 5), (3, 5), how) is patches


def test_prefix_tokens_are_kept_or_dropped_on_both_sides() -> None:
    teacher = TokenLayout((4, 4), 1)
    tokens = tokens_of(teacher)
    kept = TargetMaker(teacher, teacher)
    assert torch.equal(kept(tokens), whiten(tokens))
    assert torch.equal(kept.of_student(tokens), tokens)
    dropped = TargetMaker(teacher, TokenLayout((4, 4), 5), prefix_tokens="drop")
    assert torch.equal(dropped(tokens), whiten(tokens[:, 1:]))
    student = tokens_of(TokenLayout((4, 4), 5))
    assert torch.equal(dropped.of_student(student), student[:, 5:])


def test_cls_alone_leaves_the_registers_of_either_side_out() -> None:
    teacher, student = TokenLayout((4, 4), 5), TokenLayout((4, 4), 1)
    tokens = tokens_of(teacher)
    targets = TargetMaker(teacher, student, prefix_tokens="cls")
    assert torch.equal(targets(tokens), whiten(tokens[:, [0, *range(5, 21)]]))
    assert torch.equal(targets.of_student(tokens_of(student)), tokens_of(student))
    with_registers = TargetMaker(student, teacher, prefix_tokens="cls")
    assert torch.equal(with_registers.of_student(tokens), tokens[:, [0, *range(5, 21)]])


@given(SIDES, st.integers(1, 3), st.integers(0, 5), st.integers(0, 5), st.sampled_from(["keep", "cls", "drop"]))
def test_every_target_has_its_student_token(side: int, times: int, theirs: int, ours: int, prefix_tokens: str) -> None:
    ours = theirs if prefix_tokens == "keep" else ours
    if prefix_tokens == "cls":
        theirs, ours = max(theirs, 1), max(ours, 1)
    teacher, student = TokenLayout((side * times, side * times), theirs), TokenLayout((side, side), ours)
    for grid in ("pool", "interpolate"):
        targets = TargetMaker(teacher, student, grid, prefix_tokens)
        assert targets(tokens_of(teacher)).shape == targets.of_student(tokens_of(student)).shape


def test_pooling_leaves_the_prefix_tokens_out() -> None:
    teacher = TokenLayout((4, 4), 1)
    tokens = tokens_of(teacher)
    target = TargetMaker(teacher, TokenLayout((2, 2), 1), "pool", whiten=False)(tokens)
    assert torch.equal(target[:, 0], tokens[:, 0])
    assert torch.allclose(target[:, 1], tokens[:, [1, 2, 5, 6]].mean(1), atol=1e-6)


def test_grids_are_matched_before_whitening() -> None:
    teacher, student = TokenLayout((4, 4), 0), TokenLayout((2, 2), 0)
    target = TargetMaker(teacher, student, "pool")(tokens_of(teacher))
    assert torch.allclose(target.var(-1, unbiased=False), torch.ones(2, 4), atol=1e-3)


@pytest.mark.parametrize("whitened", [True, False])
def test_targets_are_fp32_without_gradient(whitened: bool) -> None:
    layout = TokenLayout((2, 2), 0)
    tokens = tokens_of(layout).bfloat16().requires_grad_()
    target = TargetMaker(layout, layout, whiten=whitened)(tokens)
    assert (target.dtype, target.requires_grad) == (torch.float32, False)
    assert torch.equal(target, whiten(tokens.float()) if whitened else tokens.float())


@pytest.mark.parametrize(
    ("teacher", "student", "grid", "prefix_tokens", "told"),
    [
        (((16, 16), 0), ((8, 8), 0), "exact", "keep", ["16x16 patch tokens, the student 8x8", "target.grid=pool",
         "target.grid=interpolate", "another student.image_size or teacher.image_size"]),
        (((14, 14), 0), ((8, 8), 0), "exact", "keep", ["14x14 patch tokens, the student 8x8",
         "choose target.grid=interpolate"]),
        (((14, 14), 0), ((8, 8), 0), "pool", "keep", ["14x14 does not pool to 8x8 in whole cells",
         "use target.grid=interpolate"]),
        (((8, 8), 0), ((16, 16), 0), "pool", "keep", ["8x8 does not pool to 16x16"]),
        (((8, 8), 1), ((8, 8), 0), "exact", "keep", ["the teacher has 1 prefix tokens, the student 0",
         "target.prefix_tokens=drop leaves them out of the loss"]),
        (((8, 8), 1), ((7, 7), 0), "exact", "keep", ["target.grid: ", "target.prefix_tokens: "]),
        (((8, 8), 5), ((8, 8), 1), "exact", "keep", ["has 5 prefix tokens, the student 1",
         "target.prefix_tokens=cls keeps the first of each"]),
        (((8, 8), 5), ((8, 8), 0), "exact", "cls", ["no CLS token on both sides", "target.prefix_tokens=drop"]),
    ],
)  # fmt: skip
def test_layouts_that_do_not_meet_name_the_choices(
    teacher: tuple[tuple[int, int], int],
    student: tuple[tuple[int, int], int],
    grid: str,
    prefix_tokens: str,
    told: list[str],
) -> None:
    with pytest.raises(UserError) as error:
        TargetMaker(TokenLayout(*teacher), TokenLayout(*student), grid, prefix_tokens)
    assert [part for part in told if part not in str(error.value)] == []


def test_pooling_is_proposed_only_where_it_is_possible() -> None:
    assert "target.grid=pool" not in "".join(
        layout_problems(TokenLayout((14, 14), 0), TokenLayout((8, 8), 0), "exact", "keep")
    )


@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2), st.integers(0, 2))
def test_interpolating_and_dropping_always_meet(th: int, tw: int, sh: int, sw: int, theirs: int, ours: int) -> None:
    layouts = TokenLayout((th, tw), theirs), TokenLayout((sh, sw), ours)
    assert layout_problems(*layouts, "interpolate", "drop") == []
    assert (layout_problems(*layouts, "exact", "keep") == []) == (layouts[0] == layouts[1])
