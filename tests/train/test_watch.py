"""Logs are read row by row, damaged ones with one error, and drawn."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.bench.bench import layers_figure
from llmnb.cli.__main__ import main
from llmnb.train.drawing import save_figure, smooth
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


def test_half_a_row_is_left_out(log):
    log.write_text(LOG + "4,6.1,,0.0")
    assert read_log(log)["loss"][0, -1] == 2
    log.write_text(LOG + "4,6.1,,0.001,2.0,9000\n")
    assert read_log(log)["loss"][0, -1] == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the first line must name the columns"),
        ("loss,step\n", "the first line must name the columns"),
        ("step,loss,loss\n", "the first line must name the columns"),
        ("step,loss\n1,2,3\n", "line 2: must have 2 values, has 3"),
        ("step,loss\n1,2\n1\n", "line 3: must have 2 values, has 1"),
        ("step,loss\n1,two\n", "line 2: must hold numbers"),
        ("step,loss\n,2\n", "line 2: has no step"),
        ("step,loss\n1,nan\n", "line 2: must hold numbers, not '1,nan'"),
        ("step,loss\n1,-1e999\n", "line 2: must hold numbers"),
        ("step,loss\n1," + "2" * 140_000 + "\n", "at most 1,000 characters"),
        ('step,loss\n1,"' + "2," * 70_000 + '"\n', "at most 1,000 characters"),
        ("step,loss\n" + "1" * 140_000 + ",2\n", "at most 1,000 characters"),
        ("step" + ",loss" * 28_000 + "\n", "the first line must name the"),
    ],
)
def test_bad_logs_are_refused(log, text, says):
    log.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        read_log(log)
    assert str(log) in str(error.value)
    assert len(str(error.value)) < 200 + len(str(log))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damage_is_an_answer_or_one_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("x") / "log.csv"
    raw = bytearray(LOG.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        for points in read_log(path).values():
            assert points.shape[0] == 2
    except ValueError as error:
        assert str(path) in str(error)


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


def test_names_mean_nothing_to_the_picture(log):
    names = ["price$5_^$", "$lr_1e-3$", "_hidden", r"\frac{", "a_b^c%&#~"]
    assert legend(dict.fromkeys(names, read_log(log))) == names


def test_names_that_are_no_line_of_text(log):
    logs = dict.fromkeys(
        [
            "two\nlines",
            "\U0001f600",
            "caf\udce9",
            "x" * 300 + "end",
            "\x1b[2J",
        ],
        read_log(log),
    )
    shown = legend(logs)
    assert shown[:3] == ["two lines", "\U0001f600", "caf?"]
    assert shown[3] == "..." + "x" * 54 + "end"
    rows = run_table(logs)
    assert len(rows) == 1 + len(logs) and not any("\n" in x for x in rows)
    assert rows[1].startswith("two lines ")


def test_plot_takes_names_as_they_are(log, capsys):
    runs = [log.parent / x for x in ("price$5_^$", "$lr_1e-3$", "_x")]
    for run in runs:
        run.mkdir()
        (run / "log.csv").write_text(LOG)
    main(["plot", *map(str, runs), "--out", str(log.parent / "x.png")])
    assert (log.parent / "x.png").stat().st_size > 9999
    assert "price$5_^$" in capsys.readouterr()[0]


def test_landmarks_and_titles_are_taken_literally(tmp_path):
    save_figure(tmp_path / "x.png", [], {"$a_^$": 5.0})
    layer = {"name": "gelu_forward", "calls": 1, "seconds": 1.0}
    row = {"name": "llmnb", "layers": [layer]}
    result = {"configs": [{"name": "$a_^$", "contestants": [row]}]}
    layers_figure(result).savefig(io.BytesIO(), format="png")


def test_the_table(log):
    head, row = run_table({"a run": read_log(log)})
    assert " ".join(head.split()) == "run steps last val best val tokens/s"
    assert row.split() == ["a", "run", "3", "6.4000", "6.4000", "9,100"]


def test_a_run_that_has_barely_begun(log):
    log.write_text(LOG.split("\n")[0] + "\n")
    columns = read_log(log)
    assert columns["loss"].shape == (2, 0)
    compare_runs({"a": columns})
    assert "nan" in run_table({"a": columns})[1]


def test_the_command(log):
    run = [sys.executable, "-m", "llmnb.cli", "plot", str(log), str(log)]
    out = log.parent / "x.png"
    done = subprocess.run(
        [*run, "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "6.4000" in done.stdout
    log.write_text(LOG + "4," + "6" * 140_000 + ",,,,\n")
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 300
    assert "line 6: must have at most 1,000 characters" in done.stderr
    log.write_text("no log")
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "the first line must name the columns" in done.stderr


def test_settings_of_matplotlib_do_not_reach_the_picture(log, capsys):
    import matplotlib

    out = log.parent / "x.png"
    main(["plot", str(log), "--out", str(out)])
    whole = out.read_bytes()
    strange = {"font.family": "No Such Font", "text.usetex": True}
    with matplotlib.rc_context({**strange, "savefig.dpi": 3}):
        main(["plot", str(log), "--out", str(out)])
    assert out.read_bytes() == whole
    assert "6.4000" in capsys.readouterr().out


def test_events_for_tensorboard(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    board = Board(tmp_path)
    board.write(0, {"loss": 6.5, "val_loss": None})
    board.write(1, {"loss": 6.25, "val_loss": 6.0})
    board.close()
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    found = [(x.step, x.value) for x in read.Scalars("loss")]
    assert found == [(0, 6.5), (1, 6.25)]
    assert [x.value for x in read.Scalars("val_loss")] == [6.0]


def test_without_tensorboard_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ImportError, match=r"pip install 'llmnb\[tensorb"):
        Board(tmp_path)
