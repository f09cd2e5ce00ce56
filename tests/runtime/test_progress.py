"""The progress line: on a terminal, in a log file, after a resume."""

import io

import pytest

from bas.runtime import progress
from bas.runtime.progress import ImageProgress, Progress, clock


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """The clock: `now[0]` is the time in seconds."""
    time = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3599, 3600, 7325)] == [
        "0:00",
        "1:00",
        "1:01",
        "59:59",
        "1:00:00",
        "2:02:05",
    ]


def test_terminal_redraws_one_line(now):
    stream = Terminal()
    bar = Progress("phase1", 10, stream=stream)
    for done in (1, 10):
        now[0] += 2.0
        bar.show(done, {"loss": 0.12345})
    first, second = stream.getvalue().split("\r")[1:]
    assert first == "phase1 1/10  loss 0.1235  0.50 steps/s  0:18 left\033[K"
    assert second == "phase1 10/10  loss 0.1235  2.50 steps/s  0:00 left\033[K\n"


def test_log_file_gets_a_line_now_and_then_and_the_last(now):
    stream = io.StringIO()
    bar = Progress("class images", 100, unit="images", stream=stream)
    for done in range(1, 101):
        now[0] += 1.0
        bar.show(done)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "class images 10/100  1.00 images/s  1:30 left"
    assert len(lines) == 10
    assert lines[-1].startswith("class images 100/100")


def test_speed_counts_from_where_a_resumed_stage_began(now):
    stream = Terminal()
    bar = Progress("phase2", 100, done=50, stream=stream)
    now[0] += 5.0
    bar.show(60)
    assert "60/100  2.00 steps/s  0:20 left" in stream.getvalue()


def test_images_are_counted_batch_by_batch(now):
    """Five images of three steps in batches of two: the image count, the step of the batch, and the time left."""
    stream = Terminal()
    bar = ImageProgress(5, 3, stream=stream)
    for batch in (2, 2, 1):
        for _ in range(3):
            now[0] += batch
            bar.step(batch)
    lines = [line.removesuffix("\033[K") for line in stream.getvalue().split("\r")[1:]]
    assert lines[:4] == [
        "images 0/5  step 1/3  0:13 left",
        "images 0/5  step 2/3  0:11 left",
        "images 2/5  step 3/3  0:09 left\033[K\n",
        "images 2/5  step 1/3  0:07 left",
    ]
    assert lines[6:] == [
        "images 4/5  step 1/3  0:02 left",
        "images 4/5  step 2/3  0:01 left",
        "images 5/5  step 3/3  0:00 left\033[K\n",
    ]


@pytest.mark.parametrize(("seconds", "expected"), [(0.9, 0), (3.0, 2)])
def test_images_in_a_log_file_bring_a_line_each_ten_seconds(now, seconds, expected):
    """So a short job prints none."""
    stream = io.StringIO()
    bar = ImageProgress(2, 5, stream=stream)
    for _ in range(10):
        now[0] += seconds
        bar.step(1)
    lines = stream.getvalue().splitlines()
    assert len(lines) == expected
    assert lines[:1] == ["images 0/2  step 4/5  0:18 left"][:expected]


@pytest.mark.parametrize("closed", [False, True])
def test_a_process_without_streams_shows_nothing(monkeypatch, closed):
    """As a service has it, or a notebook that closed its stream; from Python, no command opens them again."""
    stream = io.StringIO() if closed else None
    if stream:
        stream.close()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    for bar in (Progress("phase1", 2), ImageProgress(1, 2)):
        for done in (1, 2):
            bar.show(done)
