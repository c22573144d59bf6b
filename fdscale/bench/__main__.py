"""`python -m fdscale.bench gpu`: what one GPU gives, in under eight minutes, as JSON and Markdown fit to commit.

`python -m fdscale.bench loader`: what this machine's cores read, beside plain webdataset and beside decoding alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fdscale.bench.gpu import bench, part_alone
from fdscale.bench.loader import tell_loader
from fdscale.bench.parts import FULL, TINY
from fdscale.config.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """0: every part gave its figures; 1: some failed, which the report tells; 2: nothing could be run."""
    given = parser().parse_args(arguments)
    try:
        if given.part:
            part_alone(given.part, given.tiny, given.micro_batch, given.result)
            return 0
        if given.what == "loader":
            tell_loader(given.shards, given.workers, given.images, given.repeats)
            return 0
        return bench(given.tiny, given.output, given.seconds, given.only)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m fdscale.bench", description=__doc__)
    parser.add_argument("what", choices=["gpu", "loader"], help="the benchmark")
    parser.add_argument("--tiny", action="store_true", help="the same path with tiny networks, on CPUs too")
    parser.add_argument("--output", type=Path, default=Path("docs/measurements"), help="where gpu.json and gpu.md go")
    parser.add_argument("--seconds", type=float, default=460, help="no part runs longer than what is left of these")
    parser.add_argument("--only", action="append", choices=[*dict.fromkeys([*FULL, *TINY])], help="these parts alone")
    parser.add_argument("--shards", type=Path, help="loader: JPEG shards of one's own with their index (else photos)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="loader: processes of each way")
    parser.add_argument("--images", type=int, default=5120, help="loader: images of each turn")
    parser.add_argument("--repeats", type=int, default=5, help="loader: turns of each way")
    for own in ("--part", "--micro-batch", "--result"):  # how the benchmark starts a part in a process of its own
        kind = {"--micro-batch": int, "--result": Path}.get(own, str)
        parser.add_argument(own, type=kind, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
