"""Settings are frozen, strict and torch-free."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from fdscale.config.settings import CheckpointSettings, DataSettings, OptimSettings, StudentSettings


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CheckpointSettings().every = 3  # type: ignore[misc]


@pytest.mark.parametrize("value", ["3", 3.0, True, None])
def test_nothing_is_coerced_to_a_whole_number(value: object) -> None:
    with pytest.raises(ValidationError):
        DataSettings.model_validate({"shards": "a", "global_batch": value})


def test_a_whole_number_is_a_number_and_zero_reference_batch_is_none() -> None:
    optim = OptimSettings.model_validate({"lr": 1, "reference_batch": 0})
    assert (optim.lr, optim.reference_batch) == (1.0, None)


def test_geometry_takes_numbers_and_lists_of_whole_numbers() -> None:
    geometry = {"depths": [1, 2], "mlp_ratio": 2.5, "depth": 3}
    assert StudentSettings.model_validate({"name": "x", "geometry": geometry}).geometry == geometry


def test_config_and_planning_leave_torch_unimported() -> None:
    config = "fdscale.config.recipe, fdscale.config.deepspeed_json"
    modules = f"{config}, fdscale.planning.check, fdscale.planning.smoke"
    heavy = "{'torch', 'deepspeed', 'timm'}"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
