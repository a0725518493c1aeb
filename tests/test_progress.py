"""The progress line on a terminal (a real pty) and in a pipe, with a clock that the tests turn."""

import fcntl
import io
import os
import pty
import re
import struct
import termios

import pytest

from wmtp_jax.run.progress import Progress

METRICS = {
    "train/loss": 3.14159,
    "train/ce_head_0": 2.914,
    "train/ce_head_1": 3.842,
    "train/ce_head_2": 4.331,
    "train/ce_head_3": 4.6,
    "train/tokens_per_second": 12_345.0,
    "train/grad_norm": 1.0,
}
EVALUATION = {"eval/ce_head_0": 2.5, "eval/ce_head_1": 3.5, "eval/bits_per_byte": 2.31049}
FULL = "step 1200/3848  31%  loss 3.142  ce 2.91 3.84 4.33 4.60  12.3k tokens/s"


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal:
    """A pseudo-terminal of a given width that knows what stands on its screen."""

    def __init__(self, columns):
        self.master, slave = pty.openpty()
        self.columns = columns
        self.stream = os.fdopen(slave, "w")
        self.resize(columns)
        self.written = ""

    def resize(self, columns):
        self.columns = columns
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def rows(self):
        mark = f"\x1b[{len(self.written)}z"  # a code that nobody draws: what comes before it has all arrived
        self.stream.write(mark)
        self.stream.flush()
        arrived = b""
        while not arrived.endswith(mark.encode()):
            arrived += os.read(self.master, 1 << 16)
        self.written += arrived.decode()
        rows, column = [""], 0
        for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[^\x1b]", self.written):
            if token == "\n":
                rows.append("")
            elif token == "\r":
                column = 0
            elif token == "\x1b[K":
                rows[-1] = rows[-1][:column]
            elif not token.startswith("\x1b"):
                rows[-1] = rows[-1][:column] + token + rows[-1][column + 1 :]
                column += 1
        return rows

    def close(self):
        self.stream.close()
        os.close(self.master)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    opened = Terminal(120)
    yield opened
    opened.close()


def trained(progress, clock, steps, seconds, **metrics):
    """Updates after one interval of `steps` that took `seconds`."""
    clock.now += seconds
    progress.update(steps, METRICS | metrics)


def test_line_is_redrawn_in_place(terminal):
    clock = Clock()
    progress = Progress(3848, stream=terminal.stream, clock=clock)
    trained(progress, clock, 600, 60)
    trained(progress, clock, 1200, 30)
    assert terminal.rows() == [FULL + "  left 2:12"]  # (3848 - 1200) steps of 0.05 s; the first interval compiled
    progress.update(1200, EVALUATION)
    evaluation, live = terminal.rows()
    assert evaluation == "evaluation at step 1200: ce 2.50 3.50, 2.310 bits/byte"
    assert live == FULL + "  left 2:12  eval 2.310 bits/byte"
    progress.note("a word in between")
    assert terminal.rows()[1:] == ["a word in between", live]
    trained(progress, clock, 3848, 130)
    progress.close()
    progress.close()
    *_, last, below = terminal.rows()
    assert last.startswith("step 3848/3848  100%  loss 3.142") and "took 3:40" in last
    assert below == ""


@pytest.mark.parametrize(
    "columns, expected",
    [
        (79, "step 1200/3848  loss 3.142  ce 2.91..4.60  12.3k tokens/s  left 2:12  bpb 2.31"),
        (60, "step 1200/3848  loss 3.142  left 2:12  bpb 2.31"),
        (40, "step 1200/3848  loss 3.142  left 2:12"),
        (20, "step 1200/3848"),
        (10, "step 1200"),
    ],
)
def test_line_fits_the_terminal(terminal, columns, expected):
    clock = Clock()
    progress = Progress(3848, stream=terminal.stream, label="실험", clock=clock)
    trained(progress, clock, 600, 60)
    terminal.resize(columns)
    progress.update(600, {"eval/bits_per_byte": 2.31})
    trained(progress, clock, 1200, 30)
    assert len(expected) < columns
    assert terminal.rows()[-1] == expected


def test_wide_letters_count_twice(terminal):
    terminal.resize(30)
    progress = Progress(10, stream=terminal.stream, label="가" * 8)
    progress.update(1, {"train/loss": 1.0})
    assert terminal.rows() == ["step 1/10  10%  loss 1.000"]  # 16 columns of label would make it 44
    terminal.resize(45)
    progress.note("wider")
    assert terminal.rows()[-1] == "가" * 8 + "  step 1/10  10%  loss 1.000"


def test_colour_is_asked_for(terminal, monkeypatch):
    Progress(10, stream=terminal.stream).update(1, METRICS)
    terminal.rows()
    assert "\x1b[2m" in terminal.written
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal(120)
    Progress(10, stream=plain.stream).update(1, METRICS)
    plain.rows()
    assert "\x1b[2m" not in plain.written and "loss 3.142" in plain.written
    plain.close()


def test_plain_lines_in_a_pipe():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, stream=stream, label="reference", clock=clock)
    for step in range(10, 1000, 10):  # one update a second
        trained(progress, clock, step, 1)
        if step == 500:
            progress.update(step, EVALUATION)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    shown = [int(re.search(r"step (\d+)", line)[1]) for line in lines]
    # The first, one every 10 s, the evaluation, and the last one, which close() owes.
    assert shown == [10, 110, 210, 310, 410, 500, 510, 610, 710, 810, 910, 990]
    assert lines[5] == "reference  evaluation at step 500: ce 2.50 3.50, 2.310 bits/byte"
    assert lines[-1].startswith("reference  step 990/1000  99%  loss 3.142") and "left 0:01" in lines[-1]


def test_last_step_is_shown_at_once():
    stream = io.StringIO()
    progress = Progress(20, stream=stream)
    for step in (10, 15, 20):
        progress.update(step, METRICS)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["step 10/20", "step 20/20"]
    progress.close()
    assert len(stream.getvalue().splitlines()) == 2


def test_time_left_leaves_out_compilation_and_evaluations():
    def left(feed):
        clock, stream = Clock(), io.StringIO()
        progress = Progress(1000, stream=stream, clock=clock)
        feed(progress, clock)
        clock.now += 10  # so that a line is due
        with progress.paused():
            clock.now += 1000
        progress.update(500, METRICS)
        return re.search(r"left (\S+)", stream.getvalue().splitlines()[-1])[1]

    def with_pause(progress, clock):
        progress.update(0, EVALUATION)
        trained(progress, clock, 100, 70)  # compiles
        with progress.paused():
            clock.now += 60
        trained(progress, clock, 400, 30, **EVALUATION)

    def without_pause(progress, clock):
        trained(progress, clock, 100, 70)
        trained(progress, clock, 300, 20)
        trained(progress, clock, 400, 70, **EVALUATION)

    assert left(with_pause) == "0:50"  # 500 steps at 0.1 s
    assert left(without_pause) == "0:50"


def test_time_left_follows_a_change_of_speed():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10_000, stream=stream, clock=clock)
    for step in range(100, 2000, 100):
        trained(progress, clock, step, 10)  # 0.1 s a step
    for step in range(2000, 5100, 100):
        trained(progress, clock, step, 20)  # then 0.2 s a step
    assert "left 16:40" in stream.getvalue().splitlines()[-1]  # 5000 steps of 0.2 s; the mean of all says 13:40


def test_missing_and_odd_metrics():
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    progress.update(1, {})
    progress.update(1, {"eval/other": 1.0})
    progress.update(10, {"train/loss": float("nan"), "train/ce_head_0": 2.0, "train/tokens_per_second": 2.5e6})
    first, evaluation, last = stream.getvalue().splitlines()
    assert first == "step 1/10  10%"
    assert evaluation == "evaluation at step 1"
    assert last.startswith("step 10/10  100%  loss nan  ce 2.00  2.5M tokens/s  took ")


def test_broken_stream_ends_the_display_only():
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    with Progress(10, stream=stream) as progress:
        for step in range(10):
            progress.update(step, METRICS)
            progress.note("still training")
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_other_errors_of_the_caller_are_not_hidden():
    with pytest.raises(TypeError):
        Progress(10, stream=io.StringIO()).update(1, {"train/loss": object()})
