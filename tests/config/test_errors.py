"""Suggestions are close or absent."""

from __future__ import annotations

from fdscale.config.errors import SettingsError, UserError, nearest


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
