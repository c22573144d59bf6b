"""The house keeps its floors: imports go down only, rooms on one floor do not know each other, nothing grows long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fdscale"
LONGEST_FUNCTION, LONGEST_FILE = 50, 350

# Rooms by their modules' names; a name covers what is inside it, and the longest that fits counts.
FLOORS = {
    "fdscale": 0,
    "fdscale.config.errors": -1,  # everyone may tell a mistake
    "fdscale.config": 0,
    "fdscale.cluster": 0,
    "fdscale.cluster.gpus": 0,
    "fdscale.cluster.host_memory": 0,
    "fdscale.cluster.ranks": 0,
    "fdscale.terminal": 0,
    "fdscale.imports": 0,
    "fdscale.tokens": 0,
    "fdscale.blocks": 0,
    "fdscale.data": 1,
    "fdscale.students": 1,
    "fdscale.teachers": 1,
    "fdscale.distill": 1,
    "fdscale.training": 2,
    "fdscale.planning": 2,
    "fdscale.build": 3,
    "fdscale.bench": 4,
    "fdscale.train": 4,
    "fdscale.cluster.orphans": 0,
    "fdscale.cluster.launch": 4,
    "fdscale.cluster.supervise": 4,
    "fdscale.cluster.slurm": 4,
    "fdscale.cluster.lives": 4,
    "fdscale.cluster.submit": 4,
    "fdscale.doctor": 4,
    "fdscale.downstream": 4,
    "fdscale.evidence": 4,
    "fdscale.export": 4,
    "fdscale.importing": 4,
    "fdscale.fetch": 4,
    "fdscale.models": 4,
    "fdscale.plan": 4,
    "fdscale.postmortem": 4,
    "fdscale.summary": 4,
    "fdscale.checkpoints": 4,
    "fdscale.diagnostics": 4,
    "fdscale.study": 5,
    "fdscale.commands": 6,
    "fdscale.cli": 6,
    "fdscale.__main__": 7,
}
ONE_ROOM = {  # what stops a rank; the launcher's files; the post-mortem's; the command line's
    "fdscale.cluster.orphans": "fdscale.cluster.ranks",
    "fdscale.cluster.supervise": "fdscale.cluster.launch",
    "fdscale.cluster.slurm": "fdscale.cluster.launch",
    "fdscale.cluster.lives": "fdscale.cluster.launch",
    "fdscale.evidence": "fdscale.postmortem",
    "fdscale.commands": "fdscale.cli",
}

# Heavy libraries, and the only modules that may import them when they run (for types alone, anyone may).
HEAVY = {
    "deepspeed": (
        "fdscale.training.engine",
        "fdscale.training.partition",
        "fdscale.training.collectives",
        "fdscale.export.gather",
    ),
    "open_clip": ("fdscale.teachers.from_open_clip",),
    "transformers": (  # segmentation heads; the export, the process that reads it, the model file that it carries
        "fdscale.downstream.segmentation.networks",
        "fdscale.export.transformers_format",
        "fdscale.export.reader",
        "fdscale.export.fd_swin_v2_model",
    ),
    "prometheus_client": ("fdscale.training.prometheus",),
    "huggingface_hub": ("fdscale.fetch",),
    "matplotlib": ("fdscale.bench.plots", "fdscale.diagnostics.plots", "fdscale.study.plots"),
    "faster_coco_eval": (
        "fdscale.data.dense.masks",
        "fdscale.downstream.detection.average_precision",
        "fdscale.downstream.detection.masks",
    ),
    "fairscale": ("fdscale.training.sharding", "fdscale.students.offload"),
}


@dataclass(frozen=True)
class Import:
    """One import statement's target: a dotted name, and whether it happens at run time."""

    importer: str
    target: str
    for_types: bool


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports_of(importer: str, tree: ast.AST) -> list[Import]:
    return list(_imports(importer, tree, for_types=False))


def _imports(importer: str, node: ast.AST, for_types: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(importer, alias.name, for_types) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{importer}: imports are absolute"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"  # `from fdscale.students import swin_v2` names a module
            yield Import(importer, whole if whole in FILES else str(node.module), for_types)
    guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in ast.iter_child_nodes(node):
        yield from _imports(importer, child, for_types or guarded)


def room_of(module: str) -> str:
    fitting = [room for room in FLOORS if module == room or module.startswith(f"{room}.")]
    assert fitting != ["fdscale"] or module == "fdscale", f"{module}: put its room on a floor"
    room = max(fitting, key=len)
    return ONE_ROOM.get(room, room)


def forbidden(found: Import) -> str | None:
    """Why an import of our own may not be, or None."""
    if not (found.target == "fdscale" or found.target.startswith("fdscale.")):
        return None
    above, below = room_of(found.importer), room_of(found.target)
    if above == below or FLOORS[above] > FLOORS[below]:
        return None
    return f"{found.importer} (floor {FLOORS[above]}) imports {found.target} (floor {FLOORS[below]})"


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down_only(module: str) -> None:
    assert [why for found in imports_of(module, TREES[module]) if (why := forbidden(found))] == []


@pytest.mark.parametrize(
    ("importer", "statement", "allowed"),
    [
        ("fdscale.data.loader", "from fdscale.config.errors import UserError", True),
        ("fdscale.data.loader", "from fdscale.students.student import Student", False),
        ("fdscale.data.loader", "from fdscale.data.index import Index", True),
        ("fdscale.training.loop", "import fdscale.planning.memory", False),
        ("fdscale.training.loop", "from fdscale.build import train", False),
        ("fdscale.training.loop", "def f():\n    from fdscale.train import distill", False),
        ("fdscale.export.timm_format", "from fdscale.students import swin_v2", True),
        ("fdscale.train", "from fdscale.downstream.classify import finetune", False),
        ("fdscale.cluster.launch", "from fdscale.cluster.supervise import supervise", True),
        ("fdscale.cluster.ranks", "from fdscale.cluster.launch import launch", False),
        ("fdscale.planning.memory", "from fdscale.cluster.gpus import visible_gpus", True),
        ("fdscale.config.recipe", "from fdscale.cluster.ranks import Rank", False),
        ("fdscale.build.run", "import json", True),
    ],
)
def test_the_rule_itself(importer: str, statement: str, allowed: bool) -> None:
    found = imports_of(importer, ast.parse(statement))
    assert len(found) == 1
    assert (forbidden(found[0]) is None) == allowed


def heavy_imports(found: list[Import]) -> list[str]:
    """Heavy libraries imported at run time where they may not be."""
    libraries = [(i.importer, i.target.split(".")[0]) for i in found if not i.for_types]
    return [f"{who} imports {library}" for who, library in libraries if who not in HEAVY.get(library, (who,))]


def test_each_heavy_library_has_its_files() -> None:
    assert heavy_imports([found for module, tree in TREES.items() for found in imports_of(module, tree)]) == []


def test_a_heavy_library_is_seen_inside_functions_but_not_among_types() -> None:
    inside = "def f():\n    import deepspeed.ops"
    types = "if TYPE_CHECKING:\n    from deepspeed import DeepSpeedEngine"
    assert heavy_imports(imports_of("fdscale.train", ast.parse(inside))) == ["fdscale.train imports deepspeed"]
    assert heavy_imports(imports_of("fdscale.train", ast.parse(types))) == []
    assert heavy_imports(imports_of("fdscale.training.engine", ast.parse(inside))) == []


def functions_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names and lines of all functions, decorators left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("module", FILES)
def test_nothing_grows_long(module: str) -> None:
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= LONGEST_FILE
    assert {name: length for name, length in functions_of(TREES[module]) if length > LONGEST_FUNCTION} == {}


def test_functions_are_about_ten_lines() -> None:
    lengths = sorted(length for tree in TREES.values() for _, length in functions_of(tree))
    assert lengths[len(lengths) // 2] <= 10
