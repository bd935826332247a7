"""The command line: what users type, see and get wrong."""

import argparse
import errno
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    code, out, err = llmnb("train", "--resume")
    assert code == 0
    assert ("warning: which of the" in err) == warned
    found = [re.search("^folder +(.*)", out, re.M)[1]]
    code, _, err = llmnb("generate", "--tokens", 3)
    assert code == 0
    found.append(re.search("model: (.*)", err)[1])
    Path("text.txt").write_text("spam and eggs, " * 30)
    code, out, _ = llmnb("eval", "--text", "text.txt")
    assert code == 0
    found.append(re.search("^model +(.*)", out, re.M)[1])
    assert len({Path(x).name for x in found}) == 1, found
    return Path(found[0]).name


def test_the_newest_run_does_not_depend_on_the_clock(llmnb, two_runs):
    assert newest(llmnb) == "stdlib-2"
    llmnb("train", "--resume", "runs/stdlib", "--steps", 7)
    aged(two_runs / "stdlib", -5000)
    assert newest(llmnb) == "stdlib"
    shutil.rmtree(two_runs / "stdlib")
    assert newest(llmnb) == "stdlib-2"


def test_the_newest_run_of_a_copy(llmnb, two_runs, tmp_path, monkeypatch):
    shutil.copytree(two_runs, tmp_path / "b" / "runs")
    aged(tmp_path / "b" / "runs" / "stdlib", 9000)
    monkeypatch.chdir(tmp_path / "b")
    assert newest(llmnb) == "stdlib-2"


def test_the_newest_run_is_the_one_that_saved_last(llmnb, tmp_path):
    """Whichever was begun or ended first."""
    from llmnb.cli import _note
    from llmnb.run import begin, follow
    from llmnb.train import run_folder

    def run(name):
        args = argparse.Namespace(tensorboard=False)
        made = begin(run_folder(f"runs/{name}"), config)
        _note(made)
        return made, cli._follow, args

    options = {"num_layers": 1, "num_heads": 2, "channels": 16, "steps": 6}
    config = TrainConfig(
        tokenizer="byte", limit=30000, seq_len=16, batch_size=2,
        backend="reference", save_every=3, eval_every=4, **options,
    )  # fmt: skip
    first = run("first")
    second = run("second")
    second[1](second[0], second[2])
    assert cli._newest_run("config.json").name == "second"
    for _ in follow(first[0]):
        pass
    assert cli._newest_run("config.json").name == "second", "not noted"
    first[1](first[0], first[2])
    assert cli._newest_run("config.json").name == "first"


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


def test_trains_that_start_together_take_two_folders(llmnb, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        names = [*pool.map(cli._new_folder, [TrainConfig()] * 8)]
    assert len(set(names)) == 8 and all(x.is_dir() for x in names)


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


def test_warnings_take_one_line(llmnb, monkeypatch):
    def fail(place):
        raise OSError(errno.ENOLCK, "no locks\navailable")

    monkeypatch.setattr("llmnb.lock._flock", fail)
    code, _, err = llmnb("train", "--out", "run", *TINY.split())
    assert code == 0
    (line,) = [x for x in err.splitlines() if "warning" in x]
    assert line.startswith("llmnb: warning: run: no locks on this file")


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
    (run,) = (tmp_path / "runs").glob("[!.]*")
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


def test_data_from_json_lines(llmnb, tmp_path):
    lines = [json.dumps({"body": f"spam and {k} eggs"}) for k in range(300)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    ask = ["data", "out", "--corpus", "a.jsonl.gz", "--tokenizer", "byte"]
    code, _, err = llmnb(*ask)
    assert code == 1 and "a.jsonl.gz:1: must have a field 'text'" in err
    sizes = ["--shard-tokens", 1500, "--val-tokens", 2000]
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


def test_bench(llmnb, tmp_path):
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
