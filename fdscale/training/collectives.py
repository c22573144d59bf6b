"""The time that a rank spends inside the engine's collectives: what the network and slower ranks cost it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_base",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "all_to_all_single",
    "broadcast",
)


@contextmanager
def timed_collectives(measure: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside, every collective that DeepSpeed calls runs within `measure()`: the call, or the wait for its end.

    On a GPU that is the time its stream is held up, beside computation or not. What is called through torch itself (our
    own messages, fairscale's teachers) is not seen.
    """
    from deepspeed.comm import comm

    backend = comm.cdb
    for name in COLLECTIVES:
        setattr(backend, name, _timed(getattr(backend, name), measure))
    try:
        yield
    finally:
        for name in COLLECTIVES:
            delattr(backend, name)  # the class's own again


def _timed(collective: Callable[..., Any], measure: Callable[[], AbstractContextManager[object]]) -> Callable[..., Any]:
    @wraps(collective)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with measure():  # an asynchronous one is only begun here
            work = collective(*args, **kwargs)
        return _TimedWork(work, measure) if hasattr(work, "wait") else work

    return timed


class _TimedWork:
    """A collective under way, the wait for which is measured."""

    def __init__(self, work: Any, measure: Callable[[], AbstractContextManager[object]]) -> None:
        self._work, self._measure = work, measure

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._measure():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
