"""Several data sets: their shares of a batch, and what does not fit together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fdscale.config.errors import SettingsError
from fdscale.config.recipe import load_recipe
from fdscale.data.packing.digits import pack_digits
from fdscale.data.remote.cache import GIB
from fdscale.planning.check import Plan, check
from fdscale.planning.data_check import DIGITS_CLASSES, DIGITS_SAMPLES
from tests.data.shard_server import ShardServer

Shards = Callable[..., str]
DEEPSPEED: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}


def plan_of(*overrides: str) -> Plan:
    given = ["teacher.weights=random", "data.global_batch=8", "data.workers=0", "epochs=30", "checkpoint.every=5"]
    return check(load_recipe("vit_b_clip_b", [*given, *overrides]), DEEPSPEED, 2)


def problems(*overrides: str) -> str:
    with pytest.raises(SettingsError) as caught:
        plan_of(*overrides)
    return "\n".join(caught.value.problems)


def test_an_epoch_of_several_data_sets_is_as_long_as_all_of_them(shards: Shards) -> None:
    plan = plan_of(f"data.shards={shards(20)}", f"data.further_shards.more.shards={shards(13)}")
    assert (plan.samples, plan.steps_per_epoch) == (33, 4)


def test_what_is_wrong_with_each_data_set_is_told_at_once(shards: Shards, tmp_path: Any) -> None:
    nowhere = [f"data.further_shards.{name}.shards={tmp_path / name}" for name in ("one", "two")]
    told = problems(f"data.shards={shards(20)}", *nowhere)
    assert "data.further_shards.one.shards: shard folder" in told
    assert "data.further_shards.two.shards: shard folder" in told


def test_a_data_set_that_is_named_twice_is_told_wherever_it_lies(shards: Shards, tmp_path: Path) -> None:
    first = shards(20)
    copied = shutil.copytree(first, tmp_path / "copied")
    three = [
        f"data.shards={first}",
        f"data.further_shards.a.shards={shards(9)}",
        f"data.further_shards.b.shards={copied}",
    ]
    assert f"data.further_shards.b.shards: got {copied}, the same shards as data.shards; name" in problems(*three)
    told = problems("data.shards=digits", "data.further_shards.again.shards=digits")
    assert "data.further_shards.again.shards: got digits, the same shards as data.shards; name them once" in told


def test_a_share_of_less_than_one_image_and_one_of_more_than_there_is(shards: Shards) -> None:
    two = [f"data.shards={shards(20)}", f"data.further_shards.more.shards={shards(3)}"]
    told = problems(*two, "data.weight=99", "data.further_shards.more.weight=1")
    assert "data.further_shards.more.shards: its share of a global batch of 8 images is less than one image" in told
    told = problems(*two, "data.weight=1", "data.further_shards.more.weight=1")
    assert "more.shards: its share of a global batch of 8 is 4 images, but it holds 3; lower its weight" in told


def test_weights_are_given_to_all_or_to_none(shards: Shards) -> None:
    two = [f"data.shards={shards(20)}", f"data.further_shards.more.shards={shards(9)}"]
    assert plan_of(*two, "data.weight=1", "data.further_shards.more.weight=2.5").steps_per_epoch == 3
    with pytest.raises(SettingsError, match=r"a weight of each data set \(not set: data\.weight\), or"):
        plan_of(*two, "data.further_shards.more.weight=2")


def test_few_labels_are_of_one_data_set(shards: Shards) -> None:
    two = [f"data.shards={shards(20)}", f"data.further_shards.more.shards={shards(9)}", "labelled=8", "classes=4"]
    with pytest.raises(SettingsError, match=r"labelled: it is data\.shards that few are taken of"):
        check(load_recipe("digits_finetune", ["data.global_batch=8", *two]), DEEPSPEED, 2)


def test_what_lies_beside_the_embedded_digits_is_looked_at_too(shards: Shards, tmp_path: Any) -> None:
    mixed = ["data.shards=digits", f"data.further_shards.more.shards={tmp_path / 'nowhere'}"]
    assert "data.further_shards.more.shards: shard folder" in problems(*mixed)
    mixed[1] = f"data.further_shards.more.shards={shards(20)}"
    told = problems(*mixed, "data.weight=99", "data.further_shards.more.weight=1")
    assert "data.further_shards.more.shards: its share of a global batch of 8 images is less than one image" in told
    unlabelled = f"data.further_shards.more.shards={shards(300, labels=False)}"
    with pytest.raises(SettingsError, match=r"data\.further_shards\.more\.shards: 300 of 300 samples have no label"):
        check(load_recipe("digits_finetune", ["data.global_batch=8", "data.shards=digits", unlabelled]), DEEPSPEED, 2)


def test_as_many_digits_are_planned_as_are_packed(tmp_path: Path) -> None:
    index = pack_digits(tmp_path / "digits", "train")
    assert (len(index), len(index.classes or ())) == (DIGITS_SAMPLES, DIGITS_CLASSES)


def test_held_out_shards_behind_a_url_take_their_room_and_are_asked_for_once(shards: Shards, tmp_path: Path) -> None:
    held_out = Path(shards(40))
    room = sum(shard.stat().st_size for shard in held_out.glob("*.tar")) / GIB
    overrides = [f"data.shards={shards(20)}", "eval.every=5", f"data.cache={tmp_path / 'cache'}", "epochs=30"]
    overrides += ["teacher.weights=random", "data.global_batch=8", "checkpoint.every=5"]

    def checked(cache_gib: float) -> None:
        url = [f"eval.shards={server.url}", f"data.cache_gib={cache_gib}"]
        check(load_recipe("vit_b_clip_b", [*overrides, *url]), DEEPSPEED, 2, 2)

    with ShardServer(held_out).serving() as server:
        checked(1.1 * room)
        assert server.asked["index.json"] == 1
        with pytest.raises(SettingsError, match=r"data\.cache_gib: got .*, allowed: at least"):
            checked(0.9 * room)
