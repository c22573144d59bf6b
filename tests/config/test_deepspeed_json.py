"""DeepSpeed JSONs are read strictly, and our key lists are DeepSpeed's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdscale.config.deepspeed_json import BLOCKS, HOMES, LEAF_MODULE, MONITORS, TOP_LEVEL, ZERO, load_deepspeed_json
from fdscale.config.errors import SettingsError, UserError

GOOD: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
many = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.json"


def problems(path: Path, config: dict[str, Any]) -> list[str]:
    path.write_text(json.dumps(config))
    with pytest.raises(SettingsError) as caught:
        load_deepspeed_json(str(path))
    return caught.value.problems


def test_a_good_file_comes_back_as_written(path: Path) -> None:
    path.write_text(json.dumps(GOOD))
    assert load_deepspeed_json(str(path)) == GOOD


def test_every_problem_is_told_at_once(path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 4, "overlap_com": True, "reduce_bucket_size": "auto"},
        "wall_clock_breakdwn": True,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": True},
    }
    assert problems(path, config) == [
        "mine.json: unknown key 'wall_clock_breakdwn'; did you mean 'wall_clock_breakdown'?"
        " (DeepSpeed would ignore it in silence)",
        "mine.json: 'gradient_clipping' does not belong into a DeepSpeed JSON:"
        " its home is the recipe: 'optim.clip' (0 = off)",
        'mine.json: train_micro_batch_size_per_gpu: "auto" is not allowed; write the value',
        'mine.json: zero_optimization.reduce_bucket_size: "auto" is not allowed; write the value',
        "mine.json: train_micro_batch_size_per_gpu: got 'auto', allowed: a whole number, at least 1",
        "mine.json: zero_optimization.stage: got 4, allowed: 0, 1, 2 or 3",
        "mine.json: unknown key 'zero_optimization.overlap_com'; did you mean 'overlap_comm'?",
        "mine.json: bf16 and fp16 are both enabled; allowed: one of them, or none for fp32",
    ]


@pytest.mark.parametrize("key", sorted(HOMES))
def test_a_key_with_another_home_is_refused_by_name(path: Path, key: str) -> None:
    (problem,) = problems(path, {**GOOD, key: {}})
    assert f"'{key}' does not belong into a DeepSpeed JSON" in problem


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_required_keys_are_missed(path: Path, missing: str) -> None:
    (problem,) = problems(path, {key: value for key, value in GOOD.items() if key != missing})
    assert f"{missing}: missing" in problem


def test_micro_batch_and_stage_take_no_booleans(path: Path) -> None:
    config = {"train_micro_batch_size_per_gpu": True, "zero_optimization": {"stage": True}}
    assert len(problems(path, config)) == 2


def test_a_scalar_where_an_object_belongs_is_told(path: Path) -> None:
    found = problems(path, {"train_micro_batch_size_per_gpu": 1, "zero_optimization": 3, "bf16": True})
    assert len(found) == 2


def test_syntax_errors_name_file_and_line(path: Path) -> None:
    path.write_text('{\n  "zero_optimization": {"stage": 3},\n}')
    with pytest.raises(UserError, match=r"mine\.json: line (2|3), column \d+: not JSON"):
        load_deepspeed_json(str(path))


@pytest.mark.parametrize("text", ["[]", "3", '{"a": 1, "a": 2}'])
def test_what_json_allows_and_deepspeed_does_not_is_told(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=r"mine\.json"):
        load_deepspeed_json(str(path))


def test_an_unknown_name_suggests_a_shipped_one() -> None:
    expected = r"unknown DeepSpeed JSON 'labtop'; did you mean 'laptop'\?; known: .*swinv2_g"
    with pytest.raises(UserError, match=expected):
        load_deepspeed_json("labtop")


@many
@given(st.text(min_size=1))
def test_any_other_top_level_key_is_refused(path: Path, key: str) -> None:
    if key not in TOP_LEVEL:
        (problem,) = problems(path, {**GOOD, key: 1})
        assert key in problem


def test_our_key_lists_are_deepspeeds_own() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    class Recorder(dict):
        """Remembers every key that is asked for."""

        asked: ClassVar[set[str]] = set()

        def get(self, key: str, default: Any = None) -> Any:
            self.asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            self.asked.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Recorder:  # type: ignore[override]
            return self  # DeepSpeed only asks whether a key is in there

        def __copy__(self) -> Recorder:
            return self

    DeepSpeedConfig(Recorder(GOOD))
    assert Recorder.asked >= TOP_LEVEL
    fields = DeepSpeedZeroConfig.model_fields
    legacy = {name for name, field in fields.items() if (field.json_schema_extra or {}).get("deprecated")}
    assert {field.alias or name for name, field in fields.items()} - legacy == ZERO


def test_sixteen_bit_without_fp32_masters_is_refused(path: Path) -> None:
    (problem,) = problems(path, {**GOOD, "zero_optimization": {"stage": 0}, "bf16": {"enabled": True}})
    assert "bf16 under zero_optimization.stage 0 keeps no fp32 weights to save" in problem


def test_typed_blocks_are_checked_before_a_gpu_is_touched(path: Path) -> None:
    wrong = {"bf16": {"enable": True}, "data_types": {"grad_accum_type": "fp32"}}
    sizes = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "big", "sub_group_size": 1e9}}
    told = problems(path, {**GOOD, **sizes, **wrong})
    assert [problem.split("; ")[0].split(", allowed")[0] for problem in told] == [
        "mine.json: zero_optimization.reduce_bucket_size: got 'big'",
        "mine.json: unknown key 'bf16.enable'",
        "mine.json: unknown key 'data_types.grad_accum_type'",
    ]


def test_deepspeeds_check_of_gradients_stays_on(path: Path) -> None:
    (told,) = problems(path, {**GOOD, "bf16": {"enabled": True, "check_grad_overflow": False}})
    assert (
        told == "mine.json: bf16.check_grad_overflow: got False, allowed: true: a step that is not finite is left out"
    )


def test_the_keys_of_typed_blocks_are_deepspeeds_own() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    assert BLOCKS["bf16"] == set(DeepSpeedBF16Config.model_fields)
    assert BLOCKS["fp16"] == set(DeepSpeedFP16Config.model_fields)


def test_the_keys_of_its_monitor_are_deepspeeds_own() -> None:
    from deepspeed.monitor import config

    classes = {
        "tensorboard": "TensorBoardConfig",
        "wandb": "WandbConfig",
        "csv_monitor": "CSVConfig",
        "comet": "CometConfig",
    }
    assert MONITORS.keys() == classes.keys() == config.DeepSpeedMonitorConfig.model_fields.keys()
    for block, name in classes.items():
        assert BLOCKS[block] == set(getattr(config, name).model_fields)


def test_blocks_of_the_monitor_are_checked(path: Path) -> None:
    blocks = {"tensorboard": True, "wandb": {"enabled": "yes", "projekt": "p"}, "csv_monitor": {"output_path": None}}
    told = problems(path, {**GOOD, **blocks})
    assert [problem.split(", allowed")[0] for problem in told] == [
        "mine.json: unknown key 'wandb.projekt'; did you mean 'project'?",
        "mine.json: tensorboard: got True",
        "mine.json: wandb.enabled: got 'yes'",
        "mine.json: csv_monitor.output_path: got None",
    ]


def test_leaf_modules_are_named_in_lists(path: Path) -> None:
    leaves = {"classes": "SwinV2Block", "names": ["", "layers.0"], "clases": [], "name_suffixes": ["attn"]}
    told = problems(path, {**GOOD, "zero_optimization": {"stage": 3, "leaf_module": leaves}})
    assert [problem.split(", allowed")[0] for problem in told] == [
        "mine.json: zero_optimization.leaf_module.classes: got 'SwinV2Block'",
        "mine.json: zero_optimization.leaf_module.names: got ['', 'layers.0']",
        "mine.json: unknown key 'zero_optimization.leaf_module.clases'; did you mean 'classes'?",
    ]
    (problem,) = problems(path, {**GOOD, "zero_optimization": {"stage": 3, "leaf_module": ["SwinV2Block"]}})
    assert "allowed: an object such as" in problem


def test_the_keys_of_leaf_modules_are_deepspeeds_own() -> None:
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig

    assert set(DeepSpeedZeroLeafModuleConfig.model_fields) == LEAF_MODULE
