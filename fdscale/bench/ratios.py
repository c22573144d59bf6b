"""What a benchmark's ratios have to be, and whether one has fallen since the report that is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fdscale.bench.tables import Table

TOLERANCE = 0.1  # of the kept ratio: medians of paired turns differ by some 0.05 on a machine with neighbours


@dataclass(frozen=True)
class Ratio:
    """A figure without a unit, which another day or a slower machine leaves as it is; `must` and `aim` where set."""

    name: str
    value: float
    must: float | None = None
    aim: float | None = None
    better: Literal["higher", "lower"] = "higher"

    def reaches(self, bound: float | None) -> bool:
        """Whether it is at least as good as the bound; where there is none, yes."""
        return bound is None or (self.value >= bound if self.better == "higher" else self.value <= bound)


def musts(ratios: Iterable[Ratio]) -> Table:
    """Each ratio that has something to reach."""
    lines = [
        [ratio.name, f"{ratio.value:.2f}", _bound(ratio, ratio.must), _bound(ratio, ratio.aim), _told(ratio)]
        for ratio in ratios
        if ratio.must is not None or ratio.aim is not None
    ]
    return Table("What was to be reached", "", ["ratio", "measured", "must", "aim", ""], lines)


def _bound(ratio: Ratio, bound: float | None) -> str:
    return "" if bound is None else f"{'≥' if ratio.better == 'higher' else '≤'} {bound:.2f}"


def _told(ratio: Ratio) -> str:
    if not ratio.reaches(ratio.must):
        return "missed"
    if ratio.aim is None:
        return "held"
    return "aim reached" if ratio.reaches(ratio.aim) else "aim missed" if ratio.must is None else "held"


def compared(now: Sequence[Ratio], kept: Sequence[Ratio], tolerance: float = TOLERANCE) -> tuple[Table, list[str]]:
    """The ratios beside those of the kept report, and the names of those that are worse by more than `tolerance`.

    One that is kept and was measured under neither name nor number any more has fallen, too.
    """
    measured = {ratio.name: ratio for ratio in now}
    lines, fallen = [], []
    for before in kept:
        ratio = measured.get(before.name)
        change = None if ratio is None else _worse_by(ratio, before)
        if change is None or change > tolerance:
            fallen.append(before.name)
        value = "missing" if ratio is None else f"{ratio.value:.3f}"
        verdict = "fallen" if before.name in fallen else "held"
        lines.append([before.name, f"{before.value:.3f}", value, "" if change is None else f"{-change:+.1%}", verdict])
    how = f"A ratio that is worse than the kept one by more than {tolerance:.0%} has fallen."
    return Table("Beside the kept report", how, ["ratio", "kept", "now", "better by", ""], lines), fallen


def _worse_by(now: Ratio, before: Ratio) -> float:
    change = now.value / before.value - 1
    return -change if before.better == "higher" else change
