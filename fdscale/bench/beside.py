"""Processes beside this one, each with something of its own that it is asked to work with, one after the other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from fdscale.training.engine import part

Made = TypeVar("Made")
Answer = TypeVar("Answer")
FORK = multiprocessing.get_context("fork")  # at once, and with all that is imported; nothing was computed yet


class Beside(Generic[Made]):
    """A process that makes something, and holds it until the context ends.

    So each way of doing the same has its own memory and settings, as its user has them, and ways can take turns.
    """

    def __init__(self, make: Callable[[], Made]) -> None:
        self._pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_serve, args=(make, theirs, self._pipe), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def __enter__(self) -> Beside[Made]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pipe.close()
        self._process.join()

    def ask(self, question: Callable[[Made], Answer]) -> Answer:
        """What a function of a module gives of the thing there; RuntimeError where the process has ended."""
        try:
            self._pipe.send(question)
            answer: Answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a process of the benchmark ended: its own words are above") from error
        return answer


def _serve(make: Callable[[], Any], pipe: Connection, others: Connection) -> None:
    others.close()
    made = make()
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            break
        pipe.send(question(made))
    if dist.is_initialized():
        part()  # gloo's threads abort a rank that ends before the others
    os._exit(0)  # compilers' and DeepSpeed's threads are waited for by nobody
