"""Records of what was fetched: read back as written, one a teacher and pinned revision, checked against the bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdscale.config.errors import UserError
from fdscale.teachers.fetched import Fetched, fetched, record, record_path, sha256_of, verify, weights_folder

CONTENT = b"weights" * 1000
COMMIT, OTHER = "a" * 40, "b" * 40
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FDSCALE_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def file(tmp_path: Path) -> Fetched:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return Fetched(path, "timm/some", COMMIT, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


def refusal(found: Fetched) -> str:
    with pytest.raises(UserError) as error:
        verify(found)
    return str(error.value)


def test_what_is_recorded_is_read_back_and_nothing_else_is_left(folder: Path, file: Fetched) -> None:
    assert fetched("clip_vit_b16") is None
    record("clip_vit_b16", None, file)
    assert fetched("clip_vit_b16") == file
    assert fetched("clip_vit_l14") is None
    assert [path.name for path in folder.iterdir()] == ["clip_vit_b16.json"]
    stored = json.loads((folder / "clip_vit_b16.json").read_text())
    assert stored == {
        "teacher": "clip_vit_b16",
        "path": str(file.path),
        "repository": "timm/some",
        "revision": COMMIT,
        "sha256": file.sha256,
        "size": len(CONTENT),
    }


def test_a_pinned_revision_has_its_own_record(folder: Path, file: Fetched) -> None:
    tagged = Fetched(file.path, "timm/some", OTHER, file.sha256, file.size)
    record("dino_vit_b16", None, file)
    record("dino_vit_b16", "v1", tagged)
    assert (fetched("dino_vit_b16"), fetched("dino_vit_b16", "v1")) == (file, tagged)
    assert fetched("dino_vit_b16", "v2") is None


def test_the_commit_that_was_newest_can_be_pinned_without_fetching_again(folder: Path, file: Fetched) -> None:
    record("dino_vit_b16", None, file)
    assert fetched("dino_vit_b16", COMMIT) == file
    assert fetched("dino_vit_b16", OTHER) is None


@example(first=("a", "b"), second=("ab", None))
@example(first=("a", "b"), second=("a@b", None))
@given(first=st.tuples(NAMES, st.none() | NAMES), second=st.tuples(NAMES, st.none() | NAMES))
def test_no_two_teachers_share_a_record(first: tuple[str, str | None], second: tuple[str, str | None]) -> None:
    paths = [record_path(*each) for each in (first, second)]
    assert (paths[0] == paths[1]) == (first == second)
    assert all(path.parent == weights_folder() for path in paths)


def test_the_folder_is_the_environments_or_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDSCALE_WEIGHTS", "/scratch/w")
    assert weights_folder() == Path("/scratch/w")
    for unset in ("", None):
        monkeypatch.delenv("FDSCALE_WEIGHTS") if unset is None else monkeypatch.setenv("FDSCALE_WEIGHTS", unset)
        assert weights_folder() == Path.home() / ".cache" / "fdscale" / "weights"


@pytest.mark.parametrize(
    "change",
    [{"size": "7"}, {"sha256": None}, {"path": 3}, {"revision": [1]}],
    ids=["size", "sha256", "path", "revision"],
)
def test_a_record_of_other_kinds_is_refused(change: dict[str, Any], folder: Path, file: Fetched) -> None:
    record("x", None, file)
    path = record_path("x", None)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match="not a record of `fdscale fetch`"):
        fetched("x")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"path": "/x"}'])
def test_a_damaged_record_is_refused_with_its_path_and_the_remedy(text: str, folder: Path, file: Fetched) -> None:
    record("x", None, file)
    record_path("x", None).write_text(text)
    with pytest.raises(UserError) as error:
        fetched("x")
    assert str(error.value).startswith(f"{folder / 'x.json'}: not a record of `fdscale fetch`")
    assert "remove it, then bring it again with `fdscale fetch RECIPE`" in str(error.value)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, file: Fetched, monkeypatch: Any) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("FDSCALE_WEIGHTS", str(tmp_path / "taken"))
    with pytest.raises(UserError, match=r"cannot be written .* set \$FDSCALE_WEIGHTS"):
        record("x", None, file)


def test_the_fetched_bytes_are_accepted(file: Fetched) -> None:
    verify(file)
    assert sha256_of(file.path) == file.sha256


def test_a_truncated_file_is_refused(file: Fetched) -> None:
    file.path.write_bytes(CONTENT[:100])
    assert refusal(file) == (
        f"teacher.weights: {file.path} has 100 bytes, fetched were {len(CONTENT)}: it was cut off or replaced; bring "
        "it again with `fdscale fetch RECIPE` on a node with network"
    )


def test_an_altered_file_is_refused_with_both_hashes(file: Fetched) -> None:
    altered = CONTENT[:-1] + b"?"
    file.path.write_bytes(altered)
    told = refusal(file)
    assert f"{file.path} has SHA-256 {hashlib.sha256(altered).hexdigest()}, fetched was {file.sha256}" in told
    assert "`fdscale fetch RECIPE`" in told


def test_a_file_that_went_away_is_told(file: Fetched) -> None:
    file.path.unlink()
    assert "cannot be found now (No such file or directory): is it on a disk that this node does not see?" in refusal(
        file
    )


def test_reading_records_needs_no_torch_and_no_hub() -> None:
    code = "import sys, fdscale.teachers.fetched; print(*(m in sys.modules for m in ('torch', 'huggingface_hub')))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]
