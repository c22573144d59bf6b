"""Every shipped DeepSpeed JSON loads strictly, is explained, and is accepted by DeepSpeed itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fdscale.config.deepspeed_json import deepspeed_json_names, load_deepspeed_json
from fdscale.config.recipe import load_recipe, recipe_names
from fdscale.config.shipped import shipped


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


def test_every_json_serves_a_recipe() -> None:
    assert {load_recipe(name).deepspeed for name in recipe_names()} == set(deepspeed_json_names())
