"""The frozen teachers as canaries: bits that change in their weights, and chips that compute wrongly, are found.

A teacher never learns, so its storage and its features of a fixed batch are what they were, bit for bit. Whatever a
rank's memory or arithmetic does to the student it does to them, too. Looking at the storage takes 0.12 s a GB on one
CPU core (measured), at the features one forward of two images; both are done before a checkpoint, or as often as asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.config.errors import StartAgain
from fdscale.teachers.teacher import Teacher
from fdscale.training.engine import Connection, gather_lists
from fdscale.training.lineage import read_object
from fdscale.training.partition import is_divided
from fdscale.training.run_directory import write_text

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # words of 64 bits at a time: 8 MiB, and as much again for the products
MIX = 0x5851F42D4C957F2D  # odd: multiplying by it loses nothing modulo 2**64
PROBE_IMAGES = 2


class Canary:
    """Compares the teachers of this rank with what they were, and the ranks with each other.

    `teachers`: by the setting that names each, with their weights in place, `placements` likewise; `chip`: what
    computes here; `file`: where a run keeps its first features. Every rank makes one and calls `check` at the same
    time: a divided teacher's forward is a collective. Raises StartAgain when the ranks differ from the start.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        placements: Mapping[str, str],
        connection: Connection,
        chip: str,
        file: Path,
    ) -> None:
        self.teachers, self.placements = dict(teachers), {where: placements[where] for where in teachers}
        self.connection, self.chip, self.file = connection, chip, file
        self.here = f"rank {connection.rank.rank} on {socket.gethostname()}"
        self.storages = self._storages()
        self.features: dict[str, str] = {}
        self.probing = self._same_chips() and self._repeats()
        if self.probing:
            self._settle()

    def check(self, step: int) -> None:
        """Raise StartAgain on every rank, naming ranks and teachers, where anything is not what it was."""
        now = self._storages()
        for name, value in now.items():
            self.storages.setdefault(name, value)  # a small weight that the engine has gathered to stay, meanwhile
        changed = sorted({where for where, tensor in now if self.storages[where, tensor] != now[where, tensor]})
        told = [f"{self.here}: the weights of {where} have changed in its memory" for where in changed]
        self._refuse(told, step)
        if self.probing:
            features = self._features()
            wrong = [where for where in features if features[where] != self.features[where]]
            told = [
                f"{self.here}: the features of {where} are others, of the same weights and pixels" for where in wrong
            ]
            self._refuse(told, step)

    def _refuse(self, told: list[str], step: int) -> None:
        if told := gather_lists(told, self.connection):
            raise StartAgain(
                f"step {step}: {'; '.join(told)}. Teachers are frozen: memory or chip is at fault, and nothing was "
                "saved since; the run goes on from its last checkpoint. Take the host out if it is named again"
            )

    def _storages(self) -> dict[tuple[str, str], int]:
        """A fingerprint of each tensor that this rank holds of the teachers, by teacher and name."""
        held = {(where, name): t for where, teacher in self.teachers.items() for name, t in storage_of(teacher)}
        weights = odd_numbers(self.connection.device)
        return dict(zip(held, torch.stack([fingerprint(t, weights) for t in held.values()]).tolist(), strict=True))

    def _features(self) -> dict[str, str]:
        """The SHA-256 of each teacher's features of the probe batch."""
        return {where: _digest(teacher(self._pixels(teacher.image_size))) for where, teacher in self.teachers.items()}

    def _pixels(self, size: int) -> Tensor:
        pixels = torch.rand(PROBE_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(5))
        return pixels.to(self.connection.device)

    def _same_chips(self) -> bool:
        chips = sorted(set(gather_lists([self.chip], self.connection)))
        if len(chips) > 1 and self.connection.rank.is_main:
            logger.warning("the ranks run on several chips (%s): their features are not compared", ", ".join(chips))
        return len(chips) == 1

    def _repeats(self) -> bool:
        """Take the features twice: whether they are the same, bit for bit; raises where a minority's are not."""
        self.features = self._features()
        unlike = gather_lists([] if self._features() == self.features else [self.here], self.connection)
        if not unlike:
            return True
        if len(unlike) <= self.connection.rank.world_size / 2:
            raise StartAgain(f"the teachers' features are others each time on {', '.join(unlike)}, and there alone")
        if self.connection.rank.is_main:
            logger.warning("the teachers' features do not repeat bit for bit here: they are not compared")
        return False

    def _settle(self) -> None:
        """Compare the features at a start among the ranks, and with the run's first ones."""
        first = self.connection.broadcast(self._first())
        everyone = gather_lists([(self.here, self.features)], self.connection)
        told = []
        for where in self.teachers:
            odd = odd_ones({here: features[where] for here, features in everyone}, first.get(where))
            told += [f"the features of {where} differ between the ranks, of the same weights and pixels: {odd}"] * bool(
                odd
            )
        if told:
            raise StartAgain("; ".join(told))
        self.connection.on_main(lambda: self._keep(first))

    def _first(self) -> dict[str, str]:
        """The run's first features; none where nothing is recorded, or under other conditions, which is said."""
        recorded = read_object(self.file)
        before, now = recorded.get("conditions", {}), self._conditions()
        if changed := [f"{key} {before[key]} -> {now[key]}" for key in before if before[key] != now.get(key)]:
            logger.info("the teachers' features are recorded anew, their conditions changed: %s", "; ".join(changed))
        return recorded.get("features", {}) if before == now else {}

    def _keep(self, first: Mapping[str, str]) -> None:
        """Record the features where they are not what is recorded."""
        if first == self.features:
            return
        if first:
            logger.warning(
                "the teachers' features are not this run's first ones, of the same weights and on every rank alike: "
                "a driver or a library has changed; bit for bit no longer holds"
            )
        contents = {"conditions": self._conditions(), "features": self.features}
        write_text(self.file, json.dumps(contents, indent=1) + "\n")

    def _conditions(self) -> dict[str, Any]:
        """What decides the bits of a teacher's features, beside weights and pixels."""
        return {
            "chip": self.chip,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "threads": torch.get_num_threads(),
            "placement": self.placements,
            "dtype": {where: str(next(teacher.parameters()).dtype) for where, teacher in self.teachers.items()},
        }


def storage_of(teacher: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this rank holds of a teacher between two forwards: whole ones, partitions, or flat shards."""
    for name, parameter in teacher.named_parameters():
        if not is_divided(parameter):
            yield name, parameter.data
            continue
        yield name, parameter.ds_tensor.data  # type: ignore[attr-defined]
        if parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
            yield f"{name}, gathered", parameter.data
    yield from teacher.named_buffers()


def odd_numbers(device: torch.device) -> Tensor:
    """1, 3, 5, …, as many as `fingerprint` takes words at a time."""
    return torch.arange(1, 2 * CHUNK, 2, device=device)


def fingerprint(tensor: Tensor, weights: Tensor) -> Tensor:
    """An int64 of a tensor's bits, on its device: the sum of its 64-bit words times `odd_numbers`, modulo 2**64.

    One flipped bit changes a word by a power of two, and that times an odd number is never 0: none goes unseen.
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = F.pad(raw, (0, -raw.numel() % 8)) if raw.numel() % 8 or raw.data_ptr() % 8 else raw
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for words in raw.view(torch.int64).split(CHUNK):
        total = total * MIX + (words * weights[: len(words)]).sum()
    return total


def odd_ones(values: Mapping[str, str], first: str | None) -> str:
    """Who has another value than the rest, or than the `first` one; empty where all have the same."""
    counts = Counter(values.values()).most_common()
    if len(counts) == 1:
        return ""
    if first in values.values():
        return ", ".join(who for who, value in values.items() if value != first)
    listed = [", ".join(who for who, value in values.items() if value == of) for of, _ in counts]
    if counts[0][1] > len(values) / 2:
        return ", ".join(listed[1:])
    return f"{' against '.join(listed)}; which of them is wrong cannot be told"


def chip_of(device: torch.device) -> str:
    """What computes here, by its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
