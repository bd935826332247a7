"""`llmnb train`: a run begun, stopped, gone on with."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import FILES, LIBRARY, TINY, interrupt

from llmnb.formats.published import write_folder
from llmnb.model.gpt2 import GPT2


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
@pytest.mark.parametrize("first", ["SIGHUP", "SIGINT"])
def test_a_closed_terminal_saves_though_a_signal_came_before(
    llmnb, tmp_path, monkeypatch, hangup, first
):
    first = getattr(signal, first)
    interrupt(monkeypatch, 3, first, SIGHUP)
    code, out, _ = llmnb("train", "--out", "cut", *TINY.split())
    assert code == 128 + first
    assert "stopped    at step 4, and saved" in out
    assert signal.getsignal(SIGHUP) == hangup
    found = {x.name for x in (tmp_path / "cut").iterdir()}
    assert {"model.bin", "state_00000004.safetensors"} < found


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
    interrupt(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    code, _, err = llmnb("train", "--out", "cut", *TINY.split())
    assert code == 130 and "Traceback" not in err
    assert not list((tmp_path / "cut").glob("state_*"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, out, _ = llmnb("train", "--resume", "cut")
    assert code == 0 and "resumes    at step 0 of 6" in out


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


def test_a_damaged_checkpoint_is_passed_over(llmnb, tmp_path):
    llmnb("train", "--out", "run", *TINY.split(), "--save-every", 4)
    newest = tmp_path / "run" / "state_00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    code, out, err = llmnb("train", "--resume", "run")
    assert code == 0 and "resumes    at step 4 of 6" in out
    warning = [x for x in err.splitlines() if x.startswith("llmnb: warning")]
    assert len(warning) == 1 and "state_00000006" in warning[0]


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
        code, out, _ = llmnb("train", "--out", name, *args)
        assert code == 0 and ("after 2 steps:" in out) == bool(extra)
    for name in ("model.bin", "loss.png"):
        pair = [(tmp_path / x / name).read_bytes() for x in "ab"]
        assert pair[0] == pair[1]


def test_events_for_tensorboard(llmnb, tmp_path):
    pytest.importorskip("tensorboard")
    code, _, _ = llmnb("train", "--out", "a", *TINY.split(), "--tensorboard")
    assert code == 0
    assert len(list((tmp_path / "a").glob("events*"))) == 1


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
