"""`fdscale evaluate`: what a finished segmenter or detector is worth, seen as asked, on any number of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fdscale.cluster.ranks import rank_from_environment
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.errors import UserError
from fdscale.downstream import detect, segment
from fdscale.downstream.dense import image_loader, told
from fdscale.downstream.finished_run import dense_settings
from fdscale.training.engine import Connection, compute_dtype, connect, parameter_dtype
from fdscale.training.run_directory import RunDirectory, write_text
from fdscale.training.sharding import divide_frozen

PROGRAMS: dict[str, Any] = {"segment": segment, "detect": detect}


def evaluate(
    folder: Path, overrides: Sequence[str] = (), ending: str = "", output: Path | None = None
) -> dict[str, float]:
    """Measure what a run left (`ending` "_ema": its moving average) on its held-out images; every rank calls it.

    `overrides` are settings of `eval`: other scales, images, windows. Overlays go into the run's folder, and `output`
    gets the result as JSON. Under a ZeRO-3 JSON the network is divided over the ranks. Raises UserError for a folder
    that is no finished run of a dense task, and for settings that are wrong.
    """
    settings = dense_settings(folder, overrides)
    program, deepspeed_json = PROGRAMS[settings.program], load_deepspeed_json(settings.deepspeed)
    connection = connect(rank_from_environment(os.environ))
    held_out = program.open_held_out(settings, RunDirectory(folder), connection)
    if held_out is None:
        raise UserError(f"eval: the run in {folder} names no held-out images; name them as its program's recipes do")
    network = program.left_by(settings, folder, ending)
    look = program.look_with(network, settings, held_out, connection, folder)
    _place(network, deepspeed_json, connection)
    images = image_loader(program.images_of(held_out), len(held_out), settings.data.workers, connection)
    with _precision(deepspeed_json, connection):
        found = look(network, told(iter(images)), ending)
    if output is not None:
        connection.on_main(lambda: write_text(output, json.dumps(found, indent=2) + "\n"))
    return found


def _place(network: nn.Module, deepspeed_json: Mapping[str, Any], connection: Connection) -> None:
    """Frozen, on the device, in the type that the run computed with; divided where it was."""
    network.eval().requires_grad_(False)
    if dtype := parameter_dtype(deepspeed_json):
        for parameter in network.parameters():  # parameters alone, as the engine does
            parameter.data = parameter.data.to(dtype)
    network.to(connection.device)
    if deepspeed_json["zero_optimization"]["stage"] == 3 and connection.rank.world_size > 1:
        divide_frozen(network, deepspeed_json, connection)


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
