"""A frozen student's features judged: the same on any number of ranks, and as scikit-learn and a plain k-NN find."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from fdscale.config.errors import UserError
from fdscale.data.batches import EvalBatches
from fdscale.data.index import load_index
from fdscale.data.loader import EvalLoader
from fdscale.data.packing.digits import pack_digits
from fdscale.data.packing.pack import pack
from fdscale.downstream.probe import probe
from fdscale.students.files import load_weights, save_student
from fdscale.students.geometry import ViTGeometry, file_geometry
from fdscale.students.student import build_student
from fdscale.training.engine import Connection

VIT = ViTGeometry(32, 2, 4, patch_size=8, image_size=32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("digits")
    return pack_digits(folder / "train", "train").folder, pack_digits(folder / "test", "test").folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = build_student(VIT, seed=1)
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=drawn) * 0.1)
    return save_student(network, network.backbone.state_dict(), tmp_path_factory.mktemp("student"))


def probed(connection: Connection, *given: Any) -> dict[str, Any] | str:
    try:
        return asdict(probe(*given))
    except UserError as error:
        return str(error)


def features(path: Path, shards: Path) -> tuple[torch.Tensor, torch.Tensor]:
    network = build_student(file_geometry(path)).eval()
    load_weights(network, path)
    index = load_index(shards)
    (batch,) = EvalLoader(EvalBatches(index, 32, "bicubic"), len(index), 0, 1, len(index), 0, torch.device("cpu"))
    with torch.no_grad():
        return network(batch.images.float() / 255)[:, 1:].mean(dim=1), batch.labels


def test_it_finds_what_others_find_on_any_number_of_ranks(
    student: Path, shards: tuple[Path, Path], tmp_path: Path, one_rank: Any, two_ranks: Any
) -> None:
    output = tmp_path / "probe.json"
    (alone,) = one_rank(probed, student, *shards, 20, 64, 0)
    together = two_ranks(probed, student.parent, *shards, 20, 100, 0, output)
    assert together[0] == together[1] == json.loads(output.read_text())
    assert (alone["training_images"], alone["held_out_images"], alone["classes"]) == (1348, 449, 10)
    for name in ("linear_accuracy", "knn_accuracy"):
        assert together[0][name] == pytest.approx(alone[name], abs=1.5 / 449)
    assert together[0]["penalty"] == alone["penalty"]
    (known, known_labels), (asked, wanted) = (features(student, folder) for folder in shards)
    mean, std = known.mean(0), (known.var(0, unbiased=False) + 1e-6).sqrt()
    theirs = LogisticRegression(C=1 / (2 * alone["penalty"] * len(known)), max_iter=2000, tol=1e-6)
    theirs.fit((known - mean).div(std).double().numpy(), known_labels.numpy())
    score = theirs.score((asked - mean).div(std).double().numpy(), wanted.numpy())
    assert score > 0.6
    assert alone["linear_accuracy"] == pytest.approx(score, abs=2.5 / 449)
    similarity = torch.nn.functional.normalize(asked, dim=1) @ torch.nn.functional.normalize(known, dim=1).T
    weights, nearest = similarity.topk(20)
    votes = torch.zeros(len(asked), 10).scatter_add_(1, known_labels[nearest], (weights / 0.07).exp())
    assert alone["knn_accuracy"] == pytest.approx(float((votes.argmax(1) == wanted).double().mean()), abs=1.5 / 449)


def test_labels_that_cannot_be_judged_are_refused(student: Path, shards: tuple[Path, Path], tmp_path: Path) -> None:
    for name, classes in (("flat", [""]), ("eleven", [f"{number:02d}" for number in range(11)]), ("other", ["0", "x"])):
        for place in classes:
            (tmp_path / name / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name / place / "image.png")
        pack(tmp_path / name, tmp_path / f"{name}.tars", 10)
    told = {"flat": "without a label", "eleven": "has label 10", "other": "numbers its classes otherwise"}
    for name, words in told.items():
        with pytest.raises(UserError, match=words):
            probe(student, shards[0], tmp_path / f"{name}.tars", 20, 64, 0)
