"""The design: complete, in an order that can be worked off, and differing where it is meant to differ alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings
from fdscale.planning.networks import geometry_of
from fdscale.study.tasks import ABLATIONS, FULL, QUICK, RECIPES, SCRATCH, TRAINED, Design, Task, tasks_of
from fdscale.training.run_directory import flatten

DESIGN = Design("train", "test", "a", "b", 7, (0, 1, 2, 3, 4), {"distill": ("student.geometry.depth=3",)})
TASKS = tasks_of(DESIGN, Path("runs"))
NUMBER = re.compile(r"^[\w.]+\s*=\s*(\[\s*)?[-+]?\d")
MARK = re.compile(r"#\s(official|paper|ours): \w.{2,}$")


def settings(task: Task) -> dict[str, object]:
    return flatten(load_recipe(str(RECIPES / f"{task.kind}.toml"), task.overrides).model_dump())


def of_kind(kind: str, seed: int = 0) -> list[Task]:
    return [task for task in TASKS if (task.kind, task.seed) == (kind, seed)]


def test_each_seed_has_every_run_once() -> None:
    per_seed = {"supervised": 1, "contrastive": 1, "distill": 8, "finetune": 11, "probe": 5, "diagnose": 2}
    assert Counter((task.kind, task.seed) for task in TASKS) == {
        (kind, seed): count for kind, count in per_seed.items() for seed in range(5)
    }
    assert len({task.name for task in TASKS}) == len(TASKS)


def test_what_a_task_needs_comes_before_it() -> None:
    before: set[str] = set()
    for task in TASKS:
        assert before.issuperset(task.needs), task.name
        before.add(task.name)


def test_fine_tunings_of_a_seed_differ_in_what_they_start_from_alone() -> None:
    every = [settings(task) for task in of_kind("finetune")]
    differing = {key for one in every for key in one if one.get(key) != every[0].get(key)}
    differing |= {key for one in every for key in every[0] if one.get(key) != every[0].get(key)}
    assert {key for key in differing if not key.startswith("student.")} == {"run_dir"}
    assert every[0]["classes"] == 7


def test_each_ablation_takes_one_ingredient_out() -> None:
    by_network = {task.network: settings(task) for task in of_kind("distill") if task.of == "contrastive"}
    ingredients = {"target.whiten": True, "student.position_bias": None, "student.drop_path": 0.1}
    for network, ingredient in zip(ABLATIONS, ingredients, strict=True):
        full, without = by_network[FULL], by_network[network]
        assert {key for key in full if full[key] != without[key]} == {ingredient, "run_dir"}
        assert full[ingredient] == ingredients[ingredient]


def test_random_weights_are_those_that_the_distillation_begins_with() -> None:
    (scratch,) = (task for task in of_kind("finetune") if task.network == SCRATCH)
    distilled = load_recipe(str(RECIPES / "distill.toml"), of_kind("distill")[0].overrides)
    tuned = load_recipe(str(RECIPES / "finetune.toml"), scratch.overrides)
    assert isinstance(distilled, DistillSettings)
    ours, theirs = geometry_of(tuned.student), geometry_of(distilled.student)
    assert vars(ours) | {"position_bias": "shared"} == vars(theirs)
    assert vars(theirs)["depth"] == 3  # the user's
    assert (tuned.student.weights, tuned.seed) == (None, distilled.seed)


@pytest.mark.parametrize("kind", TRAINED)
def test_each_number_says_where_it_comes_from(kind: str) -> None:
    lines = (RECIPES / f"{kind}.toml").read_text().splitlines()
    assert [line for line in lines if NUMBER.match(line) and not MARK.search(line)] == []
    batch = load_recipe(str(RECIPES / f"{kind}.toml"), [f"deepspeed={RECIPES}/one_rank.json", *QUICK[kind]])
    micro_batch = load_deepspeed_json(f"{RECIPES}/one_rank.json")["train_micro_batch_size_per_gpu"]
    assert batch.data.global_batch == micro_batch  # all views of a step are told apart at once
