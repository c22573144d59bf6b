"""The README is run: console blocks print what they show, every other command exists and its settings are valid."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fdscale.bench.__main__ import parser as bench_parser
from fdscale.cli import app
from fdscale.config.recipe import SITE, load_recipe, recipe_names
from fdscale.config.shipped import shipped_files
from fdscale.planning.smoke import smoke_patch

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shown_commands() -> list[tuple[str, str]]:
    """(command, what the README says it prints) of the console blocks, in order."""
    text = "".join(blocks("console"))
    pairs = [part.partition("\n") for part in text.split("$ ")[1:]]
    return [(command, output) for command, _, output in pairs]


def bash_commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def plain(text: str) -> str:
    return " ".join(text.split())


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_console_blocks_print_what_they_show(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert shown_commands()
    for command, shown in shown_commands():
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert plain(done.stdout + done.stderr) == plain(shown), command


@pytest.mark.parametrize("words", bash_commands(), ids=" ".join)
def test_every_other_command_exists_and_its_settings_are_valid(words: list[str]) -> None:
    if words[0] == "make" or words[:2] == ["SYSTEM_TORCH=1", "make"]:
        assert f"\n{words[-1]}:" in MAKEFILE
        return
    if words[0] == "export":
        name, _, site = words[1].partition("=")
        assert name == SITE
        load_recipe("swinv2_g", site=shlex.split(site))
        return
    launchers = [word for word in words if word.startswith("launchers/")]
    assert all((REPOSITORY / launcher).is_file() for launcher in launchers)
    if "where" in words:
        assert shipped_files(words[words.index("where") + 1].rstrip(")"))
        launchers = words
    if words[:3] == ["python", "-m", "fdscale.bench"]:
        assert bench_parser().parse_args(words[3:]).what == "gpu"
        return
    if words[1] in ("models", "import", "checkpoint", "export", "probe", "evaluate", "diagnose") or words[1:3] == [
        "doctor",
        "runs/swinv2_g",
    ]:
        commands = {command.name or command.callback.__name__ for command in app.registered_commands}
        assert words[1] in commands | {group.name for group in app.registered_groups}
        return
    programs = ("fetch", "plan", "distill", "segment", "detect", "doctor", "submit")
    before = next((word for word in words if word in programs), "")
    named = [word for word in words if word in recipe_names()]  # a launcher's first argument may be one
    recipe = (named or ["swinv2_g"])[0] if launchers else words[words.index(before) + 1]
    overrides = [word for word in words if re.fullmatch(r"[a-z_.]+=.+", word)]
    load_recipe(recipe, overrides, smoke_patch if "--smoke" in words else None)


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w/.]+)\)", README))
def test_links_lead_to_files(path: str) -> None:
    assert (REPOSITORY / path).exists()


def test_the_tree_names_every_module() -> None:
    tree = CONTRIBUTING[CONTRIBUTING.index("├── cli.py") : CONTRIBUTING.index("tests/  ")]
    modules = [path for path in (REPOSITORY / "fdscale").rglob("*.py") if not path.name.startswith("__")]
    assert [path.name for path in modules if path.name not in tree] == []


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_are_finished_and_their_links_lead_to_files(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"\{[A-Z]+\}", text) == [], "a figure that was to be put in"
    links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
