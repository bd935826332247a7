"""The command line: what users type, see and get wrong."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from llmnb import cli, shards, tokenizer
from llmnb.checkpoint import write_folder
from llmnb.cli import main
from llmnb.config import GPT2Config
from llmnb.data import read_shard, write_shard
from llmnb.gpt2 import GPT2
from llmnb.terminal import progress
from llmnb.train import TrainConfig

TINY = (
    "--tokenizer byte --limit 30000 --num-layers 1 --num-heads 2 "
    "--channels 16 --seq-len 16 --batch-size 2 --steps 6 --eval-every 4 "
    "--backend reference"
)
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
    folder = tmp_path_factory.mktemp("cli") / "run"
    main(["train", "--out", str(folder), *TINY.split()])
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
    assert found["config"]["corpus"] == ["stdlib"]
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
    from llmnb import train as module

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
    from llmnb import train as module

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
    from llmnb import run as module

    whole = module.save_run

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return whole(*args)

    monkeypatch.setattr(module, "save_run", interrupted)
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


def test_fine_tuning(llmnb, tmp_path, trained):
    args = "--limit 20000 --batch-size 2 --steps 3 --backend reference"
    code, out, _ = llmnb("train", "--init", trained, *args.split())
    assert code == 0
    assert "1 layers, 2 heads, 16 channels, 257 tokens" in out
    (run,) = (tmp_path / "runs").iterdir()
    config = json.loads((run / "config.json").read_text("utf-8"))["config"]
    assert config["init"] == str(trained) and config["seq_len"] == 16
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
    found = cli._command(argv)
    assert found == "llmnb bench --json b.json --against llmc=d"


def test_bench_takes_named_configurations(llmnb, monkeypatch):
    asked = []

    def fake(configs, settings, start, bar):
        asked.append((configs, settings, start))
        facts = {"machine": "m", "threads": 1, "load": 0.0}
        return {**facts, "configs": [], "start": []}

    monkeypatch.setattr("llmnb.bench.bench", fake)
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
    "data": "data out --corpus {run}/sample.txt --tokenizer byte",
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
        "import sys; from llmnb import cli, train\n"
        "def opened(**how): raise ValueError(open('file', 'w').fileno())\n"
        "train.starting_from = opened\n"
        "cli.main(['train', '--init', 'x'])"
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
        monkeypatch.setattr("llmnb.room.free_memory", lambda: nbytes)

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
        "from llmnb.cli import main\n"
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
