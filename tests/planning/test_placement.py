"""Where `auto` puts teachers: whole while half of a rank's memory stays free, the small ones first."""

from __future__ import annotations

import pytest

from fdscale.config.recipe import load_recipe
from fdscale.planning.placement import chosen_placements

PAIR = "vit_l_clip_dinov2"
SMALL, LARGE = "teacher", "further_teachers.dinov2"


def chosen(*overrides: str, **how: object) -> dict[str, str]:
    settings = load_recipe(PAIR, list(overrides))
    return {where: choice.placement for where, choice in chosen_placements(settings, **how).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (None, ("replicated", "replicated")),
        (200, ("replicated", "replicated")),  # 30 + 10 + 60 leave exactly half of it
        (199, ("replicated", "zero3")),
        (79, ("zero3", "zero3")),
    ],
)
def test_teachers_stay_whole_while_half_of_the_memory_is_free(memory: int | None, expected: tuple[str, str]) -> None:
    found = chosen(teachers={LARGE: 60, SMALL: 10}, states=30, memory=memory)
    assert (found[SMALL], found[LARGE]) == expected


def test_what_is_set_is_kept_and_takes_its_room() -> None:
    overrides = [f"{LARGE}.placement=replicated"]
    sizes = {SMALL: 60, LARGE: 50}
    assert chosen(*overrides, teachers=sizes, states=0, memory=200) == {SMALL: "zero3", LARGE: "replicated"}
    assert chosen(f"{LARGE}.placement=fairscale", teachers=sizes, states=0, memory=200)[SMALL] == "replicated"


def test_an_unknown_size_stays_whole_and_says_why() -> None:
    choice = chosen_placements(load_recipe(PAIR), {}, 0, 100)[SMALL]
    assert (choice.placement, choice.reason) == ("replicated", "auto: its size is known once it is built")


def test_fine_tuning_has_no_teachers() -> None:
    assert chosen_placements(load_recipe("digits_finetune")) == {}
