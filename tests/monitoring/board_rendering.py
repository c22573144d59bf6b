"""A board drawn with Grafana's UI library in headless Chromium, and its JSON held against Grafana's types."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SOURCES = Path(__file__).parent / "boards"
CACHE = Path(__file__).parents[2] / ".cache" / "grafana"  # 700 MB of node_modules
UNIT = 38  # pixels of one unit of a board's height, as in board.tsx
COLOURS = 256  # of a committed picture
CHROMIUM = (
    "chromium",
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--virtual-time-budget=20000",
)
TYPESCRIPT = (
    "node_modules/.bin/tsc",
    *("--strict", "--noEmit", "--skipLibCheck", "--target", "es2022"),
    *("--module", "esnext", "--moduleResolution", "bundler"),
)
EMPTY_FILES = [f"--loader:.{kind}=empty" for kind in ("ttf", "woff", "woff2")]


@dataclass(frozen=True)
class View:
    """What of Prometheus is shown: `runs`, from and to (Unix seconds), seconds between two scrapes, pixels."""

    prometheus: str
    runs: tuple[str, ...]
    begin: int
    end: int
    scrape: int = 60
    width: int = 1600


def install() -> None:
    """The library and the compiler from npm, once; afterwards what is there is used."""
    CACHE.mkdir(parents=True, exist_ok=True)
    wanted = (SOURCES / "package.json").read_text()
    installed = CACHE / "installed.json"
    if installed.exists() and installed.read_text() == wanted:
        return
    shutil.copy(SOURCES / "package.json", CACHE)
    # React 18 beside packages that name other versions as peers
    _run("npm", "install", "--legacy-peer-deps", "--no-audit", "--no-fund", "--silent", "--no-package-lock")
    installed.write_text(wanted)


def type_errors(board: Path) -> str:
    """What TypeScript's compiler has against a board as a Dashboard of @grafana/schema; empty when nothing."""
    shutil.copy(SOURCES / "types.ts", CACHE)
    source = CACHE / f"{board.stem}.ts"
    source.write_text(f"import type {{ Board }} from './types';\n\nexport const board: Board = {board.read_text()};\n")
    checked = subprocess.run([*TYPESCRIPT, source.name], cwd=CACHE, capture_output=True, text=True)
    assert checked.returncode == 0 or checked.stdout, checked.stderr
    return checked.stdout


def render(board: Path, view: View, picture: Path) -> dict[str, Any]:
    """Draws a board; {"rendered": panels drawn, "failed": [...], "empty": [...], "marks": annotations}."""
    _bundle()
    contents = json.loads(board.read_text())
    asked = json.dumps({"board": contents, "page": _page(view), "width": view.width}).replace("</", "<\\/")
    page = CACHE / f"{picture.stem}.html"
    page.write_text(
        '<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="app.css">'
        '<body style="margin: 4px"><div id="root"></div>'
        f"<script>window.asked = {asked}</script>"
        '<script src="app.js"></script>'
    )
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in contents["panels"])
    size = f"--window-size={view.width + 8},{height * UNIT + 8}"
    picture.parent.mkdir(parents=True, exist_ok=True)
    _browse(size, f"--screenshot={picture}", page.as_uri())
    title = re.search(r"<title>(.*?)</title>", _browse(size, "--dump-dom", page.as_uri()), re.DOTALL)
    assert title is not None, "the page did not get as far as its report"
    _with_few_colours(picture)
    return json.loads(html.unescape(title[1]))


def _page(view: View) -> dict[str, Any]:
    return {
        "prometheus": view.prometheus,
        "from": view.begin,
        "to": view.end,
        "scrape": view.scrape,
        "runs": list(view.runs),
    }


def _bundle() -> None:
    newest = max(source.stat().st_mtime for source in SOURCES.glob("*.ts*"))
    bundle = CACHE / "app.js"
    if not bundle.exists() or bundle.stat().st_mtime < newest:
        for source in SOURCES.glob("*.ts*"):
            shutil.copy(source, CACHE)
        production = '--define:process.env.NODE_ENV="production"'
        _run(
            "node_modules/.bin/esbuild",
            "board.tsx",
            "--bundle",
            "--minify",
            "--outfile=app.js",
            "--log-level=error",
            production,
            "--loader:.svg=text",
            *EMPTY_FILES,
        )


def _browse(*arguments: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        return _run(*CHROMIUM, f"--user-data-dir={profile}", *arguments)


def _with_few_colours(picture: Path) -> None:
    with Image.open(picture) as drawn:
        few = drawn.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    assert len(few.getcolors()) > COLOURS // 4, f"{picture} is blank: the report is of another visit of the page"
    few.save(picture, optimize=True)


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=CACHE, capture_output=True, text=True, env=dict(os.environ), timeout=600)
    assert done.returncode == 0, f"{' '.join(command[:3])}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
