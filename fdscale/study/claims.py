"""What the paper says, as differences between runs of one seed, and the rule that says whether they were found.

The rule is older than any result: of each claim the 95 % Student-t interval of the mean difference over seeds.
On the expected side of zero the claim is *reproduced*, on the other side *not reproduced at this scale*, else
*inconclusive*. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fdscale.diagnostics.intervals import mean_interval
from fdscale.study.results import Result, by_seed
from fdscale.study.tasks import AFTER, BEFORE, FULL, TEACHER

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced at this scale", "inconclusive"
RULE = (
    "Every claim is a difference between two runs of the same seed, and a sign that the paper expects. *Reproduced*: "
    "the 95 % Student-t interval of the mean over seeds lies wholly on the expected side of zero. *Not reproduced at "
    "this scale*: wholly on the other side. *Inconclusive*: zero is inside. The rule was fixed before the first run."
)


@dataclass(frozen=True)
class Difference:
    """Minuend and subtrahend, each a (kind, network, value) of the results; `scale` to the unit that is told."""

    minuend: tuple[str, str, str]
    subtrahend: tuple[str, str, str]
    unit: str
    scale: float = 1.0

    def of_seeds(self, results: Iterable[Result], of: str) -> dict[int, float]:
        """The difference for each seed for which both are there, of the networks of one teacher."""
        rows = list(results)
        more, less = (by_seed(rows, kind, of, *rest) for kind, *rest in (self.minuend, self.subtrahend))
        return {seed: (more[seed] - less[seed]) * self.scale for seed in more if seed in less}


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper's, what is measured of it, and the sign that it should have."""

    sentence: str
    difference: Difference
    sign: int


@dataclass(frozen=True)
class Judged:
    """A claim for the networks of one teacher: differences by seed, their mean and interval, and the verdict."""

    claim: Claim
    of: str
    differences: Mapping[int, float]
    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        return verdict(self.claim.sign, self.low, self.high)


def verdict(sign: int, low: float | None, high: float | None) -> str:
    """The rule."""
    if low is None or high is None or low <= 0 <= high:
        return INCONCLUSIVE
    return REPRODUCED if (low > 0) == (sign > 0) else NOT_REPRODUCED


def judged(claim: Claim, results: Iterable[Result], of: str) -> Judged | None:
    """A claim for the networks of one teacher; None where nothing was measured of it."""
    differences = claim.difference.of_seeds(results, of)
    if not differences:
        return None
    return Judged(claim, of, differences, *mean_interval(list(differences.values())))


def _tuned(more: str, less: str) -> Difference:
    return Difference(("finetune", more, ACCURACY), ("finetune", less, ACCURACY), "points", 100)


def _looked(value: str, unit: str) -> Difference:
    return Difference(("diagnose", FULL, f"{AFTER}.{value}"), ("diagnose", FULL, f"{BEFORE}.{value}"), unit)


ACCURACY, LINEAR, KNN = "eval_accuracy", "linear_accuracy", "knn_accuracy"
RESULT = (Claim("Feature distillation improves fine-tuning", _tuned(FULL, TEACHER), +1),)
INGREDIENTS = (
    Claim("Whitening the targets helps", _tuned(FULL, "without whitening"), +1),
    Claim("One relative position bias for all blocks helps", _tuned(FULL, "without shared bias"), +1),
    Claim("Drop path in the student alone helps", _tuned(FULL, "without drop path"), +1),
)
SEPARABILITY = (
    Claim(
        "A linear probe does not gain: it loses",
        Difference(("probe", FULL, LINEAR), ("probe", TEACHER, LINEAR), "points", 100),
        -1,
    ),
)
DIAGNOSTICS = (
    Claim(
        "Heads of deep blocks attend over more different distances", _looked("attention_distance_spread", "pixels"), +1
    ),
    Claim("Heads of deep blocks are less alike", _looked("head_similarity", "cosine"), -1),
    Claim("Averaged attention maps are more diagonal", _looked("attention_diagonality", "0 to 1"), +1),
    Claim("Averaged maps depend more on the offset alone", _looked("attention_offset_share", "0 to 1"), +1),
    Claim("Averaged maps have fewer columns", _looked("attention_column_share", "0 to 1"), -1),
    Claim("The loss landscape is flatter", _looked("sharpness", "nats"), -1),
)
CLAIMS = (*RESULT, *INGREDIENTS, *SEPARABILITY, *DIAGNOSTICS)
