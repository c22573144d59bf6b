"""This rank's micro batches on its device: of a range of training steps, or of a whole evaluation set."""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ImageFile
from torch.utils.data import DataLoader

from fdscale.config.errors import UserError
from fdscale.data.ahead import Shard, ShardsAhead
from fdscale.data.batches import PADDING, Request
from fdscale.data.heap import keep_freed
from fdscale.data.holding import NOTHING, Holding, note
from fdscale.data.lending import Lender
from fdscale.data.order import Order, accumulation_steps
from fdscale.data.remote.fetching import FetchAhead

# Forking starts a worker at once and shares the index and the parent's pages; spawn and forkserver import
# torch again in each (seconds and 300 MB). It is safe here: a worker decodes with PIL and NumPy and touches
# neither CUDA nor OpenMP, the two things that do not survive a fork beside torch's threads.
START_METHOD = "fork"
KEPT = 64 * 2**20  # bytes that a worker holds on to: an image of 16 million pixels, decoded
PIECE = 2**18  # bytes in which Pillow hands pixels out: a view of 256 pixels comes in one
AHEAD = 2  # micro batches that a worker has ready, or is at
AT_ONCE = 2  # that an evaluation looks at: the next one comes before the last one is let go of


class MicroBatches(Protocol):
    """A data set whose items are micro batches, which `to(device)` and `pin_memory()` copy.

    It says by `holding.note` which sample it decodes. `image_bytes` is the size of every image, where they have one and
    lie in memory from `lending.room_for`; else 0.
    """

    @property
    def image_bytes(self) -> int: ...

    def __getitem__(self, request: Request) -> Any: ...

    def name(self, sample: int) -> str: ...

    def close(self) -> None: ...


class TrainLoader:
    """Training micro batches of one rank: it takes rows r*G/W .. (r+1)*G/W of each global batch, in order.

    The same bytes for any number of workers, and the same global batch for any world size.
    `data_wait_seconds`, the time spent waiting for micro batches, counts upwards over the loader's life, on this rank.
    `ahead` are the shards that are brought before their steps.
    """

    def __init__(
        self,
        batches: MicroBatches,
        order: Order,
        rank: int,
        world_size: int,
        micro_batch: int,
        workers: int,
        device: torch.device,
        ahead: ShardsAhead | None = None,
    ) -> None:
        self.accumulation = accumulation_steps(order.global_batch, world_size, micro_batch)
        self.data_wait_seconds = 0.0
        self._order = order
        self._rank = rank
        self._micro_batch = micro_batch
        self._ahead = ahead
        self._feed = _Feed(batches, workers, device, rank, world_size, micro_batch, 2 * self.accumulation)

    @property
    def fetched_bytes(self) -> int:
        """Bytes that this rank and its workers have brought from behind URLs."""
        return 0 if self._ahead is None else self._ahead.fetched_bytes

    def steps(self, first_step: int, last_step: int) -> Generator[list[Any], None, None]:
        """For each step of [first_step, last_step): this rank's `accumulation` micro batches, in order."""
        with self._fetching(first_step, last_step) as fetching:
            batches = self._feed.batches(self._requests(first_step, last_step))
            for number in range(first_step, last_step):
                if fetching is not None:
                    fetching.note(number)
                start = time.perf_counter()
                step = [next(batches) for _ in range(self.accumulation)]
                self.data_wait_seconds += time.perf_counter() - start
                yield step

    def _fetching(self, first_step: int, last_step: int) -> AbstractContextManager[FetchAhead[Shard] | None]:
        """Brings the shards of this rank's coming steps; forked before the workers and their threads."""
        ahead = self._ahead
        if not ahead:
            return nullcontext()
        own = self.accumulation * self._micro_batch
        rows = slice(self._rank * own, (self._rank + 1) * own)

        def shards_of(step: int) -> list[Shard]:
            return ahead.of(self._order.batch(step)[rows])

        steps = ahead.steps(self._order.global_batch)
        return FetchAhead(shards_of, ahead.bring, first_step, last_step, steps)

    def _requests(self, first_step: int, last_step: int) -> Iterator[Request]:
        first_row = self._rank * self.accumulation * self._micro_batch
        for step in range(first_step, last_step):
            samples, views = self._order.batch(step), self._order.views(step)
            for micro in range(self.accumulation):
                start = first_row + micro * self._micro_batch
                rows = slice(start, start + self._micro_batch)
                yield Request(samples[rows], views[rows], rows)


class EvalLoader:
    """Each of so many samples once, in equally many equally large batches on every rank.

    Rank r of W takes rows r*B .. (r+1)*B of each run of W*B samples; the last run is padded (`Batch.valid`).
    An undecodable sample becomes a padding row and is named in `Batch.bad`.
    """

    def __init__(
        self,
        batches: MicroBatches,
        samples: int,
        rank: int,
        world_size: int,
        batch_size: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._samples = samples
        self._rows = slice(rank * batch_size, (rank + 1) * batch_size)
        self._together = world_size * batch_size
        self._feed = _Feed(batches, workers, device, rank, world_size, batch_size, AT_ONCE)

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-self._samples // self._together)

    def __iter__(self) -> Iterator[Any]:
        return self._feed.batches(self._requests())

    def _requests(self) -> Iterator[Request]:
        for start in range(0, self._samples, self._together):
            samples = np.arange(start, start + self._together)
            samples[samples >= self._samples] = PADDING
            yield Request(samples[self._rows], np.zeros_like(samples[self._rows]), self._rows)


class _Feed:
    """Requests in, micro batches on the device out, through DataLoader workers that stay for all of them.

    Of `rows` images each; the caller looks at so many `at_once`.
    """

    def __init__(
        self,
        dataset: MicroBatches,
        workers: int,
        device: torch.device,
        rank: int,
        world_size: int,
        rows: int,
        at_once: int,
    ) -> None:
        self._dataset = dataset
        self._workers = workers
        self._device = device
        self._where = f"rank {rank} of {world_size}"
        self._holding = Holding(workers)
        self._rows, self._at_once = rows, at_once
        self._exiting = multiprocessing.get_context(START_METHOD).RawValue(ctypes.c_bool, False)
        # Registered after multiprocessing's exit handler, hence run before that one stops and joins workers.
        atexit.register(setattr, self._exiting, "value", True)

    def batches(self, requests: Iterator[Request]) -> Iterator[Any]:
        lender = self._new_lender()  # for as long as there are requests
        try:
            for batch in _quiet_iterator(self._loader(requests, lender)):
                yield batch.to(self._device)
        except UserError as error:  # out of a worker it comes wrapped in the text of a traceback
            raise UserError(f"{self._where}: {str(error).rpartition('UserError: ')[2].strip()}") from error
        except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: within the handing over of a batch
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            told = f"a data worker of {self._workers} died{self._told_at()} ({error or 'it sent no more'})"
            raise RuntimeError(
                f"{self._where}: {told}; the usual cause is too little memory or /dev/shm: lower data.workers or the "
                "micro batch and start again"
            ) from error
        finally:
            self._dataset.close()

    def _loader(self, requests: Iterator[Request], lender: Lender | None) -> DataLoader[Any]:
        return DataLoader(
            self._dataset,  # type: ignore[arg-type]  # it asks for no more than this protocol
            batch_size=None,  # one item is one micro batch already
            sampler=requests,
            num_workers=self._workers,
            prefetch_factor=AHEAD if self._workers else None,
            collate_fn=_put_down,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context=START_METHOD if self._workers else None,
            worker_init_fn=partial(self._begin, lender),
            generator=torch.Generator(),  # else DataLoader draws a seed from the rank's generator
        )

    def _new_lender(self) -> Lender | None:
        """With places for what each worker may be ahead, and its share of what the caller looks at."""
        size = self._rows * self._dataset.image_bytes
        if not (self._workers and size):
            return None
        return Lender(self._workers, AHEAD + -(-self._at_once // self._workers), size)

    def _told_at(self) -> str:
        held = ", ".join(map(self._dataset.name, self._holding.of_the_dead()))
        return f" at {held}" if held else ""

    def _begin(self, lender: Lender | None, worker: int) -> None:
        """In a new worker."""
        _leave_signals_to_the_rank(self._exiting)
        _spare_memory()
        self._holding.begin(worker)
        if lender is not None:
            lender.begin(worker)


def _spare_memory() -> None:
    """In a worker: what an image took serves the next one, and what the rank had is not looked through for garbage."""
    gc.freeze()
    ImageFile.MAXBLOCK = PIECE
    keep_freed(KEPT)


def check_bad_ratio(bad: int, samples: int, max_ratio: float, names: Sequence[str]) -> None:
    """Raise UserError when more than `max_ratio` of a data set's samples were undecodable in one epoch."""
    if bad <= max_ratio * samples:
        return
    shown = "".join(f"\n  {name}" for name in names[:10])
    raise UserError(
        f"{bad} of {samples} samples cannot be decoded ({bad / samples:.2%}); allowed: {max_ratio:.2%} "
        f"(data.max_bad_ratio); repair or leave out these images, or raise the limit:{shown}"
    )


def _quiet_iterator(loader: DataLoader[Any]) -> Iterator[Any]:
    """A dead worker is told by the next batch only.

    torch's SIGCHLD handler would raise wherever the rank is by then: within a checkpoint, or a collective.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return iterator


def _put_down(batch: Any) -> Any:
    """The batch as it is; its worker holds no sample now."""
    note(NOTHING)
    return batch


def _leave_signals_to_the_rank(exiting: ctypes.c_bool) -> None:
    """In a worker: stop signals reach whole process groups (SLURM, Ctrl-C), but the rank finishes its step.

    So a worker outlives them and ends with its loader; only the SIGTERM that multiprocessing sends at the
    rank's exit counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if exiting.value else None)
