"""Runs of other architectures, with other models' tokenizers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fuzz import refused
from large import TEXT as LETTERS
from large import large_encoding
from llamas import (
    FAMILIES,
    TEXT,
    cfg_of,
    write_json,
    write_llama,
    write_sentencepiece,
)
from runs import TINY, cut, cut_and_resumed, files_of, straight, weights
from tiktoken import Encoding

from llmnb.files import own_folder
from llmnb.formats.foreign import Foreign
from llmnb.formats.shard import read_shard, write_shard
from llmnb.formats.vocabulary import keep_encoding, open_encoding
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer
from llmnb.text.corpus import encode_documents
from llmnb.text.tokenizer import document_start, text_start
from llmnb.train.evaluation import score_text, text_losses
from llmnb.train.feed import prepare
from llmnb.train.finetune import starting_from
from llmnb.train.folder import load_run, weights_path
from llmnb.train.options import TrainConfig
from llmnb.train.run import begin, finish, follow, resume

QUICK = {
    "backend": "reference", "steps": 6, "save_every": 2, "eval_batches": 2,
    "eval_every": 3, "batch_size": 2, "seq_len": 8, "total_batch": 32,
}  # fmt: skip


@pytest.fixture
def read_files(monkeypatch):
    """Runs read their own corpus, not the one that other tests share."""
    monkeypatch.setattr("llmnb.train.run.prepare", prepare)


@pytest.fixture
def corpus(tmp_path, read_files):
    (tmp_path / "a.txt").write_text(TEXT * 9)
    return {"corpus": (str(tmp_path / "a.txt"),)}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_the_straight_run(tmp_path, family, backend):
    known = FAMILIES[family].items()
    shape = {k: x for k, x in known if k in ("num_kv_heads", "window")}
    config = replace(TINY, arch=family, backend=backend, **shape)
    assert config.micro_batches == 2
    run, want = cut_and_resumed(tmp_path, 8, config)
    assert run.model.cfg == want.model.cfg and run.model.cfg.family == family
    assert "model.safetensors" in files_of(tmp_path / "b")
    model, _, _ = load_run(tmp_path / "b")
    assert np.array_equal(model.memory.flat("params"), weights(run))


@pytest.mark.parametrize(
    ("family", "tokenizer", "name", "ends"),
    [(x, write_json, "json", (0, 1)) for x in FAMILIES]
    + [("llama", write_sentencepiece, "model", (1, 2))],
)
def test_a_family_is_tuned(tmp_path, corpus, family, tokenizer, name, ends):
    """With its own tokenizer."""
    init = write_llama(tmp_path / "hub", family, tokenizer)
    config = starting_from(init, **corpus, **QUICK)
    assert config.tokenizer == str(init / f"tokenizer.{name}")
    cfg = cfg_of(family)
    assert (config.arch, config.channels) == (family, 16)
    assert config.num_kv_heads == cfg.num_kv_heads
    assert config.window == (cfg.window or 0)
    run = begin(own_folder(tmp_path / "a"), config)
    said = json.loads((run.folder / "config.json").read_text())["config"]
    assert (said["arch"], said["init"]) == (family, str(init))
    start = GPT2.from_checkpoint(init, 2, 8, "reference")
    assert run.model.cfg == start.cfg
    assert np.array_equal(weights(run), start.memory.flat("params"))
    list(follow(run))
    cut(tmp_path / "b", 3, config)
    again, _ = resume(tmp_path / "b")
    assert isinstance(again.data.encoding, Foreign)
    list(follow(again))
    assert np.array_equal(weights(again), weights(run))
    assert not np.array_equal(weights(run), start.memory.flat("params"))
    finish(run)
    _, encoding, _ = load_run(tmp_path / "a")
    want = open_encoding(init)
    assert encoding.encode_ordinary(TEXT) == want.encode_ordinary(TEXT)
    assert (encoding.bos_token, encoding.eot_token) == ends


def test_options_that_contradict_the_checkpoint(tmp_path):
    init = write_llama(tmp_path / "hub")
    for name, here, asked in (
        ("arch", "llama", "mistral"), ("num_kv_heads", 1, 2),
        ("channels", 16, 32),
    ):  # fmt: skip
        says = f"hub has {name} {here}, not {asked}"
        refused(says, starting_from, init, **{name: asked})


@pytest.mark.parametrize("begins", [True, False])
def test_documents_begin_as_the_tokenizer_says(tmp_path, begins):
    init = write_llama(tmp_path / "hub", begins=begins)
    encoding = open_encoding(init)
    want = [1, 0] if begins else [1]  # the end of what was before, a begin
    assert document_start(encoding) == want
    assert text_start(encoding) == want[-1]
    tokens = encode_documents(encoding, ["low", "new"])
    low, new = map(encoding.encode_ordinary, ("low", "new"))
    assert tokens.tolist() == [*want, *low, *want, *new]
    one = encode_documents(encoding, ["low<|endoftext|>new"], endoftext=True)
    assert one.tolist() == tokens.tolist()
    gpt2s = tokenizer.byte()
    assert document_start(gpt2s) == [256] == [text_start(gpt2s)]
    text = "low" + " " * 100_000 + "new\n" * 3  # a long blank
    ids = tokenizer.encode_text(encoding, text)
    assert ids.tolist() == encoding.encode_ordinary(text)
    assert encoding.decode(ids.tolist()) == text
    # a text is scored behind its start
    model = GPT2.from_checkpoint(init, 1, 32, "reference", "fp64")
    ids = [want[-1], *encoding.encode_ordinary("the lowest tower")]
    score = score_text(model, encoding, "the lowest tower")
    losses = np.concatenate([*text_losses(model, np.array(ids))])
    assert (score.tokens, score.bytes) == (len(ids) - 1, 16)
    assert score.nats == losses.sum()


def test_a_run_in_a_folder_in_use_has_its_own_files(tmp_path, corpus):
    """A model and a tokenizer, and none of those that were there."""
    shape = {"num_layers": 1, "num_heads": 2, "channels": 16}
    plain = TrainConfig(tokenizer="byte", **shape, **QUICK, **corpus)
    finish(straight(tmp_path / "a", plain)[0])
    assert weights_path(tmp_path / "a").name == "model.bin"
    tuned = starting_from(write_llama(tmp_path / "hub"), **QUICK, **corpus)
    for config, family, kind, gone in (
        (tuned, "llama", Foreign, {"model.bin", "tokenizer.tiktoken"}),
        (plain, "gpt2", Encoding, {"model.safetensors", "tokenizer.json"}),
    ):
        run = begin(own_folder(tmp_path / "a", force=True), config)
        list(follow(run))
        finish(run)
        model, encoding, _ = load_run(tmp_path / "a")
        assert model.cfg.family == family and type(encoding) is kind
        assert not gone & {x.name for x in run.folder.iterdir()}


def test_a_json_of_gpt2s_kind_with_other_ends_stays_what_it_is(tmp_path):
    """One that ends texts with a token of its own is not GPT-2's."""
    library = pytest.importorskip("tokenizers")
    write_json(tmp_path, begins=False)
    whole = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole.add_special_tokens(["<|endoftext|>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    encoding = open_encoding(tmp_path)
    assert isinstance(encoding, Foreign) and encoding.eot_token == 1
    kept = tmp_path / "kept"
    kept.mkdir()
    keep_encoding(encoding, kept)
    again = open_encoding(kept)
    assert isinstance(again, Foreign) and again.eot_token == 1
    # and a folder with another tokenizer is not written over
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "vocab.json").write_text("{}")
    (tmp_path / "b" / "tokenizer.model").write_text("mine")
    with pytest.raises(ValueError, match=r"vocab\.json: is of another token"):
        keep_encoding(encoding, tmp_path / "b")
    here = {x.name: x.read_text() for x in (tmp_path / "b").iterdir()}
    assert here == {"vocab.json": "{}", "tokenizer.model": "mine"}


# more tokens than two bytes can number

LARGE = {"num_layers": 1, "num_heads": 2, "channels": 8} | QUICK


def test_a_run_of_a_large_vocabulary_goes_on(tmp_path, read_files):
    """From shards, and from the same text in memory."""
    text, shards = tmp_path / "a.txt", tmp_path / "shards"
    text.write_text(LETTERS)
    shards.mkdir()
    tokenizer.save(large_encoding(), shards / "tokenizer.tiktoken")
    named = {"tokenizer": str(shards / "tokenizer.tiktoken")}
    config = TrainConfig(**LARGE, **named, corpus=(str(text),))
    data = prepare(config)
    assert data.train_tokens.dtype == np.uint32
    assert data.val_tokens.max() > 65_536
    write_shard(shards / "val.bin", data.val_tokens, 70_000)
    write_shard(shards / "train.bin", data.train_tokens, 70_000)
    other = TrainConfig(**LARGE, shards=str(shards), arch="llama")
    run, _ = cut_and_resumed(tmp_path, 3, other)
    assert run.model.cfg.vocab_size == 70_000
    assert all(np.isfinite(x) for x in run.at.losses)

    folder = tmp_path / "c"
    cut(folder, 3, config)
    run, warnings = resume(folder, shards=str(shards))
    assert warnings == []
    tokens = read_shard(shards / "train.bin").copy()
    tokens[-1] ^= 65_536  # what two bytes do not show
    write_shard(shards / "train.bin", tokens, 2**31)
    run.lock.release()
    refused("not the one it began with", resume, folder, shards=str(shards))
