"""What a user installs: the wheel alone knows its recipes, DeepSpeed JSONs and launchers."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the working tree without fetching anything."""
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output)]
    built = subprocess.run([*command, str(REPOSITORY)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(output.glob("fdscale-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `fdscale` is the installed wheel, not the repository."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    return {**os.environ, "PYTHONPATH": str(target)}


def python(arguments: list[str], env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def test_everything_that_is_found_by_name_is_in_the_wheel(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    shipped = [
        *(path.relative_to(REPOSITORY) for path in (REPOSITORY / "fdscale").rglob("*.py")),
        *(path.relative_to(REPOSITORY) for path in (REPOSITORY / "fdscale" / "recipes").glob("*.toml")),
        *("fdscale" / path.relative_to(REPOSITORY) for path in (REPOSITORY / "ds_configs").glob("*")),
        *("fdscale" / path.relative_to(REPOSITORY) for path in (REPOSITORY / "launchers").glob("*.sh")),
        Path("fdscale/launchers/site.example.env"),
    ]
    assert {path.as_posix() for path in shipped} <= packed
    assert not [name for name in packed if name.startswith(("tests/", "launchers/", "ds_configs/"))]
    assert "fdscale/launchers/site.env" not in packed, "a site's own"


def test_the_installed_wheel_checks_a_recipe_in_an_empty_folder(installed: dict[str, str], tmp_path: Path) -> None:
    where = python(["-c", "import fdscale; print(fdscale.__file__)"], installed, tmp_path)
    assert where.stdout.startswith(installed["PYTHONPATH"]), where.stdout + where.stderr
    checked = python(["-m", "fdscale", "check", "swinv2_g", "data.shards=digits"], installed, tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert not list(tmp_path.iterdir())


def test_the_installed_wheel_knows_where_its_launchers_are(installed: dict[str, str], tmp_path: Path) -> None:
    where = python(["-m", "fdscale", "where", "fd_swinv2g"], installed, tmp_path)
    assert where.returncode == 0, where.stdout + where.stderr
    assert where.stdout == f"{installed['PYTHONPATH']}/fdscale/launchers/fd_swinv2g.sh\n"
    both = python(["-m", "fdscale", "where", "swinv2_g"], installed, tmp_path)
    assert [Path(line).name for line in both.stdout.splitlines()] == ["swinv2_g.toml", "swinv2_g.json"]
    assert all(Path(line).is_file() for line in both.stdout.splitlines())
    unknown = python(["-m", "fdscale", "where", "fd_swin2g"], installed, tmp_path)
    assert unknown.returncode == 2
    assert "did you mean 'fd_swinv2g'" in unknown.stderr


def test_the_constraints_name_what_is_tested() -> None:
    pins = dict(line.split("==") for line in constraint_lines())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {requirement.split(">")[0].replace("-", "_").lower() for requirement in wanted}
    assert names <= {name.replace("-", "_").lower() for name in pins}


@pytest.mark.skipif("CI" not in os.environ, reason="another machine may run other versions within the bounds")
def test_the_tested_versions_are_the_pinned_ones() -> None:
    pins = dict(line.split("==") for line in constraint_lines())
    assert {name: version(name) for name in pins} == pins


def constraint_lines() -> list[str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]
