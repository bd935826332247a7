"""The command line: what users type, see and get wrong."""

import io
import json
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from llmnb import cli, tokenizer
from llmnb.checkpoint import write_folder
from llmnb.cli import main
from llmnb.config import GPT2Config
from llmnb.data import read_shard
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


def test_interrupted_training_keeps_what_there_is(
    llmnb, tmp_path, monkeypatch
):
    from llmnb import train as module

    whole = module.train

    def interrupted(*args):
        for step in whole(*args):
            if step.step == 3:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(module, "train", interrupted)
    code, _, err = llmnb("train", "--out", "cut", *TINY.split())
    assert code == 0 and "stopped" in err
    assert sorted(x.name for x in (tmp_path / "cut").iterdir()) == FILES
    lines = (tmp_path / "cut" / "log.csv").read_text("utf-8").splitlines()
    assert len(lines) == 1 + 3


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
        ("bench --steps 0 --backend reference", 1, "steps must be at least 1"),
        ("bench --threads 0", 1, "threads must be at least 1, got 0"),
        ("bench --config big", 1, "no config 'big': choose from small, 124m"),
        ("bench --against nobody", 1, "no contestant 'nobody': choose from"),
        ("bench --against llmc=no-file", 1, "no-file is not a program"),
        ("bench --json no/folder/a.json", 1, "there is no folder no/folder"),
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
    for command in ("train", "generate", "data", "bench", "info"):
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
