"""The whole study in a minute: everything is run, nothing is learned; then gone on with, and drawn again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fdscale.build.networks import prepare_student
from fdscale.cli import main
from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe
from fdscale.data.packing.digits import Digits
from fdscale.data.packing.shards import write_shards
from fdscale.diagnostics.rows import read_rows
from fdscale.students.files import read_weights
from fdscale.study.conduct import conduct, design_of
from fdscale.study.results import Result, read_results
from fdscale.study.tasks import LOOKED, TRAINED, tasks_of

pytestmark = pytest.mark.timeout(600)  # the first of them waits for the study
SEEDS = 1  # what more of them give is told in test_claims and test_report
SHORT = dict.fromkeys(("supervised", "contrastive", "finetune"), ("steps=3",))  # shorter still than quick
SHORT["distill"] = ("optim.lr=2e-3",)  # at which a few steps stay near their start
MIB = 2**20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Labelled shards of one's own: 320 digits to learn, 96 to be asked."""
    values, labels = load_digits(return_X_y=True)
    folder, numbers = tmp_path_factory.mktemp("shards"), np.arange(len(values))
    digits = Digits("some digits", numbers, values, labels)
    for name, part in {"train": numbers[:320], "held_out": numbers[400:496]}.items():
        write_shards(digits.part(part), folder / name, 64, seed=None)
    return folder / "train", folder / "held_out"


def command(shards: tuple[Path, Path], output: Path) -> list[str]:
    train, held_out = map(str, shards)
    given = ["--shards", train, "--held-out", held_out, "--seeds", str(SEEDS), "--output", str(output)]
    return ["study", "--quick", "--workers", "1", *given, *(f"{kind}.{word}" for kind in SHORT for word in SHORT[kind])]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, shards: tuple[Path, Path]) -> Path:
    output = tmp_path_factory.mktemp("quick") / "study"
    assert main(command(shards, output)) == 0
    return output


def rows(study: Path) -> list[Result]:
    return read_results(study / "results.jsonl")


def test_every_run_is_there_with_what_it_has_seen(study: Path, shards: tuple[Path, Path]) -> None:
    design = design_of(shards, range(SEEDS), SHORT, True, study)
    assert {row.task for row in rows(study)} == {task.name for task in tasks_of(design, study / "runs")}
    for row in rows(study):
        if row.kind in TRAINED:
            assert (study / "runs" / row.task / "complete.json").is_file()
            assert row.values["images"] == 32 * row.values["steps"]
        if row.kind == "finetune":
            assert 0 <= row.values["eval_accuracy"] <= 1
        if row.kind == "diagnose":
            found = {one.model for one in read_rows(study / "runs" / row.task / "measurements.jsonl")}
            assert found == {name.split(".")[0] for name in row.values} == set(LOOKED)


def test_runs_of_a_seed_begin_alike_and_seeds_differ(study: Path) -> None:
    def weights(name: str) -> dict[str, torch.Tensor]:
        return read_weights(study / "runs" / name / "student.safetensors")

    first, name = weights("seed_0/random_probed"), "blocks.0.attn.qkv.weight"
    tuned = load_recipe(str(study / "runs/seed_0/random_finetuned/recipe.toml"), [])
    other = prepare_student(tuned.student, 1).backbone.state_dict()
    assert first.keys() == other.keys()
    assert not torch.equal(first[name], other[name])
    distilled = [weights(f"seed_0/{of}_distilled")[name] for of in ("contrastive", "supervised")]
    assert all(0 < (one - first[name]).abs().max() < 0.02 for one in distilled)  # a few steps away from it
    assert not torch.equal(*distilled)


def test_without_an_ingredient_something_else_is_learned(study: Path) -> None:
    loss = {row.task: row.values["loss"] for row in rows(study) if row.kind == "distill" and row.seed == 0}
    assert len({value for name, value in loss.items() if "contrastive" in name}) == 4


def test_a_worker_holds_no_more_after_many_runs(study: Path) -> None:
    held = [row.resident_bytes for row in rows(study) if row.kind == "finetune"]
    assert max(held) - held[0] < 24 * MIB


def test_the_report_says_what_was_found(study: Path) -> None:
    text = (study / "report.md").read_text()
    for of in ("contrastive", "supervised"):
        assert f"distilled from the {of} teacher" in text
    assert text.count("*inconclusive*") + text.count("*reproduced*") + text.count("*not reproduced") >= 22
    assert (study / "report.html").stat().st_size > 100_000


def test_a_finished_study_is_drawn_again_and_nothing_is_run(
    study: Path, shards: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (study / "results.jsonl").read_bytes()
    (study / "report.html").unlink()
    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", None)  # no worker could be started
    assert main(command(shards, study)) == 0
    assert (study / "report.html").is_file()
    assert (study / "results.jsonl").read_bytes() == before


def test_what_is_missing_is_done_by_the_same_command_and_what_fails_is_named(
    study: Path, shards: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    results, design = study / "results.jsonl", study / "design.json"
    before = results.read_text()
    probes = [row for row in rows(study) if row.kind == "probe"]
    missing, failing = probes[:2]
    weights = study / "runs" / failing.task.removesuffix("_probed") / "student.safetensors"
    weights.rename(weights.with_suffix(".away"))
    gone = {missing.task, failing.task}
    kept = [line for line in before.splitlines(keepends=True) if json.loads(line)["task"] not in gone]
    results.write_text("".join(kept) + '{"task": "seed_0/torn')
    design.write_text(json.dumps(json.loads(design.read_text()) | {"commit": "0123456789ab"}))
    with pytest.raises(UserError, match=rf"(?s){failing.task}: .*student.*what it said is in"):
        conduct(design_of(shards, range(SEEDS), SHORT, True, study), study, workers=1)
    (again,) = (row for row in rows(study) if row.task == missing.task)
    assert again.values == missing.values
    assert len(rows(study)) == len(kept) + 1
    assert "began at commit 0123456789ab and is gone on with at" in caplog.text
    weights.with_suffix(".away").rename(weights)
    results.write_text(before)


def test_another_study_is_refused(study: Path, shards: tuple[Path, Path]) -> None:
    own = {**SHORT, "finetune": ("steps=3", "optim.lr=1.0")}
    with pytest.raises(UserError, match=r"holds another study:\n.*finetune.*\nname another folder"):
        conduct(design_of(shards, range(SEEDS), own, True, study), study, workers=1)


def test_more_labels_than_images_are_refused(tmp_path: Path, shards: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"finetune.labelled=321: .*has 320 images; allowed: 1 to 320"):
        design_of(shards, range(1), {"finetune": ("labelled=321",)}, True, tmp_path)


def test_a_study_that_is_stopped_commits_what_it_is_at(tmp_path: Path, shards: tuple[Path, Path]) -> None:
    longer = [*command(shards, tmp_path), "contrastive.steps=100000"]
    process = subprocess.Popen([sys.executable, "-m", "fdscale", *longer])
    log = tmp_path / "logs" / "worker_0.log"
    while not (log.exists() and "step 1/100000" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == REQUEUE_EXIT_CODE
    (committed,) = (tmp_path / "runs/seed_0/contrastive_teacher/attempts").glob("0001/step_*")
    assert (committed / "manifest.json").is_file()
    assert "stopped by a signal" in log.read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["finetunes.steps=3"], "allowed: KIND.key=value"),
        (["steps=3"], "allowed: KIND.key=value"),
        (["distill.optim.rate=3"], "optim.rate"),
        (["--shards", "somewhere"], "give both, or neither"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *words, "--output", str(tmp_path / "study")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "study" / "results.jsonl").exists()


def test_shards_without_labels_are_refused(tmp_path: Path, shards: tuple[Path, Path]) -> None:
    images, unlabelled = tmp_path / "images", tmp_path / "unlabelled"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32)).save(images / f"{number}.png")
    assert main(["shards", "pack", str(images), str(unlabelled)]) == 0
    with pytest.raises(UserError, match="without a label"):
        design_of((shards[0], unlabelled), range(1), {}, True, tmp_path)
