"""`fdscale evaluate`: what a finished segmenter or detector is worth, seen as asked, on any number of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fdscale.build.networks import on_first_rank
from fdscale.cluster.ranks import rank_from_environment
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.downstream import detect, segment
from fdscale.downstream.dense import image_loader, readable
from fdscale.downstream.finished_run import dense_settings
from fdscale.training.engine import Connection, compute_dtype, connect, parameter_dtype
from fdscale.training.run_directory import RunDirectory, write_text
from fdscale.training.sharding import divide_frozen

PROGRAMS: dict[str, Any] = {"segment": segment, "detect": detect}


def evaluate(
    folder: Path, overrides: Sequence[str] = (), ending: str = "", output: Path | None = None
) -> dict[str, float]:
    """Measure what a run left (`ending` "_ema": its moving average) on its held-out images; every rank calls it.

    `overrides` are settings of `eval`: other scales, images, windows. `output` gets the result as JSON, and overlays go
    beside it, but never into the run's folder: those there are training's. Under a ZeRO-3 JSON the network is divided
    over the ranks. Before that rank 0 alone has the student whole, and a segmenter's heads; a detector's heads, which
    are small, are whole on every rank. Raises UserError for a folder that is no finished run of a dense task, and for
    settings that are wrong.
    """
    settings = dense_settings(folder, overrides, bool(ending))
    program, deepspeed_json = PROGRAMS[settings.program], load_deepspeed_json(settings.deepspeed)
    connection = connect(rank_from_environment(os.environ))
    beside = None if output is None or output.parent.resolve() == folder.resolve() else output.parent
    if output is not None:
        connection.on_main(lambda: output.parent.mkdir(parents=True, exist_ok=True))
    held_out = program.open_held_out(settings, RunDirectory(folder), connection)
    network = _placed(partial(program.left_by, settings, folder, ending, held_out), deepspeed_json, connection)
    look = program.look_with(network, settings, held_out, connection, beside)
    images = image_loader(program.images_of(held_out), len(held_out), settings.data.workers, connection)
    with _precision(deepspeed_json, connection):
        found = look(network, readable(iter(images), settings.data.max_bad_ratio, connection), ending)
    if output is not None:
        connection.on_main(lambda: write_text(output, json.dumps(found, indent=2) + "\n"))
    return found


def _placed(build: Callable[..., nn.Module], deepspeed_json: Mapping[str, Any], connection: Connection) -> nn.Module:
    """Frozen, on the device, in the type that the run computed with; divided where it was."""
    divided = deepspeed_json["zero_optimization"]["stage"] == 3 and connection.rank.world_size > 1
    network = on_first_rank(build, connection) if divided else build()
    network.eval().requires_grad_(False)
    if dtype := parameter_dtype(deepspeed_json):
        for parameter in network.parameters():  # parameters alone, as the engine does
            parameter.data = parameter.data.to(dtype)
    if not divided:
        return network.to(connection.device)
    divide_frozen(network, deepspeed_json, connection)
    return network


def _precision(deepspeed_json: Mapping[str, Any], connection: Connection) -> AbstractContextManager[object]:
    if not deepspeed_json.get("torch_autocast", {}).get("enabled"):
        return nullcontext()
    return torch.autocast(connection.device.type, compute_dtype(deepspeed_json))


def table_of(folder: Path, found: Mapping[str, float]) -> Table:
    """The result for a terminal."""
    table = Table(title=str(folder), title_justify="left")
    table.add_column("held-out images")
    table.add_column("", justify="right")
    for name, value in found.items():
        table.add_row(name.replace("/", " "), f"{value:.2%}")
    return table
