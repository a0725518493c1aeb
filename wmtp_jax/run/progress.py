"""The progress line that a person watches: redrawn in place on a terminal, plain lines at most every 10 s elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN_SECONDS = 10.0  # between two plain lines
REDRAW_SECONDS = 0.1  # between two redraws: faster than anyone reads
HALF_LIFE_SECONDS = 20.0  # of an interval's say in the estimate of the time left

# What goes first where the terminal is too narrow: (field, which of its shorter forms; one too many leaves it out).
_SHORTEN = (
    ("heads", 1),
    ("label", 1),
    ("eval", 1),
    ("percent", 1),
    ("rate", 1),
    ("heads", 2),
    ("eval", 2),
    ("left", 1),
    ("loss", 1),
)


class Progress:
    """Shows where a training is: step, loss, cross-entropy of each head, tokens/s, time left, newest evaluation.

    The time left is the steps left times the recent seconds a step, smoothed with a half-life of 20 s of training. The
    first interval, which holds the compilation, and time inside `paused()` don't count; without `paused()`, an interval
    that ends in an evaluation is left out.

    A stream that breaks (a closed terminal, a pipe whose reader went) ends the display, never the training.

    Args:
        total_steps: the step at which the training is complete.
        stream: where to write; a terminal gets a live line, anything else plain lines.
        label: words before the step, such as the stage's name.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        label: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total_steps
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._label = label
        self._clock = clock
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self._live and not os.environ.get("NO_COLOR")
        self._step = 0
        self._metrics: dict[str, Any] = {}
        self._started = self._updated = clock()
        self._paused = 0.0
        self._compiled = False  # an update with training metrics has come, so compilation is over
        self._seconds = self._steps = 0.0  # decayed sums of clean intervals: their ratio is the recent seconds a step
        self._shown_at = -float("inf")
        self._pending = False  # the newest update is not on the screen yet
        self._drawn = False  # a live line stands on the terminal's last row

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time of its block (an evaluation, a save) out of the estimate of the time left."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a logging step, by their names in metrics.jsonl, and shows what is due."""
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        trained = not evaluation or len(evaluation) < len(metrics)
        self._time(step, trained=trained, evaluated=bool(evaluation))
        self._metrics.update(metrics)
        if evaluation:
            self.note(self._evaluation(step, evaluation))
        if not trained:
            if self._drawn:
                self._draw()
            return
        self._pending = True
        now = self._clock()
        if step >= self._total or now - self._shown_at >= (REDRAW_SECONDS if self._live else PLAIN_SECONDS):
            self._show(now)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live line."""
        self._write(("\r\x1b[K" if self._drawn else "") + text + "\n")
        if self._drawn:
            self._draw()

    def close(self) -> None:
        """Shows the newest update if it is not shown yet, and leaves the last line standing. Safe to call twice."""
        if self._pending:
            self._show(self._clock())
        if self._drawn:
            self._write("\n")
            self._drawn = False

    def _time(self, step: int, *, trained: bool, evaluated: bool) -> None:
        now = self._clock()
        steps, seconds = step - self._step, now - self._updated - self._paused
        # Without paused() nobody knows how long an evaluation took: such an interval counts only for want of another.
        mixed = evaluated and not self._paused and self._steps > 0
        if steps > 0 and self._compiled and not mixed:
            decay = 0.5 ** (seconds / HALF_LIFE_SECONDS)
            self._seconds = self._seconds * decay + seconds
            self._steps = self._steps * decay + steps
        self._compiled = self._compiled or trained
        self._step, self._updated, self._paused = step, now, 0.0

    def _show(self, now: float) -> None:
        self._shown_at, self._pending = now, False
        if self._live:
            self._draw()
        else:
            self._write(_plain(self._fields({})) + "\n")

    def _draw(self) -> None:
        room = self._columns() - 1  # a full last column makes some terminals wrap
        shorter: dict[str, int] = {}
        fields = self._fields(shorter)
        for name, form in _SHORTEN:
            if _width(_plain(fields)) <= room:
                break
            shorter[name] = form
            fields = self._fields(shorter)
        text = _plain(fields)
        if _width(text) > room:
            text = _cut(text, room)
        elif self._colour:
            text = "  ".join(f"\x1b[2m{name}\x1b[22m {value}" if name else value for name, value in fields)
        self._write("\r" + text + "\x1b[K")
        self._drawn = True

    def _columns(self) -> int:
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns if self._stream else 0
        except OSError:
            columns = 0
        return columns or shutil.get_terminal_size().columns

    def _fields(self, shorter: Mapping[str, int]) -> list[tuple[str, str]]:
        """The line's (name, value) pairs, each in the form that `shorter` asks for; no field without its metric."""
        heads = _heads(self._metrics, "train/ce_head_")
        bits = self._metrics.get("eval/bits_per_byte")
        forms = {
            "label": [("", self._label)],
            "step": [("step", f"{self._step}/{self._total}")],
            "percent": [("", f"{100 * self._step // max(self._total, 1)}%")],
            "loss": [("loss", _number(self._metrics.get("train/loss", self._metrics.get("train/value_loss")), 3))],
            "heads": [("ce", " ".join(heads)), ("ce", "..".join(heads[:1] + heads[1:][-1:]))],
            "rate": [("", _rate(self._metrics.get("train/tokens_per_second")))],
            "left": [self._left()],
            "eval": [("eval", _number(bits, 3, " bits/byte")), ("bpb", _number(bits, 2))],
        }
        chosen = [(pairs, shorter.get(name, 0)) for name, pairs in forms.items()]
        return [pairs[form] for pairs, form in chosen if form < len(pairs) and pairs[form][1]]

    def _left(self) -> tuple[str, str]:
        if self._step >= self._total:
            return ("took", _duration(self._clock() - self._started))
        if not self._steps:
            return ("", "")
        return ("left", _duration((self._total - self._step) * self._seconds / self._steps))

    def _evaluation(self, step: int, metrics: Mapping[str, Any]) -> str:
        heads = " ".join(_heads(metrics, "eval/ce_head_"))
        explained = metrics.get("eval/explained_variance")
        parts = [
            ("ce", heads),
            ("", _number(metrics.get("eval/bits_per_byte"), 3, " bits/byte")),
            ("values explain", "" if explained is None else f"{explained:.1%}"),
        ]
        text = ", ".join(f"{name} {value}".strip() for name, value in parts if value)
        return f"{self._label + '  ' if self._label else ''}evaluation at step {step}{': ' + text if text else ''}"

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._stream = None


def _heads(metrics: Mapping[str, Any], prefix: str) -> list[str]:
    values = []
    while (value := metrics.get(f"{prefix}{len(values)}")) is not None:
        values.append(_number(value, 2))
    return values


def _number(value: Any, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{float(value):.{digits}f}{unit}"


def _rate(tokens_per_second: Any) -> str:
    if tokens_per_second is None:
        return ""
    value = float(tokens_per_second)
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit} tokens/s"
    return f"{value:.0f} tokens/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _plain(fields: list[tuple[str, str]]) -> str:
    return "  ".join(f"{name} {value}".strip() for name, value in fields)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _cut(text: str, room: int) -> str:
    while text and _width(text) > room:
        text = text[:-1]
    return text
