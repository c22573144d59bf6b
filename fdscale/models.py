"""The tables of teachers and students as a person reads them: what each is, how large, and under which licence."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.table import Table
from rich.text import Text

from fdscale.config.errors import UserError, nearest
from fdscale.students.geometry import STUDENTS, SwinV2Geometry, ViTGeometry
from fdscale.teachers.table import TEACHERS, TeacherSpec

COUNTED = "tokens: h x w + CLS and registers; FLOPs: one image's forward, 2 for each multiply-accumulate"
OF_TEACHERS = f"{COUNTED}; any network of timm's teaches as timm:NAME, a student by its name or as student_file"
OF_STUDENTS = f"{COUNTED}; any network of timm's learns as timm:NAME; a teacher's licence may bind what it taught"


def models_tables(kind: str) -> list[Table]:
    """A table of `teachers`, of `students`, or `all`: one row each, by family. Raises UserError for another kind."""
    tables: dict[str, Callable[[], Table]] = {"teachers": _teachers, "students": _students}
    if kind not in (*tables, "all"):
        raise UserError(f"models: got {kind!r}{nearest(kind, tables)}; allowed: {', '.join(tables)}, all")
    return [make() for name, make in tables.items() if kind in (name, "all")]


def _teachers() -> Table:
    table = _table("teacher", "timm's network and weights, or as marked", OF_TEACHERS)
    table.add_column("licence", max_width=12)
    families = [spec.family for spec in TEACHERS.values()]
    for (name, spec), following in zip(TEACHERS.items(), [*families[1:], None], strict=True):
        cells = [_named(name, _weights(spec)), *_size(spec), Text(spec.licence)]
        table.add_row(*cells, end_section=following != spec.family)
    return table


def _weights(spec: TeacherSpec) -> str:
    if not spec.pretrained:
        return f"{spec.model} (your file)"
    return f"{spec.model}.{spec.pretrained}" + ("" if spec.source == "timm" else f" ({spec.source})")


def _students() -> Table:
    table = _table("student", "timm's class, and what it is built with", OF_STUDENTS)
    families = [geometry.family for geometry in STUDENTS.values()]
    for (name, geometry), following in zip(STUDENTS.items(), [*families[1:], None], strict=True):
        table.add_row(_named(name, _blocks(geometry)), *_size(geometry), end_section=following != geometry.family)
    return table


def _blocks(geometry: ViTGeometry | SwinV2Geometry) -> str:
    if isinstance(geometry, ViTGeometry):
        return f"Beit, {geometry.depth} blocks, {geometry.num_heads} heads, patch {geometry.patch_size}"
    return f"SwinTransformerV2, {_joined(geometry.depths)} blocks, window {geometry.window_size}"


def _joined(numbers: Iterable[int]) -> str:
    return "-".join(str(number) for number in numbers)


def _table(who: str, origin: str, caption: str) -> Table:
    """Two lines a row, so that a name of timm's has room beside its numbers in 100 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption=caption)
    table.add_column(f"{who}\n  {origin}", overflow="fold")
    for column in ("params\n(M)", "width", "tokens", "GFLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _named(name: str, origin: str) -> Text:
    return Text.assemble((name, "bold"), f"\n  {origin}")


def _size(network: TeacherSpec | ViTGeometry | SwinV2Geometry) -> list[Text]:
    """Millions of parameters, channels of a token, tokens and at which image side, billions of FLOPs."""
    height, width = network.grid
    prefix = f"+{network.prefix_tokens}" if network.prefix_tokens else ""
    tokens = f"{height}x{width}{prefix}\nat {network.image_size} px"
    millions, billions = network.parameters() / 1e6, network.flops() / 1e9
    return [Text(f"{millions:,.1f}"), Text(str(network.width)), Text(tokens), Text(f"{billions:,.1f}")]
