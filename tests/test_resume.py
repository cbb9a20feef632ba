"""Law 7: a training that is killed anywhere and resumed ends with the bits of one that never stopped.

Real processes (`python -m unrolled train`) are killed while they import, encode, train, write and delete; and a forked
one at every single change that a training makes to its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from unrolled.checkpoints import checkpoint_steps, load, read_checkpoint
from unrolled.errors import StorageError, TrainingError
from unrolled.storage import read_tensors
from unrolled.training import prepare_config, train

# Dropout (random state), an average, overlapping windows (carry from the middle), documents, several epochs, a learning
# rate that depends on the update, and figures in the log over more updates than lie between two checkpoints.
SETTINGS: dict[str, Any] = {
    "cell": "lstm", "hidden": 8, "layers": 2, "unit": "jamo", "dropout": 0.2, "recurrent_dropout": 0.1, "average": 0.9,
    "window": 5, "stride": 3, "batch_size": 4, "documents": "line", "epochs": 3, "warmup": 7, "lr": 0.01,
    "save_every": 2, "valid_every": 31, "log_every": 5, "keep_memory": False,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def korean(lines: int, seed: int = 1) -> str:
    """Lines that are documents, of syllables that have two letters or three, and some Latin ones."""
    dice = random.Random(seed)
    return "".join("".join(dice.choices("가난닭 뷁힣a b", k=dice.randint(2, 12))) + "\n" for _ in range(lines))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(korean(50))
    return path


# ---------------------------------------------------------------------------------------------- real processes


def command(text: Path, out: Path, *more: str) -> list[str]:
    given = [f"--set={name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    return [sys.executable, "-m", "unrolled", "train", str(text), "--out", str(out), *given, *more]


def start(*args: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(args, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, **more)


def finish(*args: str) -> str:
    process = start(*args)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return said


def go_on(text: Path, out: Path) -> list[str]:
    """The command that a person would give: --resume, once there is something to resume."""
    return command(text, out, *(["--resume"] if (out / "config.yaml").exists() else []))


class Final:
    """What must not depend on interruptions: the kept weights, the last checkpoint (weights, optimiser, average,
    carry, random state) and what is in the log but for times."""

    def __init__(self, out: Path) -> None:
        self.weights, self.about = read_tensors(out / "model.safetensors", "model")
        self.steps = checkpoint_steps(out)
        self.checkpoint = read_checkpoint(out, self.steps[-1])
        position = self.checkpoint.content["position"]
        self.position = {key: value for key, value in position.items() if key != "seconds"}
        timed = ("seconds", "chars_per_second")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        self.metrics = [{key: value for key, value in line.items() if key not in timed} for line in lines]
        self.files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))


def assert_same(out: Path, expected: Final) -> None:
    final = Final(out)
    assert final.steps == expected.steps
    assert final.checkpoint.tensors.keys() == expected.checkpoint.tensors.keys()
    parts = {name.split(".")[0] for name in expected.checkpoint.tensors}
    assert parts == {"weights", "average", "optimizer", "carry", "random"}
    for name, tensor in expected.checkpoint.tensors.items():
        assert torch.equal(final.checkpoint.tensors[name], tensor), name
    assert final.weights.keys() == expected.weights.keys()
    assert all(torch.equal(final.weights[name], tensor) for name, tensor in expected.weights.items())
    assert final.about == expected.about
    assert final.position == expected.position
    assert final.metrics == expected.metrics
    assert final.files == expected.files


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Final:
    out = tmp_path_factory.mktemp("whole") / "m"
    said = finish(*command(corpus, out))
    assert "error" not in said
    final = Final(out)
    updates = [line["step"] for line in final.metrics if line["kind"] == "train"]
    assert updates == sorted(set(updates))
    return final


def newest(out: Path) -> int:
    try:
        return max((int(name) for name in os.listdir(out / "checkpoints") if name.isdigit()), default=-1)
    except FileNotFoundError:
        return -1


def temporary_in(folder: Path) -> bool:
    try:
        return any(name.startswith(".tmp-unrolled") for name in os.listdir(folder))
    except FileNotFoundError:
        return False


MOMENTS = ("folder made", "checkpoint half written", "training", "weights half written", "checkpoint made", "any time")


def kill(process: subprocess.Popen[str], out: Path, kind: str, dice: random.Random, startup: float) -> bool:
    """SIGKILL at such a moment; whether the process was still alive then. startup: seconds that one takes."""
    before = newest(out)
    goal = before + dice.choice([2, 4, 8])
    limit = time.monotonic() + dice.uniform(0, 1.3 * startup)
    is_now, after = {
        "any time": (lambda: time.monotonic() > limit, 0.0),  # while it imports, encodes, restores, trains
        "folder made": ((out / "vocabulary.json").exists, dice.choice([0, 0.001, 0.01])),
        "weights half written": (lambda: newest(out) > before and temporary_in(out), 0.0),
        "checkpoint half written": (lambda: newest(out) >= goal and temporary_in(out / "checkpoints"), 0.0),
        "checkpoint made": (lambda: newest(out) >= goal, dice.choice([0, 0.0005])),  # the one before is being deleted
        "training": (lambda: newest(out) >= goal, dice.uniform(0, 0.1)),
    }[kind]
    while process.poll() is None:
        if is_now():
            time.sleep(after)
            break
        time.sleep(0.0002)  # a file is being written for longer; the process needs the processor too
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def killed_again_and_again(text: Path, out: Path, kills: int) -> int:
    """Train with that many kills, or with as many as it takes to be through; how many it were."""
    seed = time.time_ns()
    print(f"seed {seed}")  # the moments are the machine's all the same
    dice = random.Random(seed)
    startup = 0.0
    for count in range(kills):
        began = time.monotonic()
        if not kill(start(*go_on(text, out)), out, MOMENTS[count % len(MOMENTS)], dice, startup):
            return count
        startup = startup or time.monotonic() - began  # the first is killed as soon as there is a folder
    return kills


@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    corpus: Path, tmp_path: Path, uninterrupted: Final
) -> None:
    assert killed_again_and_again(corpus, tmp_path / "m", 7) == 7, "the training was over too soon"
    finish(*go_on(corpus, tmp_path / "m"))
    assert_same(tmp_path / "m", uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_a_hundred_times_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(korean(600))
    finish(*command(text, tmp_path / "whole"))
    assert killed_again_and_again(text, tmp_path / "m", 120) >= 100, "the training was over too soon"
    finish(*go_on(text, tmp_path / "m"))
    assert_same(tmp_path / "m", Final(tmp_path / "whole"))


@pytest.mark.timeout(900)
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(corpus: Path, tmp_path: Path, uninterrupted: Final) -> None:
    out = tmp_path / "m"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(*go_on(corpus, out))
        goal = newest(out) + 7
        while newest(out) < goal and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == 130, said
        (line,) = [line for line in said.splitlines() if line.startswith("stopped")]
        step = newest(out)
        assert line == f"stopped at update {step:,}, saved in {out}. Go on with the same command and --resume"
        assert "Traceback" not in said
        assert "now try" not in said
        load(out)  # there is a model to try, validated or not
    said = finish(*go_on(corpus, out))
    assert f"going on at update {step:,}" in said
    assert_same(out, uninterrupted)


# --------------------------------------------------------------------- killed at every change, in forked processes

SWEEP = """
    import hashlib, json, os, random, shutil, signal, sys
    from pathlib import Path
    from unrolled.training import train

    text, top, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    os.fsync = lambda descriptor: None      # a killed process loses nothing that it gave to the kernel
    CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "os.utime"}

    def forked(out, kill_at=None, **more):
        '''Train in a child; kill it before the n-th change that it makes in the folder. Whether it was killed.'''
        child = os.fork()
        if child == 0:
            if kill_at is not None:
                left = kill_at

                def watch(event, args):
                    nonlocal left
                    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
                    if (event in CHANGES or writes) and str(out) in str(args[0]):
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(watch)
            try:
                train(text, out, **more)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0, f"{out}, killed at change {kill_at}: see above"
        return False

    def final(out):
        step = max(path.name for path in (out / "checkpoints").iterdir())
        timed = ("seconds", "chars_per_second")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return {
            "weights": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
            "state": hashlib.sha256((out / "checkpoints" / step / "state.safetensors").read_bytes()).hexdigest(),
            "metrics": [{key: value for key, value in line.items() if key not in timed} for line in lines],
            "files": sorted(path.relative_to(out).as_posix() for path in out.rglob("*")),
        }

    def go_on(out):
        resume = (out / "config.yaml").exists()
        return {"resume": True} if resume else settings

    dice = random.Random(1)
    train(text, top / "warm", **settings)   # what is set up once is set up before the children are made
    forked(top / "whole", **settings)
    expected = final(top / "whole")
    changes = 0
    while True:                             # a fresh training; its continuation is killed too, somewhere
        out = top / f"killed{changes}"
        if not forked(out, changes + 1, **settings):
            break
        changes += 1
        if changes % 4 == 0:
            forked(out, dice.randint(1, 12), **go_on(out))
        forked(out, **go_on(out))
        assert final(out) == expected, f"killed at change {changes}: {final(out)}, expected {expected}"
        shutil.rmtree(out)

    forked(top / "earlier", **{**settings, "seed": 5, "hidden": 7, "steps": 4})
    replaced = 0
    while True:                             # one that replaces an earlier model, as far as the new one's first windows
        out = top / f"replaced{replaced}"
        shutil.copytree(top / "earlier", out)
        if not forked(out, replaced + 1, force=True, **{**settings, "steps": 1}):
            break
        replaced += 1
        config = out / "config.yaml"
        if not config.exists():             # a folder without a model: a new training needs no force
            left = [path.name for path in out.rglob("*") if path.is_file() and not path.name.startswith(".tmp")]
            assert set(left) <= {"vocabulary.json"}, f"killed at change {replaced}, left of the earlier model: {left}"
            forked(out, **settings)
        elif replaced % 2 and "seed: 5" not in config.read_text():
            forked(out, resume=True, steps=settings["steps"])
        else:
            forked(out, force=True, **settings)
        # The log is left out: a training of one update logs it, being its last, and the longer one does not.
        ends = [{key: value for key, value in end.items() if key != "metrics"} for end in (final(out), expected)]
        assert ends[0] == ends[1], f"replacing, killed at change {replaced}: {ends[0]}, expected {ends[1]}"
        shutil.rmtree(out)
    print(json.dumps([changes, replaced]))
"""


@pytest.mark.timeout(900)
def test_killed_at_every_change_to_its_folder_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """And so does a training that replaces an earlier model: nothing of that one is ever resumed."""
    (tmp_path / "text.txt").write_text(korean(12))
    settings = {**SETTINGS, "unit": "char", "layers": 1, "steps": 5, "valid_every": 3, "epochs": 9, "log_every": 2}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SWEEP), tmp_path / "text.txt", tmp_path, json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    changes, replaced = json.loads(result.stdout)
    assert changes > 40, f"only {changes} changes seen"
    assert replaced > 20, f"only {replaced} changes seen"
    print(f"{changes} and {replaced} changes")


# ------------------------------------------------------------------------------------------ what may change, and not


QUICK: dict[str, Any] = {**SETTINGS, "steps": 9, "schedule": "constant", "valid_every": 4, "log_every": 2}


def test_an_interruption_between_two_lines_of_the_log_leaves_no_trace(corpus: Path, tmp_path: Path) -> None:
    """A line is the mean over 5 updates; the checkpoint that is gone on from lies in their midst."""
    settings = {**QUICK, "steps": 17, "log_every": 5}
    train(corpus, tmp_path / "whole", **settings)
    train(corpus, tmp_path / "m", **{**settings, "steps": 12, "valid_every": 17})
    lines = [json.loads(line) for line in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12, 12]

    class Stop(Exception):
        pass

    class Stopper:
        def start(self, what: str, total: float, done: float = 0) -> None: ...

        def say(self, line: str) -> None: ...

        def stop(self) -> None: ...

        def update(self, done: float, note: str = "") -> None:
            if "loss" in note and done == 13:
                raise Stop

    shutil.rmtree(tmp_path / "m")
    with pytest.raises(Stop):
        train(corpus, tmp_path / "m", **settings, watcher=Stopper())
    assert checkpoint_steps(tmp_path / "m")[-1] == 12
    with (tmp_path / "m" / "metrics.jsonl").open("a") as file:  # what a killed process's buffer may have left
        file.write('{"kind": "train", "step": 13, "loss": 1.0}\n{"kind": "tra')
    train(corpus, tmp_path / "m", resume=True)
    assert_same(tmp_path / "m", Final(tmp_path / "whole"))


def test_more_epochs_go_on_as_if_they_had_been_asked_for_at_once(corpus: Path, tmp_path: Path) -> None:
    """With a constant rate. A cosine falls towards the last update, so with more epochs it is another curve: what is
    done keeps the old one, and from there on the new one is followed."""
    settings = {name: value for name, value in QUICK.items() if name != "steps"} | {"valid_every": None}
    settings |= {"batch_size": 16, "window": 9, "stride": 7, "log_every": 1}
    train(corpus, tmp_path / "whole", **{**settings, "epochs": 3})
    train(corpus, tmp_path / "m", **{**settings, "epochs": 1})
    train(corpus, tmp_path / "m", resume=True, epochs=3)
    assert_same(tmp_path / "m", Final(tmp_path / "whole"))
    assert prepare_config(tmp_path / "m", resume=True).training.epochs == 3

    cosine = {**settings, "schedule": "cosine"}
    train(corpus, tmp_path / "c", **{**cosine, "epochs": 1})
    train(corpus, tmp_path / "c", resume=True, epochs=3)
    train(corpus, tmp_path / "d", **{**cosine, "epochs": 3})
    rates = {
        name: {line["step"]: line["lr"] for line in Final(tmp_path / name).metrics if line["kind"] == "train"}
        for name in ("c", "d")
    }
    each = max(rates["d"]) // 3
    assert {step for step in rates["d"] if rates["c"].get(step) != rates["d"][step]} == {
        step
        for step in rates["d"]
        if 8 < step <= each  # after the warm-up and the top, up to where the first one ended
    }


def test_what_is_done_is_not_done_again(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "m", **QUICK)
    before = Final(tmp_path / "m")
    said: list[str] = []

    class Lines:
        def start(self, what: str, total: float, done: float = 0) -> None: ...

        def update(self, done: float, note: str = "") -> None: ...

        def stop(self) -> None: ...

        def say(self, line: str) -> None:
            said.append(line)

    train(corpus, tmp_path / "m", resume=True, watcher=Lines())
    assert said[-1] == "nothing left to do: 9 updates are done; give more --epochs to go on"
    assert_same(tmp_path / "m", before)
    train(corpus, tmp_path / "m", resume=True, steps=4)  # fewer than are done
    assert_same(tmp_path / "m", before)


def test_a_training_that_stopped_early_has_stopped(corpus: Path, tmp_path: Path) -> None:
    """Killed after its last checkpoint and resumed, it must not go on either; more patience makes it."""
    settings = {**QUICK, "lr": 1e-30, "valid_every": 1, "patience": 3}
    train(corpus, tmp_path / "m", **settings)
    stopped = Final(tmp_path / "m")
    assert stopped.steps == [1, 4]
    train(corpus, tmp_path / "m", resume=True)
    assert_same(tmp_path / "m", stopped)
    train(corpus, tmp_path / "m", resume=True, patience=5)
    train(corpus, tmp_path / "at once", **{**settings, "patience": 5})
    assert Final(tmp_path / "m").steps == [1, 6]
    assert_same(tmp_path / "m", Final(tmp_path / "at once"))


def test_another_text_is_refused(corpus: Path, tmp_path: Path) -> None:
    other, valid = tmp_path / "other.txt", tmp_path / "valid.txt"
    other.write_text(corpus.read_text().replace("a", "b", 1))
    valid.write_text(korean(9, seed=4))
    train(corpus, tmp_path / "m", **QUICK)
    for texts, held_out, what in ((other, None, "training"), (corpus, valid, "training")):
        with pytest.raises(TrainingError) as caught:
            train(texts, tmp_path / "m", valid=held_out, resume=True, steps=12)
        assert str(caught.value).startswith(f"the {what} text is not the one that {tmp_path}/m was trained with (its")
        assert str(caught.value).endswith("give the same files, or start anew in another folder")
    train(corpus, tmp_path / "n", valid=valid, **QUICK)
    with pytest.raises(TrainingError, match=r"^the validation text is not the one"):
        train(corpus, tmp_path / "n", valid=other, resume=True, steps=12)


def test_other_settings_are_refused_by_name(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "m", **QUICK)
    before = Final(tmp_path / "m")
    with pytest.raises(TrainingError) as caught:
        train(corpus, tmp_path / "m", resume=True, **{**QUICK, "hidden": 9, "lr": 0.5, "steps": 12})
    assert str(caught.value) == (
        f"the model in {tmp_path}/m was trained with other settings (core.hidden: 8 -> 9; training.lr: 0.01 -> 0.5): "
        "leave them out to go on with it, or start anew in another folder"
    )
    assert_same(tmp_path / "m", before)
    train(corpus, tmp_path / "m", resume=True, **{**QUICK, "steps": 11, "save_every": 3, "log_every": 1})
    assert checkpoint_steps(tmp_path / "m")[-1] == 11


def test_there_must_be_something_to_resume(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(StorageError) as caught:
            train(corpus, tmp_path / name, resume=True, **QUICK)
        assert str(caught.value) == f"{tmp_path}/{name} holds no model to resume: leave --resume out to start one"
    assert not (tmp_path / "nowhere").exists()


def test_a_training_killed_before_its_first_checkpoint_begins_anew(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "whole", **QUICK)
    train(corpus, tmp_path / "m", **{**QUICK, "steps": 2})
    shutil.rmtree(tmp_path / "m" / "checkpoints")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "checkpoints").mkdir()
    (tmp_path / "m" / "checkpoints" / ".tmp-unrolled-0123456789abcdef").mkdir()
    train(corpus, tmp_path / "m", resume=True, steps=9)
    assert_same(tmp_path / "m", Final(tmp_path / "whole"))


def test_what_a_kill_after_the_last_checkpoint_left_is_cleared(corpus: Path, tmp_path: Path) -> None:
    """While the report was written, say: nothing is left to be trained."""
    train(corpus, tmp_path / "m", **QUICK)
    done = Final(tmp_path / "m")
    (tmp_path / "m" / ".tmp-unrolled-0123456789abcdef").write_text("half a page")
    (tmp_path / "m" / "checkpoints" / ".tmp-unrolled-0123456789abcdef").mkdir()
    train(corpus, tmp_path / "m", resume=True)
    assert_same(tmp_path / "m", done)


def test_the_model_that_was_started_from_may_be_gone_at_resume(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "source", **QUICK)
    settings = {**QUICK, "init_from": str(tmp_path / "source")}
    train(corpus, tmp_path / "whole", **settings)
    train(corpus, tmp_path / "m", **{**settings, "steps": 4})
    shutil.rmtree(tmp_path / "source")
    train(corpus, tmp_path / "m", resume=True, steps=9)
    assert_same(tmp_path / "m", Final(tmp_path / "whole"))


def test_a_model_is_replaced_only_by_force_and_then_whole(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "m", **{**QUICK, "hidden": 9, "steps": 15, "seed": 3})
    before = Final(tmp_path / "m")
    with pytest.raises(StorageError) as caught:
        train(corpus, tmp_path / "m", **QUICK)
    assert str(caught.value) == (
        f"{tmp_path}/m already holds a model: go on with it (--resume), replace it (--force) or choose another --out"
    )
    assert_same(tmp_path / "m", before)
    train(corpus, tmp_path / "m", force=True, **QUICK)
    train(corpus, tmp_path / "fresh", **QUICK)
    assert_same(tmp_path / "m", Final(tmp_path / "fresh"))


def test_the_seed_decides_every_bit(corpus: Path, tmp_path: Path) -> None:
    def digest(name: str, **more: Any) -> str:
        torch.rand(len(name))  # what the caller drew before does not matter
        train(corpus, tmp_path / name, **{**QUICK, **more})
        step = checkpoint_steps(tmp_path / name)[-1]
        state = (tmp_path / name / "checkpoints" / f"{step:010}" / "state.safetensors").read_bytes()
        return hashlib.sha256(state + (tmp_path / name / "model.safetensors").read_bytes()).hexdigest()

    assert digest("a") == digest("again") != digest("other", seed=2)
    # Where checkpoints, lines of the log and validations fall does not.
    weights = read_checkpoint(tmp_path / "a", 9).tensors
    train(corpus, tmp_path / "b", **{**QUICK, "save_every": 5, "log_every": 7, "valid_every": 2})
    assert all(torch.equal(t, weights[name]) for name, t in read_checkpoint(tmp_path / "b", 9).tensors.items())
