"""`fdscale bench WHAT`, also `python -m fdscale.bench WHAT`: speed and memory beside this machine's measured ceilings.

`step`: whole distillation steps beside plain timm's. `loader`: images/s beside webdataset and beside decoding alone.
`scaling`: ranks beside one. `checkpoint`: saving and loading beside the disk. `startup`: a start, by phases. `gpu`:
what one GPU gives, in under eight minutes. With `--output` the figures are kept as JSON and Markdown fit to commit;
`--check` compares ratios with such.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fdscale.bench.apart import in_own_process
from fdscale.bench.checkpoint import checkpoint_ratios, checkpoint_row, checkpoint_tables
from fdscale.bench.conduct import Benchmark, Rows, conduct
from fdscale.bench.gpu import bench, part_alone
from fdscale.bench.loader_report import loader_ratios, loader_row, loader_tables, refuse_too_few
from fdscale.bench.pairs import PAIRS
from fdscale.bench.pairs import TINY as TINY_PAIRS
from fdscale.bench.parts import FULL, TINY, Row
from fdscale.bench.scaling import rank_row, scaling_ratios, scaling_row, scaling_tables
from fdscale.bench.startup import WAYS as STARTS
from fdscale.bench.startup import startup_ratios, startup_rows, startup_tables
from fdscale.bench.step import WAYS, refuse_without_compiler, step_row
from fdscale.bench.step_report import step_ratios, step_tables
from fdscale.bench.turns import SIDES
from fdscale.cluster.ranks import rank_from_environment
from fdscale.config.errors import UserError
from fdscale.training.engine import connect, part

KEPT = Path("docs/measurements")
LONGEST = 1800.0  # seconds of a part
TINY_SIDES = {"bf16": (128,), "fp32": (128,)}


def main(arguments: list[str] | None = None) -> int:
    """0: every part gave its figures; 1: some failed, or a ratio fell; 2: nothing could be run."""
    words = sys.argv[1:] if arguments is None else arguments
    given = parser().parse_args(words)
    try:
        return int(given.run(given, words) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The options of the command line: one subcommand for each benchmark."""
    parser = argparse.ArgumentParser(prog="fdscale bench", description=__doc__)
    benchmarks = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_gpu(benchmarks)
    _add_step(benchmarks)
    _add_loader(benchmarks)
    _add_scaling(benchmarks)
    _add_checkpoint(benchmarks)
    _add_startup(benchmarks)
    return parser


def _add(benchmarks: Any, what: str, run: Callable[[argparse.Namespace, list[str]], int | None], help: str) -> Any:
    parser = benchmarks.add_parser(what, help=help, description=help)
    parser.set_defaults(run=run)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # how a benchmark starts a part in a process of its own
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def _add_kept(parser: Any) -> None:
    parser.add_argument("--output", type=Path, help="where bench_WHAT.json, .md and .png go; else nothing is written")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="this part alone")
    parser.add_argument("--again", action="store_true", help="measure what this commit has given already, too")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when a ratio has fallen below --kept"
    )
    parser.add_argument("--kept", type=Path, default=KEPT, help="the folder of that report")


def _add_step(benchmarks: Any) -> None:
    parser = _add(benchmarks, "step", _step, "whole distillation steps, fdscale's beside plain timm's")
    _add_kept(parser)
    parser.add_argument("--tiny", action="store_true", help="the same path with tiny networks")
    parser.add_argument("--way", action="append", choices=WAYS, help="these ways alone")
    parser.add_argument("--also", action="append", metavar="SETTINGS", help="fdscale with these settings, as one word")
    parser.add_argument("--images", type=int, default=8, help="of a step")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each way")
    parser.add_argument("--fp32", action="store_true", help="in fp32")
    parser.add_argument("--figure", type=Path, help="a PNG of all that is kept in --output, or was measured")


def _step(given: argparse.Namespace, words: list[str]) -> int:
    if given.images < 1 or given.repeats < 1:
        raise UserError("bench step: allowed: --images and --repeats from 1")
    pairs = TINY_PAIRS if given.tiny else PAIRS
    if given.part:
        pair = pairs[given.part]
        ways = [*(given.way or pair.ways), *(pair.also if given.also is None else given.also)]
        sides = TINY_SIDES if given.tiny else SIDES
        return _give(given, step_row(pair, ways, given.images, given.repeats, not given.fp32, sides))
    refuse_without_compiler(given.way or WAYS)
    parts = _apart(pairs, words)
    title = "Steps beside plain timm" + (", tiny networks" if given.tiny else "")
    return _conduct(given, Benchmark("step", title, parts, step_tables, step_ratios, _plot_steps))


def _plot_steps(rows: Rows, file: Path) -> None:
    try:
        from fdscale.bench.plots import plot_steps
    except ImportError as error:
        raise UserError('--figure: matplotlib is missing: pip install "fdscale[diagnose]"') from error
    plot_steps(rows, file)


def _add_scaling(benchmarks: Any) -> None:
    parser = _add(benchmarks, "scaling", _scaling, "images/s of several ranks beside one, a core each")
    _add_kept(parser)
    parser.add_argument("--tiny", action="store_true", help="the same path with tiny networks")
    parser.add_argument("--ranks", type=int, action="append", help="so many ranks (default: this machine's cores)")
    parser.add_argument("--images", type=int, default=4, help="of a step, on each rank")
    parser.add_argument("--repeats", type=int, default=7, help="steps")


def _scaling(given: argparse.Namespace, words: list[str]) -> int:
    counts = given.ranks or [os.cpu_count() or 1]
    if given.images < 1 or given.repeats < 1 or min(counts) < 2:
        raise UserError("bench scaling: allowed: --ranks from 2 (one core is none), --images and --repeats from 1")
    pairs = TINY_PAIRS if given.tiny else PAIRS
    if given.part:
        connection = connect(rank_from_environment(os.environ))
        row = rank_row(pairs[given.part], given.images, given.repeats, connection)
        part()  # gloo's threads abort a rank that ends before the others
        return _give(given, row)
    name = "tiny_swinv2_b" if given.tiny else "swinv2_t"
    parts = {name: partial(scaling_row, [*words, "--part", name], counts, LONGEST)}
    return _conduct(given, Benchmark("scaling", "Ranks on one machine", parts, scaling_tables, scaling_ratios))


def _add_checkpoint(benchmarks: Any) -> None:
    parser = _add(benchmarks, "checkpoint", _checkpoint, "MB/s of saving and loading a run, beside the disk's own")
    _add_kept(parser)
    parser.add_argument("--tiny", action="store_true", help="the same path with tiny networks")
    parser.add_argument("--folder", type=Path, help="on the disk that is asked about (default: the temporary folder)")
    parser.add_argument("--repeats", type=int, default=4, help="turns")


def _checkpoint(given: argparse.Namespace, words: list[str]) -> int:
    if given.repeats < 1 or (given.folder and not given.folder.is_dir()):
        raise UserError("bench checkpoint: allowed: --repeats from 1, --folder that exists")
    name = "tiny_vit_b16" if given.tiny else "vit_b16"
    if given.part:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            connection = connect(rank_from_environment(os.environ))
            pair = (TINY_PAIRS if given.tiny else PAIRS)[name]
            return _give(given, checkpoint_row(pair, Path(folder), given.repeats, connection))
    title, parts = "A checkpoint beside the disk", _apart([name], words)
    return _conduct(given, Benchmark("checkpoint", title, parts, checkpoint_tables, checkpoint_ratios))


def _add_startup(benchmarks: Any) -> None:
    parser = _add(benchmarks, "startup", _startup, "seconds from the command to the first step, phase by phase")
    _add_kept(parser)
    parser.add_argument("--repeats", type=int, default=5, help="starts of each way")


def _startup(given: argparse.Namespace, words: list[str]) -> int:
    if given.repeats < 1:
        raise UserError("bench startup: allowed: --repeats from 1")
    parts = {way: partial(startup_rows, way, given.repeats) for way in STARTS}
    return _conduct(given, Benchmark("startup", "From the command on", parts, startup_tables, startup_ratios))


def _conduct(given: argparse.Namespace, benchmark: Benchmark) -> int:
    if given.check:  # what is kept is compared with, and stays
        return conduct(benchmark, None, given.only, True, given.kept / f"bench_{benchmark.what}.json")
    return conduct(benchmark, given.output, given.only, given.again, None, getattr(given, "figure", None))


def _apart(names: Any, words: list[str]) -> dict[str, Callable[[], Row]]:
    """Each part in a process of its own, under the same words, with every core."""
    cores = {"OMP_NUM_THREADS": str(os.cpu_count())}
    return {name: partial(in_own_process, [*words, "--part", name], LONGEST, cores) for name in names}


def _give(given: argparse.Namespace, row: Row) -> int:
    given.result.write_text(json.dumps(row))
    return 0


def _add_loader(benchmarks: Any) -> None:
    parser = _add(benchmarks, "loader", _loader, "images/s that this machine's cores read")
    _add_kept(parser)
    parser.add_argument("--shards", type=Path, help="JPEG shards of one's own with their index (else photos)")
    parser.add_argument("--workers", type=int, action="append", help="processes of each way (default: the cores)")
    parser.add_argument("--images", type=int, default=5120, help="images of each turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")


def _loader(given: argparse.Namespace, words: list[str]) -> int:
    counts = given.workers or [os.cpu_count() or 1]
    refuse_too_few(min(counts), given.images, given.repeats)
    measure = partial(loader_row, given.shards, images=given.images, repeats=given.repeats)
    parts = {f"{workers} processes": partial(measure, workers=workers) for workers in counts}
    return _conduct(given, Benchmark("loader", "The loader beside decoding", parts, loader_tables, loader_ratios))


def _add_gpu(benchmarks: Any) -> None:
    parser = _add(benchmarks, "gpu", _gpu, "what one GPU gives beside the plan, in under eight minutes")
    parser.add_argument("--tiny", action="store_true", help="the same path with tiny networks, on CPUs too")
    parser.add_argument("--output", type=Path, default=KEPT, help="where gpu.json and gpu.md go")
    parser.add_argument("--seconds", type=float, default=460, help="no part runs longer than what is left of these")
    parser.add_argument("--only", action="append", choices=[*dict.fromkeys([*FULL, *TINY])], help="these parts alone")
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)


def _gpu(given: argparse.Namespace, words: list[str]) -> int:
    if given.part:
        return _give(given, part_alone(given.part, given.tiny, given.micro_batch))
    return bench(given.tiny, given.output, given.seconds, given.only)


if __name__ == "__main__":
    sys.exit(main())
