"""Logs are read row by row, damaged ones with one error, and drawn."""

import io
import warnings

import matplotlib
import numpy as np
import pytest

from llmnb.bench.report import layers_figure
from llmnb.train.drawing import loss_figure, save_figure, smooth
from llmnb.train.loop import Step
from llmnb.train.watch import Board, compare_runs, read_log, run_table

LOG = """step,loss,val_loss,learning_rate,grad_norm,tokens_per_second
0,6.9,6.95,0.001,2.5,9000
1,6.8,,0.002,2.4,9100
2,6.5,6.6,0.003,2.2,9200
3,,6.4,,,
"""


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(LOG)
    return path


def test_columns(log):
    columns = read_log(log)
    assert [*columns] == LOG.split("\n")[0].split(",")[1:]
    assert columns["loss"].tolist() == [[0, 1, 2], [6.9, 6.8, 6.5]]
    assert columns["val_loss"].tolist() == [[0, 2, 3], [6.95, 6.6, 6.4]]
    for name, points in read_log(log.parent).items():  # the folder of a run
        assert np.array_equal(points, columns[name])

    for end, last in (("", 2), ("\n", 4)):  # half a row is left out
        log.write_text(LOG + "4,6.1,,0.001,2.0,9000" + end)
        assert read_log(log)["loss"][0, -1] == last


def test_running_means():
    points = np.array([[0.0, 1, 2, 3, 4], [5.0, 1, 3, 2, 4]])
    assert smooth(points, 2).tolist() == [[0.5, 1.5, 2.5, 3.5], [3, 2, 2.5, 3]]
    assert np.array_equal(smooth(points, 1), points)
    assert np.array_equal(smooth(points, 6), points)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        smooth(points, 0)


def test_the_picture_holds_every_run(log):
    logs = {"a": read_log(log), "b": read_log(log)}
    figure = compare_runs(logs, window=2)
    loss, rate, norm, speed = figure.axes
    labels = [line.get_label() for line in loss.lines]
    assert labels[0::2] == ["a", "b"]
    assert loss.lines[0].get_ydata() == pytest.approx([6.85, 6.65])
    assert loss.lines[1].get_ydata() == pytest.approx([6.95, 6.6, 6.4])
    assert rate.lines[0].get_ydata().tolist() == [0.001, 0.002, 0.003]


def legend(logs):
    """The names in a picture's legend, as they are drawn."""
    figure = compare_runs(logs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(io.BytesIO(), format="png")
    known = [x for x in caught if "missing from" not in str(x.message)]
    assert known == []
    texts = figure.axes[0].get_legend().get_texts()
    assert not any(x.get_parse_math() or x.get_usetex() for x in texts)
    return [x.get_text() for x in texts]


def test_names_that_are_no_line_of_text(log, capsys):
    plain = ["price$5_^$", "$lr_1e-3$", "_hidden", r"\frac{", "a_b^c%&#~"]
    names = ["two\nlines", "\U0001f600", "caf\udce9", "x" * 300 + "end"]
    logs = dict.fromkeys([*plain, *names, "\x1b[2J"], read_log(log))
    shown = legend(logs)
    assert shown[:5] == plain, "as they are"
    assert shown[5:8] == ["two lines", "\U0001f600", "caf?"]
    assert shown[8] == "..." + "x" * 54 + "end"
    rows = run_table(logs)
    assert len(rows) == 1 + len(logs) and not any("\n" in x for x in rows)
    assert rows[6].startswith("two lines ")
    # and titles are taken literally
    layer = {"name": "gelu_forward", "calls": 1, "seconds": 1.0}
    row = {"name": "llmnb", "layers": [layer]}
    result = {"contests": [{"name": "$a_^$", "contestants": [row]}]}
    layers_figure(result).savefig(io.BytesIO(), format="png")


def test_the_table(log):
    head, row = run_table({"a run": read_log(log)})
    assert " ".join(head.split()) == "run steps last val best val tokens/s"
    assert row.split() == ["a", "run", "3", "6.4000", "6.4000", "9,100"]
    log.write_text(LOG.split("\n")[0] + "\n")  # a run that has barely begun
    columns = read_log(log)
    assert columns["loss"].shape == (2, 0)
    compare_runs({"a": columns})
    assert "nan" in run_table({"a": columns})[1]


def test_the_command(log, llmnb):
    """The user's own settings of matplotlib reach neither picture."""
    run, out = log.parent / "price$5_^$", log.parent / "x.png"
    run.mkdir()
    (run / "log.csv").write_text(LOG)
    steps = [Step(i, 5.0 - i, None) for i in range(50)]
    seen, strange = [], {"font.family": "No Such Font", "text.usetex": True}
    for own in ({}, strange | {"savefig.dpi": 3, "font.size": 99}):
        with matplotlib.rc_context(own):
            _, text, _ = llmnb("plot", log, run, "--out", out)
            seen.append(out.read_bytes())
            save_figure(out, loss_figure, steps, {"$a_^$": 5.0})
            seen.append(out.read_bytes())
    assert seen[:2] == seen[2:] and seen[0][:4] == b"\x89PNG"
    assert "6.4000" in text and "price$5_^$" in text
    for kind, begin in (("pdf", b"%PDF"), ("svg", b"<?xml")):
        out = out.with_suffix("." + kind)
        assert llmnb("plot", log, "--out", out)[0] == 0
        assert out.read_bytes().startswith(begin)
    code, _, err = llmnb("plot", log, "--out", log.parent / "x.doc")
    assert code == 1 and "Format 'doc' is not supported" in err
    assert err.count("\n") == 1 and not (log.parent / "x.doc").exists()
    for text, why in (
        (LOG + "4," + "6" * 140_000 + ",,,,\n", "line 6: must have at most"),
        ("no log", "the first line must name the columns"),
    ):
        log.write_text(text)
        code, _, err = llmnb("plot", log)
        assert code == 1 and why in err
        assert err.count("\n") == 1 and len(err) < 300


def test_events_for_tensorboard(tmp_path):
    within = "tensorboard.backend.event_processing"
    events = pytest.importorskip(f"{within}.event_accumulator")
    board = Board(tmp_path)
    board.write(0, {"loss": 6.5, "val_loss": None})
    board.write(1, {"loss": 6.25, "val_loss": 6.0})
    board.close()
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    found = [(x.step, x.value) for x in read.Scalars("loss")]
    assert found == [(0, 6.5), (1, 6.25)]
    assert [x.value for x in read.Scalars("val_loss")] == [6.0]
