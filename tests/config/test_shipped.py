"""What is shipped is found by its name, with or without a suffix."""

from __future__ import annotations

import pytest

from fdscale.config.errors import UserError
from fdscale.config.shipped import shipped, shipped_files


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("fd_swinv2g", ["fd_swinv2g.sh"]),
        ("fd_swinv2g.sh", ["fd_swinv2g.sh"]),
        ("laptop", ["laptop.json"]),
        ("swinv2_g", ["swinv2_g.toml", "swinv2_g.json"]),
        ("swinv2_g.toml", ["swinv2_g.toml"]),
        ("swinv2_g.json", ["swinv2_g.json"]),
    ],
)
def test_a_name_stands_for_every_file_of_that_name(name: str, found: list[str]) -> None:
    files = shipped_files(name)
    assert [file.name for file in files] == found
    assert all(file.is_file() and file.is_absolute() for file in files)


def test_launchers_are_found_in_their_folder() -> None:
    assert shipped_files("fd_swinv2g") == [shipped("launchers") / "fd_swinv2g.sh"]


@pytest.mark.parametrize("name", ["fd_swin2g", "swinv2g.json", "README", "README.md", "", "../launchers/demo"])
def test_another_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"nothing shipped is called .*fd_swinv2g\.sh"):
        shipped_files(name)


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(UserError, match="did you mean 'fd_swinv2g'"):
        shipped_files("fd_swin2g")
