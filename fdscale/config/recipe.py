"""Recipes: TOML files found by name or path, with `key=value` overrides, into one frozen settings object.

Precedence: default < recipe < smoke patch < the site's FDSCALE_SETTINGS < command line.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.errors import SettingsError, UserError, attempt, nearest
from fdscale.config.problems import setting_problems
from fdscale.config.programs import PROGRAMS, AnySettings
from fdscale.config.settings import RunSettings
from fdscale.config.shipped import find, shipped_names

Tree = dict[str, Any]
SITE = "FDSCALE_SETTINGS"  # the environment variable of what a site sets for all its runs
KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def recipe_names() -> list[str]:
    """The names of the shipped recipes."""
    return shipped_names("recipes", ".toml")


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    smoke: Callable[[Tree], Tree] | None = None,
    site: Sequence[str] = (),
) -> AnySettings:
    """The settings of a recipe with overrides, the `site`'s before the user's.

    `smoke` returns the patch that shrinks the recipe it is given. Raises UserError when the file cannot be read,
    SettingsError with every problem at once otherwise; what is the site's fault is told as FDSCALE_SETTINGS'.
    """
    path = find("recipe", name_or_path, "recipes", ".toml")
    recipe = {"recipe": path.stem, **_read(path)}
    chosen, pairs, problems = _chosen(recipe, [*site, *overrides])
    own = set(_chosen(recipe, overrides)[2]) if problems and site else set(problems)
    if problems and isinstance(chosen.get("deepspeed"), str):  # the other file's problems are told along
        told: list[str] = []
        attempt(lambda: load_deepspeed_json(chosen["deepspeed"]), told)
        problems, own = problems + told, own.union(told)
    if problems:
        raise SettingsError([f"{path.name if problem in own else SITE}: {problem}" for problem in problems])
    if smoke is None:
        return _settings(chosen)
    shrunk = _apply(_merge(recipe, smoke(chosen)), pairs, [])
    assert not _problems(shrunk), _problems(shrunk)
    return _settings(shrunk)


def site_words(env: Mapping[str, str]) -> list[str]:
    """The settings that a site's environment has for all its runs, split as a shell would. Raises UserError."""
    try:
        return shlex.split(env.get(SITE, ""))
    except ValueError as error:
        raise UserError(
            f"{SITE}={env[SITE]!r} cannot be split into words ({error}): write key=value key=value"
        ) from error


def to_toml(settings: RunSettings) -> str:
    """The settings as a recipe that loads to the same settings again."""
    tree = settings.model_dump(mode="json", exclude_none=True)
    if settings.optim.reference_batch is None:
        tree["optim"]["reference_batch"] = 0  # leaving it out would mean the default
    return tomli_w.dumps(tree)


def _read(path: Path) -> Tree:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _chosen(recipe: Tree, overrides: Sequence[str]) -> tuple[Tree, list[tuple[list[str], Any]], list[str]]:
    """A recipe's tree with overrides, these as pairs, and every problem of both."""
    pairs, problems = _parse_all(overrides)
    chosen = _apply(recipe, pairs, problems)
    return chosen, pairs, problems + _problems(chosen)


def _parse_all(overrides: Sequence[str]) -> tuple[list[tuple[list[str], Any]], list[str]]:
    pairs, problems = [], []
    for text in overrides:
        try:
            pairs.append(_parse(text))
        except UserError as error:
            problems.append(str(error))
    return pairs, problems


def _parse(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    if not equals or not KEY.fullmatch(key):
        raise UserError(f"override {text!r}: write key=value, such as optim.lr=1e-3")
    return key.split("."), _value(text, value)


def _value(text: str, value: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError as error:
        if value.startswith(("[", "{", '"', "'")):
            raise UserError(f"override {text!r}: the value is not readable as TOML: {error}") from error
        return value
    is_plain = len(parsed) == 1 and isinstance(parsed["value"], bool | int | float | str | list | dict)
    return parsed["value"] if is_plain else value  # dates and lines beyond the first are text


def _apply(tree: Tree, pairs: Sequence[tuple[list[str], Any]], problems: list[str]) -> Tree:
    for parts, value in pairs:
        blocked = _blocking_scalar(tree, parts)
        if blocked:
            problems.append(f"override '{'.'.join(parts)}': '{blocked}' is a single value, not a table")
        else:
            tree = _set(tree, parts, value)
    return tree


def _blocking_scalar(tree: Any, parts: Sequence[str]) -> str:
    for depth, part in enumerate(parts[:-1]):
        tree = tree.get(part, {})
        if not isinstance(tree, dict):
            return ".".join(parts[: depth + 1])
    return ""


def _set(tree: Tree, parts: Sequence[str], value: Any) -> Tree:
    head, *rest = parts
    return {**tree, head: _set(tree.get(head, {}), rest, value) if rest else value}


def _merge(tree: Tree, patch: Mapping[str, Any]) -> Tree:
    """`tree` with the patch laid over it, table by table; None in the patch takes the key out."""
    merged = dict(tree)
    for key, value in patch.items():
        if isinstance(value, dict):
            merged[key] = _merge(merged.get(key, {}), value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def _problems(tree: Tree) -> list[str]:
    program = tree.get("program")
    if program not in PROGRAMS:
        known = " or ".join(f'"{name}"' for name in PROGRAMS)
        return [f"program: got {program!r}, allowed: {known}{nearest(str(program), PROGRAMS)}"]
    siblings = {name: model for name, model in PROGRAMS.items() if name != program}
    return setting_problems(tree, PROGRAMS[program], siblings)


def _settings(tree: Tree) -> AnySettings:
    return PROGRAMS[tree["program"]].model_validate(tree)
