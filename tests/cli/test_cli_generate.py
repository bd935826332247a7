"""`llmnb generate`: texts of a run, of any file, with its own tokens."""

import io
import math
import re
from pathlib import Path

import pytest
from commands import TINY, TUNE
from spelling import own_files

from llmnb.config import GPT2Config
from llmnb.formats.published import write_folder
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.formats.shard import read_shard
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer
from llmnb.text.bpe import from_tokens


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


def test_generate_from_a_bin_file(llmnb, tmp_path):
    cfg = GPT2Config(32, 257, 1, 2, 16)
    GPT2(cfg, 1, 8, "reference").save_checkpoint(tmp_path / "m.bin")
    ask = ["generate", "m.bin", "--prompt", "ab", "--tokens", 50]
    code, out, _ = llmnb(*ask, "--tokenizer", "byte")
    assert code == 0 and out.startswith("ab")
    tokens = [b"x" * 3, *(bytes([i]) for i in range(256))]
    ranks = from_tokens("other", tokens)
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


def test_a_models_own_tokens_are_used(llmnb, tmp_path, hub):
    commands = [
        ["generate", hub, "--prompt", "low", "--tokens", 30],
        ["eval", hub, "--text", "a.txt"],
        ["generate", hub / "model.safetensors", "--prompt", "newest"],
    ]
    for command in commands:
        code, out, err = llmnb(*command)
        assert code == 0, err
        assert llmnb(*command, "--tokenizer", "own.tiktoken")[1] == out
    code, out, err = llmnb(
        "train", "--init", hub, "--out", "run", *TUNE.split()
    )
    assert code == 0, err
    assert "270 tokens" in out
    run, own = tmp_path / "run" / "tokenizer.tiktoken", Path("own.tiktoken")
    assert run.read_bytes() == own.read_bytes()
    assert llmnb("train", "--resume", "run", "--steps", 3)[0] == 0
    # and for another corpus, a run's tokenizer and a folder's
    for name in ("run/tokenizer.tiktoken", hub, hub / "vocab.json"):
        args = ["--corpus", "a.txt", "--tokenizer", name, "--val-tokens", 30]
        code, out, err = llmnb("data", "shards", "--force", *args)
        assert code == 0, err
        made = tmp_path / "shards" / "tokenizer.tiktoken"
        assert made.read_bytes() == own.read_bytes()


def test_a_text_may_end_in_token_0(llmnb, tmp_path, hub):
    own_files(hub, tokenizer.load("own.tiktoken"), ["<|endoftext|>"])
    code, _, err = llmnb("train", "--init", hub, "--out", "run", *TUNE.split())
    assert code == 0, err
    kept = tokenizer.load(tmp_path / "run" / "tokenizer.tiktoken")
    assert (kept.eot_token, kept.n_vocab) == (0, 270)
    prompt = ["--prompt", "lowest", "--tokens", 20]
    assert llmnb("generate", "run", *prompt)[0] == 0
    args = ["--corpus", "a.txt", "--tokenizer", hub, "--val-tokens", 30]
    assert llmnb("data", "shards", *args)[0] == 0
    tokens = read_shard(tmp_path / "shards" / "val.bin")
    text = (tmp_path / "a.txt").read_text("utf-8")
    assert text.startswith(kept.decode(list(tokens[1:]))) and tokens[0] == 0


def test_a_tokenizer_that_nobody_knows_is_asked_for(llmnb, tmp_path, hub):
    for path in (hub / "vocab.json", hub / "merges.txt"):
        path.unlink()
    for command in (
        ["generate", hub],
        ["eval", hub, "--text", "a.txt"],
        ["train", "--init", hub, *TUNE.split()],
    ):
        code, out, err = llmnb(*command)
        assert (code, out) == (1, "") and err.count("\n") == 1
        assert "which tokenizer? None of tokenizer.tiktoken, vocab" in err
        assert "name it, as in --tokenizer gpt2" in err
        assert llmnb(*command, "--tokenizer", "own.tiktoken")[0] == 0


@pytest.mark.parametrize("rows", [258, 300, 384])
@pytest.mark.parametrize("name", ["m.bin", "m.safetensors", "tied"])
def test_rows_without_a_token_are_never_drawn(llmnb, tmp_path, name, rows):
    """They are by far the likeliest, and all others equally likely."""
    cfg = GPT2Config(32, rows, 1, 2, 16)
    model = GPT2(cfg, 1, 8, "reference")
    model.params["wte"][...], model.params["wte"][:257] = 1, -1
    model.params["lnfw"][...], model.params["lnfb"][...] = 0, 1
    if name == "tied":  # the embedding by the name of the head alone
        write_folder(tmp_path / name, cfg, model.params)
        path = tmp_path / name / "model.safetensors"
        file = TensorFile(path)
        tensors = {x: file[x] for x in file.names}
        tensors["lm_head.weight"] = tensors.pop("wte.weight")
        write_tensors(path, tensors, {"wte.weight": "lm_head.weight"})
    else:
        model.save_checkpoint(name)
    (tmp_path / "a.txt").write_text("some text é\n" * 9, "utf-8")
    byte = "--tokenizer", "byte"
    for backend in ("cpu", "reference"):
        how = ["--tokens", 60, "--backend", backend, "--samples", 2]
        code, out, err = llmnb("generate", name, *byte, *how)
        assert code == 0, err
        assert len(out.encode("utf-8", "replace")) > 100
    code, out, err = llmnb("eval", name, *byte, "--text", "a.txt")
    assert code == 0, err
    assert f"{math.log(257):.4f} nats a token" in out
    code, out, err = llmnb("train", "--init", name, *byte, *TUNE.split())
    assert code == 0 and "16 channels, 257 tokens" in out, err
    (log,) = tmp_path.glob("runs/*/log.csv")
    first = log.read_text("utf-8").splitlines()[1].split(",")
    assert float(first[1]) == pytest.approx(math.log(257), 1e-5)
    (tuned,) = tmp_path.glob("runs/*/model.bin")
    assert not GPT2.from_checkpoint(tuned, 1, 8).params["wte"][257:].any()


@pytest.mark.parametrize("rows", [50257, 50258, 50304])
def test_a_model_of_llm_cs_is_gpt2s(llmnb, tmp_path, rows):
    try:
        tokenizer.gpt2()
    except ConnectionError as error:
        pytest.skip(str(error))
    cfg = GPT2Config(16, rows, 1, 1, 4)
    GPT2(cfg, 1, 1, "reference").save_checkpoint("m.bin")
    code, out, err = llmnb("generate", "m.bin", "--tokens", 5)
    assert code == 0 and out
    more = f"m.bin has {rows} tokens, the tokenizer gpt2 knows 50257: the "
    assert err == ("" if rows == 50257 else f"{more}others are left out\n")
    (tmp_path / "a.txt").write_text("It's naïve.", "utf-8")
    assert llmnb("eval", "m.bin", "--text", "a.txt")[0] == 0


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"


@pytest.mark.parametrize(
    "command",
    [
        "generate hub",
        "generate other/m.bin --tokenizer byte",
        "eval hub --text a.txt",
        "train --init other/m.bin --corpus a.txt",
        "train --shards other --tokenizer byte",
        "generate hub --tokenizer other/vocab.json",
        "eval other/m.bin --tokenizer byte --hellaswag other/m.bin",
        "verify other",
    ],
)
def test_a_git_lfs_pointer_is_called_one(llmnb, tmp_path, hub, command):
    other = tmp_path / "other"
    other.mkdir()
    names = "m.bin", "train.bin", "val.bin", "vocab.json", "m_debug_state.bin"
    for name in names:
        (other / name).write_bytes(POINTER)
    if "other/vocab.json" not in command:
        (hub / "model.safetensors").write_bytes(POINTER)
    code, out, err = llmnb(*command.split())
    assert code == 1 and err.count("\n") == 1
    assert "this is a Git LFS pointer" in err and "`git lfs pull`" in err


def test_a_flipped_bit_of_a_run_is_seen(llmnb, tmp_path):
    """And going on with the run writes the model anew."""
    assert llmnb("train", "--out", "run", *TINY.split())[0] == 0
    path = tmp_path / "run" / "model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    (tmp_path / "a.txt").write_text("some text " * 50)
    for command in (
        ["generate", "run"],
        ["eval", "run", "--text", "a.txt"],
        ["train", "--init", "run", *TUNE.split()],
    ):
        code, _, err = llmnb(*command)
        assert code == 1 and "model.bin is damaged, its checksum" in err
        assert "`llmnb train --resume`" in err.splitlines()[-1]
    assert llmnb("train", "--resume", "run")[0] == 0
    assert path.read_bytes() == whole
