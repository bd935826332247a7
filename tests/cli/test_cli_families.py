"""The commands on models of other families, with their own tokenizers."""

import re

import pytest
from commands import SMALL, TUNE
from llamas import FAMILIES, TEXT, write_llama, write_sentencepiece

from llmnb.cli import generate as command
from llmnb.formats.shard import read_shard
from llmnb.formats.vocabulary import open_encoding
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer
from llmnb.text.bpe import from_tokens
from llmnb.train.evaluation import score_text


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 9)
    return "a.txt"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tuned_and_used(done, tmp_path, text, family, backend):
    """And measured; its texts do not depend on the backend."""
    hub = write_llama(tmp_path / "hub", family)
    how = TUNE.replace("reference", backend).split()
    how += ["--init", hub, "--out", "run", "--total-batch", 16]
    assert "2 layers, 2 heads, 16 channels" in done("train", *how)
    for model in (hub, "run"):
        ask = ["eval", model, "--text", text, "--seq-len", 16]
        assert "perplexity" in done(*ask)
        ask = ["generate", model, "--prompt", "the low", "--tokens", 12]
        first = done(*ask, "--backend", backend)
        assert first.startswith("the low")
        # with keys and values kept, and without
        assert done(*ask, "--backend", "reference") == first


@pytest.mark.parametrize("begins", [True, False])
def test_how_a_text_begins(done, tmp_path, text, begins, monkeypatch):
    """As the tokenizer says, in a prompt and where it is measured."""
    hub = write_llama(tmp_path / "hub", begins=begins)
    encoding, seen = open_encoding(hub), []
    whole = command.generate_samples

    def watched(decoder, ids, *rest, **how):
        seen.append(ids)
        return whole(decoder, ids, *rest, **how)

    monkeypatch.setattr(command, "generate_samples", watched)
    for prompt in ("the low", ""):
        done("generate", hub, "--prompt", prompt, "--tokens", 3)
    low = encoding.encode_ordinary("the low")
    assert seen == ([[0, *low], [0]] if begins else [low, [1]])
    # eval pays for the text and not for its start
    out = done("eval", hub, "--text", text)
    model = GPT2.from_checkpoint(hub, 1, 32)
    score = score_text(model, encoding, TEXT * 9)
    assert f"{score.loss:.4f} nats a token" in out
    tokens = len(encoding.encode_ordinary(TEXT * 9))
    assert f"tokens     {tokens:,}, context 32" in out
    assert f"{len(TEXT) * 9:,} bytes" in out


def test_shards_keep_another_models_tokenizer(done, tmp_path, text):
    hub = write_llama(tmp_path / "hub")
    args = ["--corpus", text, "--tokenizer", hub / "tokenizer.json"]
    done("data", "out", *args, "--val-tokens", 90)
    val = read_shard(tmp_path / "out" / "val.bin")
    ids = open_encoding(hub).encode_ordinary(TEXT * 9)
    assert val[:2].tolist() == [1, 0]  # an end, a begin
    assert val[2:].tolist() == ids[:88]
    how = TUNE.replace("--corpus a.txt", "--shards out").split()
    done("train", "--init", hub, "--out", "run", *how)
    shape = ["--num-kv-heads", 1, "--num-heads", 2, "--channels", 16]
    assert "300 tokens" in done("train", "--arch", "llama", *shape, *how)


def test_a_tokenizer_without_a_model_makes_a_new_one(done, tmp_path, text):
    write_llama(tmp_path / "hub", tokenizer=write_sentencepiece)
    named = ["--tokenizer", tmp_path / "hub" / "tokenizer.model"]
    how = ["--out", "run", *TUNE.split(), *named, "--arch", "gemma3_text"]
    how += ["--num-heads", 2, "--channels", 16, "--window", 4]
    done("train", *how)
    assert (tmp_path / "run" / "tokenizer.model").exists()
    text = done("generate", "run", "--prompt", "the", "--tokens", 5)
    assert text.startswith("the")
    assert "resumes" in done("train", "--resume", "run", "--steps", 3)


def test_a_tokenizer_that_lacks_tokens_is_named(failed, tmp_path, text):
    """More tokens than the model has rows is another model's tokenizer."""
    hub = write_llama(tmp_path / "hub")
    wrong = ["--tokenizer", tmp_path / "large.tiktoken"]
    few = [bytes([i % 256] * (1 + i // 256)) for i in range(310)]
    tokenizer.save(from_tokens("large", few), wrong[1])
    for ask in (
        ["generate", hub, *wrong],
        ["eval", hub, "--text", text, *wrong],
        ["train", "--init", hub, "--out", "run", *TUNE.split(), *wrong],
    ):
        err = failed(*ask)
        assert err.count("\n") == 1
        said = r"hub\S* has 300 tokens, the tokenizer.* has 311"
        assert re.search(said, err)


@pytest.mark.parametrize("family", ["gpt2", *FAMILIES])
def test_info_and_bench_know_every_family(done, family):
    how = [*SMALL.split(), "--arch", family]
    assert "MFLOP" in done("info", *how)
    args = ["--steps", 1, "--turn", 0, "--precision", "fp32"]
    out = done("bench", *args, *how)
    assert "tokens/s" in out
    assert (f"{family}, 1 layers" in out) == (family != "gpt2")
