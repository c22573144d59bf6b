"""Between two rows of metrics the host never waits for the device, but where every ZeRO stage asks for its norm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fdscale
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings
from fdscale.planning.smoke import smoke_patch
from fdscale.train import distill
from fdscale.training.engine import Connection
from fdscale.training.loop import fit

aten = torch.ops.aten
PACKAGE = str(Path(fdscale.__file__).parent)
READ = (Tensor.tolist, Tensor.numpy, Tensor.cpu)  # torch dispatches nothing where the tensor is on the host
ASKED = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_dim, aten._unique2}


class Questions:
    """Which function of ours, in which of the loop's steps, wanted to know a tensor's values on the host.

    The loader is left out: what it looks at has not been on the device.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def note(self) -> None:
        frame: FrameType | None = sys._getframe(1)
        asking: FrameType | None = None
        while frame is not None and frame.f_code is not fit.__code__:
            if asking is None and frame.f_code.co_filename.startswith(PACKAGE):
                asking = frame
            frame = frame.f_back
        if frame is not None and asking is not None and not asking.f_code.co_filename.startswith(f"{PACKAGE}/data/"):
            self.seen.append((frame.f_locals["progress"].step, asking.f_code.co_name))


class Dispatched(TorchDispatchMode):
    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        masked = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or packet in ASKED:
            self.questions.note()
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_function__(self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func in READ:
            self.questions.note()
        return func(*args, **(kwargs or {}))


def asked_in_a_run(connection: Connection, run_dir: str, digits: str, *overrides: str) -> list[tuple[int, str]]:
    given = [f"run_dir={run_dir}", f"data.shards={digits}", "max_steps=6", "log.every=6", "eval.every=0"]
    settings = load_recipe("vit_b_clip_b", [*given, f"eval.shards={digits}", *overrides], smoke_patch)
    assert isinstance(settings, DistillSettings)
    questions = Questions()
    with Called(questions), Dispatched(questions):
        assert distill(settings)
    return questions.seen


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fdscale.data.packing.digits import pack_digits

    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


def test_a_step_that_is_not_told_asks_for_no_value(tmp_path: Path, digits: Path, one_rank: Any) -> None:
    """Steps 1 and 6 are told. On a CPU nothing waits; what would on a GPU is known by what is asked."""
    overrides = ("student.drop_path=0.3", "student.skip_dropped=true")  # as on a GPU
    asked = one_rank(asked_in_a_run, str(tmp_path / "run"), str(digits), *overrides)[0]
    told = {who for step, who in asked if step in (1, 6)}
    between = {who for step, who in asked if 2 <= step <= 4}
    assert "_row" in told
    assert between == {
        "_agree",  # flags of the control group: on the host by design
        "take",  # drop path's draws: likewise
        "take_step",  # DeepSpeed's norm, once a step
    }
