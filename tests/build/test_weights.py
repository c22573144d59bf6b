"""What a run's networks start from: found without a network, read once a node, agreed on by all, held to the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fdscale.build.networks import prepare_teacher
from fdscale.build.weights import WeightsRecord, hold_weights, student_weights, teacher_weights
from fdscale.cluster.ranks import Rank
from fdscale.config.errors import UserError
from fdscale.config.settings import StudentSettings, TeacherSettings
from fdscale.teachers.fetched import Fetched, record
from fdscale.training.engine import Connection
from fdscale.training.run_directory import RunDirectory

ALONE = Connection(Rank(0, 0, 1, 1, "127.0.0.1", 29500), torch.device("cpu"), None)
GOLDEN = Path(__file__).parents[1] / "golden" / "vit_from_dino.safetensors"
SHAPE: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "image_size": 32}
COMMIT, OTHER = "a" * 40, "b" * 40
Ranks = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compute node: no socket leads anywhere, the hub's client is told so, and nothing was fetched yet."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FDSCALE_WEIGHTS", str(tmp_path / "weights"))


def fetched_file(folder: Path, content: bytes = b"weights", revision: str = COMMIT) -> Fetched:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return Fetched(path, "timm/some", revision, hashlib.sha256(content).hexdigest(), len(content))


def refusal(settings: TeacherSettings) -> str:
    with pytest.raises(UserError) as error:
        teacher_weights("teacher", settings, ALONE)
    return str(error.value)


def test_a_student_file_is_held_by_its_description_too(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_file({"a": torch.ones(1)}, path)
    described = {"geometry": {}, "mean": [0.5] * 3, "std": [0.5] * 3}
    path.with_suffix(".json").write_text(json.dumps(described))
    settings = StudentSettings(name="student_file", weights=str(path))
    first = student_weights(settings, ALONE)
    path.with_suffix(".json").write_text(json.dumps({**described, "mean": [0.0] * 3}))
    second = student_weights(settings, ALONE)
    assert first.sha256 == second.sha256
    assert None is not first.description != second.description


def test_a_teacher_is_built_from_what_was_fetched_without_any_network(tmp_path: Path) -> None:
    golden = load_file(GOLDEN)
    state = {key.removeprefix("teacher."): value for key, value in golden.items() if key.startswith("teacher.")}
    save_file(state, tmp_path / "model.safetensors")
    found = fetched_file(tmp_path, (tmp_path / "model.safetensors").read_bytes())
    record("dino_vit_b16", None, found)
    settings = TeacherSettings(name="dino_vit_b16", geometry=SHAPE)
    weights = teacher_weights("teacher", settings, ALONE)
    assert weights == WeightsRecord("dino_vit_b16", str(found.path), found.sha256, "timm/some", COMMIT)
    teacher = prepare_teacher(settings, weights.path, torch.float32)
    key = "blocks.1.mlp.fc2.weight"
    assert torch.equal(teacher.backbone.state_dict()[key], state[key])


def test_what_was_never_fetched_is_refused_with_every_way_out(tmp_path: Path) -> None:
    told = refusal(TeacherSettings(name="clip_vit_l14"))
    assert told == (
        f"teacher.weights: {tmp_path / 'weights'} has no weights of clip_vit_l14: run `fdscale fetch RECIPE` on a node "
        "with network, or set teacher.weights=FILE, or teacher.weights=random for a trial"
    )


def test_another_revision_than_the_recipe_pins_is_not_used(tmp_path: Path) -> None:
    record("clip_vit_l14", None, fetched_file(tmp_path))
    assert f"has no weights of clip_vit_l14 at revision '{OTHER}'" in refusal(
        TeacherSettings(name="clip_vit_l14", revision=OTHER)
    )
    pinned = teacher_weights("teacher", TeacherSettings(name="clip_vit_l14", revision=COMMIT), ALONE)
    assert pinned.revision == COMMIT


def test_a_fetched_file_that_changed_is_refused(tmp_path: Path) -> None:
    record("clip_vit_l14", None, fetched_file(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"w3ights")
    assert "it was altered" in refusal(TeacherSettings(name="clip_vit_l14"))
    (tmp_path / "model.safetensors").write_bytes(b"weigh")
    assert "has 5 bytes, fetched were 7" in refusal(TeacherSettings(name="clip_vit_l14"))


def test_a_file_of_the_users_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = fetched_file(tmp_path).path
    digest = hashlib.sha256(b"weights").hexdigest()
    assert teacher_weights("teacher", TeacherSettings(name="dino_vit_b16", weights=str(path)), ALONE) == WeightsRecord(
        "dino_vit_b16", str(path), digest
    )
    assert student_weights(StudentSettings(name="vit_b16", weights=str(path)), ALONE).sha256 == digest
    missing = str(tmp_path / "no.pt")
    assert refusal(TeacherSettings(name="dino_vit_b16", weights=missing)) == (
        f"teacher.weights: {missing}: cannot be read (No such file or directory)"
    )


def test_random_and_own_weights_have_no_hash() -> None:
    assert teacher_weights("teacher", TeacherSettings(name="clip_vit_b16", weights="random"), ALONE) == WeightsRecord(
        "clip_vit_b16", "random"
    )
    assert teacher_weights("teacher", TeacherSettings(name="own"), ALONE) == WeightsRecord("own", "own")
    assert student_weights(StudentSettings(name="vit_b16"), ALONE) == WeightsRecord("vit_b16", "random")


def test_a_run_keeps_what_it_starts_from(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.attempts.mkdir(parents=True)
    weights = WeightsRecord("clip_vit_b16", "/w/model.safetensors", "0" * 64, "timm/some", COMMIT)
    hold_weights(directory, ALONE, {"teacher": weights, "student": WeightsRecord("vit_b16", "random")})
    stored = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert stored["teacher"] == dataclasses.asdict(weights)
    assert stored["student"]["sha256"] is None
    (directory.attempts / "0001" / "step_00000001").mkdir(parents=True)
    moved = dataclasses.replace(weights, path="/elsewhere/model.safetensors")
    hold_weights(directory, ALONE, {"teacher": moved})
    other = dataclasses.replace(weights, sha256="1" * 64)
    with pytest.raises(UserError, match="began with other weights"):
        hold_weights(directory, ALONE, {"teacher": other})
    stored = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert stored["teacher"]["path"] == "/elsewhere/model.safetensors"
    assert stored["student"]["name"] == "vit_b16"


def on_this_rank(connection: Connection, folders: list[str], nodes: int) -> str:
    """Hash or refusal on one of two ranks, on one node or two, with the records in its own folder."""
    rank = connection.rank
    here = dataclasses.replace(connection, rank=dataclasses.replace(rank, local_rank=rank.rank if nodes == 1 else 0))
    os.environ["FDSCALE_WEIGHTS"] = folders[rank.rank]
    try:
        return str(teacher_weights("teacher", TeacherSettings(name="clip_vit_l14"), here).sha256)
    except UserError as error:
        return str(error)


def node_with(folder: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A node's records under `folder`/weights, of a file with that content."""
    folder.mkdir()
    monkeypatch.setenv("FDSCALE_WEIGHTS", str(folder / "weights"))
    if content is not None:
        record("clip_vit_l14", None, fetched_file(folder, content))
    return str(folder / "weights")


def test_every_rank_of_a_node_has_what_its_first_one_read(
    two_ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = node_with(tmp_path / "first", b"weights", monkeypatch)
    other = node_with(tmp_path / "other", None, monkeypatch)  # rank 1 must not look for itself
    digest = hashlib.sha256(b"weights").hexdigest()
    assert two_ranks(on_this_rank, [first, other], 1) == [digest, digest]


def test_a_failure_on_one_node_ends_every_rank_with_the_same_sentence(
    two_ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node_with(tmp_path / "a", b"weights", monkeypatch), node_with(tmp_path / "b", None, monkeypatch)]
    first, second = two_ranks(on_this_rank, nodes, 2)
    assert first == second
    assert first.startswith(f"on the node of rank 1: teacher.weights: {nodes[1]} has no weights of clip_vit_l14")


def test_nodes_with_different_bytes_are_refused(
    two_ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node_with(tmp_path / name, name.encode(), monkeypatch) for name in ("a", "b")]
    first, second = two_ranks(on_this_rank, nodes, 2)
    assert first == second
    a, b = (hashlib.sha256(name).hexdigest() for name in (b"a", b"b"))
    assert "the nodes have different bytes there" in first
    assert f"SHA-256 {a} at rank 0" in first
    assert f"SHA-256 {b} at rank 1" in first
