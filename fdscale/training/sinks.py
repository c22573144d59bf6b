"""Which rank shows and keeps what: console and file on the main rank, an endpoint on each local rank 0."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fdscale.cluster.ranks import Rank
from fdscale.training.console import ConsoleSink
from fdscale.training.metrics import JsonLines, Sink, Sinks


def open_sinks(
    rank: Rank,
    run_dir: Path,
    program: str,
    total_steps: int,
    resumed_step: int | None,
    prometheus_host: str,
    prometheus_port: int | None,
    console: Console,
) -> Sinks:
    """The sinks of this rank, none on most; `resumed_step` is the loaded checkpoint's step, None without one.

    Every rank calls this, and writes every row: the values are those of the whole run, equal on all ranks.
    """
    sinks: list[Sink] = []
    say = None
    if rank.is_main:
        screen = ConsoleSink(program, total_steps, console, first_step=resumed_step or 0)
        say = screen.say
        sinks += [screen, JsonLines(run_dir / "metrics.jsonl", resumed_step)]
    if rank.local_rank == 0 and prometheus_port is not None:
        # imported on use: a run without an endpoint needs no prometheus_client
        from fdscale.training.prometheus import serve_prometheus

        endpoint = serve_prometheus(run_dir.name, prometheus_host, prometheus_port)
        sinks += [endpoint] if endpoint else []
    return Sinks(sinks, say)
