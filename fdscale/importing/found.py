"""What a family's reader makes of a checkpoint, and how its numbers are settled with the user's."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fdscale.config.errors import UserError, nearest
from fdscale.importing.source import StateDict
from fdscale.students.geometry import Geometry

Override = int | str | Sequence[int]
Overrides = Mapping[str, Override]


@dataclass(frozen=True)
class Found:
    """A student in a checkpoint: its geometry, its tensors under the student's names, and what is worth saying.

    `family` names the network in words. `normalisation` is the images' statistics in training, as far as the file
    shows: "imagenet", "inception" or "clip".
    """

    family: str
    geometry: Geometry
    state: StateDict
    normalisation: str = "imagenet"
    notes: tuple[str, ...] = ()


def parsed(overrides: Sequence[str]) -> dict[str, Override]:
    """`key=value` pairs, their values as TOML has them (`[12, 12, 12, 6]`), or as plain words."""
    pairs = [text.partition("=") for text in overrides]
    if broken := ["".join(pair) for pair in pairs if not pair[1] or not pair[2]]:
        raise UserError(f"{' '.join(broken)}: write key=value, such as window_size=8")
    return {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> Override:
    try:
        value: Override = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value


def refuse_unknown(overrides: Overrides, known: Sequence[str], path: Path) -> None:
    """Raises UserError for an override that a family's reader does not ask for."""
    for key in overrides:
        if key not in known:
            raise UserError(f"{path}: nothing is called {key} there{nearest(key, known)}; allowed: {', '.join(known)}")


def settled(read: Mapping[str, int | None], overrides: Overrides, path: Path) -> list[int]:
    """Numbers that the file tells, or else the user; raises UserError for neither, or where they differ."""
    given = {name: overrides.get(name, value) for name, value in read.items()}
    if open_ones := [name for name, value in given.items() if value is None]:
        ask = " ".join(f"{name}=…" for name in open_ones)
        raise UserError(f"{path}: its tensors do not tell {' and '.join(open_ones)}; add {ask} as it was in training")
    return [_agreed(name, given[name], value, path) for name, value in read.items()]


def _agreed(name: str, given: object, read: int | None, path: Path) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise UserError(f"{path}: got {name}={given!r}, allowed: a whole number, at least 1")
    if read is not None and given != read:
        raise UserError(f"{path}: {name}={given} was given, but its tensors say {read}; leave it out")
    return given


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio by which an MLP has exactly `hidden` channels inside, once it is rounded down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
