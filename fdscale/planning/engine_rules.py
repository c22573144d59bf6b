"""What DeepSpeed 0.19.8 keeps of each weight, by stage and precision; read in its code and measured, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Keeper = Literal["ddp", "zero12", "bf16", "zero3"]
Config = Mapping[str, Any]

FP32, REDUCED = 4, 2  # bytes
REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's default, and what the two optimizers without buckets take at once
DEFAULTS = {
    "reduce_bucket_size": REDUCE_BUCKET,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


@dataclass(frozen=True)
class EngineRules:
    """Bytes of an element in each role, and which of DeepSpeed's optimizers keeps the states.

    `ddp`: stage 0; `zero12`: stages 1 and 2; `bf16`: stage 1 of bf16 weights with fp32 gradients, an optimizer of its
    own, which keeps gradients whole; `zero3`. `gradient` is accumulated, `backward` comes out of the backward pass,
    `reduced` travels, `frozen` weights are a teacher's. `at_once`: `bf16` adds a gradient to the fp32 ones as soon as
    it is there, and lets go of it. Offloaded states lie on the host, or on disk and in no sum.
    """

    keeper: Keeper
    stage: int
    weight: int
    backward: int
    gradient: int
    reduced: int
    master: int
    moment: int
    frozen: int
    offload_optimizer: str
    offload_weights: str
    zero: Mapping[str, Any]
    at_once: bool = False

    @property
    def compact(self) -> bool:
        """Whether the accumulated gradients already are what the optimizer takes: no copy of them in its step."""
        return self.keeper == "bf16" or (self.keeper == "zero12" and self.gradient > self.weight)

    def size(self, key: str) -> int:
        """A number of elements of `zero_optimization`, DeepSpeed's own where the JSON leaves it out."""
        return int(self.zero.get(key, DEFAULTS[key]))


def engine_rules(config: Config) -> EngineRules:
    """The rules for a DeepSpeed JSON.

    fp32 ZeRO-1 to 3 hold a second fp32 copy of the partition: stages 1 and 2 clone it, and stage 3 means to share it
    but compares a device with a string. Stage 0 updates the weights themselves.
    """
    zero = config["zero_optimization"]
    stage, block = zero["stage"], _reduced_block(config)
    weight = REDUCED if block is not None else FP32
    gradient = _type_bytes(config.get("data_types", {}).get("grad_accum_dtype"), weight)
    bf16 = config.get("bf16", {}).get("enabled", False)
    low = block is not None and any(block.get(f"{key}_master_weights_and_grads") for key in ("bf16", "fp16"))
    autocast = config.get("torch_autocast", {}).get("enabled", False)
    keeper = _keeper(stage, bool(bf16 and gradient == FP32 and not device(config, "optimizer")))
    return EngineRules(
        keeper=keeper,
        stage=stage,
        weight=weight,
        backward=weight,
        gradient=gradient,
        reduced=_type_bytes(config.get("communication_data_type"), REDUCED if autocast else weight),
        master=REDUCED if low else FP32 if stage or block is not None else 0,
        moment=REDUCED if block is not None and block.get("bf16_optimizer_states") else FP32,
        frozen=REDUCED if autocast else weight,
        offload_optimizer=device(config, "optimizer"),
        offload_weights=device(config, "param"),
        zero=zero,
        at_once=keeper == "bf16" and bool(config["bf16"].get("immediate_grad_update")),
    )


def device(config: Config, what: str) -> str:
    """Where `offload_optimizer` or `offload_param` sends its states: `cpu`, `nvme`, or "" for nowhere."""
    found = (config["zero_optimization"].get(f"offload_{what}") or {}).get("device", "none")
    return "" if found == "none" else str(found)


def _keeper(stage: int, bf16_with_fp32_gradients: bool) -> Keeper:
    if stage == 1 and bf16_with_fp32_gradients:
        return "bf16"
    by_stage: tuple[Keeper, ...] = ("ddp", "zero12", "zero12", "zero3")
    return by_stage[stage]


def _reduced_block(config: Config) -> Mapping[str, Any] | None:
    """The block that makes the weights 16 bits wide, if one does."""
    blocks = [config[key] for key in ("bf16", "fp16") if config.get(key, {}).get("enabled")]
    return blocks[0] if blocks else None


def _type_bytes(name: str | None, default: int) -> int:
    return default if name is None else FP32 if name in ("fp32", "float32", "float") else REDUCED
