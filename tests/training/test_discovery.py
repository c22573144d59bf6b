"""Target files: what Prometheus reads in them, and whose they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale.training.discovery import Target


def contents(folder: Path) -> list[dict]:
    return [json.loads(path.read_text())[0] for path in sorted(folder.glob("*.json"))]


def test_a_node_says_where_its_metrics_are_and_how_it_ended(tmp_path: Path):
    target = Target(tmp_path, "vit", tmp_path / "runs/vit", 3, "n1")
    target.write("10.0.0.1:9101", {})
    assert contents(tmp_path) == [{"targets": ["10.0.0.1:9101"], "labels": {"run": "vit", "node": "n1"}}]
    assert target.file.name.startswith("vit-")
    assert target.file.name.endswith("-0003-n1.json")
    assert target.file.stat().st_mode & 0o777 == 0o644
    target.write("10.0.0.1:9101", {"ended": "stopped", "__scheme__": "https"})
    (only,) = contents(tmp_path)
    assert only["labels"] == {"run": "vit", "node": "n1", "ended": "stopped", "__scheme__": "https"}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    target.remove()
    target.remove()
    assert list(tmp_path.iterdir()) == []


def test_older_attempts_of_the_same_run_are_removed_and_nothing_else(tmp_path: Path):
    runs, folder = tmp_path / "runs", tmp_path / "targets"
    folder.mkdir()
    there = [
        Target(folder, "vit", runs / "vit", 1, "n1"),
        Target(folder, "vit", runs / "vit", 2, "n-2"),
        Target(folder, "vit", runs / "vit", 3, "n1"),
        Target(folder, "vit", runs / "vit", 10001, "n1"),
        Target(folder, "vit", runs / "other" / "vit", 1, "n1"),  # of the same name, elsewhere
        Target(folder, "vit2", runs / "vit2", 1, "n1"),
    ]
    for target in there:
        target.write("127.0.0.1:1", {})
    there[0].file.with_suffix(".new").write_text("killed while it wrote")
    (folder / "by-hand.json").write_text("[]")
    Target(folder, "vit", runs / "link" / ".." / "vit", 3, "n9").remove_older()
    kept = {target.file for target in there[2:]} | {folder / "by-hand.json"}
    assert set(folder.iterdir()) == kept


@settings(max_examples=30)
@given(run=st.text(), node=st.text())
def test_any_name_is_a_file_and_a_label(tmp_path_factory: pytest.TempPathFactory, run: str, node: str):
    folder = tmp_path_factory.mktemp("targets")
    first = Target(folder, run, Path("/runs/x"), 1, node)
    first.write("127.0.0.1:1", {})
    (only,) = contents(folder)
    assert only["labels"] == {"run": run, "node": node}
    assert not first.file.name.startswith(".")
    Target(folder, run, Path("/runs/x"), 2, node).remove_older()
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path):
    target = Target(tmp_path / "unmounted", "vit", tmp_path, 1, "n1")
    with pytest.raises(FileNotFoundError):
        target.write("127.0.0.1:1", {})
    with pytest.raises(FileNotFoundError):
        target.remove_older()
    assert not (tmp_path / "unmounted").exists()
