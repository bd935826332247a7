"""The command line: what users type, see and get wrong."""

import argparse
import errno
import gzip
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from test_vocabulary import own_files

from llmnb.cli import bench as bench_command
from llmnb.cli import train as train_command
from llmnb.cli.__main__ import main
from llmnb.config import GPT2Config
from llmnb.formats.published import write_folder
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.formats.shard import read_shard, write_shard
from llmnb.model.gpt2 import GPT2
from llmnb.text import corpus, shards, tokenizer
from llmnb.train import evaluation
from llmnb.train.newest import new_folder, newest_run, note_newest
from llmnb.train.options import TrainConfig
from llmnb.train.terminal import progress

TINY = (
    "--tokenizer byte --limit 30000 --num-layers 1 --num-heads 2 "
    "--channels 16 --seq-len 16 --batch-size 2 --steps 6 --eval-every 4 "
    "--backend reference"
)
BYTES = "--tokenizer", "byte"
PARTS = "val", "train"
ROOT = Path(__file__).parents[2]
LIBRARY = Path(__file__).parents[1] / "data" / "library.jsonl.gz"
FILES = [
    "config.json",
    "log.csv",
    "loss.png",
    "model.bin",
    "sample.txt",
    "state_00000006.safetensors",
    "tokenizer.tiktoken",
]


@pytest.fixture
def llmnb(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; gives its code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMNB_TRACEBACK", raising=False)

    def run(*args):
        code = 0
        try:
            main([str(x) for x in args])
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a fixed text: what it writes depends on no other."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    text = ["--corpus", str(LIBRARY)]
    main(["train", "--out", str(folder), *TINY.split(), *text])
    return folder


# train


def test_train_twice_makes_two_folders(llmnb, tmp_path):
    code, out, err = llmnb("train", *TINY.split())
    assert code == 0
    assert "stdlib (Python " in out and "30,000 characters" in out
    assert "unigram" in out and "runs/stdlib" in out.replace("\\", "/")
    assert "6/6" in err and "loss=" in err and "tok/s=" in err
    run = tmp_path / "runs" / "stdlib"
    assert sorted(x.name for x in run.iterdir()) == FILES
    sample = (run / "sample.txt").read_bytes().decode("utf-8")
    assert sample in out
    code, out, _ = llmnb("train", *TINY.split())
    assert code == 0
    second = tmp_path / "runs" / "stdlib-2"
    assert sorted(x.name for x in second.iterdir()) == FILES
    first = (run / "model.bin").read_bytes()
    assert first == (second / "model.bin").read_bytes()


def test_train_records_what_was_asked(trained):
    found = json.loads((trained / "config.json").read_text("utf-8"))
    assert found["config"]["channels"] == 16
    assert found["config"]["corpus"] == [str(LIBRARY)]
    lines = (trained / "log.csv").read_text("utf-8").splitlines()
    assert len(lines) == 1 + 6 + 1


def test_train_refuses_a_folder_in_use(llmnb, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    code, out, err = llmnb("train", "--out", "mine", *TINY.split())
    assert (code, out) == (1, "")
    assert err == "llmnb: error: mine exists and is not empty\n"
    code, _, _ = llmnb("train", "--out", "mine", "--force", *TINY.split())
    assert code == 0
    assert sorted(x.name for x in (tmp_path / "mine").iterdir()) == sorted(
        [*FILES, "x"]
    )


def test_train_on_files(llmnb, tmp_path):
    (tmp_path / "tale.txt").write_text("once upon a time " * 99, "utf-8")
    code, out, _ = llmnb("train", "--corpus", "tale.txt", *TINY.split())
    assert code == 0
    assert "tale.txt: 1 documents, 1,683 characters" in out
    assert (tmp_path / "runs" / "tale" / "model.bin").exists()


def interrupt(monkeypatch, at, number=signal.SIGINT, times=1):
    """Have a signal come while step `at` is computed."""
    from llmnb.train import loop as module

    whole = module.train_step

    def interrupted(config, model, batches, progress):
        if progress.step == at:
            for _ in range(times):
                signal.raise_signal(number)
        return whole(config, model, batches, progress)

    monkeypatch.setattr(module, "train_step", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)


SIGHUP = getattr(signal, "SIGHUP", None)
hangs_up = pytest.mark.skipif(not SIGHUP, reason="Windows has no SIGHUP")


@pytest.fixture
def hangup():
    """What SIGHUP does unless it is handled: here it fails the test."""

    def die(*args):
        pytest.fail("killed by SIGHUP")

    old = signal.signal(SIGHUP, die)
    yield die
    signal.signal(SIGHUP, old)


@hangs_up
def test_a_closed_terminal_saves_though_the_signal_comes_twice(
    llmnb, tmp_path, monkeypatch, hangup
):
    interrupt(monkeypatch, 3, SIGHUP, times=2)
    code, out, _ = llmnb("train", "--out", "cut", *TINY.split())
    assert code == 129
    assert "stopped    at step 4, and saved" in out
    assert signal.getsignal(SIGHUP) == hangup
    found = {x.name for x in (tmp_path / "cut").iterdir()}
    assert {"model.bin", "state_00000004.safetensors"} < found


@hangs_up
def test_ctrl_c_and_then_a_closed_terminal_still_save(
    llmnb, tmp_path, monkeypatch, hangup
):
    from llmnb.train import loop as module

    whole = module.train_step

    def interrupted(config, model, batches, progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(SIGHUP)
        return whole(config, model, batches, progress)

    monkeypatch.setattr(module, "train_step", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert llmnb("train", "--out", "cut", *TINY.split())[0] == 130
    assert (tmp_path / "cut" / "model.bin").exists()


@hangs_up
def test_nohup_goes_on(llmnb, tmp_path, monkeypatch, hangup):
    signal.signal(SIGHUP, signal.SIG_IGN)
    interrupt(monkeypatch, 3, SIGHUP)
    code, _, err = llmnb("train", "--out", "run", *TINY.split())
    assert code == 0 and "finishing" not in err
    assert sorted(x.name for x in (tmp_path / "run").iterdir()) == FILES
    assert signal.getsignal(SIGHUP) == signal.SIG_IGN


def test_a_signal_while_the_model_is_saved_waits_for_it(
    llmnb, tmp_path, monkeypatch
):
    whole = GPT2.save_checkpoint

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return whole(*args)

    monkeypatch.setattr(GPT2, "save_checkpoint", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code, out, _ = llmnb("train", "--out", "run", *TINY.split())
    assert code == 130 and "at step 6, and saved" in out
    assert (tmp_path / "run" / "model.bin").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_goes_on(llmnb, tmp_path, monkeypatch, number):
    llmnb("train", "--out", "whole", *TINY.split())
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(number)
    interrupt(monkeypatch, 3, number)
    code, out, _ = llmnb("train", "--out", "cut", *TINY.split())
    assert code == 128 + number
    assert "stopped    at step 4, and saved" in out
    assert "llmnb train --resume cut" in out
    assert handlers == (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(number),
    )
    found = {x.name for x in (tmp_path / "cut").iterdir()}
    assert {"model.bin", "state_00000004.safetensors"} < found
    lines = (tmp_path / "cut" / "log.csv").read_text("utf-8").splitlines()
    assert len(lines) == 1 + 4
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, out, _ = llmnb("train", "--resume", "cut")
    assert code == 0 and "resumes    at step 4 of 6" in out
    pair = [
        (tmp_path / x / "model.bin").read_bytes() for x in ("whole", "cut")
    ]
    assert pair[0] == pair[1]


def test_a_second_interrupt_stops_at_once(llmnb, tmp_path, monkeypatch):
    interrupt(monkeypatch, 3, times=2)
    code, _, err = llmnb("train", "--out", "cut", *TINY.split())
    assert code == 130 and "Traceback" not in err
    assert not list((tmp_path / "cut").glob("state_*"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, out, _ = llmnb("train", "--resume", "cut")
    assert code == 0 and "resumes    at step 0 of 6" in out


def test_resume_takes_the_newest_run(llmnb, tmp_path):
    llmnb("train", *TINY.split())
    llmnb("train", *TINY.split())
    code, out, _ = llmnb("train", "--resume", "--steps", 8)
    assert code == 0 and "stdlib-2" in out and "at step 6 of 8" in out
    lines = (tmp_path / "runs/stdlib-2/log.csv").read_text("utf-8")
    assert [x.split(",")[0] for x in lines.splitlines()[1:]] == list(
        "012345678"
    )


def aged(folder, seconds):
    """As if a folder's files were written so long after 2001."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (1e9 + seconds, 1e9 + seconds))


@pytest.fixture
def two_runs(llmnb, tmp_path):
    """runs/stdlib and the newer runs/stdlib-2, which seems to be older."""
    for _ in range(2):
        llmnb("train", *TINY.split())
    aged(tmp_path / "runs" / "stdlib-2", 0)
    aged(tmp_path / "runs" / "stdlib", 5000)
    return tmp_path / "runs"


def newest(llmnb, warned=False):
    """The run that each command takes when none is named."""
    code, out, err = llmnb("train", "--resume")
    assert code == 0
    assert ("warning: which of the" in err) == warned
    found = [re.search("^folder +(.*)", out, re.M)[1]]
    code, _, err = llmnb("generate", "--tokens", 3)
    assert code == 0
    found.append(re.search("model: (.*)", err)[1])
    Path("text.txt").write_text("spam and eggs, " * 30)
    code, out, _ = llmnb("eval", "--text", "text.txt")
    assert code == 0
    found.append(re.search("^model +(.*)", out, re.M)[1])
    found = [Path(x).relative_to("runs").parts[0] for x in found]
    assert len({*found}) == 1, found
    return found[0]


def test_the_newest_run_does_not_depend_on_the_clock(llmnb, two_runs):
    assert newest(llmnb) == "stdlib-2"
    llmnb("train", "--resume", "runs/stdlib", "--steps", 7)
    aged(two_runs / "stdlib", -5000)
    assert newest(llmnb) == "stdlib"
    shutil.rmtree(two_runs / "stdlib")
    assert newest(llmnb) == "stdlib-2"


def test_the_newest_run_of_a_copy(llmnb, two_runs, tmp_path, monkeypatch):
    shutil.copytree(two_runs, tmp_path / "b" / "runs")
    aged(tmp_path / "b" / "runs" / "stdlib", 9000)
    monkeypatch.chdir(tmp_path / "b")
    assert newest(llmnb) == "stdlib-2"


def test_the_newest_run_is_the_one_that_saved_last(llmnb, tmp_path):
    """Whichever was begun or ended first."""
    from llmnb.train.folder import run_folder
    from llmnb.train.run import begin, follow

    def run(name):
        made = begin(run_folder(f"runs/{name}"), config)
        note_newest(made)
        return made

    def follow_to_the_end(run):
        args = argparse.Namespace(tensorboard=False)
        train_command._follow(run, args, train_command._Stop())

    options = {"num_layers": 1, "num_heads": 2, "channels": 16, "steps": 6}
    config = TrainConfig(
        tokenizer="byte", limit=30000, seq_len=16, batch_size=2,
        backend="reference", save_every=3, eval_every=4, **options,
    )  # fmt: skip
    first = run("first")
    second = run("second")
    follow_to_the_end(second)
    assert newest_run("config.json").name == "second"
    for _ in follow(first):
        pass
    assert newest_run("config.json").name == "second", "not noted"
    follow_to_the_end(first)
    assert newest_run("config.json").name == "first"


def test_a_run_that_was_renamed_makes_it_uncertain(llmnb, two_runs):
    (two_runs / "stdlib-2").rename(two_runs / "best")
    code, out, err = llmnb("generate", "--tokens", 3)
    assert code == 0 and "model: " + str(Path("runs/stdlib")) in err
    (line,) = [x for x in err.splitlines() if "warning" in x]
    assert "the 2 runs in runs/ is the newest is not certain" in line
    assert "taken is runs" in line and "name one" in line
    (two_runs / ".order").unlink()
    assert newest(llmnb, warned=True) == "stdlib"
    shutil.rmtree(two_runs / "best")
    (two_runs / ".order").unlink()
    assert newest(llmnb) == "stdlib", "the only one is certain"


def test_trains_that_start_together_take_two_folders(llmnb, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        names = [*pool.map(new_folder, [TrainConfig()] * 8)]
    assert len(set(names)) == 8 and all(x.is_dir() for x in names)


def test_resume_with_a_text_that_has_moved(llmnb, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs, " * 900)
    llmnb("train", "--out", "a", "--corpus", "a.txt", *TINY.split())
    llmnb("data", "here", "--corpus", "a.txt", "--tokenizer", "byte")
    llmnb("train", "--out", "b", "--shards", "here", *TINY.split())
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    (tmp_path / "here").rename(tmp_path / "there")
    for run, where in (
        ("a", ["--corpus", "b.txt"]),
        ("b", ["--shards", "there"]),
    ):
        again = "train", "--resume", run, "--steps", 8
        code, _, err = llmnb(*again)
        assert code == 1 and "name its new place with --corpus or" in err
        code, out, _ = llmnb(*again, *where)
        assert code == 0 and "at step 6 of 8" in out
    (tmp_path / "c.txt").write_text("spam and eggs. " * 900)
    code, _, err = llmnb("train", "--resume", "a", "--corpus", "c.txt")
    assert code == 1 and "a: the text is not the one it began with" in err


def test_warnings_take_one_line(llmnb, monkeypatch):
    def fail(place):
        raise OSError(errno.ENOLCK, "no locks\navailable")

    monkeypatch.setattr("llmnb.files._flock", fail)
    code, _, err = llmnb("train", "--out", "run", *TINY.split())
    assert code == 0
    (line,) = [x for x in err.splitlines() if "warning" in x]
    assert line.startswith("llmnb: warning: run: no locks on this file")


def test_a_damaged_checkpoint_is_passed_over(llmnb, tmp_path):
    llmnb("train", "--out", "run", *TINY.split(), "--save-every", 4)
    newest = tmp_path / "run" / "state_00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    code, out, err = llmnb("train", "--resume", "run")
    assert code == 0 and "resumes    at step 4 of 6" in out
    warning = [x for x in err.splitlines() if x.startswith("llmnb: warning")]
    assert len(warning) == 1 and "state_00000006" in warning[0]


def test_a_full_disk(llmnb, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").symlink_to("/dev/full")
    code, _, err = llmnb("train", "--out", "run", "--force", *TINY.split())
    assert code == 1
    (line,) = [x for x in err.splitlines() if "error" in x]
    assert "run: No space left on device; there is no checkpoint yet" in line


def test_fine_tuning(llmnb, tmp_path):
    """On a fixed text: the library of this Python would set the losses."""
    text = ["--corpus", LIBRARY]
    assert llmnb("train", "--out", "first", *TINY.split(), *text)[0] == 0
    args = "--limit 20000 --batch-size 2 --steps 3 --backend reference"
    code, out, _ = llmnb("train", "--init", "first", *args.split(), *text)
    assert code == 0
    assert "1 layers, 2 heads, 16 channels, 257 tokens" in out
    (run,) = (tmp_path / "runs").glob("library*")
    config = json.loads((run / "config.json").read_text("utf-8"))["config"]
    assert config["init"] == "first" and config["seq_len"] == 16
    assert config["learning_rate"] == 1e-4
    first = (run / "log.csv").read_text("utf-8").splitlines()[1]
    assert float(first.split(",")[1]) < 5.4, "it has learnt before"


def test_accumulation_and_depth(llmnb, tmp_path):
    args = TINY.replace("--num-heads 2", "").replace("--channels 16", "")
    args = args.replace("--num-layers 1", "--depth 1").split()
    code, out, _ = llmnb("train", *args, "--total-batch", 128, "--overfit")
    assert code == 0 and "1 layers, 1 heads, 64 channels" in out


def test_samples_leave_no_trace(llmnb, tmp_path):
    for name, extra in (("a", []), ("b", ["--sample-every", 2])):
        args = [*TINY.split(), "--backend", "cpu", *extra]
        code, _, err = llmnb("train", "--out", name, *args)
        assert code == 0
    for name in ("model.bin", "loss.png"):
        pair = [(tmp_path / x / name).read_bytes() for x in "ab"]
        assert pair[0] == pair[1]


def test_samples_are_shown(llmnb):
    code, out, _ = llmnb("train", *TINY.split(), "--sample-every", 3)
    assert code == 0
    assert "after 3 steps:" in out and "after 6 steps:" in out


def test_events_for_tensorboard(llmnb, tmp_path):
    pytest.importorskip("tensorboard")
    code, _, _ = llmnb("train", "--out", "a", *TINY.split(), "--tensorboard")
    assert code == 0
    assert len(list((tmp_path / "a").glob("events*"))) == 1


def test_diverging_training(llmnb, tmp_path):
    args = ["--learning-rate", "1e30", "--clip", "0", "--steps", "50"]
    with np.errstate(all="ignore"):
        code, _, err = llmnb("train", "--out", "bad", *TINY.split(), *args)
    assert code == 1
    assert re.search(r"llmnb: error: the .* at step \d+ .*", err)
    assert "Traceback" not in err
    assert (tmp_path / "bad" / "log.csv").exists()
    assert not (tmp_path / "bad" / "model.bin").exists()


# a run always gets out


def warnings_in(err):
    """The warnings among the lines, each without its beginning."""
    lines = [x.rpartition("llmnb: warning: ") for x in err.splitlines()]
    return [x for _, found, x in lines if found]


@pytest.mark.parametrize("broken", ["backend", "package", "missing"])
def test_without_matplotlib_a_run_is_kept(tmp_path, broken):
    """A backend as notebooks set it, or a package that does not work."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    if broken == "backend":
        env["MPLBACKEND"] = "no-such-backend"
    else:
        stub = tmp_path / "stub" / "matplotlib"
        stub.mkdir(parents=True)
        why = "a broken build" if broken == "package" else "No module"
        (stub / "__init__.py").write_text(f"raise ImportError('{why}')")
        env["PYTHONPATH"] += os.pathsep + str(stub.parent)
    done = subprocess.run(
        [sys.executable, "-m", "llmnb.cli", "train", "--out", "a"]
        + TINY.split(),
        cwd=tmp_path, env=env, capture_output=True, text=True,
        encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (warning,) = warnings_in(done.stderr)
    assert warning.startswith(f"goes on without {Path('a', 'loss.png')}: ")
    assert "Traceback" not in done.stderr
    names = sorted(x.name for x in (tmp_path / "a").iterdir())
    assert names == [x for x in FILES if x != "loss.png"]


def raising(kind=OSError, *args):
    def fail(*_, **how):
        raise kind(*args)

    return fail


@pytest.mark.parametrize(
    ("what", "kind", "without"),
    [
        ("llmnb.cli.train._sample", ValueError, "sample.txt"),
        ("llmnb.cli.train._keep_sample", MemoryError, "sample.txt"),
        ("llmnb.train.run.read_steps", PermissionError, "log.csv"),
        ("llmnb.train.run.save_figure", RuntimeError, "loss.png"),
        ("llmnb.train.run.landmarks", OSError, "loss.png"),
    ],
)
def test_what_fails_after_training_is_a_warning(
    llmnb, tmp_path, monkeypatch, what, kind, without
):
    monkeypatch.setattr(what, raising(kind, "no\nluck"))
    code, out, err = llmnb("train", "--out", "a", *TINY.split())
    assert code == 0 and "wrote " in out and "model.bin" in out
    (warning,) = warnings_in(err)
    assert warning.startswith("goes on without ")
    assert f"{without}: {kind.__name__}: no luck" in warning
    assert (tmp_path / "a" / "model.bin").exists()


def test_landmarks_that_fail_in_the_end_are_a_warning(llmnb, monkeypatch):
    """A shard has vanished since the run's record was written."""
    failing = raising(OSError, 2, "No such file", "val.bin")
    monkeypatch.setattr("llmnb.cli.train.landmarks", failing)
    code, out, err = llmnb("train", "--out", "a", *TINY.split())
    assert code == 0 and re.search(r"^loss +\d\.\d{3}$", out, re.M)
    assert len(warnings_in(err)) == 1 and "the landmarks" in err


@pytest.mark.parametrize("name", ["loss.png", "sample.txt"])
def test_a_place_that_is_taken_is_a_warning(llmnb, tmp_path, name):
    (tmp_path / "a" / name).mkdir(parents=True)
    code, _, err = llmnb("train", "--out", "a", "--force", *TINY.split())
    assert code == 0
    (warning,) = warnings_in(err)
    assert warning.startswith(f"goes on without {Path('a', name)}: ")


def test_samples_and_events_that_fail_stop_nothing(
    llmnb, tmp_path, monkeypatch
):
    written = []

    class Board:
        def __init__(self, folder):
            pass

        def write(self, step, numbers):
            written.append(step)
            if step == 2:
                raise OSError(28, "No space left on device", "events")

        def close(self):
            raise AssertionError("it is gone already")

    monkeypatch.setattr("llmnb.train.watch.Board", Board)
    failing = raising(ValueError, "no text")
    monkeypatch.setattr("llmnb.cli.train._sample", failing)
    args = [*TINY.split(), "--sample-every", 3, "--tensorboard"]
    code, _, err = llmnb("train", "--out", "a", *args)
    assert code == 0 and written == [0, 1, 2]
    said = warnings_in(err)
    assert [x.split(":")[0] for x in said] == [
        "goes on without TensorBoard's events",
        "goes on without a sample",  # said once
        f"goes on without {Path('a', 'sample.txt')}",
    ]


def test_a_picture_that_fails_costs_no_measurement(
    llmnb, tmp_path, monkeypatch
):
    savefig = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, raising(OSError, "no font"))
    files = ["--json", "a.json", "--plot", "a.png"]
    args = [*files, "--precision", "fp32", "--steps", 1, *SMALL.split()]
    code, out, err = llmnb("bench", *args)
    assert code == 1 and "error: no font" in err
    assert "tokens/s" in out and (tmp_path / "a.json").exists()


def test_the_way_out_of_a_run_that_diverges(llmnb, tmp_path, monkeypatch):
    """The error's own command trains, from the last good state."""
    from llmnb.train import loop as module

    whole = module.train_step

    def spoilt(config, model, batches, at):
        if at.step == 5:
            model.params["fcw"][:] = np.nan
        return whole(config, model, batches, at)

    (tmp_path / "my text.txt").write_text("once upon a time " * 99)
    args = ["--corpus", "my text.txt", *TINY.split(), "--save-every", 2]
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", spoilt)
        code, _, err = llmnb("train", *args, "--learning-rate", 0.01)
    assert code == 1
    _, _, command = err.splitlines()[-1].partition(": llmnb ")
    words = shlex.split(command)
    good = Path("runs", "my text", "state_00000004.safetensors")
    assert words[:3] == ["train", "--init", str(good)]
    assert "--learning-rate 0.005" in command
    code, _, _ = llmnb(*words)
    assert code == 0
    new = tmp_path / "runs" / "my text-2"
    assert (new / "model.bin").exists()
    found = json.loads((new / "config.json").read_text("utf-8"))["config"]
    assert found["init"] == str(good) and found["corpus"] == ["my text.txt"]


def test_a_run_that_is_not_over_can_be_used(llmnb, tmp_path, trained):
    """Its newest state is its model; so is a state that is named."""
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    for name in ("config.json", "tokenizer.tiktoken"):
        shutil.copy(trained / name, run)
    shutil.copy(trained / "state_00000006.safetensors", run)
    state = Path("runs", "a", "state_00000006.safetensors")
    (tmp_path / "a.txt").write_text("def f(x): pass")
    ask = ["--prompt", "def f", "--tokens", 9]
    want = llmnb("generate", trained, *ask)[1]
    for name in ([], ["runs/a"], [state]):
        code, out, err = llmnb("generate", *name, *ask)
        assert (code, out) == (0, want)
        assert err == ("" if name == [state] else f"model: {state}\n")
    scores = []
    for name in (trained, "runs/a", state):
        code, out, _ = llmnb("eval", name, "--text", "a.txt")
        assert code == 0
        scores.append(out.splitlines()[1:])
    assert scores[0] == scores[1] == scores[2]
    args = "--limit 20000 --batch-size 2 --steps 3 --backend reference"
    first = []
    for i, name in enumerate((trained, "runs/a", state)):
        folder = tmp_path / f"tuned-{i}"
        assert not llmnb(
            "train", "--init", name, "--out", folder, *args.split()
        )[0]
        first.append((folder / "model.bin").read_bytes())
    assert first[0] == first[1] == first[2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["m.bin", "m.safetensors", "hub", "run"])
def test_weights_that_are_no_numbers(llmnb, tmp_path, trained, kind, value):
    """One row of an embedding is enough; every command says so."""
    model = GPT2.from_checkpoint(trained / "model.bin", 1, 8, "reference")
    model.params["wte"][65] = value
    if kind == "hub":
        write_folder(tmp_path / "hub", model.cfg, model.params)
    elif kind == "run":
        shutil.copytree(trained, tmp_path / "run")
        model.save_checkpoint("run/model.bin")
    else:
        model.save_checkpoint(kind)
    (tmp_path / "a.txt").write_text("text")
    line = json.dumps({"ctx": "a", "endings": [*"abcd"], "label": 0})
    (tmp_path / "a.jsonl").write_text(line)
    tokenizer = ["--tokenizer", "byte"]
    for command in (
        ["generate", kind, "--temperature", 0, *tokenizer],
        ["generate", kind, "--backend", "reference", *tokenizer],
        ["eval", kind, "--text", "a.txt", *tokenizer],
        ["eval", kind, "--hellaswag", "a.jsonl", *tokenizer],
        ["train", "--init", kind, "--limit", 9000, *tokenizer],
    ):
        code, out, err = llmnb(*command)
        assert code == 1 and "acc" not in out and "nan" not in out
        last = err.splitlines()[-1]
        assert last.startswith(f"llmnb: error: {kind}")
        assert f"wte is {value} at (65, 0), where weights must" in last


# generate


def test_generate(llmnb, trained):
    ask = ["generate", trained, "--prompt", "def f", "--tokens", 30]
    code, out, err = llmnb(*ask)
    assert (code, err) == (0, "")
    assert out.startswith("def f") and len(out) > 10
    assert llmnb(*ask)[1] == out
    assert llmnb(*ask, "--seed", 7)[1] != out
    greedy = llmnb(*ask, "--temperature", 0)[1]
    assert greedy == llmnb(*ask, "--top-k", 1, "--seed", 9)[1]
    assert greedy == llmnb(*ask, "--top-p", 1e-9, "--seed", 9)[1]


def test_generate_takes_the_newest_run(llmnb, tmp_path):
    llmnb("train", *TINY.split())
    llmnb("train", *TINY.split())
    code, _, err = llmnb("generate", "--tokens", 3)
    assert code == 0
    assert "stdlib-2" in err


def test_generate_from_a_bin_file(llmnb, tmp_path):
    cfg = GPT2Config(32, 257, 1, 2, 16)
    GPT2(cfg, 1, 8, "reference").save_checkpoint(tmp_path / "m.bin")
    ask = ["generate", "m.bin", "--prompt", "ab", "--tokens", 50]
    code, out, _ = llmnb(*ask, "--tokenizer", "byte")
    assert code == 0 and out.startswith("ab")
    tokens = [b"x" * 3, *(bytes([i]) for i in range(256))]
    ranks = tokenizer._encoding("other", tokens)
    tokenizer.save(ranks, tmp_path / "other.tiktoken")
    code, _, err = llmnb(*ask, "--tokenizer", "other.tiktoken")
    assert code == 1
    assert "m.bin has 257 tokens, the tokenizer other.tiktoken has 258" in err


def test_generate_several(llmnb, trained):
    ask = ["generate", trained, "--prompt", "def f", "--tokens", 30]
    code, out, err = llmnb(*ask, "--samples", 3, "--seed", 7)
    assert (code, err) == (0, "")
    alone = [llmnb(*ask, "--seed", 7 + i)[1] for i in range(3)]
    heads = [f"--- {i + 1} of 3, seed {7 + i}\n" for i in range(3)]
    assert out == "".join(h + t for h, t in zip(heads, alone, strict=True))


def test_generate_reads_the_prompt(llmnb, trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def f"))
    ask = ["generate", trained, "--tokens", 9]
    piped = llmnb(*ask, "--prompt", "-")
    assert piped[0] == 0 and piped == llmnb(*ask, "--prompt", "def f")


def test_generate_counts(llmnb, trained):
    ask = ["generate", trained, "--prompt", "def f", "--stats", "--tokens"]
    code, _, err = llmnb(*ask, 9, "--samples", 2)
    assert code == 0
    assert re.search(r"prompt: 6 tokens, the first token after [\d.]+ s", err)
    assert re.search(r"then: 16 tokens in .* tokens/s, .* ms a step", err)
    assert llmnb(*ask, 0)[::2] == (0, "\n")


def test_generate_with_a_long_prompt(llmnb, trained):
    ask = ["generate", trained, "--tokens", 9]
    code, out, err = llmnb(*ask, "--prompt", "x" * 500 + "def f")
    assert code == 0 and out.startswith("x" * 500 + "def f")
    assert "the prompt has 506 tokens; the model sees the last 10" in err
    # the same 10 tokens of a shorter prompt, which is cut at the same place
    short = llmnb(*ask, "--prompt", "x" * 12 + "def f")
    assert "18 tokens; the model sees the last 10" in short[2]
    assert short[1][12:] == out[500:]


def test_generate_from_other_files(llmnb, tmp_path):
    cfg = GPT2Config(32, 257, 1, 2, 16)
    model = GPT2(cfg, 1, 8, "reference")
    model.save_checkpoint("m.bin")
    model.save_checkpoint("m.safetensors")
    write_folder(tmp_path / "hub", cfg, model.params)
    ask = ["--prompt", "ab", "--tokens", 50, "--tokenizer", "byte"]
    want = llmnb("generate", "m.bin", *ask)
    assert want[0] == 0
    for path in ("m.safetensors", "hub"):
        assert llmnb("generate", path, *ask) == want


def test_generate_from_a_damaged_file(llmnb, tmp_path):
    GPT2(GPT2Config(32, 257, 1, 2, 16), 1, 8).save_checkpoint("m.bin")
    whole = (tmp_path / "m.bin").read_bytes()
    for damaged in (b"", whole[:500], whole[:-4], whole + b"1234"):
        (tmp_path / "m.bin").write_bytes(damaged)
        code, out, err = llmnb("generate", "m.bin", "--tokenizer", "byte")
        assert (code, out) == (1, "") and "m.bin" in err
        assert err.count("\n") == 1


# tokens


@pytest.fixture
def hub(tmp_path):
    """A model folder whose 270 tokens are its own."""
    encoding = tokenizer.train("low lower lowest, newer newest " * 3, 270)
    cfg = GPT2Config(32, 270, 1, 2, 16)
    model = GPT2(cfg, 1, 8, "reference")
    write_folder(tmp_path / "hub", cfg, model.params)
    own_files(tmp_path / "hub", encoding)
    tokenizer.save(encoding, tmp_path / "own.tiktoken")
    (tmp_path / "a.txt").write_text("the newest of the low " * 20)
    return tmp_path / "hub"


TUNE = (
    "--corpus a.txt --batch-size 1 --seq-len 8 --steps 2 --eval-every 4 "
    "--backend reference"
)


def test_a_models_own_tokens_are_used(llmnb, tmp_path, hub):
    commands = [
        ["generate", hub, "--prompt", "low", "--tokens", 30],
        ["eval", hub, "--text", "a.txt"],
        ["generate", hub / "model.safetensors", "--prompt", "newest"],
    ]
    for command in commands:
        code, out, err = llmnb(*command)
        assert code == 0, err
        assert llmnb(*command, "--tokenizer", "own.tiktoken")[1] == out
    code, out, err = llmnb(
        "train", "--init", hub, "--out", "run", *TUNE.split()
    )
    assert code == 0, err
    assert "270 tokens" in out
    run, own = tmp_path / "run" / "tokenizer.tiktoken", Path("own.tiktoken")
    assert run.read_bytes() == own.read_bytes()
    assert llmnb("train", "--resume", "run", "--steps", 3)[0] == 0
    # and for another corpus, a run's tokenizer and a folder's
    for name in ("run/tokenizer.tiktoken", hub, hub / "vocab.json"):
        args = ["--corpus", "a.txt", "--tokenizer", name, "--val-tokens", 30]
        code, out, err = llmnb("data", "shards", "--force", *args)
        assert code == 0, err
        made = tmp_path / "shards" / "tokenizer.tiktoken"
        assert made.read_bytes() == own.read_bytes()


def test_a_text_may_end_in_token_0(llmnb, tmp_path, hub):
    own_files(hub, tokenizer.load("own.tiktoken"), ["<|endoftext|>"])
    code, _, err = llmnb("train", "--init", hub, "--out", "run", *TUNE.split())
    assert code == 0, err
    kept = tokenizer.load(tmp_path / "run" / "tokenizer.tiktoken")
    assert (kept.eot_token, kept.n_vocab) == (0, 270)
    prompt = ["--prompt", "lowest", "--tokens", 20]
    assert llmnb("generate", "run", *prompt)[0] == 0
    args = ["--corpus", "a.txt", "--tokenizer", hub, "--val-tokens", 30]
    assert llmnb("data", "shards", *args)[0] == 0
    tokens = read_shard(tmp_path / "shards" / "val.bin")
    text = (tmp_path / "a.txt").read_text("utf-8")
    assert text.startswith(kept.decode(list(tokens[1:]))) and tokens[0] == 0


def test_a_tokenizer_that_nobody_knows_is_asked_for(llmnb, tmp_path, hub):
    for path in (hub / "vocab.json", hub / "merges.txt"):
        path.unlink()
    for command in (
        ["generate", hub],
        ["eval", hub, "--text", "a.txt"],
        ["train", "--init", hub, *TUNE.split()],
    ):
        code, out, err = llmnb(*command)
        assert (code, out) == (1, "") and err.count("\n") == 1
        assert "which tokenizer? None of tokenizer.tiktoken, vocab" in err
        assert "name it, as in --tokenizer gpt2" in err
        assert llmnb(*command, "--tokenizer", "own.tiktoken")[0] == 0


@pytest.mark.parametrize("rows", [258, 300, 384])
@pytest.mark.parametrize("name", ["m.bin", "m.safetensors", "tied"])
def test_rows_without_a_token_are_never_drawn(llmnb, tmp_path, name, rows):
    """They are by far the likeliest, and all others equally likely."""
    cfg = GPT2Config(32, rows, 1, 2, 16)
    model = GPT2(cfg, 1, 8, "reference")
    model.params["wte"][...], model.params["wte"][:257] = 1, -1
    model.params["lnfw"][...], model.params["lnfb"][...] = 0, 1
    if name == "tied":  # the embedding by the name of the head alone
        write_folder(tmp_path / name, cfg, model.params)
        path = tmp_path / name / "model.safetensors"
        file = TensorFile(path)
        tensors = {x: file[x] for x in file.names}
        tensors["lm_head.weight"] = tensors.pop("wte.weight")
        write_tensors(path, tensors, {"wte.weight": "lm_head.weight"})
    else:
        model.save_checkpoint(name)
    (tmp_path / "a.txt").write_text("some text é\n" * 9, "utf-8")
    byte = "--tokenizer", "byte"
    for backend in ("cpu", "reference"):
        how = ["--tokens", 60, "--backend", backend, "--samples", 2]
        code, out, err = llmnb("generate", name, *byte, *how)
        assert code == 0, err
        assert len(out.encode("utf-8", "replace")) > 100
    code, out, err = llmnb("eval", name, *byte, "--text", "a.txt")
    assert code == 0, err
    assert f"{math.log(257):.4f} nats a token" in out
    code, out, err = llmnb("train", "--init", name, *byte, *TUNE.split())
    assert code == 0 and "16 channels, 257 tokens" in out, err
    (log,) = tmp_path.glob("runs/*/log.csv")
    first = log.read_text("utf-8").splitlines()[1].split(",")
    assert float(first[1]) == pytest.approx(math.log(257), 1e-5)
    (tuned,) = tmp_path.glob("runs/*/model.bin")
    assert not GPT2.from_checkpoint(tuned, 1, 8).params["wte"][257:].any()


@pytest.mark.parametrize("rows", [50257, 50258, 50304])
def test_a_model_of_llm_cs_is_gpt2s(llmnb, tmp_path, rows):
    try:
        tokenizer.gpt2()
    except ConnectionError as error:
        pytest.skip(str(error))
    cfg = GPT2Config(16, rows, 1, 1, 4)
    GPT2(cfg, 1, 1, "reference").save_checkpoint("m.bin")
    code, out, err = llmnb("generate", "m.bin", "--tokens", 5)
    assert code == 0 and out
    more = f"m.bin has {rows} tokens, the tokenizer gpt2 knows 50257: the "
    assert err == ("" if rows == 50257 else f"{more}others are left out\n")
    (tmp_path / "a.txt").write_text("It's naïve.", "utf-8")
    assert llmnb("eval", "m.bin", "--text", "a.txt")[0] == 0


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"


@pytest.mark.parametrize(
    "command",
    [
        "generate hub",
        "generate other/m.bin --tokenizer byte",
        "eval hub --text a.txt",
        "train --init other/m.bin --corpus a.txt",
        "train --shards other --tokenizer byte",
        "generate hub --tokenizer other/vocab.json",
        "eval other/m.bin --tokenizer byte --hellaswag other/m.bin",
        "verify other",
    ],
)
def test_a_git_lfs_pointer_is_called_one(llmnb, tmp_path, hub, command):
    other = tmp_path / "other"
    other.mkdir()
    names = "m.bin", "train.bin", "val.bin", "vocab.json", "m_debug_state.bin"
    for name in names:
        (other / name).write_bytes(POINTER)
    if "other/vocab.json" not in command:
        (hub / "model.safetensors").write_bytes(POINTER)
    code, out, err = llmnb(*command.split())
    assert code == 1 and err.count("\n") == 1
    assert "this is a Git LFS pointer" in err and "`git lfs pull`" in err


def test_a_flipped_bit_of_a_run_is_seen(llmnb, tmp_path):
    """And going on with the run writes the model anew."""
    assert llmnb("train", "--out", "run", *TINY.split())[0] == 0
    path = tmp_path / "run" / "model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    (tmp_path / "a.txt").write_text("some text " * 50)
    for command in (
        ["generate", "run"],
        ["eval", "run", "--text", "a.txt"],
        ["train", "--init", "run", *TUNE.split()],
    ):
        code, _, err = llmnb(*command)
        assert code == 1 and "model.bin is damaged, its checksum" in err
        assert "`llmnb train --resume`" in err.splitlines()[-1]
    assert llmnb("train", "--resume", "run")[0] == 0
    assert path.read_bytes() == whole


# data


def test_data_then_train(llmnb, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 200, "utf-8")
    code, out, _ = llmnb(
        "data", "shards", "--corpus", "a.txt", "--vocab-size", 260
    )
    assert code == 0 and "llmnb train --shards shards" in out
    names = sorted(x.name for x in (tmp_path / "shards").iterdir())
    assert names == ["tokenizer.tiktoken", "train.bin", "val.bin"]
    encoding = tokenizer.load(tmp_path / "shards" / "tokenizer.tiktoken")
    assert encoding.n_vocab == 260
    parts = [
        read_shard(tmp_path / "shards" / f"{x}.bin") for x in ("val", "train")
    ]
    text = encoding.decode(np.concatenate(parts).tolist())
    assert text == "<|endoftext|>" + "spam and eggs. " * 200
    code, out, _ = llmnb("train", "--shards", "shards", *TINY.split())
    assert code == 0 and "shards in shards" in out
    assert "260 tokens" in out


def test_a_shard_cut_short_while_training(llmnb, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 900, "utf-8")
    assert llmnb("data", "out", "--corpus", "a.txt", *BYTES)[0] == 0
    shown = train_command._show

    def cut(bar, run, *rest):
        if run.at.step == 4:
            with open(tmp_path / "out" / "train.bin", "r+b") as file:
                file.truncate(1024)
        shown(bar, run, *rest)

    monkeypatch.setattr(train_command, "_show", cut)
    ask = *TINY.split(), "--save-every", 2, "--out", "run"
    code, _, err = llmnb("train", "--shards", "out", *ask)
    assert code == 1 and re.search(
        r"error: out.train\.bin: has been cut short, token [\d,]+ is gone; "
        r"the last checkpoint is state_00000004\.safetensors\n$",
        err,
    )


def test_data_from_json_lines(llmnb, tmp_path, monkeypatch):
    lines = [json.dumps({"body": f"spam and {k} eggs"}) for k in range(300)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    ask = ["data", "out", "--corpus", "a.jsonl.gz", "--tokenizer", "byte"]
    code, _, err = llmnb(*ask)
    assert code == 1 and "a.jsonl.gz:1: must have a field 'text'" in err
    sizes = ["--shard-tokens", 1500, "--val-tokens", 2000]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = llmnb(*ask, "--field", "body", *sizes)
    assert code == 0 and "300 documents, " in out and "100%" in err
    names = sorted(x.name for x in (tmp_path / "out").iterdir())
    assert names[0] == "tokenizer.tiktoken" and names[-1] == "val_000001.bin"
    assert names[1:3] == ["train_000000.bin", "train_000001.bin"]
    code, out, _ = llmnb("train", "--shards", "out", *TINY.split())
    assert code == 0 and "2,000 to validate on" in out
    code, _, err = llmnb(*ask, "--field", "body", *sizes)
    assert code == 1 and "out exists and is not empty" in err
    ask += ["--field", "body", "--shard-tokens", 10**6, "--force"]
    assert llmnb(*ask)[0] == 0
    names = sorted(x.name for x in (tmp_path / "out").iterdir())
    assert names == ["tokenizer.tiktoken", "train.bin", "val.bin"]


def test_data_goes_on_and_refuses_other_options(llmnb, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 900, "utf-8")
    ask = ["data", "out", "--corpus", "a.txt", "--tokenizer", "byte"]
    ask += ["--shard-tokens", 5000]

    written = []

    def write_two(path, tokens):
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write_shard(path, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_shard", write_two)
        code, _, err = llmnb(*ask)
    assert code == 1 and "out/train_000001.bin: No space left" in err
    names = {x.name for x in (tmp_path / "out").iterdir()}
    assert {"unfinished.json", "val.bin", "train_000000.bin"} < names
    code, _, err = llmnb(*ask, "--limit", 99)
    assert code == 1 and "begun with limit 0, not 99" in err
    assert llmnb(*ask)[0] == 0
    ask[1] = "other"
    assert llmnb(*ask)[0] == 0
    for path in (tmp_path / "other").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


# any text


@pytest.mark.parametrize("blank", [" ", "\n", "\u00a0"])
def test_a_million_blanks_in_every_command(llmnb, tmp_path, blank):
    text = "spam and eggs. " * 99 + blank * 1_000_000 + "end"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    code, out, _ = llmnb("data", "out", "--corpus", "a.txt", *BYTES)
    assert code == 0 and "1 documents, 1,001,488 characters" in out
    tokens = [read_shard(tmp_path / "out" / f"{x}.bin") for x in PARTS]
    ids = corpus.encode_documents(tokenizer.byte(), [text])
    assert np.array_equal(np.concatenate(tokens), ids)
    ask = ["train", "--corpus", "a.txt", *TINY.split()[4:], "--out", "run"]
    assert llmnb(*ask, *BYTES)[0] == 0
    (tmp_path / "b.txt").write_text("a" + blank * 1_000_000, "utf-8")
    score = "eval", "run", "--text", "b.txt", "--limit", 1_000_001
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "text_losses", lambda m, x, *_: [x[1:] * 0])
        code, out, _ = llmnb(*score)
    assert code == 0 and f"{len((tmp_path / 'b.txt').read_bytes()):,} b" in out
    code, out, err = llmnb("generate", "run", "--prompt", blank * 1_000_000)
    assert code == 0 and "model sees the last" in err


def test_outputs_in_the_corpus_are_not_read(llmnb, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 900, "utf-8")
    ask = ["train", "--corpus", ".", "--out"]
    code, first, _ = llmnb(*ask, "one", *TINY.split())
    assert code == 0 and "1 documents, 13,500 characters\n" in first
    saved = (tmp_path / "one" / "model.bin").read_bytes()
    (tmp_path / "one" / "model.bin").unlink()
    (tmp_path / "one" / "state_00000006.safetensors").unlink()
    assert llmnb("train", "--resume", "one")[0] == 0
    assert (tmp_path / "one" / "model.bin").read_bytes() == saved
    code, out, _ = llmnb(*ask, "two", *TINY.split())
    assert (
        code == 0 and "13,500 characters; passed over: runs or shards 1" in out
    )
    assert (tmp_path / "two" / "model.bin").read_bytes() == saved
    data = ["data", "shards", "--corpus", ".", "--tokenizer", "byte"]
    code, out, _ = llmnb(*data)
    assert (
        code == 0
        and "1 documents, 13,500 characters; passed over: runs or shards 2"
        in out
    )
    shards = {x.name: x.read_bytes() for x in tmp_path.glob("shards/*")}
    code, out, _ = llmnb(*data, "--force")
    assert (
        code == 0
        and "1 documents, 13,500 characters; passed over: runs or shards 3"
        in out
    )
    assert shards == {
        x.name: x.read_bytes() for x in tmp_path.glob("shards/*")
    }


@pytest.mark.parametrize("corpus", [".", "../mine", "a.txt ../mine"])
def test_the_corpus_is_not_written_into(llmnb, tmp_path, monkeypatch, corpus):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    Path("a.txt").write_text("spam and eggs. " * 900, "utf-8")
    ask = "--corpus", *corpus.split(), "--force", *BYTES
    for command in ("data .", "train --out ../mine"):
        code, out, err = llmnb(*command.split(), *ask)
        assert (code, out) == (1, "") and "is the corpus: " in err
        assert err.count("\n") == 1
    assert [x.name for x in Path().iterdir()] == ["a.txt"]


def test_bad_records_and_the_special_token_in_every_command(llmnb, tmp_path):
    """And train, data and eval read the same documents."""
    text = "spam<|endoftext|>eggs. " * 300
    lines = [json.dumps({"body": text})] * 2 + ["[", '{"body": null}']
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join([*lines, '{"body": "\\ud800"}']))
    ask = ["--corpus", "a.jsonl.gz", "--field", "body"]
    code, _, err = llmnb("data", "no", *ask, *BYTES)
    assert code == 1 and "gz:3: must be JSON" in err and "--skip-bad p" in err
    said = "2 documents, 13,800 characters; passed over: bad records 3"
    more = "; <|endoftext|> as ordinary text: 600 (--endoftext"
    train = "train", *TINY.split()[4:], "--out"
    for out, flags in (
        ("x", ["--skip-bad"]),
        ("y", ["--skip-bad", "--endof"]),
    ):
        flags = [*flags, *BYTES]
        for command in (("data", out), (*train, f"run{out}")):
            code, said_now, err = llmnb(*command, *ask, *flags)
            assert code == 0 and said in said_now, err
            assert (more in said_now) == (out == "x")
        parts = [read_shard(tmp_path / out / f"{x}.bin") for x in PARTS]
        want = [text, text]
        ids = corpus.encode_documents(tokenizer.byte(), want, out == "y")
        assert np.array_equal(np.concatenate(parts), ids)
        code, out, _ = llmnb(
            "eval", "runx", "--text", "a.jsonl.gz", "--field", "body",
            "--limit", 100, *flags[:-2],
        )  # fmt: skip
        assert code == 0 and "passed over" not in out  # none so early
    prompt = "a<|endoftext|>b"
    code, out, err = llmnb("generate", "runx", "--prompt", prompt)
    assert code == 0 and err.startswith("<|endoftext|> in the prompt is ordin")
    code, _, err = llmnb("generate", "runx", "--prompt", prompt, "--endoftext")
    assert (code, err) == (0, "")


# bench and info


SMALL = (
    "--num-layers 1 --num-heads 2 --channels 16 --seq-len 16 "
    "--batch-size 2 --vocab-size 300 --backend reference"
)


def test_bench(llmnb, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    files = ["--json", "a.json", "--plot", "a.png"]
    code, out, err = llmnb("bench", "--steps", 2, *files, *SMALL.split())
    assert code == 0
    assert "tokens/s" in out and "matmul_backward" in out
    assert "llmnb bf16" in out and "not available" in out
    assert "2/4" in err  # a bar over two rounds and two to warm up
    found = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert found["configs"][0]["model"]["vocab_size"] == 300
    assert found["configs"][0]["batch_size"] == 2
    assert found["start"] == []
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_prints_json(llmnb):
    args = ["--steps", 1, "--precision", "fp32", "--json", "-"]
    code, out, _ = llmnb("bench", *args, *SMALL.split(), "--threads", 1)
    assert code == 0
    found = json.loads(out)
    assert found["threads"] == 1
    (row,) = found["configs"][0]["contestants"]
    assert row["name"] == "llmnb fp32" and row["threads"] == 1


def test_bench_writes_no_folders_of_this_machine():
    argv = ["bench", "--json", "/a/b.json", "--against", "llmc=../c/d"]
    found = bench_command._command(argv)
    assert found == "llmnb bench --json b.json --against llmc=d"


def test_bench_takes_named_configurations(llmnb, monkeypatch):
    asked = []

    def fake(configs, settings, start, bar):
        asked.append((configs, settings, start))
        facts = {"machine": "m", "threads": 1, "load": 0.0}
        return {**facts, "configs": [], "start": []}

    monkeypatch.setattr(bench_command, "bench", fake)
    llmnb("bench", "--config", "124m-64", "small", "--against", "torch")
    llmnb("bench", "--start", "--threads", 3, "--torch-python", "py")
    (first, racing, start), (second, starting, started) = asked
    assert [*first] == ["124m-64", "small"] and second == {}
    assert first["small"][1:] == (12, 64)
    assert racing.against == ("torch",) and starting.threads == 3
    assert racing.precisions == ("fp32", "bf16")
    assert starting.torch_python == "py"
    assert (start, started) == (False, True)


def test_info(llmnb):
    code, out, _ = llmnb("info")
    assert code == 0
    assert re.search(r"versions +llmnb \d", out)
    args = "--num-layers 12 --num-heads 12 --channels 768 --seq-len 1024"
    code, out, _ = llmnb("info", *args.split(), "--vocab-size", 50257)
    assert "124,475,904" in out
    model = GPT2(GPT2Config(16, 300, 1, 2, 16), 2, 16, "reference")
    megabytes = f"{model.memory.nbytes / 1e6:.1f} MB"
    assert megabytes in llmnb("info", *SMALL.split())[1]


# mistakes


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("", 2, "the following arguments are required: COMMAND"),
        ("trian", 2, "invalid choice: 'trian'"),
        ("train --stepz 3", 2, "unrecognized arguments: --stepz 3"),
        ("train --steps three", 2, "--steps: invalid int value: 'three'"),
        ("train --steps 0", 1, "steps must be at least 1, got 0"),
        ("train --depth 49", 1, "depth must be at least 1 and below 49"),
        ("train --depth 4 --num-layers 4", 1, "--depth sets num-layers"),
        ("train --total-batch 700", 1, "multiple of a batch's 512 tokens"),
        ("train --init none.bin", 1, "none.bin: No such file"),
        ("train --resume", 1, "there is no run in runs/ here"),
        ("train --resume nowhere", 1, "config.json: No such file"),
        ("train --resume x --out y", 1, "needs neither --out nor --force"),
        ("info --depth 12 --channels 64", 1, "depth 12 makes channels 768"),
        ("train --channels 130", 1, "channels must be a multiple"),
        ("train --schedule stairs", 1, "no kind 'stairs'"),
        ("train --corpus nowhere", 1, "nowhere"),
        ("train --tokenizer none --limit 99", 1, "none: No such file"),
        ("train --limit 200 --tokenizer byte", 1, "token"),
        ("train --threads 0", 1, "threads"),
        ("train --backend quantum --limit 300000", 1, "quantum"),
        ("generate", 1, "there is no run in runs/ here"),
        ("generate nowhere", 1, "there is no run nowhere"),
        ("generate . ", 1, ".: holds none of model.safetensors, "),
        ("generate x --temperature -1", 1, "temperature must be at least 0"),
        ("generate x --top-p 2", 1, "top_p must be above 0 and at most 1"),
        ("generate x --top-k 0", 1, "top_k must be a whole number"),
        ("generate x --samples 0", 1, "samples must be at least 1, got 0"),
        ("data", 2, "the following arguments are required: FOLDER"),
        ("data out --vocab-size 3", 1, "3"),
        ("data out --shard-tokens 0 --tokenizer byte --limit 9", 1, "1, 2147"),
        ("data out --corpus nothing", 1, "no file called nothing"),
        ("bench --steps 0 --backend reference", 1, "steps must be at least 1"),
        ("bench --threads 0", 1, "threads must be at least 1, got 0"),
        ("bench --config big", 1, "no config 'big': choose from small, 124m"),
        ("bench --against nobody", 1, "no contestant 'nobody': choose from"),
        ("bench --against llmc=no-file", 1, "no-file is not a program"),
        ("bench --json no/folder/a.json", 1, "there is no folder no/folder"),
        ("bench --write --config small", 1, "leave out --config, --against"),
        ("bench --precision fp99", 1, "precision must be one of"),
        ("info --num-heads 7", 1, "multiple of num_heads"),
    ],
)
def test_mistakes_get_one_line(llmnb, command, code, message):
    got, _, err = llmnb(*command.split())
    assert got == code
    assert message in err
    assert err.count("\n") == 1 and "rror: " in err


def test_tracebacks_on_request(llmnb, monkeypatch):
    monkeypatch.setenv("LLMNB_TRACEBACK", "1")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        llmnb("train", "--steps", 0)


# streams


class Terminal(io.StringIO):
    """What a terminal is sent."""

    def isatty(self):
        return True


def broken(kind):
    """A stream whose reader has gone away, or whose disk is full."""
    if kind == "full":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        return open("/dev/full", "w")
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        pty = pytest.importorskip("pty")
        reader, writer = pty.openpty()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.parametrize("kind", ["pipe", "terminal", "full"])
def test_training_goes_on_when_nobody_reads(
    llmnb, tmp_path, monkeypatch, kind
):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, broken(kind))
    ask = [*TINY.split(), "--sample-every", 2]
    assert llmnb("train", "--out", "run", *ask)[0] == 0
    assert sorted(x.name for x in (tmp_path / "run").iterdir()) == FILES


def test_a_signal_when_nobody_reads(llmnb, tmp_path, monkeypatch):
    """Standard error is the process's own here: os.write goes there."""
    old, lost = os.dup(2), broken("pipe")
    try:
        os.dup2(lost.fileno(), 2)
        interrupt(monkeypatch, 3)
        code = llmnb("train", "--out", "cut", *TINY.split())[0]
    finally:
        os.dup2(old, 2)
    assert code == 130 and (tmp_path / "cut" / "model.bin").exists()


def test_training_says_that_its_report_is_lost(llmnb, monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken("full"))
    code, _, err = llmnb("train", "--out", "run", *TINY.split())
    assert code == 0
    warning = "llmnb: warning: standard output: No space left on device\n"
    assert err.count("standard output") == 1 and warning in err


OTHERS = {
    "generate": "generate {run} --prompt spam --tokens 9 --samples 2",
    "eval": "eval {run} --text {run}/config.json --limit 300",
    "plot": "plot {run}",
    "data": "data out --corpus {run}/log.csv --tokenizer byte",
    "info": "info",
    "bench": "bench --steps 1 --precision fp32 --json - " + SMALL,
    "help": "train --help",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_reader_that_goes_away_ends_other_commands_quietly(
    llmnb, trained, monkeypatch, name
):
    monkeypatch.setattr(sys, "stdout", broken("pipe"))
    args = OTHERS[name].format(run=trained).split()
    assert llmnb(*args) == (141, "", "")


@pytest.mark.parametrize("name", OTHERS)
def test_a_result_that_cannot_be_written_is_one_error(
    llmnb, trained, monkeypatch, name
):
    monkeypatch.setattr(sys, "stdout", broken("full"))
    args = OTHERS[name].format(run=trained).split()
    error = "llmnb: error: standard output: No space left on device\n"
    assert llmnb(*args) == (1, "", error)


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [("pipe", 141, ""), ("full", 1, "No space left on device")],
)
def test_python_that_ends_has_nothing_to_add(kind, code, says):
    """Such as "Exception ignored", and a code of its own."""
    command = [sys.executable, "-m", "llmnb.cli", "info"]
    with broken(kind) as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == code
    assert says in done.stderr and done.stderr.count("\n") == bool(says)


@pytest.mark.skipif(os.name != "posix", reason="uses a shell")
def test_streams_that_are_closed_from_the_start():
    command = f"'{sys.executable}' -m llmnb.cli info"
    shell = f"{command} >&-; echo $?; {command} --num-heads 7 2>&-; echo $?"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n1\n", "")


@pytest.mark.skipif(os.name != "posix", reason="uses a shell")
def test_closed_streams_leave_no_place_for_files(trained, tmp_path):
    """No file of the run gets the number of a stream that was closed."""
    code = (
        "from llmnb.cli import __main__, train\n"
        "def opened(**how): raise ValueError(open('file', 'w').fileno())\n"
        "train.starting_from = opened\n"
        "__main__.main(['train', '--init', 'x'])"
    )
    shell = f"'{sys.executable}' -c \"{code}\" >&- <&- 2>err; cat err"
    done = subprocess.run(
        shell, shell=True, capture_output=True, text=True, cwd=tmp_path
    )
    number = re.fullmatch(r"llmnb: error: (\d+)\n", done.stdout)
    assert number and int(number[1]) > 2


def test_characters_that_a_stream_lacks_are_escaped(
    llmnb, trained, tmp_path, monkeypatch
):
    def bytes_of(*args):
        out = io.TextIOWrapper(io.BytesIO(), "cp1252", newline="\n")
        monkeypatch.setattr(sys, "stdout", out)
        return llmnb(*args)[0], out.buffer.getvalue()

    ask = "generate", trained, "--tokens", 0, "--prompt"
    assert bytes_of(*ask, "caf\xe9 \u4e2d") == (0, b"caf\xe9 \\u4e2d\n")
    assert bytes_of(*ask, "caf\udce9") == (0, b"caf\\ufffd\n")
    (tmp_path / "\u4e2d.txt").write_text(
        "spam \u4e2d\U0001f600 " * 2000, "utf-8"
    )
    ask = [*TINY.split(), "--sample-every", 2]
    code, raw = bytes_of("train", "--corpus", "\u4e2d.txt", *ask)
    assert code == 0
    assert b"corpus     \\u4e2d.txt: 1 documents" in raw
    assert b"after 2 steps:" in raw and b"wrote      runs" in raw


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_a_name_that_is_not_text_is_said(llmnb, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    code, _, err = llmnb("generate", name)
    assert code == 1 and "there is no run caf\\udce9\n" in err
    code, out, err = llmnb("train", "--out", name, *TINY.split())
    assert code == 0 and "folder     caf\\udce9\n" in out
    assert (tmp_path / name / "model.bin").exists()


def test_a_prompt_that_is_not_text(llmnb, trained, monkeypatch):
    ask = ["generate", trained, "--tokens", 0, "--prompt", "-"]
    prompt = io.TextIOWrapper(io.BytesIO(b"caf\xe9!"), "utf-8")
    monkeypatch.setattr(sys, "stdin", prompt)
    assert llmnb(*ask) == (0, "caf\ufffd!\n", "")
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = llmnb(*ask)
    assert code == 1 and "standard input, which is closed" in err


@pytest.fixture
def terminals(llmnb, monkeypatch):
    """Run a command on a terminal; gives its code and what it was sent."""

    def run(*args):
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return llmnb(*args)[0], out.getvalue(), err.getvalue()

    return run


NASTY = "a\tb\x1b[31m\x9b31m\r\x07"
TAME = "a\tb\\x1b[31m\\x9b31m\\x0d\\x07"


def test_a_terminal_gets_no_commands(llmnb, trained, terminals, tmp_path):
    ask = ["generate", trained, "--tokens", 0, "--prompt", NASTY]
    assert terminals(*ask) == (0, TAME + "\n", "")
    error = "llmnb: error: there is no run "
    code, _, err = terminals("generate", "x\x1b]0;title\x07")
    assert (code, err) == (1, error + "x\\x1b]0;title\\x07\n")
    header = {
        "\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    code, _, err = terminals("generate", path)
    assert code == 1 and "\x1b" not in err
    code, _, err = terminals("train", "--schedule", "\x1b[2J")
    assert code == 1 and "\x1b" not in err and "[2J" in err
    code, _, err = terminals("info", "\x1b[2J")
    assert code == 2 and "\\x1b[2J" in err


def test_files_and_pipes_get_the_text_as_it_is(llmnb, trained):
    ask = ["generate", trained, "--tokens", 0, "--prompt", NASTY]
    assert llmnb(*ask) == (0, NASTY + "\n", "")


def test_an_error_is_one_line_whatever_the_name(llmnb):
    code, _, err = llmnb("plot", "two\nlines")
    assert code == 1 and err.count("\n") == 1 and "two lines: No such" in err


def test_a_terminal_gets_a_bar(terminals):
    code, out, err = terminals("train", *TINY.split(), "--sample-every", 3)
    assert code == 0 and "after 3 steps:" in out
    last = err.rstrip().split("\r")[-1]
    assert "6/6" in last and "loss=" in last and "tok/s=" in last
    assert "\\x0d" not in err


def test_a_log_gets_no_bar(llmnb, trained):
    code, _, err = llmnb("train", *TINY.split())
    lines = err.splitlines()
    assert code == 0 and "\r" not in err
    assert [x.split()[:2] for x in lines] == [
        ["17%", "1/6"],
        ["83%", "5/6"],
        ["100%", "6/6"],
    ]
    assert "loss=" in lines[-1] and "val=" in lines[0]
    for name in ("eval", "data", "bench"):
        args = OTHERS[name].format(run=trained).split()
        assert llmnb(*args)[::2] == (0, ""), name


def test_a_log_gets_a_line_a_minute(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for _ in progress(range(10)):
        clock[0] += 25
    lines = [x.split()[:2] for x in capsys.readouterr()[1].splitlines()]
    assert lines == [["30%", "3/10"], ["60%", "6/10"], ["90%", "9/10"]]


# memory


@pytest.fixture
def free(monkeypatch):
    """Set how many bytes the machine has left."""

    def set_free(nbytes):
        monkeypatch.setattr("llmnb.checks.free_memory", lambda: nbytes)

    return set_free


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train --out new " + TINY, "a smaller batch_size, seq_len or model"),
        ("train --out new --init {run} --limit 9999", "a smaller batch_size"),
        ("train --resume {run} --steps 9", "a smaller batch_size"),
        ("train --out new --corpus big.txt", "made with `llmnb data`"),
        ("train --out new --corpus .", "made with `llmnb data`"),
        ("generate {run}", "fewer or shorter texts"),
        ("generate {run} --backend reference", "a smaller batch_size"),
        ("eval {run} --text big.txt", "a smaller batch_size"),
        ("bench --steps 1 " + SMALL, "fewer precisions"),
    ],
)
def test_too_little_memory_is_one_line(
    llmnb, trained, tmp_path, free, command, says
):
    (tmp_path / "big.txt").write_text("spam " * 5000)
    free(20_000)
    before = {x: x.stat().st_mtime for x in trained.iterdir()}
    code, _, err = llmnb(*command.format(run=trained).split())
    assert code == 1 and err.count("\n") == 1 and says in err
    pattern = r"llmnb: error: needs [\d.]+ GB, this machine has 0.0 GB free:"
    assert re.match(pattern, err)
    assert {x: x.stat().st_mtime for x in trained.iterdir()} == before


def test_memory_goes_by_what_is_asked(llmnb, trained, tmp_path, free):
    free(20_000_000)
    ask = ["generate", trained, "--tokens", 4, "--samples"]
    assert llmnb(*ask, 100_000)[0] == 1
    assert llmnb(*ask, 2)[0] == 0
    model = GPT2(GPT2Config(16, 300, 1, 2, 16), 2, 16, "reference")
    free(3 * model.memory.nbytes // 2)  # one of them fits, but not two
    ask = ["bench", "--steps", 1, *SMALL.split(), "--precision", "fp32"]
    code, _, err = llmnb(*ask, "fp64")
    assert code == 1 and "fewer precisions" in err
    assert llmnb(*ask)[0] == 0
    (tmp_path / "big.txt").write_text("spam " * 200_000)
    (tmp_path / "big.jsonl").write_text('{"text": "spam"}\n' * 50_000)
    free(600_000)
    ask = ["train", *TINY.split(), "--corpus"]
    assert llmnb(*ask, "big.txt")[0] == 0  # 30,000 characters of it
    assert llmnb(*ask, "big.jsonl")[0] == 0


def test_info_describes_a_model_that_is_too_large(llmnb, free):
    free(1)
    code, out, _ = llmnb("info", "--depth", 48, "--batch-size", 10**6)
    assert code == 0 and "MB (params" in out


# help


def test_help_explains_every_option(llmnb):
    code, out, _ = llmnb("train", "--help")
    assert code == 0
    text = " ".join(out.split())
    for field in fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"] in text
        if field.default not in ("", ("stdlib",)):
            shown = f"{field.metadata['help']} (default: {field.default})"
            assert shown in text
    assert "(default: stdlib)" in text


def test_every_command_has_help(llmnb):
    for command in ("train", "generate", "data", "eval", "bench", "info"):
        code, out, _ = llmnb(command, "--help")
        assert code == 0 and len(out) > 200
        assert f"  {command} " in llmnb("--help")[1]


def test_help_is_light():
    code = (
        "import sys\n"
        "from llmnb.cli.__main__ import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numba', 'matplotlib', 'tiktoken'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
    )


def test_as_a_module():
    command = [sys.executable, "-m", "llmnb.cli", "--version"]
    got = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert got.returncode == 0
    assert re.fullmatch(r"llmnb \d+\.\d+\S*\n", got.stdout)


# --- the wait before the first step


def test_a_cold_start_says_what_it_waits_for(llmnb, tmp_path, monkeypatch):
    """Train, write and measure: once where kernels are kept, else always."""
    from llmnb import cpu
    from llmnb.cpu import compiled

    assert cpu  # has its own folder from here on

    kernels = tmp_path / "kernels"
    kernels.mkdir()
    monkeypatch.setattr(compiled, "cache_folder", lambda: kernels)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 9)
    tiny = [*TINY.split()[:-1], "cpu"]
    commands = (
        ["train", "--out", "run", *tiny],
        ["train", "--resume", "run", "--steps", 7],
        ["generate", "run", "--tokens", 2],
        ["eval", "run", "--text", "text.txt"],
    )
    wait = "compiling kernels takes up to half a minute"
    for command in commands:
        code, _, err = llmnb(*command)
        assert (code, err.count(f"{wait}, once\n")) == (0, 1), err
    code, _, err = llmnb("generate", "run", "--backend", "reference")
    assert (code, wait in err) == (0, False)
    (kernels / "one.kernel").write_bytes(b"")
    for command in commands[1:]:
        code, _, err = llmnb(*command)
        assert (code, wait in err) == (0, False)
    monkeypatch.setattr(compiled, "cache_folder", lambda: None)
    _, _, err = llmnb(*commands[2])
    assert "each time, for want of a folder" in err
    assert "set LLMNB_CACHE" in err
