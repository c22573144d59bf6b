"""The tables of the report, from results alone: cells as text. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from fdscale.diagnostics.intervals import mean_interval
from fdscale.study.claims import (
    ACCURACY,
    CLAIMS,
    DIAGNOSTICS,
    INGREDIENTS,
    KNN,
    LINEAR,
    Claim,
    Judged,
    judged,
)
from fdscale.study.results import Result, by_seed
from fdscale.study.tasks import AFTER, BEFORE, FULL, LOOKED, SCRATCH, TEACHER, TEACHERS, TRAINED

NOTHING = "-"
Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Head and rows, as many cells in each."""

    head: Row
    rows: tuple[Row, ...]


def verdicts(results: Sequence[Result]) -> Table:
    """Every claim, for each teacher: the mean difference, its interval, the verdict."""
    head = ("the paper says", *(f"{of} teacher" for of in TEACHERS))
    return Table(head, tuple((claim.sentence, *(_verdict(claim, results, of) for of in TEACHERS)) for claim in CLAIMS))


def main_table(results: Sequence[Result]) -> Table:
    """Each network fine-tuned, as trained, and frozen under a classifier or a k-NN: means and intervals over seeds."""
    networks = [("random weights", "", SCRATCH)]
    for of in TEACHERS:
        networks += [(f"{of} teacher", of, TEACHER), (f"distilled from the {of} teacher", of, FULL)]
    values = (("finetune", ACCURACY), ("supervised", ACCURACY), ("probe", LINEAR), ("probe", KNN))
    rows = [
        (name, *(percent(by_seed(results, kind, of, network, value)) for kind, value in values))
        for name, of, network in networks
    ]
    head = ("network", "fine-tuned on few labels", "as trained, with all labels", "linear probe", "k-NN")
    return Table(head, tuple(rows))


def ablations(results: Sequence[Result]) -> Table:
    """Fine-tuned accuracy with every ingredient and without each, and what the ingredient brings."""
    head = ("distilled", *(cell for of in TEACHERS for cell in (f"from the {of} teacher", "the ingredient brings")))
    rows = [("with everything", *(cell for of in TEACHERS for cell in (_tuned(results, of, FULL), NOTHING)))]
    for claim in INGREDIENTS:
        network = claim.difference.subtrahend[1]
        cells = (cell for of in TEACHERS for cell in (_tuned(results, of, network), _difference(claim, results, of)))
        rows.append((network, *cells))
    return Table(head, tuple(rows))


def diagnostics(results: Sequence[Result]) -> Table:
    """Each diagnostic of the teacher, of what was distilled from it, of random weights; and paired differences."""
    head = ("diagnostic", "teacher", *LOOKED, f"{AFTER} - {BEFORE}", f"{SCRATCH} - {BEFORE}")
    rows = []
    for claim in DIAGNOSTICS:
        name = claim.difference.minuend[2].removeprefix(f"{AFTER}.")
        for of in TEACHERS:
            means = [_mean(by_seed(results, "diagnose", of, FULL, f"{model}.{name}")) for model in LOOKED]
            found = judged(claim, results, of)
            differences = (found, None if found is None else found.control)
            told = (NOTHING if each is None else interval(each, with_unit=False) for each in differences)
            rows.append((f"{name.replace('_', ' ')} ({claim.difference.unit})", of, *means, *told))
    return Table(head, tuple(rows))


def budgets(results: Sequence[Result]) -> Table:
    """What each kind of run takes: steps, images, seconds of one core's time."""
    return Table(("run", "runs", "steps each", "images each", "CPU seconds each"), tuple(_budgets(results)))


def _budgets(results: Sequence[Result]) -> Iterator[Row]:
    for kind in (*TRAINED, "probe", "diagnose"):
        rows = [row for row in results if row.kind == kind]
        if rows:
            steps, images = (
                f"{rows[0].values[name]:,.0f}" if kind in TRAINED else NOTHING for name in ("steps", "images")
            )
            yield TOLD[kind], str(len(rows)), steps, images, f"{fmean(row.cpu_seconds for row in rows):.1f}"


TOLD = {
    "contrastive": "contrastive teacher",
    "supervised": "supervised teacher",
    "distill": "distillation",
    "finetune": "fine-tuning",
    "probe": "probe of frozen features",
    "diagnose": "diagnostics, with random weights",
}


def percent(values: dict[int, float]) -> str:
    """`91.2 ± 0.8 %`: mean over seeds and half of its 95 % interval."""
    if not values:
        return NOTHING
    mean, low, _ = mean_interval([100 * value for value in values.values()])
    return f"{mean:.1f} %" if low is None else f"{mean:.1f} ± {mean - low:.1f} %"


def interval(found: Judged, with_unit: bool = True) -> str:
    """`+1.3 (+0.4 to +2.2) points`."""
    unit = found.claim.difference.unit
    told = f" {unit}" if with_unit and unit != "0 to 1" else ""
    if found.low is None or found.high is None:
        return f"{_signed(found.mean)}{told}"
    return f"{_signed(found.mean)} ({_signed(found.low)} to {_signed(found.high)}){told}"


def _signed(value: float) -> str:
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:+.{digits}f}"


def _verdict(claim: Claim, results: Sequence[Result], of: str) -> str:
    found = judged(claim, results, of)
    return NOTHING if found is None else f"*{found.verdict}*: {interval(found)}"


def _difference(claim: Claim, results: Sequence[Result], of: str) -> str:
    found = judged(claim, results, of)
    return NOTHING if found is None else interval(found)


def _tuned(results: Sequence[Result], of: str, network: str) -> str:
    return percent(by_seed(results, "finetune", of, network, ACCURACY))


def _mean(values: dict[int, float]) -> str:
    return f"{fmean(values.values()):.3g}" if values else NOTHING
