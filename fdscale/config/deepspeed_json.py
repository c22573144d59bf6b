"""DeepSpeed JSONs, read strictly and without DeepSpeed, which ignores unknown top-level keys in silence.

They keep DeepSpeed's own schema and say how a run fits the machine: ZeRO, precision, micro batch, offload.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fdscale.config.errors import SettingsError, UserError, nearest
from fdscale.config.shipped import find, shipped_names


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What DeepSpeed 0.19.8 reads (runtime/config.py), less what has another home or no use beside our own loop.
TOP_LEVEL = _words(
    """
    train_micro_batch_size_per_gpu zero_optimization bf16 fp16 torch_autocast data_types
    communication_data_type seq_parallel_communication_data_type prescale_gradients
    gradient_predivide_factor gradient_allreduce_op aio checkpoint datastates_ckpt compile comms_logger
    flops_profiler wall_clock_breakdown memory_breakdown timers steps_per_print dump_state log_level
    disable_allgather disable_python_gc csv_monitor tensorboard wandb comet
    """
)
RECIPE = "its home is the recipe:"
OWN_LOADER = "fdscale reads and orders its data itself: see [data] in the recipe"
DATA_PARALLEL = "every rank of fdscale is a data-parallel rank: shard with zero_optimization instead"
HOMES = {
    "train_batch_size": f"{RECIPE} 'data.global_batch'",
    "gradient_accumulation_steps": "it is derived as global batch / (ranks x micro batch)",
    "managed_gradient_accumulation": "accumulation belongs to fdscale's loop",
    "gradient_clipping": f"{RECIPE} 'optim.clip' (0 = off)",
    "optimizer": f"{RECIPE} [optim]; it is AdamW",
    "scheduler": f"{RECIPE} [optim]; it is a linear warm-up and optim.decay",
    "seed": f"{RECIPE} 'seed'",
    "activation_checkpointing": f"{RECIPE} 'student.activation_checkpointing'",
    "zero_allow_untested_optimizer": "fdscale hands DeepSpeed its own AdamW and sets this itself",
    "zero_force_ds_cpu_optimizer": "fdscale hands DeepSpeed its own AdamW and sets this itself",
    "bfloat16": "write 'bf16'",
    "amp": "write 'bf16' or 'fp16'",
    **dict.fromkeys(("data_efficiency", "dataloader_drop_last", "curriculum_learning"), OWN_LOADER),
    **dict.fromkeys(("tensor_parallel", "expert_parallel", "pipeline", "hybrid_engine"), DATA_PARALLEL),
    **dict.fromkeys(("autotuning", "elasticity"), "fdscale settles the batch before DeepSpeed starts"),
}
ZERO = _words(
    """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
    elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size
    stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
    stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save
    stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params
    stage3_allgather_sequential ignore_unused_parameters legacy_stage1 round_robin_gradients
    parameter_alignment zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
    pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
    save_muon_momentum_buffer_in_memory leaf_module
    """
)
MONITORS = {  # the blocks of DeepSpeed's monitor, and the package that each needs
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "csv_monitor": None,
    "comet": "comet_ml",
}
PRECISIONS = ("bf16", "fp16", "torch_autocast")
BLOCKS = {  # the keys of typed blocks: DeepSpeed refuses others as well, but on the GPUs
    "bf16": _words(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "fp16": _words(
        """
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """
    ),
    "torch_autocast": _words("enabled dtype lower_precision_safe_modules"),
    **dict.fromkeys(("tensorboard", "csv_monitor"), _words("enabled output_path job_name")),
    "wandb": _words("enabled group team project"),
    "comet": _words(
        "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode"
    ),
    "data_types": _words("grad_accum_dtype"),
}
LEAF_MODULE = _words("classes names name_suffixes")
COUNTS = ("_size", "_threshold", "_parameters", "_distance")  # endings of the keys whose value is a count


def deepspeed_json_names() -> list[str]:
    """The names of the shipped DeepSpeed JSONs."""
    return shipped_names("ds_configs", ".json")


def load_deepspeed_json(name_or_path: str) -> dict[str, Any]:
    """The JSON as a dict, in DeepSpeed's own schema; never imports DeepSpeed.

    Raises UserError when the file cannot be read, SettingsError with every problem at once otherwise.
    """
    path = find("DeepSpeed JSON", name_or_path, "ds_configs", ".json")
    config = _read(path)
    problems = [f"{path.name}: {problem}" for problem in _problems(config)]
    if problems:
        raise SettingsError(problems)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: {where}: not JSON: {error.msg}") from error
    except (UnicodeDecodeError, OSError, _DuplicateKeyError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: got a {type(config).__name__}, allowed: a JSON object")
    return config


class _DuplicateKeyError(ValueError):
    """A key stands twice in one object; json would keep the last in silence."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise _DuplicateKeyError(f"key {twice[0]!r} stands twice in one object")
    return dict(pairs)


def _problems(config: Mapping[str, Any]) -> list[str]:
    return [
        *(_unknown(key) for key in config if key not in TOP_LEVEL),
        *(f'{path}: "auto" is not allowed; write the value' for path in _auto_paths(config)),
        *_micro_batch_problems(config),
        *_zero_problems(config),
        *_precision_problems(config),
        *_block_problems(config),
        *_monitor_problems(config),
        *_unchecked(config),
    ]


def _unknown(key: str) -> str:
    if key in HOMES:
        return f"'{key}' does not belong into a DeepSpeed JSON: {HOMES[key]}"
    return f"unknown key '{key}'{nearest(key, [*TOP_LEVEL, *HOMES])} (DeepSpeed would ignore it in silence)"


def _auto_paths(node: Any, path: str = "") -> Iterator[str]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _auto_paths(value, f"{path}.{key}".lstrip("."))
    if node == "auto":
        yield path


def _micro_batch_problems(config: Mapping[str, Any]) -> Iterator[str]:
    micro_batch = config.get("train_micro_batch_size_per_gpu")
    if not _is_whole(micro_batch) or micro_batch < 1:
        got = "missing" if micro_batch is None else f"got {micro_batch!r}"
        yield f"train_micro_batch_size_per_gpu: {got}, allowed: a whole number, at least 1"


def _zero_problems(config: Mapping[str, Any]) -> Iterator[str]:
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        got = "missing" if zero is None else f"got {zero!r}"
        yield f'zero_optimization: {got}, allowed: an object such as {{"stage": 3}}'
        return
    if not _is_whole(zero.get("stage")) or zero["stage"] not in range(4):
        yield f"zero_optimization.stage: got {zero.get('stage')!r}, allowed: 0, 1, 2 or 3"
    for key in zero:
        if key not in ZERO:
            yield f"unknown key 'zero_optimization.{key}'{nearest(key, ZERO)}"
        elif key.endswith(COUNTS) and zero[key] != "auto" and not _is_count(zero[key]):
            yield f"zero_optimization.{key}: got {zero[key]!r}, allowed: a whole number, at least 0"
    yield from _leaf_problems(zero.get("leaf_module", {}))


def _leaf_problems(leaves: Any) -> Iterator[str]:
    """DeepSpeed takes each entry for a string, whatever it is, and only logs where none of them matches."""
    where = "zero_optimization.leaf_module"
    if not isinstance(leaves, dict):
        yield f'{where}: got {leaves!r}, allowed: an object such as {{"classes": ["SwinV2Block"]}}'
        return
    for key, names in leaves.items():
        if key not in LEAF_MODULE:
            yield f"unknown key '{where}.{key}'{nearest(key, LEAF_MODULE)}"
        elif not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            yield f"{where}.{key}: got {names!r}, allowed: a list of names"


def _precision_problems(config: Mapping[str, Any]) -> Iterator[str]:
    enabled = []
    for key in PRECISIONS:
        block = config.get(key, {})
        if not isinstance(block, dict):
            yield f'{key}: got {block!r}, allowed: an object such as {{"enabled": true}}'
        elif block.get("enabled"):
            enabled.append(key)
    if len(enabled) > 1:
        yield f"{' and '.join(enabled)} are both enabled; allowed: one of them, or none for fp32"
    zero = config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("stage") == 0 and {"bf16", "fp16"} & set(enabled):
        yield f"{enabled[0]} under zero_optimization.stage 0 keeps no fp32 weights to save; allowed: stage 1, 2 or 3"


def _block_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name, known in BLOCKS.items():
        block = config.get(name, {})
        for key in block if isinstance(block, dict) else ():
            if key not in known:
                yield f"unknown key '{name}.{key}'{nearest(key, known)}"


def _monitor_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name in MONITORS:
        block = config.get(name, {})
        if not isinstance(block, dict):
            yield f'{name}: got {block!r}, allowed: an object such as {{"enabled": true}}'
            continue
        if not isinstance(block.get("enabled", False), bool):
            yield f"{name}.enabled: got {block['enabled']!r}, allowed: true or false"
        for key in ("output_path", "job_name"):
            if not isinstance(block.get(key, ""), str):
                yield f"{name}.{key}: got {block[key]!r}, allowed: text"


def _unchecked(config: Mapping[str, Any]) -> Iterator[str]:
    """DeepSpeed's own check of gradients: without it an update that is not finite would be applied."""
    for name, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        block = config.get(name, {})
        if isinstance(block, dict) and block.get(key, True) is not True:
            yield f"{name}.{key}: got {block[key]!r}, allowed: true: a step that is not finite is left out"


def _is_count(value: object) -> bool:
    """Whether a value is a whole number, at least 0; JSON writes large ones as 5e8, too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
