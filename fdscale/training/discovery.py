"""Files in a folder that Prometheus watches (`file_sd`): where a run's metrics are, and how it ended. No torch here.

An orderly end takes the target away; a crash leaves it behind, so `up == 0` means that a run has gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path


class Target:
    """One node's file in `folder`; a run is told from others of the same name by where it lies, `run_dir`.

    Every method raises OSError when the folder does not let it.
    """

    def __init__(self, folder: Path, run: str, run_dir: Path, attempt: int, node: str) -> None:
        self._folder, self._attempt = folder, attempt
        self._run, self._node = run, node
        self._hash = hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:16]
        self.file = folder / f"{_plain(run)}-{self._hash}-{attempt:04d}-{_plain(node)}.json"

    def write(self, address: str, labels: Mapping[str, str]) -> None:
        """Say that this node's metrics are at `address`, HOST:PORT, with `labels` beside run and node."""
        named = {"run": self._run, "node": self._node, **labels}
        beside = self.file.with_suffix(".new")  # no *.json, which is what Prometheus looks for
        beside.write_text(json.dumps([{"targets": [address], "labels": named}]) + "\n")
        beside.chmod(0o644)  # it runs as somebody else
        os.replace(beside, self.file)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)

    def remove_older(self) -> None:
        """Take away what attempts before this one left behind, on any node."""
        ours = re.compile(rf".*-{self._hash}-(\d+)-[^/]*\.(json|new)", re.DOTALL)
        for path in self._folder.iterdir():
            found = ours.fullmatch(path.name)
            if found and int(found[1]) < self._attempt:
                path.unlink(missing_ok=True)


def _plain(name: str) -> str:
    """A name as part of a file's: a short one, which no shell, glob or file system takes for something else."""
    return re.sub(r"[^\w]", "_", name, flags=re.ASCII)[:80]
