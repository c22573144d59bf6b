"""A run directory goes on with its own run alone: what may change is one table, everything else is refused."""

from __future__ import annotations

import json
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.errors import UserError
from fdscale.config.problems import dotted_names
from fdscale.config.programs import PROGRAMS
from fdscale.config.recipe import load_recipe, to_toml
from fdscale.config.settings import RunSettings
from fdscale.training.run_directory import MAY_CHANGE, RunDirectory, differences, flatten, versions

OVERRIDES = (
    "data.shards=shards", "eval.shards=held_out", "max_steps=100", "run_dir=runs/x", "log.prometheus_port=9000",
    "student.weights=w.safetensors", "student.geometry.depth=3", "teacher.weights=t.pt", "teacher.image_size=224",
    "teacher.geometry.depth=2", "student.image_size=224", "teacher.revision=v1",
    "further_teachers.dino.name=dino_vit_b16", "further_teachers.dino.weights=d.pt",
)  # fmt: skip
SETTINGS = load_recipe("vit_b_clip_b", OVERRIDES)
JSON = load_deepspeed_json("laptop")
DATA = {"data.shards": "0" * 64, "eval.shards": "1" * 64}
WEIGHTS: dict[str, dict[str, str | None]] = {
    "teacher": {"name": "clip_vit_b16", "path": "t.pt", "sha256": "a" * 64, "revision": "c" * 40},
    "student": {"name": "vit_b16", "path": "random", "sha256": None, "revision": None},
    "further_teachers.dino": {"name": "dino_vit_b16", "path": "d.pt", "sha256": "d" * 64, "revision": None},
}
BY_HASH = ("teacher.weights", "teacher.revision", "student.weights", "further_teachers.*.weights")
PATHS = sorted(flatten(tomllib.loads(to_toml(SETTINGS))))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.begin(SETTINGS)
    directory.record(SETTINGS, JSON, DATA)
    directory.record_weights(WEIGHTS)
    return directory


def trained(run: RunDirectory) -> RunDirectory:
    """The same run once it has something to lose."""
    (run.attempts / "0001" / "step_00000001").mkdir(parents=True)
    return run


def with_teacher(**changes: str | None) -> dict[str, dict[str, str | None]]:
    return {**WEIGHTS, "teacher": {**WEIGHTS["teacher"], **changes}}


def other_value(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value - 1  # epochs: fewer before is more now
        case str():
            return value + "_before"
        case list():
            return [*value, 0]
    raise AssertionError(f"a setting of another type: {value!r}")


def change_before(run: RunDirectory, path: str) -> Any:
    """Put another value of one setting into the recorded recipe; returns it."""
    recorded = tomllib.loads(run.recipe.read_text())
    *tables, key = path.split(".")
    table = recorded
    for name in tables:
        table = table[name]
    table[key] = other_value(table[key])
    run.recipe.write_text(tomli_w.dumps(recorded))
    return table[key]


def refusal(run: RunDirectory, settings: RunSettings = SETTINGS, deepspeed_json: Any = JSON) -> str:
    with pytest.raises(UserError) as error:
        run.check(settings, deepspeed_json)
    return str(error.value)


def test_every_setting_is_among_the_paths() -> None:
    assert len(PATHS) > 40
    everywhere = {name for program in PROGRAMS.values() for name in dotted_names(program)}
    for known in (*MAY_CHANGE, *BY_HASH):
        assert any(fnmatchcase(path, known) for path in {*PATHS, *everywhere}), known
    assert not set(MAY_CHANGE) & set(BY_HASH)


@pytest.mark.parametrize("path", PATHS)
def test_a_change_passes_if_it_is_in_the_table_and_is_told_otherwise(path: str, run: RunDirectory) -> None:
    before = change_before(run, path)
    if any(fnmatchcase(path, known) for known in (*MAY_CHANGE, *BY_HASH)):
        run.check(SETTINGS, JSON)
    else:
        now = flatten(tomllib.loads(to_toml(SETTINGS)))[path]
        told = refusal(run)
        assert told.startswith(f"run_dir: {run.folder} holds another run:\n")
        assert f"\n  {path}: {before!r} there, {now!r} now\n" in told
        assert told.endswith("name a new folder with run_dir=…, or take these changes back")


def test_what_decides_the_result_is_not_in_the_table() -> None:
    for path in ("seed", "data.global_batch", "optim.lr", "loss.beta", "student.name", "teacher.name"):
        assert path in PATHS
        assert path not in MAY_CHANGE


def test_the_same_run_goes_on(run: RunDirectory) -> None:
    run.check(SETTINGS, JSON)


def test_settings_newer_than_the_run_have_their_defaults_there(run: RunDirectory) -> None:
    recorded = run.recipe.read_text()
    older = "\n".join(line for line in recorded.splitlines() if not line.startswith("layer_decay"))
    assert older != recorded
    run.recipe.write_text(older)
    trained(run).check(SETTINGS, JSON)
    decayed = SETTINGS.model_copy(update={"optim": SETTINGS.optim.model_copy(update={"layer_decay": 0.5})})
    assert "optim.layer_decay: 1.0 there, 0.5 now" in refusal(run, decayed)


def test_another_description_beside_the_same_weights_is_refused(run: RunDirectory) -> None:
    described = with_teacher(description="d" * 64)
    trained(run).check_weights(described)  # recorded without one
    run.record_weights(described)
    run.check_weights(described)
    with pytest.raises(UserError, match=r"teacher\.weights"):
        run.check_weights(with_teacher(description="e" * 64))


def test_epochs_only_grow(run: RunDirectory) -> None:
    run.check(SETTINGS.model_copy(update={"epochs": SETTINGS.epochs + 1}), JSON)
    fewer = SETTINGS.model_copy(update={"epochs": SETTINGS.epochs - 1})
    run.check(fewer, JSON)  # nothing has been trained yet: a slip of the finger can be taken back
    told = refusal(trained(run), fewer)
    assert f"epochs: {SETTINGS.epochs} there, {SETTINGS.epochs - 1} now; it may only grow" in told


def test_every_difference_is_told_at_once(run: RunDirectory) -> None:
    for path in ("seed", "optim.lr", "log.every"):
        change_before(run, path)
    told = refusal(run, deepspeed_json={**JSON, "prescale_gradients": True})
    lines = [line.split(":")[0].strip() for line in told.splitlines()[1:-1]]
    assert lines == ["optim.lr", "seed", "prescale_gradients"]


def test_a_setting_that_appears_or_goes_is_a_difference(run: RunDirectory) -> None:
    told = refusal(run, load_recipe("vit_b_clip_b", [o for o in OVERRIDES if not o.startswith("teacher.i")]))
    assert "teacher.image_size: 224 there, 'unset' now" in told
    assert differences({}, {"a": {"b": 1}}, {}) == ["a.b: 'unset' there, 1 now"]


def test_another_deepspeed_json_is_refused(run: RunDirectory) -> None:
    zero = {**JSON["zero_optimization"], "stage": 1}
    told = refusal(run, deepspeed_json={**JSON, "zero_optimization": zero})
    assert f"zero_optimization.stage: {JSON['zero_optimization']['stage']} there, 1 now" in told
    assert "bf16.enabled" in refusal(run, deepspeed_json={**JSON, "bf16": {"enabled": True}})


def test_the_micro_batch_may_change(run: RunDirectory) -> None:
    run.check(SETTINGS, {**JSON, "train_micro_batch_size_per_gpu": 1})


def test_what_is_logged_may_change(run: RunDirectory) -> None:
    run.check(SETTINGS, {**JSON, "wall_clock_breakdown": True, "tensorboard": {"enabled": True}})


def test_other_shards_are_refused_and_moved_ones_are_not(run: RunDirectory) -> None:
    run.check_data(DATA)
    with pytest.raises(UserError, match=r"began with other data than data\.shards now holds"):
        run.check_data({**DATA, "data.shards": "2" * 64})
    with pytest.raises(UserError, match=r"began under another version of fdscale, which reads data\.shards otherwise"):
        run.check_data({**DATA, "data.shards": "2:" + DATA["data.shards"]})


def test_weights_of_a_run_are_held_by_their_bytes(run: RunDirectory) -> None:
    trained(run).check_weights(WEIGHTS)
    run.check_weights(with_teacher(path="moved/t.pt", revision=None))
    with pytest.raises(UserError) as error:
        run.check_weights(with_teacher(path="other.pt", sha256="b" * 64, revision=None))
    assert str(error.value) == (
        f"run_dir: {run.folder} began with other weights:\n"
        f"  teacher.weights: SHA-256 {'a' * 64} (t.pt, teacher.revision={'c' * 40}) there, "
        f"SHA-256 {'b' * 64} (other.pt) now\n"
        "bring the old ones back, or name a new folder with run_dir=…"
    )


def test_random_weights_are_no_file_and_no_file_is_random(run: RunDirectory) -> None:
    with pytest.raises(UserError, match=r"\) there, random now"):
        trained(run).check_weights(with_teacher(path="random", sha256=None, revision=None))
    student: dict[str, str | None] = {"path": "s.safetensors", "sha256": "d" * 64}
    with pytest.raises(UserError, match=f"student.weights: random there, SHA-256 {'d' * 64}"):
        run.check_weights({**WEIGHTS, "student": student})


def test_weights_may_be_corrected_until_something_was_trained(run: RunDirectory) -> None:
    run.check_weights(with_teacher(sha256="b" * 64))
    change_before(run, "teacher.weights")
    run.check(SETTINGS, JSON)


@pytest.mark.parametrize("path", BY_HASH[:3])
def test_a_trained_run_without_a_record_of_its_weights_goes_by_their_names(path: str, run: RunDirectory) -> None:
    run.weights.unlink()
    trained(run).check_weights(WEIGHTS)
    run.check(SETTINGS, JSON)
    change_before(run, path)
    assert f"\n  {path}: " in refusal(run)
    run.record_weights(WEIGHTS)
    run.check(SETTINGS, JSON)


def test_the_same_bytes_elsewhere_keep_their_revision(run: RunDirectory) -> None:
    run.record_weights({"teacher": {"path": "elsewhere.pt", "sha256": "a" * 64, "revision": None}})
    stored = json.loads((run.folder / "weights.json").read_text())
    assert stored == {**WEIGHTS, "teacher": {**WEIGHTS["teacher"], "path": "elsewhere.pt"}}
    other: dict[str, str | None] = {"path": "b.pt", "sha256": "b" * 64, "revision": None}
    run.record_weights({"teacher": other})
    assert json.loads((run.folder / "weights.json").read_text()) == {**WEIGHTS, "teacher": other}


def test_a_folder_where_a_run_only_began_is_its_own(tmp_path: Path) -> None:
    begun = RunDirectory(tmp_path / "run")
    begun.begin(SETTINGS)
    begun.check(SETTINGS, JSON)
    begun.check_data(DATA)


def test_recording_a_longer_run_takes_its_completion_back(run: RunDirectory) -> None:
    run.mark_complete(625)
    run.record(SETTINGS, JSON, DATA)
    assert run.completed_steps() is None


def test_changed_versions_are_named(run: RunDirectory) -> None:
    assert run.changed_versions() == []
    run.versions.write_text(json.dumps({**versions(), "torch": "1.0"}))
    assert run.changed_versions() == [f"torch 1.0 -> {versions()['torch']}"]


def test_a_new_or_an_empty_folder_is_welcome(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "new").check(SETTINGS, JSON)
    RunDirectory(tmp_path).check(SETTINGS, JSON)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert f"{tmp_path} is not empty and not a run" in refusal(RunDirectory(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_ran_is_kept(run: RunDirectory) -> None:
    assert tomllib.loads(run.recipe.read_text()) == tomllib.loads(to_toml(SETTINGS))
    assert json.loads(run.deepspeed.read_text()) == JSON
    kept = json.loads((run.folder / "versions.json").read_text())
    assert kept == versions()
    assert set(kept) >= {"python", "fdscale", "torch", "deepspeed", "timm"}
    assert kept["torch"][0].isdigit()
    assert run.attempts.is_dir()
    assert list(run.folder.glob("*.new")) == []


def test_the_recipe_is_read_back_by_the_loader(run: RunDirectory) -> None:
    assert load_recipe(str(run.recipe)) == SETTINGS


def test_a_run_is_complete_once_it_is_marked(run: RunDirectory) -> None:
    assert run.completed_steps() is None
    run.mark_complete(625)
    assert run.completed_steps() == 625
