"""`llmnb data`: shards of any text, and training on them."""

import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import BYTES, PARTS, TINY

from llmnb.cli import train as train_command
from llmnb.formats.shard import read_shard, write_shard
from llmnb.text import corpus, shards, tokenizer
from llmnb.train import evaluation


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


def test_a_shard_cut_short_while_training(llmnb, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 900, "utf-8")
    assert llmnb("data", "out", "--corpus", "a.txt", *BYTES)[0] == 0
    shown = train_command._show

    def cut(bar, run, *rest):
        if run.at.step == 4:
            with open(tmp_path / "out" / "train.bin", "r+b") as file:
                file.truncate(1024)
        shown(bar, run, *rest)

    monkeypatch.setattr(train_command, "_show", cut)
    ask = *TINY.split(), "--save-every", 2, "--out", "run"
    code, _, err = llmnb("train", "--shards", "out", *ask)
    assert code == 1 and re.search(
        r"error: out.train\.bin: has been cut short, token [\d,]+ is gone; "
        r"the last checkpoint is state_00000004\.safetensors\n$",
        err,
    )


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


@pytest.mark.parametrize("blank", [" ", "\n", "\u00a0"])
def test_a_million_blanks_in_every_command(llmnb, tmp_path, blank):
    text = "spam and eggs. " * 99 + blank * 1_000_000 + "end"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    code, out, _ = llmnb("data", "out", "--corpus", "a.txt", *BYTES)
    assert code == 0 and "1 documents, 1,001,488 characters" in out
    tokens = [read_shard(tmp_path / "out" / f"{x}.bin") for x in PARTS]
    ids = corpus.encode_documents(tokenizer.byte(), [text])
    assert np.array_equal(np.concatenate(tokens), ids)
    ask = ["train", "--corpus", "a.txt", *TINY.split()[4:], "--out", "run"]
    assert llmnb(*ask, *BYTES)[0] == 0
    (tmp_path / "b.txt").write_text("a" + blank * 1_000_000, "utf-8")
    score = "eval", "run", "--text", "b.txt", "--limit", 1_000_001
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "text_losses", lambda m, x, *_: [x[1:] * 0])
        code, out, _ = llmnb(*score)
    assert code == 0 and f"{len((tmp_path / 'b.txt').read_bytes()):,} b" in out
    code, out, err = llmnb("generate", "run", "--prompt", blank * 1_000_000)
    assert code == 0 and "model sees the last" in err


def test_outputs_in_the_corpus_are_not_read(llmnb, tmp_path):
    (tmp_path / "a.txt").write_text("spam and eggs. " * 900, "utf-8")
    ask = ["train", "--corpus", ".", "--out"]
    code, first, _ = llmnb(*ask, "one", *TINY.split())
    assert code == 0 and "1 documents, 13,500 characters\n" in first
    saved = (tmp_path / "one" / "model.bin").read_bytes()
    (tmp_path / "one" / "model.bin").unlink()
    (tmp_path / "one" / "state_00000006.safetensors").unlink()
    assert llmnb("train", "--resume", "one")[0] == 0
    assert (tmp_path / "one" / "model.bin").read_bytes() == saved
    code, out, _ = llmnb(*ask, "two", *TINY.split())
    assert (
        code == 0 and "13,500 characters; passed over: runs or shards 1" in out
    )
    assert (tmp_path / "two" / "model.bin").read_bytes() == saved
    data = ["data", "shards", "--corpus", ".", "--tokenizer", "byte"]
    code, out, _ = llmnb(*data)
    assert (
        code == 0
        and "1 documents, 13,500 characters; passed over: runs or shards 2"
        in out
    )
    shards = {x.name: x.read_bytes() for x in tmp_path.glob("shards/*")}
    code, out, _ = llmnb(*data, "--force")
    assert (
        code == 0
        and "1 documents, 13,500 characters; passed over: runs or shards 3"
        in out
    )
    assert shards == {
        x.name: x.read_bytes() for x in tmp_path.glob("shards/*")
    }


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


def test_bad_records_and_the_special_token_in_every_command(llmnb, tmp_path):
    """And train, data and eval read the same documents."""
    text = "spam<|endoftext|>eggs. " * 300
    lines = [json.dumps({"body": text})] * 2 + ["[", '{"body": null}']
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join([*lines, '{"body": "\\ud800"}']))
    ask = ["--corpus", "a.jsonl.gz", "--field", "body"]
    code, _, err = llmnb("data", "no", *ask, *BYTES)
    assert code == 1 and "gz:3: must be JSON" in err and "--skip-bad p" in err
    said = "2 documents, 13,800 characters; passed over: bad records 3"
    more = "; <|endoftext|> as ordinary text: 600 (--endoftext"
    train = "train", *TINY.split()[4:], "--out"
    for out, flags in (
        ("x", ["--skip-bad"]),
        ("y", ["--skip-bad", "--endof"]),
    ):
        flags = [*flags, *BYTES]
        for command in (("data", out), (*train, f"run{out}")):
            code, said_now, err = llmnb(*command, *ask, *flags)
            assert code == 0 and said in said_now, err
            assert (more in said_now) == (out == "x")
        parts = [read_shard(tmp_path / out / f"{x}.bin") for x in PARTS]
        want = [text, text]
        ids = corpus.encode_documents(tokenizer.byte(), want, out == "y")
        assert np.array_equal(np.concatenate(parts), ids)
        code, out, _ = llmnb(
            "eval", "runx", "--text", "a.jsonl.gz", "--field", "body",
            "--limit", 100, *flags[:-2],
        )  # fmt: skip
        assert code == 0 and "passed over" not in out  # none so early
    prompt = "a<|endoftext|>b"
    code, out, err = llmnb("generate", "runx", "--prompt", prompt)
    assert code == 0 and err.startswith("<|endoftext|> in the prompt is ordin")
    code, _, err = llmnb("generate", "runx", "--prompt", prompt, "--endoftext")
    assert (code, err) == (0, "")
