"""`llmnb generate`: texts of a run, of any file, with its own tokens."""

import io
import math
import re
from pathlib import Path

import pytest
from commands import TUNE
from spelling import own_files

from llmnb.config import GPT2Config
from llmnb.formats.checkpoint import write_folder
from llmnb.formats.shard import read_shard
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer


def test_generate(llmnb, trained, monkeypatch):
    ask = ["generate", trained, "--prompt", "def f", "--tokens", 30]
    code, out, err = llmnb(*ask)
    assert (code, err) == (0, "")
    assert out.startswith("def f") and len(out) > 10
    assert llmnb(*ask)[1] == out
    assert llmnb(*ask, "--seed", 7)[1] != out
    code, last, _ = llmnb(*ask, "--samples", 2, "--seed", 2**32 - 1)
    assert code == 0 and "--- 2 of 2, seed 0\n" in last
    code, several, err = llmnb(*ask, "--samples", 3, "--seed", 7)
    alone = [llmnb(*ask, "--seed", 7 + i)[1] for i in range(3)]
    heads = [f"--- {i + 1} of 3, seed {7 + i}\n" for i in range(3)]
    parts = [h + t for h, t in zip(heads, alone, strict=True)]
    assert (code, several, err) == (0, "".join(parts), "")
    monkeypatch.setattr("sys.stdin", io.StringIO("def f"))
    assert llmnb(*ask, "--prompt", "-") == (0, out, "")
    greedy = llmnb(*ask, "--temperature", 0)[1]
    assert greedy == llmnb(*ask, "--top-k", 1, "--seed", 9)[1]
    assert greedy == llmnb(*ask, "--top-p", 1e-9, "--seed", 9)[1]


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


def test_a_models_own_tokens_are_used(done, tmp_path, hub):
    commands = [
        ["generate", hub, "--prompt", "low", "--tokens", 30],
        ["eval", hub, "--text", "a.txt"],
        ["generate", hub / "model.safetensors", "--prompt", "newest"],
    ]
    for command in commands:
        assert done(*command, "--tokenizer", "own.tiktoken") == done(*command)
    train = "train", "--init", hub, "--out", "run", *TUNE.split()
    assert "270 tokens" in done(*train)
    run, own = tmp_path / "run" / "tokenizer.tiktoken", Path("own.tiktoken")
    assert run.read_bytes() == own.read_bytes()
    done("train", "--resume", "run", "--steps", 3)
    # and for another corpus, a run's tokenizer and a folder's
    for name in ("run/tokenizer.tiktoken", hub, hub / "vocab.json"):
        args = ["--corpus", "a.txt", "--tokenizer", name, "--val-tokens", 30]
        done("data", "shards", "--force", *args)
        made = tmp_path / "shards" / "tokenizer.tiktoken"
        assert made.read_bytes() == own.read_bytes()


def test_a_text_may_end_in_token_0(done, tmp_path, hub):
    own_files(hub, tokenizer.load("own.tiktoken"), ["<|endoftext|>"])
    done("train", "--init", hub, "--out", "run", *TUNE.split())
    kept = tokenizer.load(tmp_path / "run" / "tokenizer.tiktoken")
    assert (kept.eot_token, kept.n_vocab) == (0, 270)
    done("generate", "run", "--prompt", "lowest", "--tokens", 20)
    args = ["--corpus", "a.txt", "--tokenizer", hub, "--val-tokens", 30]
    done("data", "shards", *args)
    tokens = read_shard(tmp_path / "shards" / "val.bin")
    text = (tmp_path / "a.txt").read_text("utf-8")
    assert text.startswith(kept.decode(list(tokens[1:]))) and tokens[0] == 0


@pytest.mark.parametrize("rows", [258, 300, 384])
@pytest.mark.parametrize("name", ["m.bin", "m.safetensors", "hub"])
def test_rows_without_a_token_are_never_drawn(done, tmp_path, name, rows):
    """They are by far the likeliest, and all others equally likely."""
    cfg = GPT2Config(32, rows, 1, 2, 16)
    model = GPT2(cfg, 1, 8, "reference")
    model.params["wte"][...], model.params["wte"][:257] = 1, -1
    model.params["lnfw"][...], model.params["lnfb"][...] = 0, 1
    if name == "hub":
        write_folder(tmp_path / name, cfg, model.params)
    else:
        model.save_checkpoint(name)
    (tmp_path / "a.txt").write_text("some text é\n" * 9, "utf-8")
    byte = "--tokenizer", "byte"
    for backend in ("cpu", "reference"):
        how = ["--tokens", 60, "--backend", backend, "--samples", 2]
        out = done("generate", name, *byte, *how)
        assert len(out.encode("utf-8", "replace")) > 100
    out = done("eval", name, *byte, "--text", "a.txt")
    assert f"{math.log(257):.4f} nats a token" in out
    out = done("train", "--init", name, *byte, *TUNE.split())
    assert "16 channels, 257 tokens" in out
    (log,) = tmp_path.glob("runs/*/log.csv")
    first = log.read_text("utf-8").splitlines()[1].split(",")
    assert float(first[1]) == pytest.approx(math.log(257), 1e-5)
    (tuned,) = tmp_path.glob("runs/*/model.bin")
    assert not GPT2.from_checkpoint(tuned, 1, 8).params["wte"][257:].any()


@pytest.mark.parametrize("rows", [50257, 50258, 50304])
@pytest.mark.usefixtures("gpt2")
def test_a_model_of_llm_cs_is_gpt2s(llmnb, tmp_path, rows):
    cfg = GPT2Config(16, rows, 1, 1, 4)
    GPT2(cfg, 1, 1, "reference").save_checkpoint("m.bin")
    code, out, err = llmnb("generate", "m.bin", "--tokens", 5)
    assert code == 0 and out
    more = f"m.bin has {rows} tokens, the tokenizer gpt2 knows 50257: the "
    assert err == ("" if rows == 50257 else f"{more}others are left out\n")
    (tmp_path / "a.txt").write_text("It's naïve.", "utf-8")
    assert llmnb("eval", "m.bin", "--text", "a.txt")[0] == 0
