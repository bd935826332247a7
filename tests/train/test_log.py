"""A log: rows that count, rows that wait, rows that others have damaged."""

import errno
import os
import re
import warnings
from itertools import islice

import numpy as np
import pytest
from commands import raising
from fuzz import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import TINY, cut, log_of, straight, weights

from llmnb.files import own_folder
from llmnb.model.gpt2 import GPT2
from llmnb.train import run as the_run
from llmnb.train.log import read_rows, read_steps, start_log
from llmnb.train.run import begin, finish, follow, resume
from llmnb.train.state import newest_state
from llmnb.train.watch import read_log

FIRST = "step,loss,val_loss,"


@pytest.mark.parametrize(("text", "kept"), [
    (b"", 0), (b"step,loss\n", 0), (b"step,loss\n0,1\n1,2\n2,3\n", 2),
    (b"step,loss\n0,1\n1,2\n2,", 2), (b"step,loss\n\n0,1\nx\n\xff\n", 1),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_rows_of_a_log_that_stay(tmp_path, text, kept):
    path = tmp_path / "log.csv"
    path.write_bytes(text)
    start_log(path, 2)
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith(FIRST)
    assert len(lines) == 1 + kept


@pytest.mark.parametrize(("row", "why"), [
    ("x", "must have 3 values, has 1"),
    ("1,y,", "must hold numbers, not '1,y,'"),
    ("1,2,3,4,5,6,7,8", "must have 3 values, has 8"),
    ("1.5,2,", "must begin with a whole number, not 1.5"),
    ("1,nan,", "must hold numbers, not '1,nan,'"),
    ("1,-1e999,", "must hold numbers"),
    (",2,", "has no step"),
    ("1," + "2" * 140_000 + ",", "must have at most 1,000 characters"),
    ('1,"' + "2," * 70_000 + '"', "must have at most 1,000 characters"),
    ("9" * 140_000 + ",2,", "must have at most 1,000 characters"),
])  # fmt: skip
def test_a_damaged_row_is_left_out_or_refused(tmp_path, row, why):
    """A run goes on without it, and says so; a picture is not drawn."""
    path = tmp_path / "log.csv"
    path.write_text(f"step,loss,val_loss\n0,1,\n{row}\n2,3,\n", "utf-8")
    with pytest.raises(ValueError) as error:
        read_log(path)
    assert str(error.value).startswith(f"{path}, line 3: {why}")
    with pytest.warns(UserWarning) as seen:
        steps = read_steps(path)
    (said,) = {str(x.message) for x in seen}
    assert said.startswith(f"{path}: left out line 3 ({why}")
    assert max(map(len, (said, str(error.value)))) < 200 + len(str(path))
    assert [(x.step, x.loss) for x in steps] == [(0, 1.0), (2, 3.0)]
    with pytest.warns(UserWarning, match="left out line 3"):
        start_log(path, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_steps(path) == steps


LONG = "step" + ",loss" * 28_000


@pytest.mark.parametrize("head", ["", "loss,step", "step,loss,loss", LONG])
def test_a_log_without_names_is_refused(tmp_path, head):
    path = tmp_path / "log.csv"
    path.write_text(f"{head}\n" * bool(head))
    refused("the first line must name the col", read_log, path)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.binary() | st.text("0123456789,.-en\n").map(str.encode))
def test_any_log(tmp_path_factory, text):
    """Every line is a row or is said to be none; or there is one error."""
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_bytes(b"step,loss\n" + text)
    _, rows, wrong = read_rows(path)
    assert len(rows) + len(wrong) == text.count(b"\n")
    steps = [(int(x["step"]), x["loss"]) for x in rows]
    assert [(x.step, x.loss) for x in read_steps(path)] == steps
    start_log(path, 3)
    assert path.read_bytes().startswith(FIRST.encode())
    path.write_bytes(text)
    try:
        assert all(len(points) == 2 for points in read_log(path).values())
    except ValueError as error:
        assert str(path) in str(error)


# a log or a picture that fails costs no model


def test_a_missing_log_is_begun_anew(tmp_path):
    cut(tmp_path / "a", 7)
    log = tmp_path / "a" / "log.csv"
    log.unlink()
    run = resume(tmp_path / "a")[0]
    list(islice(follow(run), 8))
    assert [s.step for s in log_of(tmp_path / "a")] == list(range(5, 13))
    steps = follow(run)
    next(steps)
    log.unlink()  # while it goes on
    list(steps)
    assert [x.step for x in finish(run)] == list(range(14, 21))
    assert log.read_text("utf-8").startswith(FIRST)


# as people, editors and other programs edit a log, by its lines
EDITED = [
    (lambda x: [*x[:3], x[3][:9], *x[4:]], 20, r"line 4 \(must have 7"),
    (lambda x: [*x[:5], b"a, b", *x[6:]], 20, r"line 6 \(must .*, has 2\)"),
    (lambda x: x[1:], 21, None),  # the names of the columns are known
    (lambda x: [x[0], *[b"1;2;3"] * 8, *x[9:]], 13, "line 4 .*, and 5 more$"),
    (lambda x: [b"\xef\xbb\xbf" + b"\r\n".join(x)], 21, None),  # a spreadsheet
    (None, 0, "goes on without .*log.csv: FileNotFoundError"),
    ("a folder", 0, "goes on without .*log.csv: (IsADir|Perm).*Error"),
]


@pytest.mark.parametrize(("edit", "count", "warning"), EDITED)
def test_an_edited_log_costs_no_model(tmp_path, edit, count, warning):
    run, _ = straight(tmp_path / "a")
    log = run.folder / "log.csv"
    lines = log.read_bytes().split(b"\n")
    log.unlink()
    if callable(edit):
        log.write_bytes(b"\n".join(edit(lines)))
    elif edit:
        log.mkdir()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        steps = finish(run)
    assert len(steps) == count
    assert len(seen) == (warning is not None)
    assert all(re.search(warning, str(x.message)) for x in seen)
    model = GPT2.from_checkpoint(run.folder / "model.bin", 1, 8, "reference")
    assert np.array_equal(model.memory.flat("params"), weights(run))
    assert (run.folder / "loss.png").exists()
    if count:
        assert read_steps(log) == steps


def test_rows_are_safe_before_the_next_state(tmp_path, monkeypatch):
    run, made = begin(own_folder(tmp_path / "a"), TINY), []
    log, state = run.folder / "log.csv", the_run.save_state

    def sync(place):
        if log.exists() and os.path.samestat(os.fstat(place), log.stat()):
            made.append(log.read_bytes().count(b"\n") - 1)

    def noted(run):
        made.append("a state")
        state(run)

    monkeypatch.setattr("llmnb.train.log.os.fsync", sync)
    monkeypatch.setattr(the_run, "save_state", noted)
    list(follow(run))
    assert made == [5, "a state", 10, "a state", 15, "a state", 20, "a state"]


@pytest.mark.parametrize("kind", ["a folder", "kept by another program"])
def test_rows_wait_for_a_log(tmp_path, monkeypatch, kind):
    """Nothing is lost, and the run goes on."""
    want, _ = straight(tmp_path / "a")
    run = begin(own_folder(tmp_path / "b"), TINY)
    log, steps = run.folder / "log.csv", follow(run)
    list(islice(steps, 6))
    kept = log.read_bytes()
    log.unlink()
    log.mkdir()
    if kind != "a folder":
        why = errno.EACCES, os.strerror(errno.EACCES), str(log)
        refuse = raising(OSError, *why)
        monkeypatch.setattr("llmnb.train.log.open", refuse, raising=False)
    with pytest.warns(UserWarning, match=r"log.csv: .*; rows wait") as seen:
        list(islice(steps, 7))
    assert len(seen) == 1, "said once"
    assert newest_state(run.folder)[0].at.step == 10
    monkeypatch.undo()
    log.rmdir()
    log.write_bytes(kept)
    list(steps)
    assert log_of(run.folder) == log_of(want.folder)
    assert np.array_equal(weights(run), weights(want))
