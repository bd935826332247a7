"""A run always gets out: what fails beside it is a warning."""

import os
import shlex
from pathlib import Path

import numpy as np
import pytest
from commands import FILES, ROOT, TINY, raising, warnings_in
from processes import python

from llmnb.files import read_json
from llmnb.train import loop


@pytest.mark.parametrize("broken", ["backend", "package", "missing"])
def test_without_matplotlib_a_run_is_kept(tmp_path, broken):
    """A backend as notebooks set it, or a package that does not work."""
    env = {"MPLBACKEND": "no-such-backend"}
    if broken != "backend":
        stub = tmp_path / "stub" / "matplotlib"
        stub.mkdir(parents=True)
        why = "a broken build" if broken == "package" else "No module"
        (stub / "__init__.py").write_text(f"raise ImportError('{why}')")
        env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{stub.parent}"}
    program = "from llmnb.cli.__main__ import main; main()"
    ask = "train", "--out", "a", *TINY.split()
    done = python(program, *ask, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    (warning,) = warnings_in(done.stderr)
    assert warning.startswith(f"goes on without {Path('a', 'loss.png')}: ")
    assert "Traceback" not in done.stderr
    names = sorted(x.name for x in (tmp_path / "a").iterdir())
    assert names == [x for x in FILES if x != "loss.png"]


@pytest.mark.parametrize(("what", "kind", "without"), [
    ("llmnb.cli.train._sample", ValueError, "sample.txt"),
    ("llmnb.cli.train._keep_sample", MemoryError, "sample.txt"),
    ("llmnb.train.run.read_steps", PermissionError, "log.csv"),
    ("llmnb.train.run.save_figure", RuntimeError, "loss.png"),
    ("llmnb.train.run.landmarks", OSError, "loss.png"),
    ("llmnb.train.run.write_log", OSError, "log.csv"),
    ("llmnb.cli.train.landmarks", OSError, "the landmarks"),
])  # fmt: skip
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


def test_samples_and_events_may_fail(llmnb, tmp_path, monkeypatch):
    written = []

    class Board:
        def __init__(self, folder):
            assert folder == Path("a")

        def write(self, step, numbers):
            written.append(step)
            if step == 2:
                raise OSError(28, "No space left on device", "events")

        close = raising(AssertionError, "it is gone already")

    monkeypatch.setattr("llmnb.train.watch.Board", Board)
    failing = raising(ValueError, "no text")
    monkeypatch.setattr("llmnb.cli.train._sample", failing)
    args = [*TINY.split(), "--sample-every", 3, "--tensorboard"]
    code, _, err = llmnb("train", "--out", "a", *args)
    assert code == 0 and written == [0, 1, 2]
    said = warnings_in(err)
    kept = str(Path("a", "sample.txt"))
    without = "TensorBoard's events", "a sample", kept  # each said once
    assert [x.split(":")[0] for x in said] == [
        f"goes on without {x}" for x in without
    ]


def test_the_way_out_of_a_run_that_diverges(llmnb, tmp_path, monkeypatch):
    """The error's own command trains, from the last good state."""
    whole = loop.train_step

    def spoilt(config, model, batches, at):
        if at.step == 5:
            model.params["fcw"][:] = np.nan
        return whole(config, model, batches, at)

    (tmp_path / "my text.txt").write_text("once upon a time " * 99)
    args = ["--corpus", "my text.txt", *TINY.split(), "--save-every", 2]
    args += ["--overfit", "--clip", 2]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", spoilt)
        code, _, err = llmnb("train", *args, "--learning-rate", 0.01)
    assert code == 1 and "Traceback" not in err
    old = tmp_path / "runs" / "my text"
    assert (old / "log.csv").exists() and not (old / "model.bin").exists()
    _, _, command = err.splitlines()[-1].partition(": llmnb ")
    words = shlex.split(command)
    good = Path("runs", "my text", "state_00000004.safetensors")
    assert words[:3] == ["train", "--init", str(good)]
    assert "--learning-rate 0.005" in command
    assert llmnb(*words)[0] == 0
    new = tmp_path / "runs" / "my text-2"
    assert (new / "model.bin").exists()
    then, found = (read_json(x / "config.json")["config"] for x in (old, new))
    tokens = str(Path("runs", "my text", "tokenizer.tiktoken"))
    then |= {"init": str(good), "tokenizer": tokens, "learning_rate": 0.005}
    assert found == then and found["corpus"] == ["my text.txt"]
