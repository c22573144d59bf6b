"""The CPU benchmarks on tiny networks: their whole path once, what is kept of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as compiler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fdscale.bench.__main__ import main
from fdscale.bench.beside import Beside
from fdscale.bench.checkpoint import checkpoint_ratios, checkpoint_row, checkpoint_tables
from fdscale.bench.pairs import PAIRS, TINY, plain_networks
from fdscale.bench.plain import Network
from fdscale.bench.planned import own_geometry_of, teacher_geometry_of
from fdscale.bench.scaling import rank_row
from fdscale.bench.step import peak, refuse_without_compiler, step_of
from fdscale.config.errors import UserError
from fdscale.training.engine import Connection


def first_losses(connection: Connection, pair: str, ways: list[str]) -> dict[str, list[float]]:
    steps = {way: step_of(way, TINY[pair], 4, bf16=True) for way in ways}
    assert all(peak(step.take) > 0 for step in steps.values())
    return {way: [float(step.take()) for _ in range(2)] for way, step in steps.items()}


@pytest.mark.parametrize("pair", TINY)
def test_every_way_takes_real_steps(one_rank: Any, pair: str) -> None:
    ways = ["fdscale", "plain", "no engine", "student.drop_path=0"]
    (losses,) = one_rank(first_losses, pair, ways)
    assert all(after < before for before, after in losses.values())
    # the same networks and draws: without the engine they learn the same, as far as bf16 carries
    assert losses["no engine"] == pytest.approx(losses["fdscale"], rel=0.01)
    assert losses["student.drop_path=0"] != losses["fdscale"]


def test_a_way_that_fails_ends_the_benchmark() -> None:
    with Beside(list) as beside:
        assert beside.ask(len) == 0
        with pytest.raises(RuntimeError, match="its own words are above"):
            beside.ask(next)  # type: ignore[arg-type]


@pytest.mark.parametrize("pair", PAIRS)
def test_plain_timm_is_given_the_same_networks(pair: str) -> None:
    settings = PAIRS[pair].settings(2)
    ours = own_geometry_of(settings.student), teacher_geometry_of(settings.teacher)
    with torch.device("meta"):
        networks = plain_networks(settings)
    for geometry, network in zip(ours, networks, strict=True):
        counted = sum(weight.numel() for weight in network.backbone.parameters())
        assert counted == geometry.parameters()
    rates = [module.drop_prob for module in networks[0].modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(settings.student.drop_path)
    assert all(getattr(module, "drop_prob", 0.0) == 0.0 for module in networks[1].modules())


def test_the_operations_are_those_that_torch_counts() -> None:
    for pair in TINY.values():
        settings = pair.settings(2)
        network, _ = plain_networks(settings)
        geometry = own_geometry_of(settings.student)
        # position bias networks run once, whatever the batch: the second image's operations are an image's
        second = counted(network, 2, geometry.image_size) - counted(network, 1, geometry.image_size)
        assert geometry.flops() == pytest.approx(second, rel=0.01)


def counted(network: Network, images: int, side: int) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network.backbone(torch.rand(images, 3, side, side))
    return counter.get_total_flops()


def saves(connection: Connection, folder: str) -> dict[str, Any]:
    return checkpoint_row(TINY["tiny_vit_b16"], Path(folder), 2, connection)


def test_a_checkpoint_is_saved_and_loaded(one_rank: Any, tmp_path: Path) -> None:
    (row,) = one_rank(saves, str(tmp_path))
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in row["seconds"].values())
    assert row["bytes"] == sum(file.stat().st_size for file in (tmp_path / "plain").iterdir())
    assert len(checkpoint_tables({"tiny": row})[0].lines) == 4
    assert [ratio.must for ratio in checkpoint_ratios("tiny", row)] == [0.7, None]


def ranks(connection: Connection) -> dict[str, Any]:
    return rank_row(TINY["tiny_vit_b16"], 2, 2, connection)


def test_ranks_wait_for_each_other_in_collectives(two_ranks: Any, one_rank: Any) -> None:
    rows = two_ranks(ranks)
    assert all(0 < waited < step for row in rows for step, waited in zip(*map(row.get, KEYS), strict=True))


KEYS = ("seconds", "collective_seconds")


def test_the_command_keeps_what_it_measured_and_checks_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["step", "--tiny", "--only", "tiny_vit_b16", "--way", "fdscale", "--way", "plain", "--repeats", "1"]
    figure = tmp_path / "images" / "steps.png"
    assert main([*words, "--output", str(tmp_path), "--figure", str(figure)]) == 0
    report = json.loads((tmp_path / "bench_step.json").read_text())
    row = report["parts"]["tiny_vit_b16"]
    assert min(*row["seconds"]["fdscale"], *row["seconds"]["bf16 128"], *row["peak_activation_bytes"].values()) > 0
    assert all(after < before for before, after in row["losses"].values())
    assert "| tiny_vit_b16, plain |" in (tmp_path / "bench_step.md").read_text()
    assert figure.stat().st_size > 10_000
    assert "fdscale is faster by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["step", "--only", "vit_b61"], "'vit_b61' is none of its parts; did you mean 'vit_b16'?; allowed"),
        (["step", "--images", "0"], "allowed: --images and --repeats from 1"),
        (["scaling", "--ranks", "1"], "--ranks from 2"),
        (["checkpoint", "--folder", "/no/such/folder"], "--folder that exists"),
        (["loader", "--images", "10"], "--images from 512"),
        (["loader", "--shards", "/no/such/shards", "--images", "512"], "/no/such/shards"),
        (["step", "--check", "--kept", "/no/such/folder"], "bench_step.json is no report of a benchmark"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_a_missing_compiler_is_told_before_anything_runs() -> None:
    with compiler.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(UserError, match="no C\\+\\+ compiler"):
        refuse_without_compiler(["fdscale", "compiled"])
    refuse_without_compiler(["fdscale", "plain"])
