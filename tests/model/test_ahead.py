"""A helper compiles what a first step wants, and is only ever a help."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from processes import output

from llmnb.config import GPT2Config
from llmnb.cpu import compiled
from llmnb.model import ahead
from llmnb.model.architectures import ARCHITECTURES, architecture_record

WHOLE = """
import json
from llmnb.model import ahead
ahead.compile_step(*json.loads({what!r}))
"""
STEP = """
import json
import numpy as np
from llmnb.cpu import compiled
from llmnb.model.architectures import architecture_from
from llmnb.model.gpt2 import GPT2

read, cfg = [], architecture_from(json.loads({record!r}))
plain = compiled._read
compiled._read = lambda path: read.append(path.name) or plain(path)
model = GPT2(cfg, 3, 9, precision={precision!r})
text = np.random.RandomState(0).randint(0, 30, (2, 3, 9))
for step in (1, 2):
    model.forward(*text)
    model.backward()
    model.clip_gradients(1e9)
    model.update(step=step)
print(json.dumps(read))
"""
SIZES = 16, 30, 2, 2, 8


@pytest.mark.parametrize(
    "family, precision", [("gpt2", "fp32"), ("llama", "fp64")]
)
def test_a_helper_has_all_that_a_step_wants(family, precision, tmp_path):
    """But the one loop; and the step looks for each kernel only once."""
    record = architecture_record(ARCHITECTURES[family](*SIZES))
    what, how = json.dumps([record, precision]), {"precision": precision}
    step = STEP.format(record=json.dumps(record), **how)
    output(WHOLE.format(what=what), LLMNB_CACHE=str(tmp_path))
    there = {x.name for x in tmp_path.rglob("*.kernel")}
    assert len(there) > 20 and not [*tmp_path.rglob("*.busy")]
    read = json.loads(output(step, LLMNB_CACHE=str(tmp_path)))
    assert len(read) == len(set(read))
    (own,) = set(read) - there
    assert own.startswith("llmnb.cpu.jit._every_part-")


class Helper:
    """A process that ends when it has been asked so many times."""

    def __init__(self, asked):
        self.asked = asked

    def poll(self):
        self.asked -= 1
        return None if self.asked > 0 else 1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.kernel"


look = partial(ahead._await_and_read, compiled._read)


def test_nobody_waits_for_a_helper_that_has_ended(path):
    helper = Helper(3)
    assert look(helper, path) is None and helper.asked == 3
    ahead._mark(path).touch()
    assert look(helper, path) is None and helper.asked == 0


def test_nobody_waits_for_ever(path, monkeypatch):
    """For a helper that was stopped at its work, say."""
    helper = Helper(10**9)
    ahead._mark(path).touch()
    monkeypatch.setattr(ahead, "PATIENCE", 0.05)
    assert look(helper, path) is None and helper.asked < 10**9


def test_a_mark_that_was_left_keeps_nobody(path):
    """Of a helper that was killed at a kernel which then another made."""
    compiled._write(path, b"made")
    ahead._mark(path).touch()
    helper = Helper(10**9)
    assert look(helper, path) == b"made" and helper.asked == 10**9
    assert ahead._read_or_mark(compiled._read, path) == b"made"
    assert not ahead._mark(path).exists()


def start(what, **how):
    """A helper in a process of its own."""
    llmnb = str(Path(ahead.__file__).parents[2])
    command = [sys.executable, "-P", "-c", ahead.HELPER, llmnb, what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, **how)


def test_a_helper_reads_no_file_of_the_users(tmp_path):
    """Of a name that it imports, where the user stands."""
    (tmp_path / "numba.py").write_text("raise SystemExit('a stranger')")
    how = {"stderr": subprocess.PIPE, "text": True}
    helper = start("not JSON", cwd=tmp_path, **how)
    assert "JSONDecodeError" in helper.stderr.read()
    helper.communicate()


def test_a_helper_ends_with_the_process_that_started_it(tmp_path):
    what = json.dumps([architecture_record(GPT2Config(*SIZES)), "fp32"])
    env = {**os.environ, "LLMNB_CACHE": str(tmp_path)}
    helper = start(what, env=env)
    helper.stdin.close()
    assert helper.wait(30) == 0
    assert len([*tmp_path.rglob("*.kernel")]) < 20


def test_a_kernel_is_awaited(path):
    assert ahead._read_or_mark(compiled._read, path) is None

    class AtWork:
        def poll(self):
            ahead._write_and_unmark(compiled._write, path, b"made")

    assert ahead._mark(path).exists()
    assert look(AtWork(), path) == b"made"
    assert not ahead._mark(path).exists()


def test_a_helper_is_started_once(tmp_path, monkeypatch):
    started = []

    class Popen:
        def __init__(self, command, **pipes):
            started.append(command)

    cfg = GPT2Config(*SIZES)
    monkeypatch.setattr(compiled, "_read", compiled._read)  # and put back
    monkeypatch.setattr(ahead.gc, "freeze", lambda: None)
    monkeypatch.setattr(ahead.atexit, "register", lambda end, helper: None)
    monkeypatch.setattr(ahead.subprocess, "Popen", Popen)
    monkeypatch.setattr(ahead.numba, "get_num_threads", lambda: 1)
    monkeypatch.setattr(compiled, "cache_folder", lambda: tmp_path)
    ahead.compile_ahead(cfg)
    assert not started  # with one thread
    monkeypatch.setattr(ahead.numba, "get_num_threads", lambda: 2)
    for precision in ("fp32", "fp32", "fp64"):
        ahead.compile_ahead(cfg, precision)
    monkeypatch.setattr(compiled, "cache_folder", lambda: None)
    ahead.compile_ahead(cfg)
    assert [json.loads(x[-1])[1] for x in started] == ["fp32", "fp64"]
    assert started[0][0] == sys.executable
