"""A real Prometheus on a free port of this machine, over blocks that are there or over targets that it scrapes."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import free_port


@contextmanager
def prometheus(folder: Path, targets: str = "", interval: str = "1s") -> Iterator[str]:
    """The address of a Prometheus whose data lies in `folder`; `targets` are files with what it scrapes (file_sd)."""
    jobs = [{"job_name": "fdscale", "honor_labels": True, "file_sd_configs": [{"files": [targets]}]}] if targets else []
    configuration = folder / "prometheus.yml"
    configuration.write_text(json.dumps({"global": {"scrape_interval": interval}, "scrape_configs": jobs}))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(process, f"http://127.0.0.1:{port}/-/ready", folder / "prometheus.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def ask(address: str, path: str, **words: str) -> dict[str, Any]:
    """Prometheus's answer; an error (of the query, say) is one with `status` "error", as it gives it."""
    url = f"{address}/api/v1/{path}"
    try:
        with urllib.request.urlopen(url, urllib.parse.urlencode(words).encode(), timeout=60) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as refused:
        return json.load(refused)


def write_blocks(folder: Path, samples: Iterable[tuple[str, Mapping[str, str], float, float]]) -> None:
    """Prometheus's own blocks in `folder`/data, of (name, labels, value, Unix time)."""
    text = folder / "samples.txt"
    with text.open("w") as file:
        for name, labels, value, at in samples:
            told = ",".join(f'{label}="{_escaped(word)}"' for label, word in labels.items())
            file.write(f"{name}{{{told}}} {float(value)!r} {at:.0f}\n")
        file.write("# EOF\n")
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet", str(text), str(folder / "data")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    text.unlink()


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"Prometheus is not up: {log.read_text()}")
