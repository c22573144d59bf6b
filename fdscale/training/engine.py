"""The door to DeepSpeed: process groups, the engine of a module, its weights in full."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdscale.cluster.ranks import Rank, export_rank
from fdscale.config.deepspeed_json import MONITORS
from fdscale.config.errors import UserError
from fdscale.data.large_pages import put_tensors_in_large_pages
from fdscale.training.average import AVERAGE
from fdscale.training.optim import Schedule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

T = TypeVar("T")


@dataclass(frozen=True)
class Connection:
    """This rank among the others: its device, and a CPU process group for messages.

    Flags and file lists travel by `control` so that agreeing on them never waits for the GPU.
    """

    rank: Rank
    device: torch.device
    control: Any  # a torch process group

    def barrier(self) -> None:
        """Wait for every rank, by messages alone."""
        dist.barrier(group=self.control)

    def broadcast(self, value: T) -> T:
        """The main rank's value, on every rank."""
        if self.rank.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def on_main(self, action: Callable[[], object]) -> None:
        """Let the main rank do something that the others wait for; its UserError, or OSError, is a UserError on all."""
        problem = _problem(action) if self.rank.is_main else None
        if problem := self.broadcast(problem):
            raise UserError(problem)


def _problem(action: Callable[[], object]) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    except OSError as error:  # the others wait for this rank's word, whatever its disk does
        return f"rank 0 could not read or write what belongs to the run: {error}; mend that, then start it again"
    return None


def connect(rank: Rank) -> Connection:
    """Join the process group (NCCL on GPUs, gloo on CPUs), once per process."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    export_rank(rank)
    deepspeed = quiet_deepspeed()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", rank.local_rank % torch.cuda.device_count())  # one is seen where SLURM binds them
        torch.cuda.set_device(device)
    else:
        _prepare_cpu()
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    return Connection(rank, device, _control_beside(dist.group.WORLD))


def _prepare_cpu() -> None:
    """What makes a process faster on CPUs, and moves a result by 1e-38 at most; before it computes anything.

    A softmax makes numbers as small as 1e-44 of Swin's masked logits, at four times the cost of others: they become 0.
    A CPU remembers where large pages are.
    """
    torch.set_flush_denormal(True)
    put_tensors_in_large_pages()


@lru_cache(maxsize=1)
def _control_beside(world: Any) -> Any:
    """A CPU process group of the same ranks, one for as long as they stay together.

    Each takes three threads and four open files, which a process that starts one run after the other would run out of.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=30))


def part() -> None:
    """Leave the other ranks, all at once: gloo's threads abort a process that ends without."""
    dist.barrier()
    _control_beside.cache_clear()
    dist.destroy_process_group()


def gather_lists(mine: list[Any], connection: Connection) -> list[Any]:
    """The lists of all ranks, one after the other, on every rank."""
    parts: list[list[Any]] = [[] for _ in range(connection.rank.world_size)]
    dist.all_gather_object(parts, mine, group=connection.control)
    return [item for part in parts for item in part]


def quiet_deepspeed() -> Any:
    """DeepSpeed, imported without its chatter."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # an optional shared-memory all-reduce for inference: compiling it costs half a minute, and asking whether it could
    # be compiled runs the compiler for every operation that DeepSpeed has; training never uses it
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    # bf16 under ZeRO-1 prints memory around each parameter group, after a full garbage collection: 20 s for 52 groups
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    _import_muon_as_it_is()
    return deepspeed


def _import_muon_as_it_is() -> None:
    """Every engine imports Muon to see that its optimizer is not one, and Muon compiles its kernels as it is imported.

    That fetches all of torch's compiler, 1.3 s of each rank's start, for an optimizer that no run of ours has.
    """
    from deepspeed.runtime import compiler

    compiling, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiling


def start_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    deepspeed_json: Mapping[str, Any],
    accumulation_steps: int,
    clip: float,
) -> DeepSpeedEngine:
    """Hand module and optimizer to DeepSpeed, with what the recipe decides added to the JSON.

    `clip` is always written: DeepSpeed clips at 1.0 when the key is absent; 0 switches clipping off.
    """
    config = {
        **{key: value for key, value in deepspeed_json.items() if key not in MONITORS},  # see monitor_writer
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": clip,
        # DeepSpeed's throughput timer waits for the device twice in every micro batch; the loop has its own
        "timers": {"throughput": {"enabled": False}, **deepspeed_json.get("timers", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = quiet_deepspeed().initialize(model=module, optimizer=optimizer, config=config)[0]
    if dist.get_world_size() == 1 and not _reduces_in_its_optimizer(engine):
        engine.enable_backward_allreduce = False  # it would copy all gradients into one and back, for nobody
    return engine


def _reduces_in_its_optimizer(engine: DeepSpeedEngine) -> bool:
    """Whether reducing is also how gradients come to the optimizer, on one rank, too."""
    return engine.zero_optimization_partition_gradients() or hasattr(engine.optimizer, "reduce_gradients")


def monitor_writer(name: str, block: Mapping[str, Any]) -> Callable[[Sequence[tuple[str, float, int]]], None]:
    """What writes (name, value, images) events as one block of DeepSpeed's monitor says; for the main rank.

    Left to itself DeepSpeed opens it amid its start, where a writer that fails would leave the other ranks waiting.
    """
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    write: Callable[[Sequence[tuple[str, float, int]]], None]
    write = MonitorMaster(get_monitor_config({name: dict(block)})).write_events
    return write


@contextmanager
def files_written_by(engine: DeepSpeedEngine, write: Callable[[Any, str], None]) -> Iterator[None]:
    """Hand every file of a checkpoint that DeepSpeed saves inside to `write(value, path)`, which must not raise.

    Its ranks meet between files. Of its own accord rank 0 would copy scripts beside: more that a full disk can fail.
    """
    writer = engine.checkpoint_engine
    writer.save = lambda state_dict, path: write(state_dict, path)
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script


@contextmanager
def balanced_module_stack() -> Iterator[None]:
    """Leave DeepSpeed's stack of modules in their forward as it was: nothing grows over a run.

    A recomputation stops inside a block once it has what the backward pass asks for: DeepSpeed 0.19.8 has put that
    block on its stack and never takes it off.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    depth = len(FWD_MODULE_STACK)
    yield
    del FWD_MODULE_STACK[depth:]


def set_learning_rate(engine: DeepSpeedEngine, schedule: Schedule, step: int) -> None:
    """Give every parameter group the rate that the schedule has for it in this step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = schedule.of_group(group["lr_scale"]).for_step(step)


def has_average(engine: DeepSpeedEngine) -> bool:
    """Whether a step was applied since an average is kept; the same answer on every rank, which all must ask."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # ZeRO and bf16 wrap it
    found = torch.tensor(int(any(AVERAGE in state for state in optimizer.state.values())), device=engine.device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found)


@contextmanager
def averaged_weights(engine: DeepSpeedEngine) -> Iterator[None]:
    """The moving average in the place of the trained weights, to compute with; then these again, to the bit.

    Every rank must enter, and no step be taken inside. What an exception leaves behind is not to be trained on.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    _link_optimizer_states(engine.optimizer)
    trained = [weight for weight in engine.module.parameters() if weight.requires_grad]
    # what the engine computes with is the rounded master, where there is one: nothing else need be kept
    kept = {weight: weight.detach().clone() for weight in trained if safe_get_full_fp32_param(weight) is None}
    for weight in trained:
        _put(weight, _whole_average(engine, weight))
    yield
    for weight in trained:
        _put(weight, kept[weight] if weight in kept else safe_get_full_fp32_param(weight))


@torch.no_grad()
def _put(weight: Tensor, whole: Tensor) -> None:
    with gathered(weight, written_by=0):
        weight.copy_(whole)


def full_state(engine: DeepSpeedEngine, module: nn.Module, wanted: bool, average: bool = False) -> dict[str, Tensor]:
    """The state dict of `module`, a part of the engine's, on the CPU and in fp32, gathered weight by weight.

    Every rank must call it; only ranks with `wanted` keep the tensors. Trained weights are the optimizer's fp32
    masters, or their moving average; frozen ones and buffers are taken as they are.
    """
    if average:
        _link_optimizer_states(engine.optimizer)
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        whole = _whole_average(engine, tensor) if average and tensor.requires_grad else _whole(tensor)
        if wanted:
            whole = whole.float() if whole.is_floating_point() else whole
            state[name] = whole.detach().cpu().clone()
    return state


def _whole(tensor: Tensor) -> Tensor:
    """One weight in full, gathered from all ranks where it is partitioned."""
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
    if master is not None:
        return master
    with gathered(tensor):
        return tensor.detach().clone()


def gathered(tensor: Tensor, written_by: int | None = None) -> AbstractContextManager[None]:
    """A context in which a weight is there in full, on every rank; what rank `written_by` changes in it is kept."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters([tensor] if hasattr(tensor, "ds_id") else [], modifier_rank=written_by)


def _link_optimizer_states(optimizer: Any) -> None:
    """ZeRO-1 and 2 link weights with their optimizer states once, after the first group's first step: too early."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _whole_average(engine: DeepSpeedEngine, tensor: Tensor) -> Tensor:
    """The moving average of one trained weight in full."""
    from deepspeed.utils import safe_get_full_optimizer_state

    divided = safe_get_full_optimizer_state(tensor, AVERAGE)
    return engine.optimizer.state[tensor][AVERAGE] if divided is None else divided  # ZeRO-0 divides nothing


def parameter_dtype(deepspeed_json: Mapping[str, Any]) -> torch.dtype | None:
    """The type to which a DeepSpeed JSON's engine casts parameters; None where it leaves them."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if deepspeed_json.get(key, {}).get("enabled"):
            return dtype
    return None


def compute_dtype(deepspeed_json: Mapping[str, Any]) -> torch.dtype:
    """The type in which a DeepSpeed JSON computes: what a frozen teacher's weights are kept in."""
    autocast = deepspeed_json.get("torch_autocast", {})
    if autocast.get("enabled"):
        return torch.float16 if autocast.get("dtype") == "float16" else torch.bfloat16
    return parameter_dtype(deepspeed_json) or torch.float32
