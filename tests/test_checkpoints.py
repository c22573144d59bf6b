"""A run's checkpoints from outside: what is told about them, and what is removed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fdscale.cli import main
from fdscale.training.lineage import RECORD
from fdscale.training.manifest import MANIFEST, describe, files_of, write_manifest


def commit(folder: Path, ranks: int = 2) -> Path:
    folder.mkdir(parents=True)
    for rank in range(ranks):
        (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(bytes(3000))
    write_manifest(folder, {"step": 1, "world_size": ranks, "files": describe(folder, files_of(folder))})
    return folder


def record(attempt: Path, continues: dict[str, int] | None) -> None:
    (attempt / RECORD).write_text(json.dumps({"continues": continues}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 2, 4, 6 and 8 committed, 8 with a flipped byte and 6 without a file; 9 never; 5 set aside; 4 converted."""
    run = tmp_path / "run"
    for name in ("step_00000002", "step_00000004", "step_00000006", "step_00000008", "damaged_step_00000005"):
        commit(run / "attempts" / "0001" / name)
    commit(run / "attempts" / "0001" / "universal_step_00000004", ranks=1)
    commit(run / "attempts" / "0001" / "universal_step_00000002", ranks=1)
    (run / "attempts" / "0001" / "step_00000009").mkdir()
    (run / "attempts" / "0001" / "step_00000003").mkdir()
    flipped = next((run / "attempts" / "0001" / "step_00000008").glob("*pp_rank_1*"))
    flipped.write_bytes(bytes(2999) + b"\1")
    next((run / "attempts" / "0001" / "step_00000006").glob("*pp_rank_0*")).unlink()
    next((run / "attempts" / "0001" / "damaged_step_00000005").glob("*pp_rank_0*")).unlink()
    return run


@pytest.fixture
def moved_on(run: Path) -> Path:
    """Attempt 2 went on from step 4 of the first, and committed 6; the first one's 8 came too late, and is whole."""
    attempts = run / "attempts"
    shutil.rmtree(attempts / "0001" / "step_00000008")
    commit(attempts / "0001" / "step_00000008")
    commit(attempts / "0002" / "step_00000006")
    record(attempts / "0002", {"attempt": 1, "step": 4})
    return run


def left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "attempts" / "0001").iterdir())


def test_ls_tells_each_with_its_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(run)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "step_" in line]
    assert [row.split()[1] for row in rows][:3] == ["0001/step_00000009", "0001/step_00000008", "0001/step_00000006"]
    told = {row.split()[1]: row for row in rows}
    assert "never committed" in told["0001/step_00000009"]
    assert "complete" in told["0001/step_00000008"]  # the flipped byte takes reading
    assert "damaged: 1 of 2 files" in told["0001/step_00000006"]
    assert "2" in told["0001/step_00000004"].split()
    assert "KiB" in told["0001/step_00000004"]


def test_verify_reads_every_byte_and_names_the_newest_whole_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 2
    told = capsys.readouterr()
    assert "0001/step_00000004: whole" in told.out
    assert "0001/step_00000009: never committed" in told.out
    error = told.err
    assert "step_00000008: zero_pp_rank_1_mp_rank_00_optim_states.pt has another SHA-256 than recorded" in error
    assert "step_00000006: zero_pp_rank_0_mp_rank_00_optim_states.pt is missing" in error
    assert "damaged_step" not in error
    assert error.rstrip().endswith("the newest whole one is 0001/step_00000004")


def test_verify_is_content_with_whole_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(tmp_path / "attempts" / "0001" / "step_00000001")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "0001/step_00000001: whole\n"


def test_prune_keeps_the_newest_whole_ones_and_what_may_be_under_way(run: Path) -> None:
    assert main(["checkpoint", "prune", str(run)]) == 0
    assert left(run) == ["step_00000004", "step_00000009", "universal_step_00000004"]


def test_prune_keeps_as_many_as_asked_for(run: Path) -> None:
    assert main(["checkpoint", "prune", str(run), "--keep", "5"]) == 0
    assert [name for name in left(run) if name.startswith("step_")] == [
        "step_00000002",
        "step_00000004",
        "step_00000009",
    ]


def test_a_dry_run_removes_nothing_and_says_what_would_go(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left(run)
    assert main(["checkpoint", "prune", str(run), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert left(run) == before
    assert f"would remove {run}/attempts/0001/step_00000008 (" in told
    assert told.rstrip().endswith("kept 0001/step_00000004")


def test_the_last_whole_one_is_never_removed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 4):
        (run / "attempts" / "0001" / f"step_0000000{step}" / MANIFEST).unlink()
    before = left(run)
    assert main(["checkpoint", "prune", str(run)]) == 2
    assert "no checkpoint is whole: nothing was removed" in capsys.readouterr().err
    assert left(run) == before


def test_what_came_too_late_is_told_apart_and_never_the_newest(
    moved_on: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "ls", str(moved_on)]) == 0
    told = {row.split()[1]: row for row in capsys.readouterr().out.splitlines() if "step_" in row}
    assert "too late: not continued" in told["0001/step_00000008"]
    assert "complete" in told["0002/step_00000006"]
    assert main(["checkpoint", "verify", str(moved_on)]) == 0
    assert "0001/step_00000008: whole, not continued" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(moved_on)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("kept 0002/step_00000006")
    assert not (moved_on / "attempts" / "0001" / "step_00000008").exists()


@pytest.mark.parametrize("command", ["ls", "verify", "prune"])
def test_what_is_no_run_is_told_in_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", command, str(tmp_path / "absent")]) == 2
    assert "absent: not a run directory: it has no folder attempts" in capsys.readouterr().err
    (tmp_path / "attempts").mkdir()
    assert main(["checkpoint", command, str(tmp_path)]) == 2
    assert "it has no checkpoint yet" in capsys.readouterr().err


def test_torch_is_not_imported(run: Path) -> None:
    script = "import sys; from fdscale.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script, "checkpoint", "ls", str(run)]).returncode == 0
