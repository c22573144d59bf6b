"""Recipes are strict: every problem at once, each with its path, the value got and what is allowed."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdscale.config.errors import SettingsError, UserError
from fdscale.config.problems import dotted_names
from fdscale.config.recipe import load_recipe, recipe_names, site_words, to_toml
from fdscale.config.settings import DistillSettings, FinetuneSettings

DISTILL = """
program = "distill"
deepspeed = "laptop"
epochs = 2
[student]
name = "vit_b16"
[teacher]
name = "clip_vit_b16"
[data]
shards = "digits"
global_batch = 32
[optim]
lr = 1e-3
"""
FINETUNE = """
program = "finetune"
deepspeed = "laptop"
epochs = 2
classes = 10
[student]
name = "vit_s16"
[data]
shards = "digits"
global_batch = 32
[optim]
lr = 1e-3
"""
many = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def distill(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(DISTILL)
    return str(path)


@pytest.fixture
def finetune(tmp_path: Path) -> str:
    path = tmp_path / "tune.toml"
    path.write_text(FINETUNE)
    return str(path)


def problems(recipe: str, *overrides: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_recipe(recipe, overrides)
    return [problem.partition(": ")[2] for problem in caught.value.problems]


def test_defaults_are_the_official_ones(distill: str) -> None:
    run = load_recipe(distill)
    assert isinstance(run, DistillSettings)
    assert (run.loss.beta, run.optim.clip) == (2.0, 3.0)
    assert (run.optim.weight_decay, run.optim.reference_batch) == (0.05, 512)
    assert run.data.crop_scale == (0.08, 1.0)
    assert run.target.whiten
    assert run.teacher.after_norm


def test_programs_have_their_own_settings(finetune: str) -> None:
    run = load_recipe(finetune, ["labelled=200"])
    assert isinstance(run, FinetuneSettings)
    assert (run.classes, run.labelled) == (10, 200)
    assert problems(finetune, "teacher.name=x", "loss.beta=1") == [
        "'teacher' is a setting of program = \"distill\" only",
        "'loss' is a setting of program = \"distill\" only",
    ]


def test_every_problem_is_told_at_once(distill: str) -> None:
    found = problems(
        distill,
        "optim.lrr=1",
        "optim.lr=-1",
        "epochs=soon",
        "student.drop_path=1.0",
        "target.grid=pol",
        "data.workers=true",
        "optim.betas=[0.9,1.5]",
        "data.crop_scale=[0.5,0.1]",
        "teacher.geometry={depth='three'}",
    )
    assert sorted(found) == sorted(
        [
            "unknown setting 'optim.lrr'; did you mean 'optim.lr'?",
            "optim.lr: got -1, allowed: a number, above 0",
            "epochs: got 'soon', allowed: a number, above 0",
            "student.drop_path: got 1.0, allowed: a number, at least 0, below 1",
            "target.grid: got 'pol', allowed: 'exact' or 'pool' or 'interpolate'",
            "data.workers: got true, allowed: a whole number, at least 0",
            "optim.betas[1]: got 1.5, allowed: a number, at least 0, below 1",
            "data.crop_scale: got [0.5, 0.1], allowed: two ascending fractions above 0 and up to 1",
            "teacher.geometry.depth: got 'three', allowed: a number or a list of whole numbers",
        ]
    )


def test_a_missing_setting_says_what_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text('program = "distill"\n[student]\n')
    found = problems(str(path))
    assert "missing setting 'student.name': text (a number as text is written key=\"5\"), not empty" in found
    assert "missing setting 'deepspeed': text (a number as text is written key=\"5\"), not empty" in found
    assert "missing setting 'teacher': a table" in found


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_non_finite_numbers_are_refused(distill: str, value: str) -> None:
    expected = f"optim.min_lr: got {value}, allowed: a finite number"
    assert problems(distill, f"optim.min_lr={value}") == [expected]


@pytest.mark.parametrize(
    ("override", "home"),
    [
        ("train_batch_size=64", "'data.global_batch'"),
        ("micro_batch=4", "train_micro_batch_size_per_gpu"),
        ("zero_optimization.stage=3", "DeepSpeed JSON"),
        ("gradient_clipping=1.0", "'optim.clip'"),
        ("gradient_accumulation_steps=2", "derived"),
        ("nodes=4", "launcher"),
        ("data.ranks=4", "launcher"),
    ],
)
def test_a_key_with_another_home_is_sent_there(distill: str, override: str, home: str) -> None:
    (problem,) = problems(distill, override)
    assert home in problem
    assert "is no recipe setting" in problem


def test_the_last_override_wins_and_values_are_toml(distill: str) -> None:
    run = load_recipe(
        distill,
        [
            "seed=1",
            "seed=2",
            "run_dir=/some/run=1",
            "student.geometry.depths=[1, 2]",
            "teacher.weights='7'",
            "eval.knn=0",
        ],
    )
    assert (run.seed, run.run_dir, run.eval.knn) == (2, "/some/run=1", 0)
    assert run.student.geometry == {"depths": [1, 2]}
    assert isinstance(run, DistillSettings)
    assert run.teacher.weights == "7"


@pytest.mark.parametrize("override", ["seed", "=3", "optim..lr=1", "optim.lr =1", "data.crop_scale=[0.1", ""])
def test_a_broken_override_is_told(distill: str, override: str) -> None:
    (problem,) = problems(distill, override)
    assert problem.startswith(f"override {override!r}")


def test_an_override_cannot_enter_a_single_value(distill: str) -> None:
    assert problems(distill, "student.name.size=3") == [
        "override 'student.name.size': 'student.name' is a single value, not a table"
    ]


def test_smoke_lies_between_recipe_and_command_line(distill: str) -> None:
    seen = []

    def smoke(tree: dict) -> dict:
        seen.append(tree["student"]["name"])
        return {"epochs": 5, "data": {"global_batch": 8, "shards": None} | {"shards": "small"}, "seed": 9}

    run = load_recipe(distill, ["student.name=swinv2_t", "seed=3"], smoke)
    assert seen == ["swinv2_t"]  # the patch fits what the command line chose
    assert (run.epochs, run.data.global_batch, run.data.shards, run.seed) == (5, 8, "small", 3)


def test_a_site_lies_between_smoke_and_command_line(distill: str) -> None:
    site = ["log.prometheus_port=9101", "log.every=7", "seed=4"]
    run = load_recipe(distill, ["log.every=8"], lambda tree: {"log": {"every": 5}, "seed": 9}, site)
    assert (run.log.prometheus_port, run.log.every, run.seed) == (9101, 8, 4)


def test_what_is_wrong_in_a_site_is_told_as_its_own(distill: str) -> None:
    site = ["log.promtheus_port=9101", "log.every=none", "--smoke", "log.prometheus_port=0", "log.prometheus_key=/k"]
    with pytest.raises(SettingsError) as caught:
        load_recipe(distill, ["log.evry=3", "log.every=4", "seed=-1"], None, site)
    told = [problem.split(", allowed")[0].split(";")[0] for problem in caught.value.problems]
    assert sorted(told) == [
        "FDSCALE_SETTINGS: log.prometheus_key: got '/k'",
        "FDSCALE_SETTINGS: log.prometheus_port: got 0",
        "FDSCALE_SETTINGS: override '--smoke': write key=value, such as optim.lr=1e-3",
        "FDSCALE_SETTINGS: unknown setting 'log.promtheus_port'",
        "mine.toml: seed: got -1",
        "mine.toml: unknown setting 'log.evry'",
    ]


def test_a_site_is_split_into_words_as_a_shell_would() -> None:
    assert site_words({}) == site_words({"FDSCALE_SETTINGS": "  "}) == []
    assert site_words({"FDSCALE_SETTINGS": "a=1 b='x y'\n c=\\$(id)"}) == ["a=1", "b=x y", "c=$(id)"]
    with pytest.raises(UserError, match=r"FDSCALE_SETTINGS=.*cannot be split into words"):
        site_words({"FDSCALE_SETTINGS": "a='x"})


def test_unknown_program_and_unknown_recipe_suggest(distill: str) -> None:
    assert problems(distill, "program=distil") == [
        'program: got \'distil\', allowed: "distill" or "finetune" or "segment" or "detect"; did you mean \'distill\'?'
    ]
    expected = r"unknown recipe 'swinv2g'; did you mean 'swinv2_g'\?; known: .*vit_b_dino"
    with pytest.raises(UserError, match=expected):
        load_recipe("swinv2g")
    with pytest.raises(UserError, match="no such file; shipped names: "):
        load_recipe("no/such.toml")


def test_unreadable_toml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text('program = "distill"\nseed 3\n')
    with pytest.raises(UserError, match=r"broken\.toml: not readable as TOML: .*line 2"):
        load_recipe(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"broken\.toml: not readable"):
        load_recipe(str(path))


@pytest.mark.parametrize("overrides", [[], ["optim.reference_batch=0", "max_steps=7", "data.flip=1"]])
def test_to_toml_loads_to_the_same_settings(distill: str, tmp_path: Path, overrides: list[str]) -> None:
    run = load_recipe(distill, overrides)
    kept = tmp_path / "recipe.toml"
    kept.write_text(to_toml(run))
    assert load_recipe(str(kept)) == run
    assert (run.optim.reference_batch is None) == bool(overrides)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_survive_their_own_toml(name: str, tmp_path: Path) -> None:
    run = load_recipe(name)
    kept = tmp_path / "recipe.toml"
    kept.write_text(to_toml(run))
    assert load_recipe(str(kept)) == run


@many
@given(st.lists(st.text(string.ascii_letters + "_-", min_size=1, max_size=9), min_size=1, max_size=3))
def test_any_unknown_key_is_refused_by_its_name(distill: str, parts: list[str]) -> None:
    key = ".".join(parts)
    if key in dotted_names(DistillSettings) or "geometry" in parts:
        return
    found = problems(distill, f"{key}=1")
    assert any(parts[0] in problem for problem in found)


@many
@given(st.text())
def test_any_text_after_the_sign_is_a_value_or_a_told_problem(distill: str, text: str) -> None:
    told = ""
    try:
        told = load_recipe(distill, [f"run_dir={text}"]).run_dir or ""
    except SettingsError as error:
        told = next(problem for problem in error.problems if "run_dir" in problem)
    assert told


@many
@given(st.text(min_size=1))
def test_any_text_arrives_when_it_is_quoted(distill: str, text: str) -> None:
    quoted = tomli_w.dumps({"value": text}).removeprefix("value = ").rstrip("\n")
    assert load_recipe(distill, [f"run_dir={quoted}"]).run_dir == text


DINO = ["further_teachers.dino.name=dino_vit_b16", "further_teachers.dino.target.grid=pool"]


def test_further_teachers_follow_the_first_by_their_names(distill: str) -> None:
    run = load_recipe(distill, [*DINO, "further_teachers.clip.name=clip_vit_l14", "further_teachers.clip.weight=0.5"])
    assert isinstance(run, DistillSettings)
    told = [(where, table.name, table.weight, target.grid) for where, (table, target) in run.teachers.items()]
    assert told == [
        ("teacher", "clip_vit_b16", 1.0, "exact"),
        ("further_teachers.clip", "clip_vit_l14", 0.5, "exact"),
        ("further_teachers.dino", "dino_vit_b16", 1.0, "pool"),
    ]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("further_teachers.dino.weigts=x", "unknown setting 'further_teachers.dino.weigts'; did you mean"),
        ("further_teachers.dino.weight=0", "further_teachers.dino.weight: got 0, allowed: a number, above 0"),
        ("further_teachers.dino.placement=zero2", "'auto' or 'replicated' or 'zero3' or 'fairscale'"),
        ("further_teachers.Dino.name=x", "further_teachers.Dino: got 'Dino', allowed: a name of small letters"),
        ("further_teachers.teacher.name=x", "any name but 'teacher', which is the first one's"),
        ("further_teachers.b.weight=1", "missing setting 'further_teachers.b.name': text"),
    ],
)
def test_a_wrong_further_teacher_is_told_by_its_path(override: str, told: str, distill: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_recipe(distill, [*DINO, override])
    assert any(told in problem for problem in caught.value.problems), caught.value.problems
