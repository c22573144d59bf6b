"""Suggestions are close or absent."""

from __future__ import annotations

import pytest

from fdscale.config.errors import SettingsError, UserError, nearest, told_as


def test_nearest_suggests_only_what_is_close() -> None:
    known = ["optim.lr", "optim.eps", "data.shards"]
    assert nearest("optim.lrr", known) == "; did you mean 'optim.lr'?"
    assert nearest("shards", known) == "; did you mean 'data.shards'?"
    assert nearest("quaternion", known) == ""
    assert nearest("anything", []) == ""


def test_a_settings_error_lists_its_problems() -> None:
    error = SettingsError(["first", "second"])
    assert isinstance(error, UserError)
    assert str(error) == "first\nsecond"
    assert error.problems == ["first", "second"]


def test_a_further_teachers_mistakes_name_its_own_settings() -> None:
    with pytest.raises(UserError) as caught, told_as("further_teachers.dino"):
        raise UserError("teacher.weights: no such file: weights/teacher.pt; set teacher.name or target.grid=pool")
    told = "further_teachers.dino.weights: no such file: weights/teacher.pt; set further_teachers.dino.name or "
    assert str(caught.value) == told + "further_teachers.dino.target.grid=pool"


def test_every_problem_of_a_further_teacher_is_renamed_and_the_first_ones_stay() -> None:
    with pytest.raises(SettingsError) as caught, told_as("further_teachers.b"):
        raise SettingsError(["teacher.layer: got 9", "data.shards: none"])
    assert caught.value.problems == ["further_teachers.b.layer: got 9", "data.shards: none"]
    with pytest.raises(UserError, match=r"^teacher\.layer$"), told_as("teacher"):
        raise UserError("teacher.layer")
