"""docs/first-cluster-run.md: its commands exist, and what they say to a recipe is valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fdscale.cli import app
from fdscale.config.recipe import load_recipe
from fdscale.planning.smoke import smoke_patch

PAGE = (Path(__file__).parent.parent / "docs" / "first-cluster-run.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]
FDSCALE = [words[words.index("fdscale") + 1 :] for words in COMMANDS if "fdscale" in words]
WALK = ["shards", "fetch", "plan", "doctor", "submit", "checkpoint", "doctor", "submit", "summary", "export"]


def test_the_walk_goes_from_shards_to_the_student() -> None:
    assert [words[0] for words in FDSCALE] == WALK


@pytest.mark.parametrize("words", FDSCALE, ids=" ".join)
def test_each_command_exists_and_its_settings_are_valid(words: list[str]) -> None:
    known = {str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands}
    assert words[0] in known | {group.name for group in app.registered_groups}
    overrides = [word for word in words if re.fullmatch(r"[a-z_.]+=.+", word)]
    if "vit_b_clip_b" in words:
        load_recipe("vit_b_clip_b", overrides, smoke_patch if "--smoke" in words else None)


def test_it_names_the_run_directory_that_the_recipe_has() -> None:
    assert {word for words in FDSCALE for word in words if word.startswith("runs/")} == {"runs/vit_b_clip_b-smoke"}
