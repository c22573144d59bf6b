"""What a run ends with on purpose: one mistake, every problem of a recipe at once, or the wish to start again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user's, told in full: what, where, got, allowed, next step."""


class SettingsError(UserError):
    """Every problem of a recipe, an override or a DeepSpeed JSON, one line each."""

    problems: list[str]

    def __init__(self, problems: Sequence[str]) -> None:
        assert problems, "a SettingsError without a problem"
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class StartAgain(Exception):
    """Nobody's mistake, and no state to go on with: start the same run again, it goes on from its last checkpoint."""


def attempt(compute: Callable[[], T], problems: list[str]) -> T | None:
    """The result, or None after adding the mistake's sentences to `problems`, so that it does not hide the next one."""
    try:
        return compute()
    except SettingsError as error:
        problems += error.problems
    except UserError as error:
        problems.append(str(error))
    return None


@contextmanager
def told_as(teacher: str) -> Iterator[None]:
    """Mistakes told inside of `teacher.…` and `target.…` are told of this one's settings, `further_teachers.NAME`."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError([settings_renamed(problem, teacher) for problem in error.problems]) from error
    except UserError as error:
        raise UserError(settings_renamed(str(error), teacher)) from error


def settings_renamed(text: str, teacher: str) -> str:
    """A sentence about the first teacher's settings, said of another's: `target.grid` -> `further_teachers.NAME.…`."""
    if teacher == "teacher":
        return text
    text = re.sub(r"(?<![\w./])teacher\.(?=[a-z])", f"{teacher}.", text)
    return re.sub(r"(?<![\w./])target\.(?=[a-z])", f"{teacher}.target.", text)


def nearest(word: str, known: Iterable[str]) -> str:
    """The suggestion that ends an error: `"; did you mean 'x'?"`, or `""` when nothing known is close.

    For dotted paths the last part decides as well: `lr` is close to `optim.lr`.
    """
    names = list(known)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if not close:
        last_parts = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
        close = [last_parts[part] for part in get_close_matches(word.rsplit(".", 1)[-1], last_parts, 1, 0.75)]
    return f"; did you mean {close[0]!r}?" if close else ""
