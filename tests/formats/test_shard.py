"""Shards: tokens in files."""

import os

import numpy as np
import pytest
from fuzz import answer, mangled
from hypothesis import given, settings

from llmnb.formats.shard import (
    Shards,
    find_shards,
    read_shard,
    sample_tokens,
    shard_length,
    write_shard,
)
from llmnb.text.data import DataLoader


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, None])
def test_shard_is_written_and_read(tmp_path, dtype):
    tokens = [0, 1, 50256, 65535]
    path = tmp_path / "a.bin"
    write_shard(path, np.array(tokens, dtype) if dtype else tokens)
    got = read_shard(path)
    assert got.dtype == np.uint16
    assert isinstance(got, np.memmap)
    assert got.tolist() == tokens
    assert os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1


def test_shard_is_llm_c_format(tmp_path):
    write_shard(tmp_path / "a.bin", [258, 3, 5])
    raw = (tmp_path / "a.bin").read_bytes()
    numbers = b"".join(n.to_bytes(4, "little") for n in (20240520, 1, 3))
    assert raw == numbers + bytes(1012) + b"\2\1\3\0\5\0"


def test_strided_tokens_are_written(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(10)[::-3])
    assert read_shard(tmp_path / "a.bin").tolist() == [9, 6, 3, 0]


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        ([], TypeError, "tokens must hold integers, got float64"),
        (
            np.empty(0, int),
            ValueError,
            r"must be 1 to 2147483647 .* got shape \(0,",
        ),
        ([1, -1], ValueError, r"must lie in \[0, 65536\), got -1"),
        ([1, 65536], ValueError, r"must lie in \[0, 65536\), got 65536"),
        ([1.0], TypeError, "tokens must hold integers, got float64"),
        ([[1]], ValueError, r"in one dimension, got shape \(1, 1\)"),
    ],
)
def test_bad_tokens(tmp_path, tokens, error, message):
    write_shard(tmp_path / "a.bin", [7])
    with pytest.raises(error, match=message):
        write_shard(tmp_path / "a.bin", tokens)
    assert read_shard(tmp_path / "a.bin").tolist() == [7]


GOOD = np.array([20240520, 1, 4] + [0] * 253, "<i4")


def with_header(place, value):
    header = GOOD.copy()
    header[place] = value
    return header.tobytes() + bytes(8)


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "0 bytes are too few for a header of 1024"),
        (GOOD.tobytes()[:-1], "1023 bytes are too few for a header of 1024"),
        (with_header(0, 1), "magic number must be 20240520, got 1"),
        (with_header(0, 20240326), "magic number .* got 20240326"),
        (with_header(1, 2), "version must be 1, got 2"),
        (with_header(2, 0), "token count must be positive, got 0"),
        (with_header(2, -4), "token count must be positive, got -4"),
        (with_header(2, 5), "size for 5 tokens must be 1034 bytes, got 1032"),
        (with_header(2, 4)[:-1], "4 tokens must be 1032 bytes, got 1031"),
        (with_header(2, 4) + b"x", "4 tokens must be 1032 bytes, got 1033"),
        (with_header(2, 2**31 - 1), "must be 4294968318 bytes, got 1032"),
    ],
)
def test_bad_shard(tmp_path, raw, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        read_shard(path)
    assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(ValueError, match=message):
        DataLoader([path], 1, 1)


@pytest.mark.parametrize(
    "raw, what",
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(2000), "a zip archive, as .* NumPy's savez"),
        (b"\x1f\x8b\x08" + bytes(2000), "unpack it first"),
        (with_header(0, 20240326), "a model in llm.c's format"),
        (b"", "this is an empty file"),
    ],
)
def test_a_shard_that_is_something_else_says_so(tmp_path, raw, what):
    (tmp_path / "train.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=f"train.bin: .*{what}"):
        read_shard(tmp_path / "train.bin")


def test_missing_shard(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.bin"):
        read_shard(tmp_path / "none.bin")
    with pytest.raises(FileNotFoundError, match=r"none\.bin"):
        DataLoader([tmp_path / "none.bin"], 1, 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(raw=mangled(GOOD.tobytes() + bytes(range(8))))
def test_a_mangled_shard(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "mangled.bin"
    got = answer(read_shard, path, raw)
    if not isinstance(got, Exception):
        assert 2 * len(got) == len(raw) - 1024
        got.sum()


@pytest.mark.skipif(os.name == "nt", reason="Windows has none of these")
def test_a_shard_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "train.bin")  # which an open() would wait for
    (tmp_path / "val.bin").symlink_to("/dev/zero")
    (tmp_path / "a.bin").mkdir()
    for name in ("train.bin", "val.bin", "a.bin"):
        with pytest.raises(ValueError, match=f"{name}: .* be a regular file"):
            read_shard(tmp_path / name)
    with pytest.raises(ValueError, match="train.bin: .* be a regular file"):
        DataLoader(find_shards(tmp_path)[0], 1, 1)


# folders of shards


def test_the_length_of_a_shard(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(300))
    assert shard_length(tmp_path / "a.bin") == 300


@pytest.mark.parametrize(
    "train, val",
    [
        (["train.bin"], ["val.bin"]),
        (["train_000000.bin", "train_000001.bin"], ["val_000000.bin"]),
        (["fineweb_train_000001.bin"], ["fineweb_val_000000.bin"]),
        (["tiny_shakespeare_train.bin"], ["tiny_shakespeare_val.bin"]),
    ],
)
def test_shards_are_found_by_name(tmp_path, train, val):
    for name in [*train, *val, "tokenizer.bin", "trainx.bin", "train.txt"]:
        (tmp_path / name).write_bytes(b"")
    got = [[x.name for x in part] for part in find_shards(tmp_path)]
    assert got == [train, val]


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_folder_without_shards(tmp_path, name):
    other = {"train": "val", "val": "train"}[name]
    (tmp_path / f"{other}.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"has no {name}.bin"):
        find_shards(tmp_path)


def test_many_shards_as_one_text(tmp_path):
    paths = [tmp_path / f"train_{k:06}.bin" for k in range(100)]
    for k, path in enumerate(paths):
        write_shard(path, np.arange(50) + 100 * k)
    shards = Shards(paths)
    assert len(shards) == 5000 and shards.paths == paths
    assert np.asarray(shards).tolist() == [
        100 * k + i for k in range(100) for i in range(50)
    ]
    sample = sample_tokens(shards, 500)
    assert sample.tolist() == [
        100 * k + i for k in range(0, 100, 2) for i in range(10)
    ]
    assert len(sample_tokens(shards, 10**9)) == 2500
    assert sample_tokens(np.arange(9), 4).tolist() == [0, 1, 2, 3]
    paths[7].write_bytes(b"")
    with pytest.raises(ValueError, match="train_000007"):
        Shards(paths)
