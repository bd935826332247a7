"""Shards: tokens in files."""

import errno
import os

import numpy as np
import pytest
from fuzz import header, refused

from llmnb.formats import shard
from llmnb.formats.shard import Shards, find_shards, read_shard, write_shard
from llmnb.text.data import DataLoader

TOKENS = [0, 1, 50256, 65535]
GIVEN = [np.array(TOKENS, kind) for kind in ("u2", "i4", "i8")]
GIVEN += [TOKENS, np.array(TOKENS[::-1])[::-1]]


@pytest.mark.parametrize("tokens", GIVEN)
def test_shard_is_written_and_read(tmp_path, tokens):
    path = tmp_path / "a.bin"
    write_shard(path, tokens)
    got = read_shard(path)
    assert got.dtype == np.uint16
    assert isinstance(got, np.memmap)
    assert got.tolist() == TOKENS
    assert os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1


@pytest.mark.parametrize(("tokens", "numbers", "body", "dtype"), [
    ([258, 3, 5], (20240520, 1, 3), b"\2\1\3\0\5\0", np.uint16),
    ([65536, 3], (20240801, 7, 2), b"\0\0\1\0\3\0\0\0", np.uint32),
])  # fmt: skip
def test_shard_is_llm_c_format(tmp_path, tokens, numbers, body, dtype):
    path = tmp_path / "a.bin"
    write_shard(path, tokens)
    first = b"".join(n.to_bytes(4, "little") for n in numbers)
    assert path.read_bytes() == first + bytes(1012) + body
    got = read_shard(path)
    assert (got.dtype, got.tolist()) == (dtype, tokens)
    assert shard.shard_length(path) == len(tokens)


@pytest.mark.skipif(os.name == "nt", reason="no limit of a file's size")
def test_a_shard_that_does_not_fit_is_named(tmp_path):
    """As on a full disk: the system's error, and the file."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_shard(tmp_path / "a.bin", range(9999))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("vocab_size", [65536, 65537])
def test_the_vocabulary_chooses_the_width(tmp_path, vocab_size):
    path, width = tmp_path / "a.bin", 2 if vocab_size == 65536 else 4
    write_shard(path, [1, 2, 3], vocab_size)
    assert path.stat().st_size == 1024 + 3 * width
    assert read_shard(path).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=rf"\[0, {vocab_size}\), got"):
        write_shard(path, [vocab_size], vocab_size)


@pytest.mark.parametrize("vocab_size", [0, 2**31, 2**40])
def test_a_token_that_four_bytes_do_not_hold(tmp_path, vocab_size):
    most = min(vocab_size, 2**31)
    with pytest.raises(ValueError, match=rf"lie in \[0, {most}\), got"):
        write_shard(tmp_path / "a.bin", [2**32 + 5], vocab_size)
    assert os.listdir(tmp_path) == []


def test_shards_of_large_tokens_are_read_as_arrays_are(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**31, 999)
    paths = [tmp_path / "train_000000.bin", tmp_path / "train_000001.bin"]
    write_shard(paths[0], tokens)
    write_shard(paths[1], tokens % 65536)
    whole = [*tokens, *(tokens % 65536)]
    assert np.asarray(Shards(paths)).tolist() == whole
    sample = shard.sample_tokens(Shards(paths), 8)
    assert sample.tolist() == whole[:4] + whole[999:1003]
    feeds = paths, [tokens, tokens % 65536]
    loaders = [DataLoader(x, 2, 7, seed=5) for x in feeds]
    for _ in range(200):
        a, b = (loader.next_batch() for loader in loaders)
        assert np.array_equal(a, b)


@pytest.mark.parametrize("tokens, error, message", [
    ([], TypeError, "tokens must hold integers, got float64"),
    (np.empty(0, int), ValueError, r"be 1 to 2147483647 .* got shape \(0"),
    ([1, -1], ValueError, r"must lie in \[0, 2147483648\), got -1"),
    ([1, 2**31], ValueError, r"must lie in .*\), got 2147483648"),
    ([1.0], TypeError, "tokens must hold integers, got float64"),
    ([[1]], ValueError, r"in one dimension, got shape \(1, 1\)"),
])  # fmt: skip
def test_bad_tokens(tmp_path, tokens, error, message):
    write_shard(tmp_path / "a.bin", [7])
    with pytest.raises(error, match=message):
        write_shard(tmp_path / "a.bin", tokens)
    assert read_shard(tmp_path / "a.bin").tolist() == [7]


def saying(count, magic=20240520, version=1):
    """A shard of eight bytes whose header says that it has `count` tokens."""
    return header(magic, version, count) + bytes(8)


def wide(count, version=7):
    return saying(count, 20240801, version)


GOOD = saying(4)


@pytest.mark.parametrize("raw, message", [
    (b"", "the size must be at least 1024 bytes, got 0"),
    (GOOD[:1023], "the size must be at least 1024 bytes, got 1023"),
    (saying(4, 1), "magic number must be 20240520, got 1"),
    (saying(4, 20240326), "magic number .* got 20240326"),
    (saying(4, version=2), "version must be 1, got 2"),
    (saying(0), "token count must be positive, got 0"),
    (saying(-4), "token count must be positive, got -4"),
    (saying(5), "size for 5 tokens must be 1034 bytes, got 1032"),
    (GOOD[:-1], "4 tokens must be 1032 bytes, got 1031"),
    (GOOD + b"x", "4 tokens must be 1032 bytes, got 1033"),
    (saying(2**31 - 1), "must be 4294968318 bytes, got 1032"),
    (wide(2, 1), "version must be 7, got 1"),
    (wide(0), "token count must be positive, got 0"),
    (wide(3), "size for 3 tokens must be 1036 bytes, got 1032"),
])  # fmt: skip
def test_bad_shard(tmp_path, raw, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(raw)
    refused(f"bad.bin: .*{message}", read_shard, path)
    refused(message, DataLoader, path, 1, 1)


@pytest.mark.skipif(os.name == "nt", reason="Windows has none of these")
def test_a_shard_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "train.bin")  # which an open() would wait for
    (tmp_path / "val.bin").symlink_to("/dev/zero")
    (tmp_path / "a.bin").mkdir()
    for name in ("train.bin", "val.bin", "a.bin"):
        refused(f"{name}: .* be a regular file", read_shard, tmp_path / name)
    with pytest.raises(ValueError, match="train.bin: .* be a regular file"):
        DataLoader(find_shards(tmp_path)[0], 1, 1)


# folders of shards


@pytest.mark.parametrize("train, val", [
    (["train.bin"], ["val.bin"]),
    (["train_000000.bin", "train_000001.bin"], ["val_000000.bin"]),
    (["fineweb_train_000001.bin"], ["fineweb_val_000000.bin"]),
    (["tiny_shakespeare_train.bin"], ["tiny_shakespeare_val.bin"]),
])  # fmt: skip
def test_shards_are_found_by_name(tmp_path, train, val):
    for name in [*train, *val, "tokenizer.bin", "trainx.bin", "train.txt"]:
        (tmp_path / name).touch()
    got = [[x.name for x in part] for part in find_shards(tmp_path)]
    assert got == [train, val]


@pytest.mark.parametrize("name, other", [("train", "val"), ("val", "train")])
def test_a_folder_without_shards(tmp_path, name, other):
    (tmp_path / f"{other}.bin").touch()
    with pytest.raises(FileNotFoundError, match=f"has no {name}.bin"):
        find_shards(tmp_path)


def test_many_shards_as_one_text(tmp_path):
    paths = [tmp_path / f"train_{k:06}.bin" for k in range(100)]
    for k, path in enumerate(paths):
        write_shard(path, np.arange(50) + 100 * k)
    shards = Shards(paths)
    assert len(shards) == 5000 and shards.paths == paths
    whole = np.arange(50) + 100 * np.arange(100)[:, None]
    assert np.array_equal(shards, whole.ravel())
    sample = shard.sample_tokens(shards, 500)
    assert np.array_equal(sample, whole[::2, :10].ravel())
    assert len(shard.sample_tokens(shards, 10**9)) == 2500
    assert shard.sample_tokens(np.arange(9), 4).tolist() == [0, 1, 2, 3]
    paths[7].write_bytes(b"")
    with pytest.raises(ValueError, match="train_000007"):
        Shards(paths)
