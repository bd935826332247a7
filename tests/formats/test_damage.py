"""Damaged files of every format: an answer, or one error that names them."""

import json
import shutil

import numpy as np
import pytest
from fuzz import cut_in_two, damaged, fuzzed, tensors_of
from llamas import write_both
from spelling import own_files, tokenizer_bin, tokens_of, vocab_of

from llmnb import GPT2, GPT2Config
from llmnb.formats import starter
from llmnb.formats.checkpoint import write_folder
from llmnb.formats.published import INDEX
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.formats.shard import read_shard, write_shard
from llmnb.formats.vocabulary import open_encoding, read_tokenizer
from llmnb.model.tensors import parameter_shapes
from llmnb.text import tokenizer
from llmnb.train.choices import Example, read_examples, write_examples

CFG = GPT2Config(3, 5, 1, 1, 4)


def model(path):
    """The model of a file, or that of the folder for its config.json."""
    whole = path.parent if path.name == "config.json" else path
    if path.name.startswith("model-"):
        whole = path.parent / INDEX
    return GPT2.from_checkpoint(whole, 1, 2, "reference")


def merges(path):
    return open_encoding(path.with_name("vocab.json"))


def tensors(path):
    file = TensorFile(path)
    for name in file.names:
        assert file[name].shape == file.shape(name)


def shard(path):
    got = read_shard(path)
    assert got.nbytes == path.stat().st_size - 1024
    return got.sum()


def choices(path):
    for example in read_examples(path):
        assert len(example.context) and 0 <= example.label < 4
        assert all(map(len, example.endings))


def ranks(path):
    found = open_encoding(path)
    assert found.decode(found.encode_ordinary("tab")) == "tab"


READERS = {
    "3.bin": model, "5.bin": model, "model.safetensors": model,
    "config.json": model, "model-0.safetensors": model,
    "model-1.safetensors": model, INDEX: model,
    "any.safetensors": tensors, "shard.bin": shard,
    "wide.bin": shard,
    "state.bin": lambda path: starter.read_debug_state(path, CFG),
    "tokens.bin": read_tokenizer, "encoding.bin": open_encoding,
    "vocab.json": open_encoding, "a.tiktoken": ranks,
    "own/merges.txt": merges, "choices.bin": choices,
    "llama/model.safetensors": model, "llama-cut/config.json": model,
    f"llama-cut/{INDEX}": model, "llama-cut/model-0.safetensors": model,
    "gemma3_text-cut/config.json": model,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a small good file of each format, and one to damage."""
    good = tmp_path_factory.mktemp("good")
    small = GPT2(CFG, 1, 2, "reference")
    small.save_checkpoint(good / "3.bin")
    small.save_checkpoint(good / "5.bin", "bf16")
    write_folder(good, CFG, small.params)
    whole = (good / "model.safetensors").read_bytes()
    cut_in_two(good, tensors_of(good))
    (good / "model.safetensors").write_bytes(whole)
    some = {"x": np.arange(5.0), "y": np.arange(3)}
    write_tensors(good / "any.safetensors", some, {"k": "v"})
    write_shard(good / "shard.bin", np.arange(4))
    rows = [np.arange(n) for n in range(1, 6)]
    example = Example(rows[4], rows[:4], 2)
    write_examples(good / "choices.bin", [example, example])
    write_shard(good / "wide.bin", np.arange(4) + 65536)
    tokens = np.array([[0, 4], [2, 1]], np.int32)
    grads = {n: np.ones(s, "f4") for n, s in parameter_shapes(CFG).items()}
    state = tokens, tokens, np.zeros((2, 2, 5), np.float32), 1.5, grads
    state = starter.DebugState(*state)
    starter.write_debug_state(good / "state.bin", CFG, state)
    encoding = tokenizer.train("ab abc", 259)
    for name in ("tokens.bin", "encoding.bin"):
        (good / name).write_bytes(tokenizer_bin(tokens_of(encoding), 258))
    (good / "vocab.json").write_text(json.dumps(vocab_of(encoding)))
    (good / "own").mkdir()
    own_files(good / "own", encoding)
    tokenizer.save(encoding, good / "a.tiktoken")
    for family in ("llama", "gemma3_text"):
        write_both(good, family)
    return good, shutil.copytree(good, tmp_path_factory.mktemp("bad") / "x")


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_is_read(folders, name):
    READERS[name](folders[0] / name)


@pytest.mark.parametrize("name", READERS)
@fuzzed(150)
def test_a_damaged_file_is_an_answer_or_one_error(folders, name, data):
    good, bad = folders
    damaged(data, READERS[name], good / name, bad / name)


# what each file is taken for instead, by the number its reader wants
NAMES = ["3.bin", "model.safetensors", "config.json", INDEX, "shard.bin"]
NAMES += ["state.bin", "tokens.bin", "vocab.json", "a.tiktoken"]
OPTIONAL = ["config.json", "own/merges.txt"]  # others need not be there
NAMES += OPTIONAL[1:]
OTHERS = {
    "a zip archive": b"PK\x03\x04" + bytes(2000),
    "a pickle": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(2000),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid "
    b"sha256:248dfc39\nsize 548105171\n",
    "a web page": b"\n<!DOCTYPE html>\n<html><head>" + bytes(2000),
    "an empty file": b"",
    "a GGUF file": b"GGUF\x03\0\0\0" + bytes(2000),
    "a packed file": b"\x1f\x8b\x08" + bytes(2000),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(2000),
    "no such file": b"Entry not found",
    "a multiple choice": (20240522).to_bytes(4, "little") + bytes(1500),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_something_else_says_so(folders, name, what):
    good, bad = folders
    (bad / name).write_bytes(OTHERS[what])
    try:
        with pytest.raises(ValueError, match=f"{name}:.*this is .*{what}"):
            READERS[name](bad / name)
    finally:
        shutil.copy(good / name, bad / name)


@pytest.mark.parametrize("name", [x for x in NAMES if x not in OPTIONAL])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        READERS[name](tmp_path / name)
