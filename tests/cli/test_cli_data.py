"""`llmnb data`: shards of any text, and training on them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from commands import BYTES, OF_SHARDS, PARTS, TINY

from llmnb.formats.shard import read_shard, write_shard
from llmnb.text import corpus, shards, tokenizer


def test_data_then_train(done, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 200, "utf-8")
    ask = "data", "shards", "--corpus", "a.txt", "--vocab-size", 260
    assert "llmnb train --shards shards" in done(*ask)
    names = sorted(x.name for x in (tmp_path / "shards").iterdir())
    assert names == ["tokenizer.tiktoken", "train.bin", "val.bin"]
    encoding = tokenizer.load(tmp_path / "shards" / "tokenizer.tiktoken")
    assert encoding.n_vocab == 260
    parts = [read_shard(tmp_path / "shards" / f"{x}.bin") for x in PARTS]
    text = encoding.decode(np.concatenate(parts).tolist())
    assert text == "<|endoftext|>" + "spam and eggs. " * 200
    out = done("train", "--shards", "shards", *OF_SHARDS.split())
    assert "shards in shards" in out and "260 tokens" in out


def test_shards_of_another_tokenizer(failed, done, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 200, "utf-8")
    done("data", "out", "--corpus", "a.txt", "--vocab-size", 260)
    tokenizer.save(tokenizer.byte(), tmp_path / "out" / "tokenizer.tiktoken")
    err = failed("train", "--shards", "out", *OF_SHARDS.split())
    assert "its tokenizer, out/tokenizer.tiktoken, has 257" in err
    err = failed("train", "--shards", "out", "--tokenizer", "gpt2")
    assert "--shards stands for a corpus: leave out --tokenizer" in err
    assert not (tmp_path / "runs").exists()


def test_an_empty_text_has_no_tokenizer(failed, tmp_path):
    (tmp_path / "a.txt").touch()
    err = failed("data", "out", "--corpus", "a.txt")
    assert "there is no text for a tokenizer to learn from" in err


def test_data_goes_on_and_refuses_other_options(done, failed, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 900, "utf-8")
    ask = ["data", "out", "--corpus", "a.txt", "--tokenizer", "byte"]
    ask += ["--shard-tokens", 5000, "--val-tokens", 700]

    written = []

    def write_two(path, tokens, vocab_size):
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write_shard(path, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write_shard", write_two)
        assert "out/train_000001.bin: No space left" in failed(*ask)
    names = {x.name for x in (tmp_path / "out").iterdir()}
    assert {"unfinished.json", "val.bin", "train_000000.bin"} < names
    assert "begun with limit 0, not 99" in failed(*ask, "--limit", 99)
    done(*ask)
    assert len(read_shard(tmp_path / "out" / "val.bin")) == 700
    ask[1] = "other"
    done(*ask)
    for path in (tmp_path / "other").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_outputs_in_the_corpus_are_not_read(done, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 900, "utf-8")
    ask = ["train", "--corpus", ".", "--out"]
    first = done(*ask, "one", *TINY.split())
    assert "1 document, 13,500 characters\n" in first
    saved = (tmp_path / "one" / "model.bin").read_bytes()
    (tmp_path / "one" / "model.bin").unlink()
    (tmp_path / "one" / "state_00000006.safetensors").unlink()
    done("train", "--resume", "one")
    assert (tmp_path / "one" / "model.bin").read_bytes() == saved
    size = "1 document, 13,500 characters; passed over: runs or shards"
    assert f"{size} 1" in done(*ask, "two", *TINY.split())
    assert (tmp_path / "two" / "model.bin").read_bytes() == saved
    data = ["data", "shards", "--corpus", ".", "--tokenizer", "byte"]
    seen = []
    for passed, again in ((2, []), (3, ["--force"])):
        assert f"{size} {passed}" in done(*data, *again)
        files = tmp_path.glob("shards/*")
        seen.append({x.name: x.read_bytes() for x in files})
    assert seen[0] == seen[1]


@pytest.mark.parametrize("corpus", [".", "../mine", "a.txt ../mine"])
def test_the_corpus_is_not_written_into(llmnb, tmp_path, monkeypatch, corpus):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    Path("a.txt").write_text("spam and eggs. " * 900, "utf-8")
    ask = "--corpus", *corpus.split(), "--force", *BYTES
    for command in ("data .", "train --out ../mine"):
        code, out, err = llmnb(*command.split(), *ask)
        assert (code, out) == (1, "") and "is the corpus: " in err
        assert err.count("\n") == 1
    assert [x.name for x in Path().iterdir()] == ["a.txt"]


def test_bad_records_and_the_special_token(llmnb, done, failed, tmp_path):
    """In every command; train, data and eval read the same documents."""
    text = "spam<|endoftext|>eggs. " * 300
    lines = [json.dumps({"body": text})] * 2 + ["[", '{"body": null}']
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join([*lines, '{"body": "\\ud800"}']))
    ask = ["--corpus", "a.jsonl.gz", "--field", "body"]
    err = failed("data", "no", *ask, *BYTES)
    assert "gz:3: must be JSON" in err and "--skip-bad p" in err
    said = "2 documents, 13,800 characters; passed over: bad records 3"
    more = "; <|endoftext|> as ordinary text: 600 (--endoftext"
    train = "train", *TINY.split()[4:], "--out"
    for out, flags in ("x", []), ("y", ["--endof"]):
        flags = ["--skip-bad", *flags, *BYTES]
        for command in (("data", out), (*train, f"run{out}")):
            said_now = done(*command, *ask, *flags)
            assert said in said_now
            assert (more in said_now) == (out == "x")
        parts = [read_shard(tmp_path / out / f"{x}.bin") for x in PARTS]
        want = [text, text]
        ids = corpus.encode_documents(tokenizer.byte(), want, out == "y")
        assert np.array_equal(np.concatenate(parts), ids)
        few = "--text", "a.jsonl.gz", "--field", "body", "--limit", 100
        said_now = done("eval", "runx", *few, *flags[:-2])
        assert "passed over" not in said_now  # none so early
    prompt = "a<|endoftext|>b"
    code, out, err = llmnb("generate", "runx", "--prompt", prompt)
    assert code == 0 and err.startswith("<|endoftext|> in the prompt is ordin")
    code, _, err = llmnb("generate", "runx", "--prompt", prompt, "--endoftext")
    assert (code, err) == (0, "")


def test_a_million_blanks(llmnb, done, tmp_path, trained, monkeypatch):
    """In every command; kinds of blanks and their tokens: tests/text."""
    text = "spam and eggs. " * 99 + " " * 1_000_000 + "end"
    (tmp_path / "a.txt").write_text(text)
    out = done("data", "out", "--corpus", "a.txt", *BYTES)
    assert "1 document, 1,001,488 characters" in out
    ask = TINY.replace("--limit 30000", "--corpus a.txt").split()
    done("train", "--out", "run", *ask)
    cheap = lambda model, tokens, *_: [tokens[1:] * 0]  # noqa: E731
    monkeypatch.setattr("llmnb.train.evaluation.text_losses", cheap)
    done("eval", trained, "--text", "a.txt")
    code, _, err = llmnb("generate", trained, "--prompt", text)
    assert code == 0 and "model sees the last" in err
