"""Every shipped DeepSpeed JSON loads strictly, is explained, and is accepted by DeepSpeed itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fdscale.config.deepspeed_json import deepspeed_json_names, load_deepspeed_json
from fdscale.config.recipe import load_recipe, recipe_names
from fdscale.config.shipped import shipped
from fdscale.data.order import accumulation_steps
from fdscale.students.geometry import SwinV2Geometry
from fdscale.students.student import build_student
from fdscale.training.engine import Connection, start_engine
from fdscale.training.optim import adamw, parameter_groups


def keys(node: dict[str, Any]) -> Iterator[str]:
    for key, value in node.items():
        yield key
        if isinstance(value, dict) and key == "zero_optimization":
            yield from keys(value)


@pytest.mark.parametrize("name", deepspeed_json_names())
def test_it_loads_strictly_and_deepspeed_accepts_it(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_deepspeed_json(name)
    accepted = DeepSpeedConfig({**config, "gradient_clipping": 0.0})
    assert accepted.train_micro_batch_size_per_gpu == config["train_micro_batch_size_per_gpu"]
    assert accepted.zero_optimization_stage == config["zero_optimization"]["stage"]
    assert accepted.bfloat16_config.enabled == ("bf16" in config)


@pytest.mark.parametrize("name", deepspeed_json_names())
def test_the_readme_says_why_for_every_key(name: str) -> None:
    readme = (shipped("ds_configs") / "README.md").read_text()
    assert f"`{name}.json`" in readme
    for key in keys(load_deepspeed_json(name)):
        assert key in readme, f"ds_configs/README.md does not explain {key}"


# What each JSON was written for: a recipe, and the ranks that its micro batch divides that recipe's batch over.
SCALES = {
    "laptop": ("digits_teacher", 2),
    "vit_b_one_gpu": ("vit_b_clip_b", 1),
    "vit_b_one_node": ("vit_b_clip_b", 8),
    "vit_l_one_node": ("vit_l_clip_l", 8),
    "swinv2_b_one_node": ("swinv2_b_esvit", 8),
    "swinv2_h_four_nodes": ("swinv2_g", 32),
    "swinv2_g": ("swinv2_g", 128),
    "swinv2_g_offload": ("swinv2_g", 16),
    "swinv2_g_slow_links": ("swinv2_g", 128),
    "dense_one_node": ("ade20k_vit_b", 8),
    "dense_swinv2_g": ("ade20k_swinv2_g", 32),
}


def test_every_json_has_a_scale_and_every_recipe_a_json() -> None:
    assert set(SCALES) == set(deepspeed_json_names())
    assert {load_recipe(name).deepspeed for name in recipe_names()} <= set(deepspeed_json_names())


@pytest.mark.parametrize("name", SCALES)
def test_the_batch_of_its_recipe_is_whole_steps_on_its_ranks(name: str) -> None:
    recipe, ranks = SCALES[name]
    micro_batch = load_deepspeed_json(name)["train_micro_batch_size_per_gpu"]
    global_batch = load_recipe(recipe).data.global_batch
    steps = accumulation_steps(global_batch, ranks, micro_batch)
    assert steps >= 1
    assert f"{global_batch} = {ranks} x {micro_batch} x {steps}" in (shipped("ds_configs") / "README.md").read_text()


def two_steps(connection: Connection, name: str) -> tuple[list[float], int]:
    """Losses of a tiny SwinV2 under a shipped JSON, with what the number of ranks decides adapted, and its leaves."""
    config = load_deepspeed_json(name)
    config["train_micro_batch_size_per_gpu"] = 2
    if "zero_hpz_partition_size" in config["zero_optimization"]:
        config["zero_optimization"]["zero_hpz_partition_size"] = connection.rank.world_size
    student = build_student(SwinV2Geometry(16, (2, 2), (2, 4), window_size=4, image_size=32), seed=1)
    optimizer = adamw(parameter_groups(student, 0.05, set()), 1e-3, (0.9, 0.999), 1e-8)
    engine = start_engine(student, optimizer, config, 1, clip=1.0)
    losses = []
    for _ in range(2):
        loss = engine(torch.full((2, 3, 32, 32), 0.3)).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    leaves = sum(getattr(module, "_z3_leaf", False) for module in student.modules())
    engine.destroy()
    return losses, leaves


@pytest.mark.parametrize("name", SCALES)
def test_two_real_steps_under_it(name: str, two_ranks: Any) -> None:
    (losses, leaves), other = two_ranks(two_steps, name)
    assert (losses, leaves) == other
    assert losses[1] < losses[0]
    stage = load_deepspeed_json(name)["zero_optimization"]["stage"]
    assert leaves == (5 if stage == 3 else 0)  # four blocks and a merging: a name that no class has would be no leaf
