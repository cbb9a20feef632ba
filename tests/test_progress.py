"""What a person sees while something runs: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from unrolled import progress
from unrolled.progress import Bar, Silent, open_bar

NOTE = "loss 1.234  1.234 nats/char  1.780 bits/char  98,765 chars/s"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def seen(text: str) -> list[str]:
    """The lines that were on the screen at some time, without what colours and moves."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", CONTROL.sub("", text)) if line.strip()]


# Where there is no terminal.


def test_a_plain_line_every_ten_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    bar.start("training", 200, 100)
    for second in range(1, 31):
        clock.now += 1
        bar.update(100 + second, NOTE)
    bar.stop()
    lines = stream.getvalue().splitlines()
    # One update a second: of 200, 190 are left after 10 seconds, of those 90 to do.
    assert lines == [
        f"training 55 %  {NOTE}  1:30 left",
        f"training 60 %  {NOTE}  1:20 left",
        f"training 65 %  {NOTE}  1:10 left",
    ]


def test_a_plain_log_has_no_control_codes_and_is_short_for_short_work(clock: Clock) -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    bar.start("encoding", 10)
    clock.now += 9.9
    bar.update(9, "x")
    bar.say("a line")
    bar.stop()
    assert stream.getvalue() == "a line\n"


def test_hours_and_no_speed_yet(clock: Clock) -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    bar.start("training", 1001)
    clock.now += 10
    bar.update(0)
    clock.now += 10
    bar.update(1)
    assert stream.getvalue().splitlines() == ["training 0 %", "training 0 %  5:33:20 left"]


def test_work_that_begins_anew_is_timed_anew(clock: Clock) -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    bar.start("encoding", 10)
    clock.now += 100
    bar.start("training", 10)
    bar.update(5)
    clock.now += 10
    bar.update(6)
    assert stream.getvalue().splitlines() == ["training 60 %  0:06 left"]


# On a terminal.


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_bar_shows_everything_in_any_width(clock: Clock, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    bar = Bar(stream)
    bar.start("training", 100)
    clock.now += 1.9
    bar.update(19, NOTE)
    assert stream.getvalue() == "", "work of less than two seconds shows nothing"
    clock.now += 0.1
    bar.update(20, NOTE)
    bar.say("epoch 1  valid 2.0000 nats/char")
    bar.stop()
    shown = seen(stream.getvalue())
    assert NOTE in shown
    assert any(re.fullmatch(r"training \S+ +20 % 0:08 left", line) for line in shown), shown
    assert "epoch 1  valid 2.0000 nats/char" in shown
    assert "…" not in "".join(shown)
    assert all(len(line) <= columns for line in shown)


def test_a_bar_leaves_nothing_behind_but_what_was_said(clock: Clock) -> None:
    stream = Terminal()
    bar = Bar(stream)
    bar.start("training", 100)
    clock.now += 3
    bar.update(20, NOTE)
    bar.stop()
    bar.stop()
    text = stream.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden and shown again"
    # The last thing is to erase both lines.
    assert re.search(r"(\x1b\[1A\x1b\[2K){1,2}$", text)
    bar.say("done")
    assert stream.getvalue().endswith("done\n")


def test_markup_in_a_line_is_left_alone(clock: Clock) -> None:
    stream = Terminal()
    bar = Bar(stream)
    bar.start("training", 10)
    clock.now += 3
    bar.update(5, "[red]note[/red]")
    bar.say("[bold]my[/bold] folder [1]")
    bar.stop()
    shown = seen(stream.getvalue())
    assert "[bold]my[/bold] folder [1]" in shown
    assert "[red]note[/red]" in shown


def test_a_bar_on_a_real_terminal() -> None:
    """Not only where something says that it is one."""
    script = (
        "from unrolled import progress\n"
        "progress._PATIENCE = 0\n"
        "bar = progress.open_bar()\n"
        "bar.start('training', 4)\n"
        f"bar.update(1, {NOTE!r}); bar.update(2, {NOTE!r}); bar.say('epoch 1'); bar.stop()\n"
    )
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(Path(progress.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as run:
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):  # Linux says so when the other side has closed
            while data := os.read(master, 65536):
                text += data
    os.close(master)
    assert run.returncode == 0, text
    shown = seen(text.decode())
    assert NOTE in shown
    assert "epoch 1" in shown
    assert any("━" in line and "50 %" in line and "left" in line for line in shown), shown
    assert b"\x1b[" in text


# The rest.


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    open_bar().say("a line")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "a line\n")


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    silent.start("training", 10)
    silent.update(5, NOTE)
    silent.say("a line")
    silent.stop()
    assert capsys.readouterr() == ("", "")
