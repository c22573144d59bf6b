"""The activations of one micro batch, from a forward and a backward pass of the real network on fake CPU tensors.

A network built on the meta device is given fake CPU tensors as weights and buffers: nothing is computed and nothing
allocated, but torch chooses the same kernels, saves the same tensors and frees them at the same moments as on a CPU.
(On the meta device itself it would choose another attention kernel.) Where a run saves other tensors is said in
`kernels`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fdscale.planning.kernels import attention_as_on_cuda, linear_as_in_zero3
from fdscale.planning.trace import Kind, Moment, Trace, TracedModule
from fdscale.students.drop_path import TableDropPath
from fdscale.teachers.teacher import Teacher

Inputs = Callable[[], tuple[Any, ...]]


class Ledger(TorchDispatchMode):
    """Counts the storages that operations bring to life until they die, and floating point operations."""

    def __init__(self, ignored: Iterator[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result

    def count(self, operations: int) -> None:
        """Count floating point operations that no operation of torch's does here."""
        self.flops += operations

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored or key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class Recorder:
    """Writes moments down while hooks of a module tell them; `away` bytes have left the device meanwhile."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.away = self.most_away = 0
        self._told: list[tuple[Kind, int, int]] = []
        self._peaks: list[int] = []

    def tell(self, kind: Kind, index: int) -> None:
        self._peaks.append(self.ledger.peak - self.away)  # of the moment before
        self.ledger.peak = self.ledger.live
        self._told.append((kind, index, self.ledger.live - self.away))

    def moments(self) -> tuple[Moment, ...]:
        peaks = [*self._peaks[1:], self.ledger.peak - self.away]
        return tuple(Moment(*told, peak) for told, peak in zip(self._told, peaks, strict=True))


def trace_step(
    module: nn.Module,
    groups: Sequence[Sequence[nn.Parameter]],
    inputs: Inputs,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    cuda: bool,
    zero3: bool,
    offload: bool = False,
) -> Trace:
    """The trace of one micro batch of a module on the meta device, which is used up.

    `groups` are its trained weights as the optimizer gets them. `inputs` makes what the module is called with, `loss`
    in its result is what is differentiated. `dtype` is that of the weights (an engine casts them alone, no buffers);
    `autocast` the type of torch's, None without. `cuda`, `zero3`: with the kernels of a CUDA device, of ZeRO-3;
    `offload`: the inputs of recomputed blocks wait in the host's memory.
    """
    number = {id(weight): group for group, members in enumerate(groups) for weight in members}
    group_of = tuple(number[id(weight)] for weight in module.parameters() if weight.requires_grad)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(module, dtype)
        _let_outputs_be(module)
        _keep_every_sample(module, cuda, zero3)
        with Ledger(_state(module)) as ledger:
            recorder = Recorder(ledger)
            weights = [weight for weight in module.parameters() if weight.requires_grad]
            called = _record(module, weights, recorder)
            if offload:
                _send_inputs_of_blocks_away(module, recorder)
            with kernels(cuda, zero3, ledger):
                batch, forward_flops = _pass(module, inputs, autocast, ledger)
    return Trace(
        recorder.moments(),
        _modules(called, weights),
        tuple(weight.numel() for weight in weights),
        group_of,
        batch,
        forward_flops,
        ledger.flops - forward_flops,
        recorder.most_away,
    )


def trace_teacher(teacher: Teacher, dtype: torch.dtype, pixels: Callable[[], Tensor], cuda: bool) -> Trace:
    """The trace of a frozen network on the meta device, which is used up: a forward pass, its backbone in `dtype`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(teacher.backbone, dtype)
        _make_fake(teacher, None)
        with Ledger(_state(teacher)) as ledger:
            recorder = Recorder(ledger)
            weights = list(teacher.parameters())
            called = _record(teacher, weights, recorder)
            images = pixels()
            batch = ledger.live
            with kernels(cuda, False, ledger), torch.no_grad():
                teacher(images)
    sizes = tuple(weight.numel() for weight in weights)
    return Trace(recorder.moments(), _modules(called, weights), sizes, (0,) * len(sizes), batch, ledger.flops, 0)


def _pass(module: nn.Module, inputs: Inputs, autocast: torch.dtype | None, ledger: Ledger) -> tuple[int, int]:
    """Forward and backward; returns the bytes of the inputs and the forward's floating point operations."""
    given = inputs()
    batch = ledger.live
    module.train()
    region: AbstractContextManager[object] = nullcontext()
    if autocast is not None:
        region = torch.autocast("cpu", autocast)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="For backward hooks to be called")  # of modules that return lists
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of modules fed with buffers alone
        with region:
            result = module(*given)
        del given  # the caller's frame ends here, too
        forward_flops = ledger.flops
        result["loss"].backward()
    return batch, forward_flops


@contextmanager
def kernels(cuda: bool, zero3: bool, ledger: Ledger) -> Iterator[None]:
    """What a run computes with other functions, replaced."""
    with (
        attention_as_on_cuda(ledger.count) if cuda else nullcontext(),
        linear_as_in_zero3() if zero3 else nullcontext(),
    ):
        yield


def _state(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _make_fake(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Fake CPU tensors in place of weights, in `dtype` where that is given, and of buffers; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is None or not weight.is_meta:
                continue
            kind = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
            fake = nn.Parameter(torch.empty(weight.shape, dtype=kind, device="cpu"), weight.requires_grad)
            part._parameters[name] = made.setdefault(id(weight), fake)  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            fake_buffer = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
            part._buffers[name] = made.setdefault(id(buffer), fake_buffer)


def _let_outputs_be(module: nn.Module) -> None:
    """Activation functions out of place: torch forbids others on what a module with hooks returns.

    They save their result either way; for a moment it is beside their input.
    """
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]


def _keep_every_sample(module: nn.Module, cuda: bool, divided: bool) -> None:
    """Draws have no values here: each branch is computed for all samples, which is the most that it can hold."""
    for draws in {part.draws for part in module.modules() if isinstance(part, TableDropPath)}:
        draws.take = partial(draws.keep_all, cuda, divided)  # type: ignore[method-assign]


def _record(module: nn.Module, weights: list[nn.Parameter], recorder: Recorder) -> list[nn.Module]:
    """Let every module below `module` that holds weights tell its passes, and every weight its gradient."""
    held = [part for part in module.modules() if part is not module and next(part.parameters(), None) is not None]
    for index, part in enumerate(held):
        _hook(part, index, recorder)
    for index, weight in enumerate(weights):
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(_gradient_hook(index, recorder))
    return held


def _send_inputs_of_blocks_away(module: nn.Module, recorder: Recorder) -> None:
    """Count a block's input as gone from its forward pass until it is recomputed (timm names them `blocks`)."""
    lists = [part for name, part in module.named_modules() if name.endswith("blocks")]
    for block in (block for blocks in lists for block in blocks.children()):
        block.register_forward_pre_hook(_sender(recorder))


def _sender(recorder: Recorder) -> Callable[..., None]:
    sizes: list[int] = []

    def send(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if sizes:  # the second time it is recomputed: its input has come back
            recorder.away -= sizes.pop()
            return
        sizes.append(sum(each.untyped_storage().nbytes() for each in inputs if isinstance(each, Tensor)))
        recorder.away += sizes[0]
        recorder.most_away = max(recorder.most_away, recorder.away)

    return send


def _hook(part: nn.Module, index: int, recorder: Recorder) -> None:
    def tell(kind: Kind) -> Callable[..., None]:
        return lambda *_: recorder.tell(kind, index)

    part.register_forward_pre_hook(tell("forward"))
    part.register_forward_hook(tell("forward_end"))
    if any(weight.requires_grad for weight in part.parameters()):
        part.register_full_backward_pre_hook(tell("backward"))
        part.register_full_backward_hook(tell("backward_end"))


def _gradient_hook(index: int, recorder: Recorder) -> Callable[[Tensor], None]:
    def complete(weight: Tensor) -> None:
        recorder.tell("gradient", index)
        weight.grad = None  # from here on it is the engine's

    return complete


def _modules(held: list[nn.Module], weights: list[nn.Parameter]) -> tuple[TracedModule, ...]:
    number = {id(weight): index for index, weight in enumerate(weights)}
    place = {id(part): index for index, part in enumerate(held)}
    parents = {id(child): place[id(part)] for part in held for child in part.children()}

    def of(part: nn.Module, recurse: bool) -> tuple[int, ...]:
        return tuple(number[id(weight)] for weight in part.parameters(recurse) if id(weight) in number)

    return tuple(
        TracedModule(type(part).__name__, of(part, False), of(part, True), parents.get(id(part), -1)) for part in held
    )
