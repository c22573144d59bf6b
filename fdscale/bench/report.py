"""The GPU benchmark's figures as Markdown."""

from __future__ import annotations

from typing import Any

GIB, TERA = 2**30, 1e12
STEPS = """Distillation in bf16 under ZeRO-3 on one rank, blocks recomputed; planned as by `fdscale plan`. "kept":
nothing is recomputed. "timm": the same networks by hand, by autocast and torch.compile. Of the ceiling: the networks'
counted operations beside the measured products (MFU)."""
_PEAKS = {"peak_bytes", "planned_peak_bytes"}


def markdown(report: dict[str, Any]) -> str:
    """One page: the device, the ceiling, a table of steps, a table of placements, and everything that failed."""
    parts = report["parts"]
    ceiling = parts.get("matmul", {}).get("tflops")
    blocks = [
        [f"# One GPU: {report['device']}", "", *_surroundings(report)],
        [f"Matrix products in bf16: **{ceiling:.1f} TFLOP/s**, the measured ceiling."] if ceiling else [],
        _steps({name: row for name, row in parts.items() if "step_seconds" in row}, ceiling),
        _placements({name: row for name, row in parts.items() if "forward_seconds" in row}),
        [f"- **{name}** failed: {row['failed']}" for name, row in parts.items() if "failed" in row],
        [f"- {name} was left out: {row['left_out']}" for name, row in parts.items() if "left_out" in row],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _surroundings(report: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    size = f", {report['device_bytes'] / GIB:.1f} GiB" if report["device_bytes"] else ""
    cuda = f", CUDA {report['cuda']}, driver {report['driver']}" if report["cuda"] else ""
    return [
        f"`python -m fdscale.bench gpu`, {report['networks']} networks with random weights, {report['date']}, commit "
        f"`{report['commit']}`.",
        f"{report['device']}{size}{cuda}; Python {report['python']}, {versions}.",
    ]


def _steps(rows: dict[str, dict[str, Any]], ceiling: float | None) -> list[str]:
    if not rows:
        return []
    head = ["part", "parameters", "images", "step", "images/s", "of the ceiling", "with recomputing"]
    head += ["states planned", "held", "peak planned", "peak", "measured / planned"]
    lines = [_line(name, row, ceiling) for name, row in rows.items()]
    return [STEPS, "", *_table(head, lines)]


def _line(name: str, row: dict[str, Any], ceiling: float | None) -> list[str]:
    def fraction(flops: float) -> str:
        return f"{flops * row['images_per_second'] / TERA / ceiling:.1%}" if ceiling else "-"

    return [
        name.removeprefix("step "),
        f"{row['student_parameters'] / 1e6:.1f} M <- {row['teacher_parameters'] / 1e6:.1f} M",
        str(row["micro_batch"]),
        f"{row['step_seconds']:.3f} s",
        f"{row['images_per_second']:.1f}",
        fraction(row["flops_per_image"]),
        fraction(row["flops_per_image_with_recomputing"]),
        *(_gib(row.get(key)) for key in ("planned_state_bytes", "held_bytes", "planned_peak_bytes", "peak_bytes")),
        f"{row['peak_bytes'] / row['planned_peak_bytes']:.3f}"
        if {"peak_bytes", "planned_peak_bytes"} <= row.keys()
        else "-",
    ]


def _placements(rows: dict[str, dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    whole = rows.get("teacher replicated", {}).get("tokens_sha256")
    lines = [
        [
            name.removeprefix("teacher "),
            f"{row['images_per_second']:.1f}",
            _gib(row["weight_bytes"]),
            _gib(row.get("held_bytes")),
            _gib(row.get("peak_bytes")),
            "-" if whole is None else "yes" if row["tokens_sha256"] == whole else "**no**",
        ]
        for name, row in rows.items()
    ]
    return _table(
        ["teacher", "images/s", "weights", "held", "peak", "tokens equal the whole one's, bit for bit"], lines
    )


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f} GiB"


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in lines)]
