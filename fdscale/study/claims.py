"""What the paper says, as differences between runs of one seed, and the rule that says whether they were found.

Of each claim the 95 % Student-t interval of the mean difference over seeds is looked at.
On the expected side of zero the claim is *reproduced*, on the other side *not reproduced at this scale*, else
*inconclusive*. Where random weights do as well, that is said. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fdscale.diagnostics.intervals import mean_interval
from fdscale.study.results import Result, by_seed
from fdscale.study.tasks import AFTER, BEFORE, FULL, SCRATCH, TEACHER

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced at this scale", "inconclusive"
BY_RANDOM = f"{REPRODUCED}, but random weights do as well"
LEAST_SEEDS = 3
ROUNDING = 1e-9  # of what is compared: differences that are the same but for it have no spread
RULE = (
    "Every claim is a difference between two runs of the same seed, and a sign that the paper expects. *Reproduced*: "
    "the 95 % Student-t interval of the mean over seeds lies wholly on the expected side of zero. *Not reproduced at "
    f"this scale*: wholly on the other side. *Inconclusive*: zero is inside, or there are fewer than {LEAST_SEEDS} "
    "seeds, or all of them have the same difference. Where random weights of the student's network differ from the "
    f"teacher in the expected direction as well, by the same rule, a diagnostic is *{BY_RANDOM}*: nothing need have "
    "been distilled for it. Claims, signs and intervals were fixed before the first run; random weights and the least "
    "number of seeds were added after a first look."
)
BESIDE_RULE = (
    "Intervals are over seeds on one fixed set of held-out images: that these images are a sample is not in them (449 "
    "digits, 94 % told right: a standard error of 1.1 points). Rates and augmentation were chosen on the held-out "
    "digits, on which a study of the digits measures too. Every fourth digit is held out, whoever wrote it: both parts "
    "have the same writers. How long and at which rates students are distilled and all are tuned was changed once, "
    "after an outcome was known in which students did worse than their teachers: docs/study.md says what, and why."
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
        found = {seed: (more[seed] - less[seed]) * self.scale for seed in more if seed in less}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper's, what is measured of it, and the sign that it should have.

    `control` is the same difference with random weights in the student's place.
    """

    sentence: str
    difference: Difference
    sign: int
    control: Difference | None = None


@dataclass(frozen=True)
class Judged:
    """A claim for the networks of one teacher: differences by seed, their mean and interval, and the verdict.

    `control` is the claim judged with random weights in the student's place.
    """

    claim: Claim
    of: str
    differences: Mapping[int, float]
    mean: float
    low: float | None
    high: float | None
    control: Judged | None = None

    @property
    def verdict(self) -> str:
        if len(self.differences) < LEAST_SEEDS:
            return INCONCLUSIVE
        found = verdict(self.claim.sign, self.low, self.high)
        by_random = self.control is not None and self.control.verdict == REPRODUCED
        return BY_RANDOM if found == REPRODUCED and by_random else found


def verdict(sign: int, low: float | None, high: float | None) -> str:
    """The rule, as far as an interval decides it."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)) or low <= 0 <= high:
        return INCONCLUSIVE
    if high - low <= ROUNDING * max(abs(low), abs(high)):
        return INCONCLUSIVE
    return REPRODUCED if (low > 0) == (sign > 0) else NOT_REPRODUCED


def judged(claim: Claim, results: Iterable[Result], of: str) -> Judged | None:
    """A claim for the networks of one teacher; None where nothing was measured of it."""
    rows = list(results)
    differences = claim.difference.of_seeds(rows, of)
    if not differences:
        return None
    control = None if claim.control is None else judged(Claim(claim.sentence, claim.control, claim.sign), rows, of)
    return Judged(claim, of, differences, *mean_interval(list(differences.values())), control)


def _tuned(more: str, less: str) -> Difference:
    return Difference(("finetune", more, ACCURACY), ("finetune", less, ACCURACY), "points", 100)


def _looked(sentence: str, value: str, unit: str, sign: int) -> Claim:
    before = ("diagnose", FULL, f"{BEFORE}.{value}")
    after, control = (Difference(("diagnose", FULL, f"{name}.{value}"), before, unit) for name in (AFTER, SCRATCH))
    return Claim(sentence, after, sign, control)


ACCURACY, LINEAR, KNN = "eval_accuracy", "linear_accuracy", "knn_accuracy"
RESULT = (Claim("Feature distillation improves fine-tuning", _tuned(FULL, TEACHER), +1),)
INGREDIENTS = (
    Claim("Whitening the targets helps", _tuned(FULL, "without whitening"), +1),
    Claim("One relative position bias for all blocks helps", _tuned(FULL, "without shared bias"), +1),
    Claim("Drop path in the student helps", _tuned(FULL, "without drop path"), +1),
)
SEPARABILITY = (
    Claim(
        "A linear probe loses",
        Difference(("probe", FULL, LINEAR), ("probe", TEACHER, LINEAR), "points", 100),
        -1,
    ),
)
DIAGNOSTICS = (
    _looked("Heads of deep blocks attend over more different distances", "attention_distance_spread", "pixels", +1),
    _looked("Heads of deep blocks are less alike", "head_similarity", "cosine", -1),
    _looked("Averaged attention maps are more diagonal", "attention_diagonality", "0 to 1", +1),
    _looked("Averaged maps depend more on the offset alone", "attention_offset_share", "0 to 1", +1),
    _looked("Averaged maps have fewer columns", "attention_column_share", "0 to 1", -1),
    _looked("The loss landscape is flatter", "sharpness", "nats per squared distance", -1),
)
CLAIMS = (*RESULT, *INGREDIENTS, *SEPARABILITY, *DIAGNOSTICS)
