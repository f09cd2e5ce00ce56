"""What a training does when told to stop, and any command when nobody reads what it says."""

import errno
import fcntl
import io
import json
import os
import signal
import sys
import termios
import threading
from itertools import product

import pytest
import torch

import bas
from bas.cli.entry import main
from bas.runtime.signals import Interrupted, Interrupts
from bas.training import checkpoints
from bas.training.checkpoints import list_checkpoints
from tests.helpers.cases import some_fast
from tests.helpers.faults import before_step, heard, resume, training
from tests.helpers.kills import child
from tests.helpers.tiny import file_hashes

# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def signals():
    with heard():
        yield


@pytest.mark.parametrize(
    ("name", "step"),
    some_fast(product(("SIGINT", "SIGTERM", "SIGHUP"), (2, 3, 4, 6)), ("SIGINT", 2), ("SIGTERM", 3), ("SIGHUP", 6)),
)
def test_a_signal_finishes_the_step_saves_and_ends(bench, tmp_path, monkeypatch, whole, name, step):
    number, before = getattr(signal, name), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda *args: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 6, saved in .*/run$") as stop:
            bas.train(bench.config(tmp_path / "run"))
    assert stop.value.exit_code == 128 + number
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"step-{step:06d}"]
    assert signal.getsignal(signal.SIGINT) is before
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_command_ends_with_the_code_that_shells_expect(bench, tmp_path, monkeypatch, capsys, name, code):
    before_step(monkeypatch, 1, lambda *args: os.kill(os.getpid(), getattr(signal, name)))
    assert main(bench.command(tmp_path / "run")) == code
    line = f"bas: stopped after step 1 of 6, saved in {tmp_path / 'run'}; --resume_from_checkpoint latest continues"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_a_signal_at_a_checkpoint_saves_its_step_once(bench, tmp_path, monkeypatch, whole):
    """A second save of the same step would have to remove the first before it takes its place."""
    saved, original = [], training.save_checkpoint

    def counted(run, step, *args):
        saved.append(step)
        return original(run, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", counted)
        before_step(patch, 4, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
            bas.train(bench.config(tmp_path / "run", checkpointing_steps=2))
    assert saved == [2, 4]
    (session,) = json.loads((tmp_path / "run" / "times.json").read_text())["sessions"]
    assert [stage["stage"] for stage in session["stages"]] == ["preparation", "phase1", "phase2"]
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


def stubborn(bench, run):
    """Train, be asked to stop before step 3, and be asked again while that is under way."""
    saving = checkpoints.write_json

    def again(path, content):
        os.kill(os.getpid(), signal.SIGTERM)
        saving(path, content)

    before_step(pytest.MonkeyPatch(), 3, lambda *args: os.kill(os.getpid(), signal.SIGINT))
    checkpoints.write_json = again
    with heard():
        bas.train(bench.config(run, checkpointing_steps=0))


def test_a_second_signal_ends_the_process_at_once_and_harms_nothing(bench, tmp_path, whole):
    assert child(stubborn, bench, tmp_path / "run") == -signal.SIGTERM
    assert list_checkpoints(tmp_path / "run") == []
    assert file_hashes(resume(bench, tmp_path / "run")) == whole
    assert not list((tmp_path / "run").rglob("*.tmp"))


def lose_terminal(bench, run):
    """Train in a terminal of one's own that is closed before step 3: the kernel sends SIGHUP, and no line can be
    written any more."""
    os.setsid()
    terminal, line = os.openpty()
    fcntl.ioctl(line, termios.TIOCSCTTY, 0)
    os.dup2(line, sys.stderr.fileno())
    os.close(line)
    before_step(pytest.MonkeyPatch(), 3, lambda *args: os.close(terminal))
    with heard():
        os._exit(main(bench.command(run)))


def test_a_lost_terminal_saves_and_ends(bench, tmp_path, whole):
    assert child(lose_terminal, bench, tmp_path / "run") == 128 + signal.SIGHUP
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000003"]
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


@pytest.mark.parametrize("name", some_fast(("SIGINT", "SIGTERM", "SIGHUP"), "SIGHUP"))
def test_a_signal_that_is_ignored_from_the_start_stays_so(bench, tmp_path, monkeypatch, whole, name):
    """As nohup ignores SIGHUP, so that a training outlives its terminal; also when another one asks to stop."""
    number, other = getattr(signal, name), signal.SIGTERM if name != "SIGTERM" else signal.SIGINT
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            before_step(patch, 2, lambda *args: os.kill(os.getpid(), number))
            assert file_hashes(bas.train(bench.config(tmp_path / "run"))) == whole
        with Interrupts() as interrupts:
            for each in (number, other, number):
                os.kill(os.getpid(), each)
            assert interrupts.asked == other
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with Interrupts() as interrupts:
            seen.append((signal.getsignal(signal.SIGTERM), interrupts.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


def count_threads():
    os._exit(torch.get_num_threads())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_child_sums_in_the_order_of_its_parent(threads):
    """Else what it trains is compared with other bits on a machine of more cores than the tests take."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert child(count_threads) == threads
    finally:
        torch.set_num_threads(before)


# --- Nobody reads the output ------------------------------------------------------------------------------------------


def write_to_nobody(words, unbuffered, errors):
    """Run a command in this process, whose standard output is a pipe that nobody reads, and end with its code."""
    reader, writer = os.pipe()
    os.close(reader)
    file = io.FileIO(writer, "w")
    sys.stdout = io.TextIOWrapper(file if unbuffered else io.BufferedWriter(file), write_through=unbuffered)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(main(words))


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_closed_pipe_ends_a_command_quietly(bench, tmp_path, unbuffered):
    """Whether Python writes each line at once or all of them at its end."""
    assert child(write_to_nobody, ["info", str(bench.model)], unbuffered, tmp_path / "errors") == 141
    assert (tmp_path / "errors").read_text() == ""


def full_output(unbuffered):
    """A file on a disk that is full, to which Python writes at once, or in one piece at the end."""
    file = io.FileIO("/dev/full", "w")
    return io.TextIOWrapper(file if unbuffered else io.BufferedWriter(file), write_through=unbuffered)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("words", [["train", "--help"], ["download", "mini"], []])
def test_output_onto_a_full_disk_is_a_failure(monkeypatch, capsys, words, unbuffered):
    monkeypatch.setattr(sys, "stdout", full_output(unbuffered))
    assert main(words) == 1
    assert capsys.readouterr().err == "bas: standard output cannot be written: No space left on device\n"


def test_work_goes_on_when_its_output_cannot_be_written(bench, tmp_path, monkeypatch, capsys):
    """The first image is told in vain, and the second one is generated and saved all the same."""
    monkeypatch.setattr(sys, "stdout", full_output(unbuffered=True))
    line = ["sample", str(bench.model), "--num_inference_steps", "1", "--output_path", str(tmp_path / "out.png")]
    assert main([*line, "--prompt", "a bowl", "a stone"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.png", "out-1.png"]
    assert capsys.readouterr().err.endswith("bas: standard output cannot be written: No space left on device\n")


def train_unread(bench, run, kind):
    """Train while nobody can read standard error."""
    reader, writer = os.openpty() if kind == "a closed terminal" else os.pipe()
    os.close(reader)
    os.dup2(os.open("/dev/full", os.O_WRONLY) if kind == "a full disk" else writer, sys.stderr.fileno())
    bas.train(bench.config(run))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # Python's own last flush is not bas's


@pytest.mark.parametrize("kind", ["a closed pipe", "a closed terminal", "a full disk"])
def test_training_goes_on_when_nobody_reads_its_progress(bench, tmp_path, whole, kind):
    assert child(train_unread, bench, tmp_path / "run", kind) == 0
    assert file_hashes(tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.png"), "out.png: No space left on device: make room"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        (OSError("image file is truncated"), "image file is truncated"),
    ],
)
def test_what_the_system_refuses_cannot_be_written_or_read_in_one_line(
    bench, tmp_path, capsys, monkeypatch, error, told
):
    """With the file, if the error names it; nobody knows here what was done with it."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("bas.cli.commands.export.run", fail)
    assert main(["export", str(bench.model), str(tmp_path / "out.safetensors")]) == 1
    assert capsys.readouterr().err == f"bas: {told}\n"
