"""Settings are frozen, strict and torch-free."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from fdscale.config.data_settings import DataSettings
from fdscale.config.keeping import CheckpointSettings, LogSettings
from fdscale.config.settings import OptimSettings, StudentSettings


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


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prometheus_port": 0}, "prometheus_port: 1 to 65535, or 0 (any free one) with log.prometheus_targets"),
        ({"prometheus_port": 0, "prometheus_targets": "t"}, None),
        ({"prometheus_port": 9101}, None),
        ({"prometheus_host": "node1"}, None),
        ({"prometheus_targets": "t"}, "prometheus_port: a port, since log.prometheus_targets is set"),
        ({"prometheus_password_file": "p"}, "prometheus_port: a port, since log.prometheus_password_file is set"),
        ({"prometheus_certificate": "c"}, "prometheus_port: a port, since log.prometheus_certificate is set"),
        ({"prometheus_port": 1, "prometheus_certificate": "c"}, None),
        ({"prometheus_port": 1, "prometheus_key": "k"}, "prometheus_key: beside log.prometheus_certificate only"),
        ({"pushgateway": "https://gateway.example:9091/prefix"}, None),
        ({"pushgateway": "http://[::1]:9091"}, None),
        *(
            ({"pushgateway": url}, "pushgateway: http://HOST:PORT or https://HOST:PORT, without a password")
            for url in ("gateway:9091", "ftp://gateway", "http://", "http://u:p@gateway", "http://gateway:port")
        ),
        *(
            ({"pushgateway": url}, "pushgateway: http://HOST:PORT or https://HOST:PORT, without a password")
            for url in ("http://gateway:99999", "http://gate way", "http://gateway/?a=b", "http://gateway\n")
        ),
    ],
)
def test_ways_out_that_cannot_be_taken_are_told(given: dict[str, object], told: str | None) -> None:
    try:
        LogSettings.model_validate(given)
    except ValidationError as error:
        (problem,) = error.errors()
        assert f"{problem['loc'][0]}: {problem['ctx']['error']}".startswith(told or "nothing")
    else:
        assert told is None


def test_config_and_planning_leave_torch_unimported() -> None:
    config = "fdscale.config.recipe, fdscale.config.deepspeed_json"
    modules = f"{config}, fdscale.planning.check, fdscale.planning.smoke"
    heavy = "{'torch', 'deepspeed', 'timm'}"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
