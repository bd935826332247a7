"""Arrays in one file: the library reads what we write, and we what it does."""

import json
import os

import numpy as np
import pytest
from fuzz import fuzzed, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from measure import peak

from llmnb.formats.safetensors import DTYPES, NAMES, TensorFile, write_tensors

arrays = st.sampled_from(sorted(NAMES.values())).flatmap(
    lambda kind: hnp.arrays(
        np.dtype(DTYPES[kind]), hnp.array_shapes(min_dims=0, min_side=0)
    )
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=8), arrays, max_size=5))
def test_there_and_back(tmp_path_factory, tensors):
    from safetensors.numpy import load_file

    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("x") / "a.safetensors"
    write_tensors(path, tensors, {"a": "ü"})
    ours = TensorFile(path)
    assert ours.metadata == {"a": "ü"}
    assert sorted(ours.names) == sorted(tensors)
    theirs = load_file(path)
    for name, x in tensors.items():
        assert ours.shape(name) == x.shape
        for got in (ours[name], theirs[name]):
            assert got.dtype == x.dtype
            assert got.shape == x.shape
            assert got.tobytes() == x.tobytes()


def test_the_librarys_files_are_read(tmp_path):
    from safetensors.numpy import save_file

    x = np.arange(6, dtype=np.float16).reshape(2, 3)
    save_file({"x": x}, tmp_path / "a", metadata={"k": "v"})
    file = TensorFile(tmp_path / "a")
    assert (file.metadata, file.dtype("x")) == ({"k": "v"}, "F16")
    assert np.array_equal(file["x"], x)
    with pytest.raises(KeyError):
        _ = file["y"]


def test_transposed_arrays_are_written_as_they_look(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    given = {"x": x.T, "part": x[:, 1:3]}
    write_tensors(tmp_path / "a", given)
    for name, want in given.items():
        assert np.array_equal(TensorFile(tmp_path / "a")[name], want)


def by_hand(path, table, body):
    head = json.dumps(table).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)


def test_types_that_numpy_lacks(tmp_path):
    """bfloat16 is the upper half of float32; of float8 nothing is known."""
    x = np.array([1.0, -2.5, np.inf, 3.140625], np.float32)
    body = (x.view(np.uint32) >> 16).astype("<u2").tobytes()
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    by_hand(tmp_path / "a", {"x": entry}, body)
    assert np.array_equal(TensorFile(tmp_path / "a")["x"], x)

    entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
    by_hand(tmp_path / "a", {"x": entry}, bytes(4))
    with pytest.raises(ValueError, match="x is F8_E4M3"):
        _ = TensorFile(tmp_path / "a")["x"]


def rows(*kinds):
    """Tables of one row, whose dtype, shape and places do not go together."""
    names = "dtype", "shape", "data_offsets"
    return [{"x": dict(zip(names, x, strict=False))} for x in kinds]


def test_metadata_that_are_null(tmp_path):
    """The library takes them for none."""
    row = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    by_hand(tmp_path / "a", {"__metadata__": None, "x": row}, b"\1\2")
    file = TensorFile(tmp_path / "a")
    assert file.metadata == {} and file["x"].tolist() == [1, 2]


@pytest.mark.skipif(os.name == "nt", reason="no such pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a")
    place = os.open(tmp_path / "a", os.O_RDWR)
    try:
        os.write(place, bytes(8))  # so that no reader waits
        refused("a: must be a regular file", TensorFile, tmp_path / "a")
    finally:
        os.close(place)


U8 = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
LIES = rows(
    ("F32", [2**40], [0, 2**42]), ("F32", [3], [0, 8]), ("F32", [2], [4, 12]),
    ("F32", [2**62, 4], [0, 0]), ("F32", [-2], [0, 8]), ("x" * 5000,),
) + [
    {"__metadata__": {"llmnb.crc32": note}, "x": U8}
    for note in ("3", "{", "[" * 9000, '"x"')
] + [{"x": ["F32", [2], [0, 8]]}]  # fmt: skip


@pytest.mark.parametrize("table", LIES, ids=range(len(LIES)))
def test_a_table_that_lies_is_refused(tmp_path, table):
    by_hand(tmp_path / "a", table, bytes(2 if "__metadata__" in table else 8))
    refused("not a whole safetensors file", TensorFile, tmp_path / "a")


@pytest.mark.parametrize(
    "raw", [b"", b"\0" * 7, b"\xff" * 8, b"\xff\xff\xff\x7f" + bytes(60)]
)
def test_no_table_at_all(tmp_path, raw):
    (tmp_path / "a").write_bytes(raw)
    refused("not a whole safetensors file", TensorFile, tmp_path / "a")


@fuzzed(200)
def test_a_flipped_bit_is_never_another_array(tmp_path_factory, data):
    """Wherever it is: the arrays come back as they were, or not at all."""
    path = tmp_path_factory.mktemp("x") / "a"
    tensors = {"x": np.arange(6.0), "y": np.arange(6, dtype=np.int32)}
    write_tensors(path, tensors, {"k": "v"})
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        file = TensorFile(path)
        got = {name: file[name] for name in tensors}
    except KeyError:
        return  # a name has changed, which its reader sees
    except ValueError as error:
        assert str(path) in str(error)
        return
    for name, x in tensors.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        assert got[name].tobytes() == x.tobytes()


def test_a_shape_that_is_turned_is_another_array(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, {"x": np.ones((2, 3))})
    path.write_bytes(path.read_bytes().replace(b"[2, 3]", b"[3, 2]"))
    with pytest.raises(ValueError, match="x is damaged"):
        TensorFile(path)["x"]


def test_checksums_are_not_among_the_metadata(tmp_path):
    """So that a file written from another's metadata has its own."""
    write_tensors(tmp_path / "a", {"x": np.arange(3)}, {"k": "v"})
    file = TensorFile(tmp_path / "a")
    assert file.metadata == {"k": "v"}
    write_tensors(tmp_path / "b", {"x": file["x"] + 1}, file.metadata)
    assert TensorFile(tmp_path / "b")["x"].tolist() == [1, 2, 3]


def test_a_table_of_megabytes_is_refused_unread(tmp_path):
    row = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    head = b"{" + b",".join(row % i for i in range(170_000)) + b"}"
    path = tmp_path / "a"
    path.write_bytes(len(head).to_bytes(8, "little") + head)

    def read():
        refused("a: not a whole .*too long", TensorFile, path)

    assert peak(read) < 1 << 20


def test_what_none_would_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="must take at most 8,388,608 bytes"):
        write_tensors(tmp_path / "a", {}, {"k": "v" * (1 << 23)})
    with pytest.raises(TypeError, match="z must be one of .*complex128"):
        write_tensors(tmp_path / "a", {"z": np.zeros(2, complex)})
    x = np.zeros(2)
    for tensors, note in (({1: x}, {}), ({}, {"k": 3}), ({}, {3: "v"})):
        with pytest.raises(TypeError, match="must be str, got [13]"):
            write_tensors(tmp_path / "a", tensors, note)
    for tensors, note in (
        ({"__metadata__": x}, {}),
        ({"x": x}, {"llmnb.crc32": "{}"}),
    ):
        with pytest.raises(ValueError, match="is taken, as a name"):
            write_tensors(tmp_path / "a", tensors, note)
    assert not list(tmp_path.iterdir())
