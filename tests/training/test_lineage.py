"""Which commits are believed: one line through the attempts, whatever else lies there, and whenever it came."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale.training.lineage import RECORD, Commit, lineage_of, step_folder
from fdscale.training.manifest import write_manifest


def commit(attempts: Path, attempt: int, step: int) -> None:
    folder = step_folder(attempts / f"{attempt:04d}", step)
    folder.mkdir(parents=True)
    write_manifest(folder, {"files": {}})


def record(attempts: Path, attempt: int, **facts: object) -> None:
    (attempts / f"{attempt:04d}").mkdir(parents=True, exist_ok=True)
    (attempts / f"{attempt:04d}" / RECORD).write_text(json.dumps(facts))


def told(attempts: Path) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(attempt, step) of the believed and of the disowned ones."""
    lineage = lineage_of(attempts)
    believed, disowned = (
        [(one.attempt, one.step) for one in commits] for commits in (lineage.believed, lineage.disowned)
    )
    return believed, disowned


def test_a_run_without_attempts_has_no_commits(tmp_path: Path) -> None:
    assert told(tmp_path / "attempts") == ([], [])


def test_the_newest_commit_of_one_attempt_comes_first(tmp_path: Path) -> None:
    for step in (20, 100, 3):
        commit(tmp_path, 1, step)
    step_folder(tmp_path / "0001", 200).mkdir()  # never committed
    assert told(tmp_path) == ([(1, 100), (1, 20), (1, 3)], [])


def test_a_commit_that_a_superseded_attempt_makes_later_is_not_read(tmp_path: Path) -> None:
    record(tmp_path, 1, continues=None)
    record(tmp_path, 2, continues={"attempt": 1, "step": 20})
    for attempt, step in ((1, 10), (1, 30), (1, 40), (2, 20), (2, 25)):
        commit(tmp_path, attempt, step)
    assert told(tmp_path) == ([(2, 25), (2, 20), (1, 10)], [(1, 40), (1, 30)])


def test_an_attempt_that_died_before_it_had_looked_changes_nothing(tmp_path: Path) -> None:
    record(tmp_path, 1, continues=None)
    record(tmp_path, 2, number=2)
    (tmp_path / "0003").mkdir()  # not even a record
    commit(tmp_path, 1, 10)
    assert told(tmp_path) == ([(1, 10)], [])


def test_an_attempt_that_began_anew_disowns_everything_before_it(tmp_path: Path) -> None:
    record(tmp_path, 2, continues=None)
    commit(tmp_path, 1, 10)
    commit(tmp_path, 2, 5)
    assert told(tmp_path) == ([(2, 5)], [(1, 10)])


def test_attempts_between_the_two_of_a_line_are_not_on_it(tmp_path: Path) -> None:
    """The second one's commits were damaged: the third went on from the first."""
    record(tmp_path, 2, continues={"attempt": 1, "step": 10})
    record(tmp_path, 3, continues={"attempt": 1, "step": 10})
    commit(tmp_path, 1, 10)
    commit(tmp_path, 2, 15)
    assert told(tmp_path) == ([(1, 10)], [(2, 15)])


def test_a_garbled_record_is_none(tmp_path: Path) -> None:
    commit(tmp_path, 1, 10)
    (tmp_path / "0001" / RECORD).write_text('{"continues"')
    assert told(tmp_path) == ([(1, 10)], [])


@dataclass
class Model:
    """A run as a list of events, its truth kept beside the files."""

    attempts: Path
    line: list[tuple[int, int]] = field(default_factory=list)  # newest last
    late: set[tuple[int, int]] = field(default_factory=set)
    number: int = 0
    last: dict[int, int] = field(default_factory=dict)  # each attempt's newest step

    def begin(self) -> None:
        self.number += 1
        before = self.line[-1] if self.line else None
        continues = None if before is None else {"attempt": before[0], "step": before[1]}
        record(self.attempts, self.number, continues=continues)
        self.last[self.number] = before[1] if before else 0

    def commit(self, attempt: int, steps: int) -> None:
        self.last[attempt] += steps
        made = (attempt, self.last[attempt])
        commit(self.attempts, *made)
        if attempt == self.number:
            self.line.append(made)
        else:
            self.late.add(made)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["begin", "commit", "zombie"]), st.integers(1, 9)), max_size=25))
def test_whatever_zombies_do_the_line_is_that_of_the_newest_attempts(events: list[tuple[str, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder))
        model.begin()
        for what, amount in events:
            if what == "begin":
                model.begin()
            else:
                of_whom = model.number if what == "commit" else 1 + amount % model.number
                model.commit(of_whom, amount)
        lineage = lineage_of(model.attempts)
        assert [(c.attempt, c.step) for c in lineage.believed] == model.line[::-1]
        assert {(c.attempt, c.step) for c in lineage.disowned} == model.late
        assert all(isinstance(c, Commit) for c in lineage.believed)
