"""`python -m tests.cluster.lab up`: a SLURM cluster to try things on, by hand.

possible             whether this machine can have one; if not, says why and returns 1
packages             install what is missing
up [NODES]           install what is missing, bring it up; prints its folder
on FOLDER NODE CMD   run a command as if on that node (ctl, n1, n2, ...), in this folder
down FOLDER          end its jobs, its daemons and itself
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.cluster.lab import packages
from tests.cluster.lab.slurm import Slurm


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["possible"], ["packages"], ["up"]) and (reason := packages.why_not()):
        print(reason)
        sys.exit(1)
    if arguments == ["possible"]:
        return
    if arguments == ["packages"]:
        packages.install()
    elif arguments[:1] == ["up"]:
        packages.install()
        print(Slurm.new(int((arguments[1:] or ["2"])[0])).folder)
    elif arguments[:1] == ["on"] and len(arguments) > 3:
        command = _lab(arguments[1]).nodes.on(arguments[2], arguments[3:])
        os.execvp(command[0], command)
    elif arguments[:1] == ["down"] and len(arguments) == 2:
        _lab(arguments[1]).down()
    else:
        sys.exit(__doc__)


def _lab(folder: str) -> Slurm:
    return Slurm(Path(folder), len(list((Path(folder) / "spool").iterdir())))


if __name__ == "__main__":
    main(sys.argv[1:])
