"""What a person sees of a run: one live progress line on a terminal, one plain line per row in a log file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

AP = ("ap/box/all", "ap/box/50", "ap/mask/all", "ap/mask/50")  # of what COCO has names for, those that are watched
HELD_OUT = (
    *("eval_loss", "eval_accuracy", "eval_ema_loss", "eval_ema_accuracy", "eval_knn_accuracy"),
    *("eval_miou", "eval_pixel_accuracy", "eval_ema_miou"),
    *(f"{whose}_{name}" for whose in ("eval", "eval_ema") for name in AP),
)
EVENT_NAMES = (*HELD_OUT, "checkpoint_seconds")


class ConsoleSink:
    """Shows rows and events; on a terminal the rows share one live line below everything that was said.

    The live line is drawn when something is written, never by a thread: the loader forks workers, and a fork
    must not copy a lock that a drawing thread holds.
    """

    def __init__(self, program: str, total_steps: int, console: Console, first_step: int = 0) -> None:
        self._console = console
        self._total_steps = total_steps
        self._progress = _live_line(console) if console.is_terminal else None
        if self._progress is not None:
            self._task = self._progress.add_task(program, total=total_steps, completed=first_step, row={})
            self._progress.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows one row; held-out results and checkpoint times stay on the screen as a line of their own."""
        row = {name: value for name, value in values.items() if name not in EVENT_NAMES}
        if "loss" in row and self._progress is not None:
            self._progress.update(self._task, completed=step, row=row)
            self._progress.refresh()
        elif "loss" in row:
            self.say("  ".join([f"step {step}/{self._total_steps}", *_cells(row).values()]))
        if events := _events(values):
            self.say(f"step {step}: " + ", ".join(events))

    def say(self, text: str) -> None:
        """Prints a line, whole: a log file is not wrapped, and brackets in a path are no markup."""
        self._console.print(Text(text), soft_wrap=not self._console.is_terminal)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class _Cells(ProgressColumn):
    """The row's numbers, equally spaced."""

    def render(self, task: Task) -> Text:
        cells = _cells(task.fields["row"])
        styles = {"loss": "bold cyan", "eta_seconds": "bold"}
        return Text("  ").join(Text(text, style=styles.get(name, "")) for name, text in cells.items())


def _live_line(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description} {task.completed}/{task.total}", style="bold"),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        _Cells(table_column=Column(no_wrap=True)),  # a narrow terminal loses the bar, then the last numbers
        console=console,
        auto_refresh=False,
        expand=True,
    )


def _cells(row: Mapping[str, float]) -> dict[str, str]:
    """The numbers a person watches, in reading order, as far as the row has them."""
    texts: dict[str, Callable[[float], str]] = {
        "eta_seconds": lambda v: f"ETA {duration(v)}",
        "loss": lambda v: f"loss {v:.4f}",
        "accuracy": lambda v: f"acc {v:.1%}",
        "pixel_accuracy": lambda v: f"acc {v:.1%}",
        "lr": lambda v: f"lr {_short(v)}",
        "grad_norm": lambda v: f"grad {v:.3g}",
        "images_per_second": lambda v: f"{v:.4g} img/s",
        "data_wait_seconds": lambda v: f"wait {_share(v, row.get('step_seconds'))}",
    }
    return {name: text(row[name]) for name, text in texts.items() if name in row}


def _events(values: Mapping[str, float]) -> list[str]:
    texts: dict[str, Callable[[float], str]] = {
        "eval_loss": lambda v: f"held-out loss {v:.4f}",
        "eval_accuracy": lambda v: f"held-out accuracy {v:.1%}",
        "eval_ema_loss": lambda v: f"loss of the average {v:.4f}",
        "eval_ema_accuracy": lambda v: f"accuracy of the average {v:.1%}",
        "eval_knn_accuracy": lambda v: f"held-out k-NN accuracy {v:.1%}",
        "eval_miou": lambda v: f"held-out mIoU {v:.1%}",
        "eval_pixel_accuracy": lambda v: f"pixels {v:.1%}",
        "eval_ema_miou": lambda v: f"mIoU of the average {v:.1%}",
        "eval_ap/box/all": lambda v: f"held-out box AP {v:.1%}",
        "eval_ap/box/50": lambda v: f"box AP50 {v:.1%}",
        "eval_ap/mask/all": lambda v: f"mask AP {v:.1%}",
        "eval_ap/mask/50": lambda v: f"mask AP50 {v:.1%}",
        "eval_ema_ap/box/all": lambda v: f"box AP of the average {v:.1%}",
        "eval_ema_ap/box/50": lambda v: f"its AP50 {v:.1%}",
        "eval_ema_ap/mask/all": lambda v: f"its mask AP {v:.1%}",
        "eval_ema_ap/mask/50": lambda v: f"AP50 {v:.1%}",
        "checkpoint_seconds": lambda v: f"checkpoint committed in {v:.1f} s",
    }
    return [texts[name](values[name]) for name in texts if name in values]


def _short(value: float) -> str:
    return f"{value:.2e}".replace("e-0", "e-").replace("e+00", "")


def _share(wait: float, step: float | None) -> str:
    return f"{wait / step:.0%}" if step else f"{wait:.3f} s"


def duration(seconds: float) -> str:
    """Whole seconds as 1:05, 2:01:05 or 3d 02:01:05; a question mark while nothing is known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{secs:02}"
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
