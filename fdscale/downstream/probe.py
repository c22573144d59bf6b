"""How much a frozen student knows already: a linear classifier and a k-NN on its features, on any number of ranks."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from fdscale.build.networks import as_pixels
from fdscale.cluster.ranks import rank_from_environment
from fdscale.config.errors import UserError
from fdscale.data.batches import EvalBatches
from fdscale.data.index import Index, load_index
from fdscale.data.loader import EvalLoader
from fdscale.students.files import load_weights
from fdscale.students.geometry import file_geometry
from fdscale.students.student import Student, build_student
from fdscale.training.engine import Connection, connect
from fdscale.training.evaluate import gather_rows
from fdscale.training.linear import Features, accuracy_of, best_linear
from fdscale.training.run_directory import write_text

logger = logging.getLogger(__name__)

TEMPERATURE = 0.07  # DINO's


@dataclass(frozen=True)
class Probed:
    """Shares of the held-out images that are classified correctly; `penalty` is the linear layer's, as chosen."""

    student: str
    training_images: int
    held_out_images: int
    classes: int
    linear_accuracy: float
    penalty: float
    knn_accuracy: float
    neighbours: int


def probe(
    student: Path, train: Path, held_out: Path, neighbours: int, batch: int, workers: int, output: Path | None = None
) -> Probed:
    """Probe a student file, or the one of a run's folder; every rank of the launch calls it.

    Each image is looked at once, as in evaluation: features are the mean of the patch tokens, fp32, of the student in
    evaluation mode. `output` gets the result as JSON. Raises UserError for files, shards or labels that do not fit.
    """
    path = student / "student.safetensors" if student.is_dir() else student
    indices = [load_index(folder) for folder in (train, held_out)]
    classes = _classes(*indices)
    network = build_student(file_geometry(path))
    load_weights(network, path)
    connection = connect(rank_from_environment(os.environ))
    if output is not None:
        connection.on_main(lambda: output.parent.mkdir(parents=True, exist_ok=True))
    network.eval().requires_grad_(False).to(connection.device)
    known, asked = (features_of(network, index, connection, batch, workers) for index in indices)
    standard = known.standard()
    layer, penalty = best_linear(known.by(standard), classes)
    found = Probed(
        student=str(path),
        training_images=len(indices[0]),
        held_out_images=len(indices[1]),
        classes=classes,
        linear_accuracy=accuracy_of(layer, asked.by(standard)),
        penalty=penalty,
        knn_accuracy=knn_accuracy_among(known, asked, classes, neighbours),
        neighbours=neighbours,
    )
    if output is not None:
        connection.on_main(lambda: write_text(output, json.dumps(asdict(found), indent=2) + "\n"))
    return found


def table_of(found: Probed) -> Table:
    """The result for a terminal."""
    table = Table(
        title=f"{found.student}: {found.training_images} images, {found.classes} classes", title_justify="left"
    )
    for column in ("features judged by", "correct of held out"):
        table.add_column(column)
    table.add_row(f"linear classifier, penalty {found.penalty:g}", f"{found.linear_accuracy:.2%}")
    table.add_row(f"k-NN, {found.neighbours} neighbours", f"{found.knn_accuracy:.2%}")
    return table


def _classes(train: Index, held_out: Index) -> int:
    """How many there are; raises UserError where an image has no label, or one that training does not know."""
    for index in (train, held_out):
        if int(index.samples["label"].min()) < 0:
            raise UserError(f"{index.folder}: there are images without a label; pack class folders to probe with them")
    classes, highest = int(train.samples["label"].max()) + 1, int(held_out.samples["label"].max())
    if highest >= classes:
        raise UserError(
            f"{held_out.folder} has label {highest}, {train.folder} only 0 to {classes - 1}: nobody learns it"
        )
    if None not in (train.classes, held_out.classes) and train.classes != held_out.classes:
        raise UserError(
            f"{held_out.folder} numbers its classes otherwise than {train.folder}: pack it again with "
            f"`fdscale shards pack FOLDER OUTPUT --classes-of {train.folder}`"
        )
    return classes


@torch.no_grad()
def features_of(student: Student, index: Index, connection: Connection, batch: int, workers: int) -> Features:
    """This rank's share of the features of all images, on its device."""
    rank = connection.rank
    batches = EvalBatches(index, student.image_size, "bicubic")
    rows, labels, keys = [], [], []
    for images in EvalLoader(batches, len(index), rank.rank, rank.world_size, batch, workers, connection.device):
        tokens = student(as_pixels(images.images))[:, student.prefix_tokens :]
        rows.append(tokens.float().mean(dim=1)[images.valid])
        labels.append(images.labels[images.valid])
        keys.append(images.keys.to(connection.device)[images.valid])
        for bad in images.bad:
            logger.warning("left out, it cannot be decoded: %s", bad)
    return Features(torch.cat(rows), torch.cat(labels), torch.cat(keys))


@torch.no_grad()
def knn_accuracy_among(known: Features, asked: Features, classes: int, neighbours: int) -> float:
    """k-NN among the training images of all ranks: cosine similarity, votes weighted by exp(sim / 0.07), as DINO's.

    Each rank finds the nearest among its own for every held-out image; the nearest of all vote.
    """
    rows, labels = gather_rows(F.normalize(asked.rows, dim=1)), gather_rows(asked.labels)
    bank = F.normalize(known.rows, dim=1)
    correct = 0
    for chunk, wanted in zip(rows.split(1024), labels.split(1024), strict=True):
        similarity, voters = _nearest_of_all(chunk @ bank.T, known.labels, neighbours)
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        votes.scatter_add_(1, voters, (similarity / TEMPERATURE).exp())
        correct += int((votes.argmax(1) == wanted).sum())
    return correct / len(rows)


def _nearest_of_all(similarity: Tensor, labels: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Similarities (S, k) and labels of the nearest over all ranks, from this rank's (S, own)."""
    mine, places = similarity.topk(min(neighbours, similarity.shape[1]))
    found = gather_rows(mine.T.contiguous()).T, gather_rows(labels[places].T.contiguous()).T
    nearest, chosen = found[0].topk(min(neighbours, found[0].shape[1]))
    return nearest, found[1].gather(1, chosen)
