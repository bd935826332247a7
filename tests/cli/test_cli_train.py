"""`llmnb train`: a run begun, stopped, gone on with."""

import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from commands import FILES, OF_SHARDS, TINY, interrupt, warnings_in

from llmnb.model.gpt2 import GPT2


def test_train_twice_makes_two_folders(llmnb, done, tmp_path):
    code, out, err = llmnb("train", *TINY.split())
    assert code == 0
    assert "stdlib (Python " in out and "30,000 characters" in out
    assert "unigram" in out and "runs/stdlib" in out.replace("\\", "/")
    assert "6/6" in err and "loss=" in err and "tok/s=" in err
    run = tmp_path / "runs" / "stdlib"
    assert sorted(x.name for x in run.iterdir()) == FILES
    sample = (run / "sample.txt").read_bytes().decode("utf-8")
    assert sample in out
    done("train", *TINY.split())
    second = tmp_path / "runs" / "stdlib-2"
    assert sorted(x.name for x in second.iterdir()) == FILES
    first = (run / "model.bin").read_bytes()
    assert first == (second / "model.bin").read_bytes()


def test_train_refuses_a_folder_in_use(llmnb, done, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    code, out, err = llmnb("train", "--out", "mine", *TINY.split())
    assert (code, out) == (1, "")
    assert err == (
        "llmnb: error: mine exists and is not empty: choose another folder, "
        "or force it (--force)\n"
    )
    done("train", "--out", "mine", "--force", *TINY.split())
    assert {x.name for x in (tmp_path / "mine").iterdir()} == {*FILES, "x"}


def test_commands_that_are_shown_run_as_they_stand(
    llmnb, done, tmp_path, monkeypatch
):
    """Whatever is in a folder's name."""
    (tmp_path / "my text.txt").write_text("once upon a time " * 99)

    def then(out):
        (line,) = re.findall("^go on +(.*)", out, re.M)
        command, *words = shlex.split(line)
        assert command == "llmnb" and any(" " in x for x in words)
        return words

    ask = ["train", *TINY.split(), "--corpus", "my text.txt"]
    words = then(done(*ask))
    assert "--prompt" not in words, "only Python begins with def"
    done(*words, "--tokens", 3)
    mixed = [*ask, "stdlib", "--out", "a run"]
    assert done(*then(done(*mixed)), "--tokens", 3).startswith("def ")
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        code, out, _ = llmnb(*ask)
    assert code == 130 and "at step 3 of 6" in done(*then(out))
    text = ["--corpus", "my text.txt", "--tokenizer", "byte"]
    done(*then(done("data", "my shards", *text)), *OF_SHARDS.split())


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
@pytest.mark.parametrize(
    "names", ["SIGINT", "SIGTERM", "SIGHUP SIGHUP", "SIGINT SIGHUP"]
)
def test_a_signal_saves(llmnb, done, tmp_path, monkeypatch, hangup, names):
    """A closed terminal saves, though it or another signal came before."""
    numbers = [getattr(signal, name) for name in names.split()]
    done("train", "--out", "whole", *TINY.split())
    with monkeypatch.context() as patch:
        interrupt(patch, 3, *numbers)
        before = [signal.getsignal(x) for x in numbers]
        code, out, _ = llmnb("train", "--out", "cut", *TINY.split())
    assert code == 128 + numbers[0]
    assert "stopped    at step 4, and saved" in out
    assert "llmnb train --resume cut" in out
    assert [signal.getsignal(x) for x in numbers] == before
    found = {x.name for x in (tmp_path / "cut").iterdir()}
    assert {"model.bin", "state_00000004.safetensors"} < found
    lines = (tmp_path / "cut" / "log.csv").read_text("utf-8").splitlines()
    assert len(lines) == 1 + 4
    assert "resumes    at step 4 of 6" in done("train", "--resume", "cut")
    a, b = (tmp_path / x / "model.bin" for x in ("whole", "cut"))
    assert a.read_bytes() == b.read_bytes()


@hangs_up
def test_nohup_goes_on(llmnb, tmp_path, monkeypatch, hangup):
    signal.signal(SIGHUP, signal.SIG_IGN)
    interrupt(monkeypatch, 3, SIGHUP)
    code, _, err = llmnb("train", "--out", "run", *TINY.split())
    assert code == 0 and "finishing" not in err
    assert sorted(x.name for x in (tmp_path / "run").iterdir()) == FILES
    assert signal.getsignal(SIGHUP) == signal.SIG_IGN


def test_a_signal_waits_while_it_saves(llmnb, tmp_path, monkeypatch):
    whole = GPT2.save_checkpoint

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return whole(*args)

    monkeypatch.setattr(GPT2, "save_checkpoint", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code, out, _ = llmnb("train", "--out", "run", *TINY.split())
    assert code == 130 and "at step 6, and saved" in out
    assert (tmp_path / "run" / "model.bin").exists()


def test_resume_with_a_text_that_has_moved(done, failed, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs, " * 900)
    out = done("train", "--corpus", "a.txt", *TINY.split())
    assert "a.txt: 1 document, 13,500 characters" in out
    shutil.move("runs/a", "a")
    done("data", "here", "--corpus", "a.txt", "--tokenizer", "byte")
    done("train", "--out", "b", "--shards", "here", *OF_SHARDS.split())
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    (tmp_path / "here").rename(tmp_path / "there")
    places = ("a", ["--corpus", "b.txt"]), ("b", ["--shards", "there"])
    for run, where in places:
        again = "train", "--resume", run, "--steps", 8
        assert "name its new place with --corpus or" in failed(*again)
        assert "at step 6 of 8" in done(*again, *where)
        done(*again)  # it knows by now
    (tmp_path / "c.txt").write_text("spam and eggs. " * 900)
    err = failed("train", "--resume", "a", "--corpus", "c.txt")
    assert "a: the text is not the one it began with" in err


def test_samples_leave_no_trace(done, tmp_path):
    """Nor do they of a run that accumulates, of a depth, on one batch."""
    for name, extra in (("a", []), ("b", ["--sample-every", 2])):
        args = re.sub("--num-heads 2 --channels 16", "", TINY)
        args = args.replace("--num-layers 1", "--depth 1").split()
        args += ["--total-batch", 128, "--overfit", "--backend", "cpu", *extra]
        out = done("train", "--out", name, *args)
        assert "1 layers, 1 heads, 64 channels" in out
        assert ("after 2 steps:" in out) == bool(extra)
    for name in ("model.bin", "loss.png"):
        pair = [(tmp_path / x / name).read_bytes() for x in "ab"]
        assert pair[0] == pair[1]


def test_a_damaged_checkpoint_is_passed_over(llmnb, tmp_path):
    llmnb("train", "--out", "run", *TINY.split(), "--save-every", 4)
    newest = tmp_path / "run" / "state_00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    code, out, err = llmnb("train", "--resume", "run")
    assert code == 0 and "resumes    at step 4 of 6" in out
    (warning,) = warnings_in(err)
    assert "state_00000006" in warning


def test_a_run_that_is_not_over_can_be_used(llmnb, tmp_path, trained):
    """By its newest state, which is named."""
    shutil.copytree(trained, tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / "model.bin").unlink()
    ask = "--prompt", "def f", "--tokens", 9
    want = llmnb("generate", trained, *ask)[1]
    state = Path("runs", "a", "state_00000006.safetensors")
    for name in ([], ["runs/a"]):
        said = f"model: {state}\n"
        assert llmnb("generate", *name, *ask) == (0, want, said)
