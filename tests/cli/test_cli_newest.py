"""Which run a command takes when none is named."""

import argparse
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from commands import TINY, interrupt
from runs import PLAIN

from llmnb.cli import train as train_command
from llmnb.files import own_folder
from llmnb.train.newest import new_folder, newest_run, note_newest
from llmnb.train.options import TrainConfig
from llmnb.train.run import begin, follow


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
    Path("text.txt").write_text("spam and eggs, " * 30)
    found = []
    for command, names in (
        ("train --resume", "^folder +(.*)"),
        ("generate --tokens 3", "^model: (.*)"),
        ("eval --text text.txt", "^model +(.*)"),
    ):
        code, out, err = llmnb(*command.split())
        assert code == 0
        uncertain = warned and not found  # the first command notes it
        assert ("warning: which of the" in err) == uncertain
        (name,) = re.findall(names, out + err, re.M)
        found.append(Path(name).relative_to("runs").parts[0])
    assert len({*found}) == 1, found
    return found[0]


def test_the_newest_run_does_not_depend_on_the_clock(llmnb, two_runs):
    assert newest(llmnb) == "stdlib-2"
    llmnb("train", "--resume", "runs/stdlib", "--steps", 7)
    aged(two_runs / "stdlib", -5000)
    assert newest(llmnb) == "stdlib"
    shutil.rmtree(two_runs / "stdlib")
    assert newest(llmnb) == "stdlib-2"


def test_a_state_that_has_just_gone_is_no_newest(tmp_path, monkeypatch):
    """Its run has removed it since its name was read."""
    monkeypatch.chdir(tmp_path)
    for name, file in ("a", "model.bin"), ("b", "state_00000001.safetensors"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, file).symlink_to(tmp_path / name)
    (tmp_path / "a").touch()
    assert newest_run() == Path("runs", "a")


def test_the_newest_run_of_a_copy(llmnb, two_runs, tmp_path, monkeypatch):
    shutil.copytree(two_runs, tmp_path / "b" / "runs")
    aged(tmp_path / "b" / "runs" / "stdlib", 9000)
    monkeypatch.chdir(tmp_path / "b")
    assert newest(llmnb) == "stdlib-2"


def test_the_newest_run_is_the_one_that_saved_last(llmnb, tmp_path):
    """Whichever was begun or ended first."""

    def follow_to_the_end(run):
        args = argparse.Namespace(tensorboard=False)
        train_command._follow(run, args, train_command._Stop())

    config = replace(PLAIN, limit=30000, steps=6, save_every=3, eval_every=4)
    names = "first", "second"
    first, second = (begin(own_folder(f"runs/{x}"), config) for x in names)
    for run in (first, second):
        note_newest(run)
    follow_to_the_end(second)
    assert newest_run("config.json").name == "second"
    for _ in follow(first):
        pass
    assert newest_run("config.json").name == "second", "not noted"
    follow_to_the_end(first)
    assert newest_run("config.json").name == "first"


def test_a_run_that_was_stopped_before_it_saved_counts(llmnb, two_runs):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2, signal.SIGINT, signal.SIGINT)
        assert llmnb("train", *TINY.split())[0] == 130
    code, out, err = llmnb("train", "--resume")
    assert code == 0 and "stdlib-3" in out and "warning" not in err


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


def test_trains_that_start_together_take_two_folders(llmnb, tmp_path, calls):
    with ThreadPoolExecutor(4) as pool:
        names = [*pool.map(new_folder, [TrainConfig()] * 8)]
    assert len(set(names)) == 8 and all(x.is_dir() for x in names)
    assert calls.count(("sync", "folder")) >= 8 or os.name == "nt"
