"""A rank's last words lie beside its attempt, in the order in which the ranks failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fdscale.config.errors import UserError
from fdscale.training.failures import FAILURES, read_failures, record_failure

AS_A_RANK = """
import sys
from pathlib import Path
from fdscale.cli import main
from fdscale.training.attempts import Attempt, note_current
note_current(Attempt(Path(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_the_earliest_comes_first_and_the_exception_is_told_from_its_traceback(tmp_path: Path) -> None:
    record_failure(tmp_path, 1, raised(RuntimeError("two\nlines: of it")))
    record_failure(tmp_path, 0, raised(UserError("run_dir: a mistake,\n  told in full")))
    first, second = read_failures(tmp_path)
    assert (first.rank, second.rank) == (1, 0)
    assert first.message == "RuntimeError: two\nlines: of it"
    assert "in raised\n    raise error" in first.text
    assert second.text == "UserError: run_dir: a mistake,\n  told in full"
    assert first.time <= second.time


def test_of_a_chain_the_last_exception_counts(tmp_path: Path) -> None:
    try:
        try:
            raise OSError("first")
        except OSError as error:
            raise ValueError("second") from error
    except ValueError as error:
        record_failure(tmp_path, 0, error)
    assert read_failures(tmp_path)[0].message == "ValueError: second"


def test_where_nothing_can_be_written_nothing_else_goes_wrong(tmp_path: Path) -> None:
    record_failure(tmp_path / "gone", 0, raised(ValueError("lost")))
    assert read_failures(tmp_path / "gone") == []


def as_a_rank(attempt: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AS_A_RANK, str(attempt), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_line_keeps_what_a_rank_ends_with(tmp_path: Path) -> None:
    attempt, run = tmp_path / "0001", tmp_path / "run"
    attempt.mkdir()
    assert as_a_rank(attempt, "checkpoint", "verify", str(run)).returncode == 2
    assert read_failures(attempt)[0].text.startswith(f"UserError: {run}")

    run.mkdir()
    (run / "metrics.jsonl").touch()
    (run / "recipe.toml").write_text("no TOML")
    assert as_a_rank(attempt, "summary", str(run)).returncode not in (0, 2)
    assert "TOMLDecodeError" in read_failures(attempt)[0].message

    (attempt / FAILURES / "rank_0.txt").unlink()
    assert as_a_rank(attempt, "where", "swinv2_g").returncode == 0
    assert read_failures(attempt) == []
