"""How tokens lie, and whether a teacher's and a student's layouts meet; torch-free, so `check` can ask."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """How a network's tokens lie: prefix tokens (CLS, registers) first, then an (h, w) grid row by row."""

    grid: tuple[int, int]
    prefix_tokens: int


def layout_problems(teacher: TokenLayout, student: TokenLayout, grid: str, prefix_tokens: str) -> list[str]:
    """Why the two layouts do not meet, one sentence each, with the choices that would make them."""
    (th, tw), (sh, sw) = teacher.grid, student.grid
    divides = th % sh == 0 and tw % sw == 0
    problems = []
    if grid == "exact" and teacher.grid != student.grid:
        pool = "target.grid=pool, " if divides else ""
        problems.append(
            f"target.grid: the teacher has {th}x{tw} patch tokens, the student {sh}x{sw}; choose "
            f"{pool}target.grid=interpolate or another student.image_size or teacher.image_size"
        )
    if grid == "pool" and not divides:
        problems.append(
            f"target.grid: {th}x{tw} does not pool to {sh}x{sw} in whole cells; use target.grid=interpolate"
        )
    return problems + _prefix_problems(teacher.prefix_tokens, student.prefix_tokens, prefix_tokens)


def _prefix_problems(teacher: int, student: int, prefix_tokens: str) -> list[str]:
    counts = f"target.prefix_tokens: the teacher has {teacher} prefix tokens, the student {student}"
    both = teacher > 0 and student > 0
    if prefix_tokens == "keep" and teacher != student:
        cls = "target.prefix_tokens=cls keeps the first of each, " if both else ""
        return [f"{counts}; {cls}target.prefix_tokens=drop leaves them out of the loss"]
    if prefix_tokens == "cls" and not both:
        return [f"{counts}: there is no CLS token on both sides; target.prefix_tokens=drop leaves them out of the loss"]
    return []
