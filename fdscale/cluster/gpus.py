"""The GPUs that a CUDA program started here would see, found without CUDA and without torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

MIB, GB = 2**20, 10**9


@dataclass(frozen=True)
class _Gpu:
    """A GPU, with the MIG instances it is partitioned into, or one such instance."""

    place: int
    uuid: str
    size: int | None
    instances: tuple[_Gpu, ...] = ()

    @property
    def is_instance(self) -> bool:
        return self.uuid.startswith("MIG-")


def visible_gpus(env: Mapping[str, str], devices: Path = Path("/dev")) -> tuple[int | None, ...]:
    """Bytes of each GPU that a CUDA program started with `env` would see; None where the driver does not tell.

    CUDA_VISIBLE_DEVICES is read as CUDA reads it (CUDA C++ Programming Guide, "CUDA Environment Variables"):
    numbers or beginnings of UUIDs; the first invalid entry ends the list, a repeated one empties it. Of MIG
    instances a program sees one, and then no whole GPU (MIG User Guide, "CUDA Device Enumeration").
    """
    gpus = _gpus_of_this_machine(devices)
    wanted = env.get("CUDA_VISIBLE_DEVICES")
    chosen = gpus if wanted is None else _chosen(gpus, wanted)
    instances = list(chain.from_iterable((gpu,) if gpu.is_instance else gpu.instances for gpu in chosen))
    return tuple(gpu.size for gpu in instances[:1] or chosen)


def _chosen(gpus: Sequence[_Gpu], wanted: str) -> list[_Gpu]:
    by_uuid = wanted.startswith(("GPU-", "MIG-"))
    chosen: list[_Gpu] = []
    for entry in wanted.split(","):
        gpu = _named(entry, gpus) if by_uuid else _numbered(entry, gpus)
        if gpu is None:
            break
        if gpu in chosen:
            return []
        chosen.append(gpu)
    return chosen


def _numbered(entry: str, gpus: Sequence[_Gpu]) -> _Gpu | None:
    """By the number that `entry` begins with, as strtoul reads it: CUDA takes `1gpu` for 1."""
    number = re.match(r"\s*\+?([0-9]+)", entry)
    return gpus[int(number[1])] if number and int(number[1]) < len(gpus) else None


def _named(entry: str, gpus: Sequence[_Gpu]) -> _Gpu | None:
    """By a UUID, or by a beginning of one that fits no other."""
    every = chain(gpus, *(gpu.instances for gpu in gpus))
    fitting = [gpu for gpu in every if entry.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(entry)]
    return fitting[0] if len(fitting) == 1 else None


def _gpus_of_this_machine(devices: Path) -> list[_Gpu]:
    """What nvidia-smi lists; where it is missing or fails, the driver's device files."""
    lines = _nvidia_smi("--query-gpu=memory.total,uuid,mig.mode.current", "--format=csv,noheader,nounits")
    if lines is None:
        count = sum(bool(re.fullmatch(r"nvidia[0-9]+", device.name)) for device in devices.iterdir())
        return [_Gpu(place, "", None) for place in range(count)]
    rows = [fields for line in lines if len(fields := [field.strip() for field in line.split(",")]) == 3]
    instances = _mig_instances() if any(row[2] == "Enabled" for row in rows) else {}
    return [
        _Gpu(place, uuid, int(size) * MIB if size.isdigit() else None, tuple(instances.get(place, ())))
        for place, (size, uuid, _) in enumerate(rows)
    ]


def _mig_instances() -> dict[int, list[_Gpu]]:
    """The instances on each GPU; `MIG 1g.18gb Device 0: (UUID: MIG-...)` has 18 GB."""
    found: dict[int, list[_Gpu]] = {}
    place = -1
    for line in _nvidia_smi("-L") or ():
        if gpu := re.match(r"GPU (\d+):", line):
            place = int(gpu[1])
        elif part := re.match(r"\s+MIG \S*?(\d+)gb.*\(UUID: (MIG-[^)]+)\)", line):
            found.setdefault(place, []).append(_Gpu(place, part[2], int(part[1]) * GB))
    return found


def _nvidia_smi(*arguments: str) -> list[str] | None:
    tool = shutil.which("nvidia-smi")
    answer = subprocess.run([tool, *arguments], capture_output=True, text=True) if tool else None
    return answer.stdout.splitlines() if answer is not None and answer.returncode == 0 else None
