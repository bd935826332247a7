"""The data loader."""

import os
import sys

import numpy as np
import pytest
from fuzz import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import peak

from llmnb.formats.shard import write_shard
from llmnb.text import data
from llmnb.text.data import DataLoader, split
from llmnb.text.readers import Readers

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def epoch(loader):
    """Every batch of one epoch, copied."""
    return [
        tuple(x.copy() for x in loader.next_batch())
        for _ in range(loader.batches_per_epoch)
    ]


def test_batches_in_order(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100, 113))
    shards = [tmp_path / "a.bin", np.arange(30)]
    loader = DataLoader(shards, 2, 3, shuffle=False)
    assert loader.batches_per_epoch == 2 + 4
    for _ in range(2):
        batches = epoch(loader)
        for x, y in batches:
            assert x.dtype == y.dtype == np.int32
            assert x.shape == y.shape == (2, 3)
            assert np.array_equal(y, x + 1)
        starts = [x.ravel().tolist() for x, _ in batches]
        want = [list(range(n, n + 6)) for n in (100, 106, 0, 6, 12, 18)]
        assert starts == want


def test_one_shard_needs_no_list(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(13))
    for shards in (path, str(path), np.arange(13)):
        loader = DataLoader(shards, 2, 3, shuffle=False)
        assert loader.next_batch()[0].ravel().tolist() == list(range(6))
    refused(r"a\.bin has 13 tokens", DataLoader, path, 1, 14)


@QUICK
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    B=st.integers(1, 5),
    T=st.integers(1, 7),
    seed=st.integers(0, 2**32 - 1),
    shuffle=st.booleans(),
)
def test_an_epoch_reads_each_window_once(sizes, B, T, seed, shuffle):
    sizes = [B * T + 1 + n for n in sizes]
    starts = np.cumsum([0, *sizes])
    shards = [np.arange(n) + s for n, s in zip(sizes, starts, strict=False)]
    loader = DataLoader(shards, B, T, seed=seed, shuffle=shuffle)
    windows = [(n - 1) // T for n in sizes]
    assert loader.batches_per_epoch == sum(w // B for w in windows)
    for _ in range(2):
        seen = []
        for x, y in epoch(loader):
            assert np.array_equal(y, x + 1)
            assert np.array_equal(x, x[:, :1] + np.arange(T))
            seen += x[:, 0].tolist()
        assert len(seen) == len(set(seen))
        for s, w in zip(starts, windows, strict=False):
            here = {n for n in seen if s <= n < s + w * T}
            assert here <= set(range(s, s + w * T, T))
            assert len(here) == w // B * B


def test_shuffle_is_the_same_on_every_machine():
    loader = DataLoader([np.arange(41)], 4, 5, seed=42)
    got = [loader.next_batch()[0][:, 0].tolist() for _ in range(4)]
    assert got[:2] == [[25, 30, 20, 0], [15, 5, 35, 10]]
    assert got[2:] == [[35, 15, 5, 10], [0, 30, 25, 20]]


def test_sizes_may_be_numbers_of_numpy():
    loader = DataLoader([np.arange(2000)], np.uint8(20), np.uint8(30), seed=1)
    plain = DataLoader([np.arange(2000)], 20, 30, seed=1)
    assert type(loader.batches_per_epoch) is int
    assert loader.batches_per_epoch == plain.batches_per_epoch == 3
    for _ in range(7):
        assert np.array_equal(loader.next_batch(), plain.next_batch())
    assert loader.state == plain.state


def test_windows_that_are_left_out_have_their_turn():
    loader = DataLoader([np.arange(29)], 4, 4, seed=0)
    batches = [x for _ in range(20) for x, _ in epoch(loader)]
    assert {*np.ravel(batches)[::4]} == {*range(0, 28, 4)}


def test_reset_goes_back_to_the_start():
    """To read the state, or to change what was read, changes nothing."""
    loader = DataLoader([np.arange(50), np.arange(70)], 2, 4, seed=9)
    start = {"epoch": 0, "shard": 0, "position": 0}
    state = loader.state
    assert state == start
    state["position"] = 3
    assert loader.state == start
    first = [x.tolist() for x, _ in epoch(loader)]
    loader.next_batch()
    assert loader.state == {"epoch": 1, "shard": 0, "position": 1}
    loader.reset()
    assert [x.tolist() for x, _ in epoch(loader)] == first


@pytest.mark.parametrize("state, message", [
    ({"epoch": 0}, r"epoch, shard and position, got \['epoch'\]"),
    ({"epoch": -1, "shard": 0, "position": 0}, "epoch must lie in .*-1"),
    ({"epoch": 0, "shard": 2, "position": 0}, r"shard .* \[0, 2\), got 2"),
    ({"epoch": 0, "shard": 0, "position": 6}, r"position .* got 6"),
])  # fmt: skip
def test_bad_state(state, message):
    loader = DataLoader([np.arange(49), np.arange(49)], 2, 4)
    loader.next_batch()
    before = loader.state
    with pytest.raises(ValueError, match=message):
        loader.state = state
    assert loader.state == before


@pytest.mark.parametrize("args, error, message", [
    (([], 1, 1), ValueError, "the list of shards is empty"),
    (([np.arange(8)], 2, 4), ValueError, "8 tokens, .* 2 x 4 needs 9"),
    (([np.arange(8)], 1, 8), ValueError, "8 tokens, .* 1 x 8 needs 9"),
    (([np.arange(0)], 1, 1), ValueError, "0 tokens, .* 1 x 1 needs 2"),
    (([np.arange(9), np.arange(3)], 1, 8), ValueError, "has 3 tokens"),
    (([np.ones(9)], 1, 1), TypeError, "must hold integers, got float64"),
    (([np.ones((9, 9), int)], 1, 1), ValueError, "one dimension"),
    (([[1, 2, 2**40]], 1, 1), ValueError, "lie in .*, got 1099511627776"),
    (([np.array([1, 2, 2**31])], 1, 1), ValueError, "got 2147483648"),
    (([np.uint64([2**63, 0])], 1, 1), ValueError, f"got {2**63}"),
    (([np.int16([1, -1])], 1, 1), ValueError, "lie in .*, got -1"),
    (([np.arange(9), [3, -5]], 1, 1), ValueError, "lie in .*, got -5"),
    (([np.ones(9, bool)], 1, 1), TypeError, "hold integers, got bool"),
    (([np.array([1, None])], 1, 1), TypeError, "integers, got object"),
    (([["1", "2", "3"]], 1, 1), TypeError, "must hold integers, got <U1"),
    (([1, 2, 3], 1, 1), ValueError, r"one dimension, got shape \(\)"),
    (([[]], 1, 1), ValueError, "0 tokens, .* 1 x 1 needs 2"),
    (([np.arange(9)], 0, 1), ValueError, "batch_size .*, got 0"),
    (([np.arange(9)], 1, 0), ValueError, "seq_len .*, got 0"),
    (([np.arange(9)], 1, 1.5), TypeError, "seq_len must be int, got flo"),
    (([np.arange(9)], 1, 1, -1), ValueError, "seed .*, got -1"),
    (([np.arange(9)], 1, 1, None), TypeError, "seed must be int"),
])  # fmt: skip
def test_bad_arguments(args, error, message):
    with pytest.raises(error, match=message):
        DataLoader(*args)


def test_the_largest_token_passes():
    loader = DataLoader([np.uint64([0, 2**31 - 1])], 1, 1)
    assert loader.next_batch()[1].tolist() == [[2**31 - 1]]


def interrupted(loader, line):
    """Ask for a batch, with Ctrl-C at so many lines of the loader's code."""
    left = line

    def watch(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != data.__file__:
            return None
        left -= event == "line"
        if left < 0:
            raise KeyboardInterrupt
        return watch

    sys.settrace(watch)
    try:
        loader.next_batch()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_an_interrupt_anywhere_leaves_a_place_that_is_whole():
    """The batch is given again, or the one after it: none is made up."""
    shards = [np.arange(13), np.arange(100, 131)]
    plain = DataLoader(shards, 2, 3, seed=2)
    wanted = [np.array(plain.next_batch()) for _ in range(20)]
    for before in range(8):  # an epoch, and the borders of shards in it
        stopped, line = True, 0
        while stopped:
            loader = DataLoader(shards, 2, 3, seed=2)
            loader.skip(before)
            stopped, line = interrupted(loader, line), line + 1
            got = [np.array(loader.next_batch()) for _ in range(9)]
            again = np.array_equal(got, wanted[before : before + 9])
            after = np.array_equal(got, wanted[before + 1 : before + 10])
            assert again or after, f"batch {before}, line {line}"
        assert line > 20


@pytest.mark.parametrize(("width", "length"), [
    (2, 0), (2, 1024), (2, 1024 + 2 * 5000), (2, 30_000),
    (4, 1024 + 4 * 5000 + 2),
])  # fmt: skip
def test_a_shard_cut_short_in_use_is_named(tmp_path, width, length):
    """A mapped file would end the process."""
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(41_000), {2: 65536, 4: 65537}[width])
    loader = DataLoader([path], 4, 1000, shuffle=False)
    loader.next_batch()
    os.truncate(path, length)
    gone = max((length - 1024) // width, 4000)
    with pytest.raises(OSError) as error:
        [loader.next_batch() for _ in range(10)]
    says = f"has been cut short, token {gone:,} is gone: '{path}'"
    assert str(error.value) == f"[Errno 5] {says}"


def test_a_shard_cut_short_between_epochs_is_named(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(9))
    loader = DataLoader([tmp_path / "a.bin", np.arange(9)], 1, 8)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"a\.bin: the size for 9 tokens"):
        [loader.next_batch() for _ in range(3)]


def test_after_a_shard_that_fails_one_can_go_back(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(1000, 1037))
    loader = DataLoader([np.arange(61), tmp_path / "a.bin"], 2, 3, seed=1)
    first = loader.state
    wanted = [x.copy() for x in loader.next_batch()]
    assert np.max(wanted) < 1000
    os.truncate(tmp_path / "a.bin", 10)
    with pytest.raises(ValueError, match=r"a\.bin"):
        loader.state = first | {"shard": 1}
    loader.state = first
    assert np.array_equal(loader.next_batch(), wanted)


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a file in use")
def test_a_shard_that_is_replaced_is_read_on(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100))
    loader = DataLoader([tmp_path / "a.bin"], 1, 9, shuffle=False)
    loader.next_batch()
    write_shard(tmp_path / "a.bin", np.arange(100, 200))
    assert loader.next_batch()[0].tolist() == [[*range(9, 18)]]
    (tmp_path / "a.bin").unlink()
    assert loader.next_batch()[0].tolist() == [[*range(18, 27)]]


def test_a_step_allocates_nothing(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(60_000))
    loader = DataLoader([tmp_path / "a.bin"], 8, 64, seed=1)
    first = loader.next_batch()

    def steps():
        for _ in range(100):
            assert loader.next_batch()[0] is first[0]

    assert peak(steps) < 2000  # one batch as int32 is 2 * 2048 bytes


@pytest.mark.parametrize(
    "count, validation, want",
    [(100, None, 10), (10, None, 1), (10**6, None, 32768), (5, 4, 4)],
)
def test_split(count, validation, want):
    tokens = np.arange(count)
    train, val = split(tokens, validation)
    assert np.array_equal(val, tokens[:want])
    assert np.array_equal(train, tokens[want:])
    assert train.base is tokens and val.base is tokens


@pytest.mark.parametrize("count, validation", [(9, None), (9, 9), (9, 0)])
def test_split_that_leaves_a_part_empty(count, validation):
    with pytest.raises(ValueError, match=f"number of tokens, {count}, got"):
        split(np.arange(count), validation)


@pytest.mark.parametrize("shape", [(0,), (24,), (26,), (25, 8)])
def test_readers_of_unequal_parts(shape):
    with pytest.raises(
        ValueError, match=r"Readers: .* shape \(n \* 8 \+ 1,\)"
    ):
        Readers(np.zeros(shape, int), 2, 4)
