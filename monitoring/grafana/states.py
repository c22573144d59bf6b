"""What a run does and how an attempt ended, as one number a run: a word and a colour each."""

from __future__ import annotations

from fdscale.training.metrics import ENDS, STATES
from monitoring.grafana.panels import GREEN, NEUTRAL, ORANGE, RED, RUN, of

_OF_STATE = {"training": GREEN, "waiting for data": ORANGE, "going back": RED}
_OF_END = {"complete": GREEN, "stopped": GREEN, "canary": ORANGE}
# After an end: a target without a label `ended` that does not answer has crashed, or its node has.
_AFTER = (("no answer", RED, ""), ("to be started again", ORANGE, "stopped|canary"), ("failed", RED, "mistake|error"))

# Waiting in warm colours, work in cold ones.
PHASE_COLOURS = {"data": "orange", "forward": "green", "backward": "blue", "update": "purple", "agree": "red"}

STATE_NAMES = {
    **{number: (state, _OF_STATE.get(state, NEUTRAL)) for number, state in enumerate(STATES, 1)},
    **{number: (word, colour) for number, (word, colour, _) in enumerate(_AFTER, len(STATES) + 1)},
}
END_NAMES = {number: (end, _OF_END.get(end, RED)) for number, end in enumerate(ENDS, 1)}


def state_number() -> str:
    """Which of STATE_NAMES each run is in."""
    # Two ways out may differ for a moment: max takes the later word.
    alive = _numbered("run_state", "state", STATES)
    gone = [
        f'{number} + (min by (run) (up{{job="fdscale", {RUN}, ended=~"{ended}"}}) == 0)'
        for number, (_, _, ended) in enumerate(_AFTER, len(STATES) + 1)
    ]
    return " or ".join([f"max by (run) ({alive})", *gone])


def end_number() -> str:
    """Which of END_NAMES the attempt before this one came to."""
    return f"max by (run) ({_numbered('previous_end', 'reason', ENDS)})"


def _numbered(name: str, label: str, words: tuple[str, ...]) -> str:
    told = (f"{number} * ({of(name, label, where=_equals(label, word))} == 1)" for number, word in enumerate(words, 1))
    return " or ".join(told)


def _equals(label: str, word: str) -> str:
    return f'{label}="{word}"'
