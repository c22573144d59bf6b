"""Which GPUs a CUDA program would see, told by a stand-in for nvidia-smi."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fdscale.cluster.gpus import visible_gpus

GIB, GB = 2**30, 10**9
WHOLE = {"mode": "Disabled", "list": ""}
PARTITIONED = {
    "mode": "Enabled",
    "list": """GPU 0: H200 (UUID: GPU-aa1)
  MIG 1g.18gb     Device  0: (UUID: MIG-c1)
  MIG 1c.2g.35gb  Device  1: (UUID: MIG-c2)
GPU 1: H200 (UUID: GPU-ab2)
GPU 2: H200 (UUID: GPU-b3)
  MIG 3g.71gb+me  Device  0: (UUID: MIG-d3)
""",
}


def nvidia_smi(folder: Path, mode: str, list: str) -> dict[str, str]:
    """An environment in which nvidia-smi tells three GPUs, of 1, 2 and 3 GiB."""
    rows = f"1024, GPU-aa1, {mode}\n2048, GPU-ab2, Disabled\n3072, GPU-b3, {mode}"
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then cat <<END\n{list}END\nelse cat <<END\n{rows}\nEND\nfi\n')
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("visible", "sizes"),
    [
        (None, (1, 2, 3)),
        ("0,2", (1, 3)),
        ("2,0", (3, 1)),
        (" 1 , 2", (2, 3)),
        ("1gpu", (2,)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0,-1,1", (1,)),
        ("0,,1", (1,)),
        ("1,3,2", (2,)),
        ("1,1", ()),
        ("GPU-b3,GPU-aa1", (3, 1)),
        ("GPU-b", (3,)),
        ("GPU-a", ()),
        ("GPU-aa1,GPU-c,GPU-b3", (1,)),
        ("GPU-aa1,GPU-aa", ()),
        ("GPU-aa1,1", (1,)),
        ("0,GPU-b3", (1,)),
        ("MIG-c1", ()),
    ],
)
def test_whole_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, **WHOLE)["PATH"])
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpus(env) == tuple(size * GIB for size in sizes)


@pytest.mark.parametrize(
    ("visible", "size"),
    [
        (None, 18 * GB),
        ("0", 18 * GB),
        ("1", 2 * GIB),
        ("1,2", 71 * GB),
        ("MIG-c2", 35 * GB),
        ("MIG-c2,MIG-d3", 35 * GB),
        ("GPU-b3", 71 * GB),
    ],
)
def test_of_instances_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, size: int
) -> None:
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, **PARTITIONED)["PATH"])
    assert visible_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == (size,)


@pytest.mark.parametrize("program", [None, "exit 9"])
def test_without_nvidia_smi_the_device_files_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if program is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus({}, devices=tmp_path) == ()
    for device in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / device).touch()
    assert visible_gpus({}, devices=tmp_path) == (None, None)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, devices=tmp_path) == (None,)


def test_an_entry_that_names_nothing_ends_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is the beginning of the only UUID."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '1024, GPU-a, Disabled'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for visible in ("GPU-a,", "GPU-a,GPU"):
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) == (GIB,)


def test_a_gpu_that_shares_the_hosts_memory_tells_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '[N/A], GPU-a, [N/A]'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert visible_gpus({}) == (None,)
