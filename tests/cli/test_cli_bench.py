"""`llmnb bench` and `llmnb info`."""

import json
import re
import sys

import pytest
from commands import SMALL, raising

from llmnb.cli import bench as bench_command
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2

SHORT = [*SMALL.split(), "--turn", 0]


def test_a_picture_that_fails_costs_nothing(llmnb, tmp_path, monkeypatch):
    savefig = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, raising(OSError, "no font"))
    files = ["--json", "a.json", "--plot", "a.png"]
    args = [*files, "--precision", "fp32", "--steps", 1, *SHORT]
    code, out, err = llmnb("bench", *args)
    assert code == 1 and "error: no font" in err
    assert "tokens/s" in out and (tmp_path / "a.json").exists()


def test_bench(llmnb, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    files = ["--json", "a.json", "--plot", "a.png"]
    code, out, err = llmnb("bench", "--steps", 2, *files, *SHORT)
    assert code == 0, err
    assert "tokens/s" in out and "matmul_backward" in out
    assert "Not measured: llmnb bf16" in out
    assert re.search("[1-4]/4", err)  # two rounds, two to warm up
    found = json.loads((tmp_path / "a.json").read_text("utf-8"))
    (contest,) = found["contests"]
    assert contest["model"]["vocab_size"] == 300
    assert contest["batch_size"] == 2 and contest["kind"] == "step"
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert found["command"].startswith("llmnb bench --steps 2 --json a.json")


def test_bench_prints_json(done):
    args = ["--steps", 1, "--precision", "fp32", "--json", "-"]
    found = json.loads(done("bench", *args, *SHORT, "--threads", 1))
    assert found["threads"] == 1
    (row,) = found["contests"][0]["contestants"]
    assert row["name"] == "llmnb fp32" and row["threads"] == 1


def test_a_layer_that_is_not_there_costs_no_minutes(failed, monkeypatch):
    monkeypatch.setattr(bench_command, "bench", raising(OSError, "steps"))
    args = ["--config", "small", "--backend", "cuda", "--kernels", "matmul"]
    assert "no layer 'matmul': choose from encoder_for" in failed(
        "bench", *args
    )


@pytest.mark.parametrize(("word", "kept"), [
    ("/a/b.json", "b.json"),
    ("llmc=../c/d", "llmc=d"),
    ("llmc=/my files/c=d/e", "llmc=e"),
    ("--json=C:\\my files\\b.json", "--json=b.json"),
    ("/my files/a=b/c", "c"),
])  # fmt: skip
def test_bench_writes_no_folders_of_this_machine(word, kept):
    found = bench_command._command(["bench", "--steps", "3", word])
    assert found == f"llmnb bench --steps 3 {kept}"


def test_bench_takes_named_configurations(llmnb, monkeypatch):
    asked = []

    def fake(configs, settings, start, bar, keep):
        asked.append((configs, settings, start))
        facts = {"machine": "m", "threads": 1, "load": 0.0}
        return {**facts, "contests": []}

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


def test_info(done):
    assert re.search(r"versions +llmnb \d", done("info"))
    args = "--num-layers 12 --num-heads 12 --channels 768 --seq-len 1024"
    args += " --vocab-size 50257"
    assert "124,475,904" in done("info", *args.split())
    model = GPT2(GPT2Config(16, 300, 1, 2, 16), 2, 16, "reference")
    megabytes = f"{model.memory.nbytes / 1e6:.1f} MB"
    assert megabytes in done("info", *SMALL.split())


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_info_counts_what_the_backend_takes(precision, done, failed):
    ask = ["info", *SMALL.split(), "--backend", "cpu"]
    shape = GPT2Config(16, 300, 1, 2, 16), 2, 16
    size = GPT2(*shape, "cpu", precision).memory.nbytes
    said = done(*ask, "--precision", precision)
    assert f"memory     {size / 1e6:.1f} MB" in said
    assert "one of 'fp32'" in failed(*ask, "--precision", "fp8")
    done(*ask, "--backend", "cuda")  # without a GPU too
