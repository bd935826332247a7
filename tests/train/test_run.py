"""Nothing lost: states, resuming, kills, signals, full disks, bad files."""

import contextlib
import errno
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.cpu.tile import cpu_features
from llmnb.files import LOCK, Lock, in_use
from llmnb.formats.checkpoint import read_config
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.formats.shard import write_shard
from llmnb.formats.vocabulary import tokenizer_of
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer
from llmnb.train import run as the_run
from llmnb.train.feed import Data, loaders, prepare
from llmnb.train.finetune import starting_from
from llmnb.train.folder import (
    load_run,
    run_folder,
    state_path,
    states,
    weights_path,
)
from llmnb.train.log import read_rows, read_steps, start_log
from llmnb.train.loop import evaluate
from llmnb.train.options import TrainConfig
from llmnb.train.run import CHANGEABLE, begin, finish, follow, resume
from llmnb.train.start import new_model
from llmnb.train.state import (
    fingerprint,
    newest_state,
    read_state,
    restore,
    save_state,
)

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LLMNB_KILLS", 4))
TINY = TrainConfig(
    tokenizer="byte",
    num_layers=1,
    num_heads=2,
    channels=16,
    seq_len=16,
    batch_size=2,
    total_batch=64,
    steps=20,
    eval_every=7,
    eval_batches=3,
    backend="reference",
    learning_rate=1e-3,
    skip_loss=1.0,
    skip_norm=1.0,
    skip_window=5,
    save_every=5,
)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    """A text of some thousand bytes in place of a corpus."""
    stream = random.Random(5)
    kinds = ["spam ", "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    lines = (stream.choices(stream.choice(kinds), k=90) for _ in range(150))
    text = "".join("".join(line) for line in lines).encode()
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16)

    def prepare(config):
        return Data(tokenizer.byte(), tokens[900:], tokens[:900], "a test")

    monkeypatch.setattr("llmnb.train.run.prepare", prepare)


def straight(folder, config=TINY):
    run = begin(run_folder(folder), config)
    steps = list(follow(run))
    return run, steps


def cut(folder, count, config=TINY):
    """A run that was left after so many steps."""
    run = begin(run_folder(folder), config)
    list(islice(follow(run), count))
    return run


def weights(run):
    return run.model.memory.flat("params").copy()


def log_of(folder):
    """The rows of a log, but for the speed."""
    steps = read_steps(folder / "log.csv")
    return [x._replace(tokens_per_second=None) for x in steps]


def files_of(folder):
    """What is in a run folder, the log without its speeds."""
    found = {x.name: x.read_bytes() for x in folder.iterdir()}
    found["log.csv"] = log_of(folder)
    return found


# resuming


@pytest.mark.parametrize("count", [1, 4, 5, 6, 13, 19, 20])
def test_a_resumed_run_is_the_straight_run(tmp_path, count):
    want, _ = straight(tmp_path / "a")
    cut(tmp_path / "b", count)
    run, warnings = resume(tmp_path / "b")
    assert warnings == [] and run.at.step == count // 5 * 5
    list(follow(run))
    assert np.array_equal(weights(run), weights(want))
    assert run.at == want.at
    finish(want)
    finish(run)
    assert files_of(tmp_path / "b") == files_of(tmp_path / "a")


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp64"},
        {"overfit": True},
        {"schedule": "wsd"},
        {"backend": "cpu"},
    ],
    ids=str,
)
def test_other_runs_resume(tmp_path, options):
    config = replace(TINY, **options)
    want, _ = straight(tmp_path / "a", config)
    cut(tmp_path / "b", 8, config)
    run, _ = resume(tmp_path / "b")
    list(follow(run))
    for group in ("params", "m", "v"):
        pair = (x.model.memory.flat(group) for x in (run, want))
        assert np.array_equal(*pair)


def test_the_state_is_all_there_is(tmp_path):
    """Each part of it, set back to its beginning, changes the end."""
    want, steps = straight(tmp_path / "a")
    skipped = [s.step for s in steps if s.skipped]
    assert skipped[0] < 10 < skipped[1] < 15 < skipped[-1]
    new = begin(run_folder(tmp_path / "new"), TINY)

    def group(name):
        def forget(run):
            run.model.memory.flat(name)[:] = new.model.memory.flat(name)

        return forget

    forgetting = {
        "nothing": lambda run: None,
        "gradients": lambda run: run.model.memory.flat("grads").fill(9),
        "activations": lambda run: run.model.memory.flat("acts").fill(9),
        "best": lambda run: setattr(run.at, "best_loss", 9.0),
        "params": group("params"),
        "m": group("m"),
        "v": group("v"),
        "place": lambda run: run.batches.reset(),
        "step": lambda run: setattr(run.at, "step", 9),
        "updates": lambda run: setattr(run.at, "updates", run.at.step),
        "losses": lambda run: run.at.losses.clear(),
        "norms": lambda run: run.at.norms.clear(),
    }
    same = []
    for name, forget in forgetting.items():
        ends = []
        for count in (12, 17):  # goes on from 10 and from 15
            folder = tmp_path / f"{name}-{count}"
            cut(folder, count)
            run = resume(folder)[0]
            forget(run)
            list(follow(run))
            ends.append(np.array_equal(weights(run), weights(want)))
        if all(ends):
            same.append(name)
    assert same == ["nothing", "gradients", "activations", "best"]


def test_a_longer_run(tmp_path):
    cut(tmp_path / "a", 12)
    run, _ = resume(tmp_path / "a", steps=30, keep=3, save_every=4)
    assert [s.step for s in follow(run)] == list(range(10, 31))
    kept = [x.name[6:14] for x in states(tmp_path / "a")]
    assert kept == ["00000024", "00000028", "00000030"]
    again, _ = resume(tmp_path / "a")
    assert again.config.steps == 30 and again.at.step == 30
    assert [s.step for s in follow(again)] == [30]
    assert [s.step for s in log_of(tmp_path / "a")] == list(range(31))


def test_the_newest_states_are_kept(tmp_path):
    config = replace(TINY, save_every=3, keep=2)
    seen = []
    run = begin(run_folder(tmp_path / "a"), config)
    for _ in follow(run):
        seen.append([int(x.stem[6:]) for x in states(run.folder)])
    assert seen[1:4] == [[], [3], [3]]
    assert seen[8] == [6, 9] and seen[-1] == [18, 20]
    run = straight(tmp_path / "b", replace(TINY, save_every=0))[0]
    assert states(run.folder) == [state_path(run.folder, 20)]


def test_a_new_run_removes_old_states(tmp_path):
    straight(tmp_path / "a")
    run = begin(tmp_path / "a", replace(TINY, seed=1))
    assert states(tmp_path / "a") == []
    list(islice(follow(run), 2))
    assert [s.step for s in log_of(run.folder)] == [0, 1]


@pytest.mark.parametrize("how", ["resume", "begin"])
def test_only_our_own_leftovers_are_swept_away(tmp_path, how):
    cut(tmp_path / "a", 7)
    ours = "state_00000010.safetensors", "log.csv", "model.bin", "config.json"
    ours = [f"{name}.{i:016x}.new" for i, name in enumerate(ours)]
    ours.append("state_00000010.safetensors.1234.new")
    others = [
        "notes.new",
        "notes.2024.new", "state_best.safetensors.12.new", "log.csv.new",
        "my model.bin.0123456789abcdef.new", "log.csv.0123456789abcdef",
    ]  # fmt: skip
    for name in (*ours, *others):
        (tmp_path / "a" / name).write_bytes(b"half")
    run = (
        resume(tmp_path / "a")[0]
        if how == "resume"
        else begin(tmp_path / "a", TINY)
    )
    left = {x.name for x in run.folder.iterdir()}
    assert left & {*ours, *others} == {*others}


# which files are states

FOREIGN = (
    "state_best.safetensors", "state_00000005 copy.safetensors",
    "state_5.safetensors", "state_0000000005.safetensors",
    "state_00000005.safetensors.bak", "state_-0000005.safetensors",
    "state_٠٠٠٠٠٠٠٥.safetensors", "my_state_00000005.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("how", ["resume", "begin", "follow"])
def test_only_our_own_names_are_states(tmp_path, how):
    """A copy beside the states is not gone on from, and stays."""
    run = cut(tmp_path / "a", 12)
    newest = states(run.folder)[-1].read_bytes()
    del run
    for name in FOREIGN:
        (tmp_path / "a" / name).write_bytes(b"better: " + newest)
    if how == "begin":
        run = begin(tmp_path / "a", TINY)
        assert states(run.folder) == []
    else:
        run, warnings = resume(tmp_path / "a")
        assert run.at.step == 10 and warnings == []
    if how == "follow":
        list(follow(run))
        assert [x.name[6:14] for x in states(run.folder)] == [
            "00000015", "00000020",
        ]  # fmt: skip
    for name in FOREIGN:
        assert (tmp_path / "a" / name).read_bytes() == b"better: " + newest


def test_a_run_of_more_than_a_hundred_million_steps(tmp_path):
    run = begin(run_folder(tmp_path / "a"), replace(TINY, steps=10**9))
    for step in (99_999_998, 99_999_999, 100_000_000):
        run.at.step = step
        save_state(run)
    assert [int(x.stem[6:]) for x in states(run.folder)] == [
        99_999_999, 100_000_000,
    ]  # fmt: skip
    assert newest_state(run.folder)[0].at.step == 100_000_000


def test_newer_states_stay_until_the_run_has_come_there(tmp_path):
    """A damaged one takes no good one's place, and goes when it is passed."""
    config = replace(TINY, keep=2, save_every=2)
    cut(tmp_path / "a", 7, config)
    for step in (9, 13, 99):
        state_path(tmp_path / "a", step).write_bytes(b"damaged")
    run, warnings = resume(tmp_path / "a")
    assert run.at.step == 6 and len(warnings) == 3
    seen = {}
    for _ in follow(run):
        seen[run.at.step] = [int(x.stem[6:]) for x in states(run.folder)]
    assert seen[7] == [4, 6, 9, 13, 99]
    assert seen[8] == [6, 8, 9, 13, 99]
    assert seen[10] == [8, 10, 13, 99]
    assert seen[14] == [12, 14, 99] and seen[20] == [18, 20, 99]


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced")
def test_a_state_is_safe_before_an_older_one_is_removed(tmp_path, monkeypatch):
    run = begin(run_folder(tmp_path / "a"), replace(TINY, keep=1))
    made = []

    def noted(name):
        call = getattr(os, name)

        def wrapped(first, *rest, **more):
            made.append(name)
            return call(first, *rest, **more)

        return wrapped

    for step in (5, 10):
        run.at.step = step
        made.clear()
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "unlink"):
                patch.setattr(os, name, noted(name))
            save_state(run)
    assert [x.name for x in states(run.folder)] == [
        "state_00000010.safetensors"
    ]
    while made[:4] != ["fsync", "replace", "unlink", "fsync"]:
        assert made.pop(0) == "unlink"  # of the file beside, which is gone
    assert made[4:] == ["unlink"]


# what cannot be resumed


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        resume(tmp_path)


@pytest.mark.parametrize("name", ["channels", "seed", "learning_rate"])
def test_what_must_not_change(tmp_path, name):
    cut(tmp_path / "a", 7)
    assert name not in CHANGEABLE
    value = getattr(TINY, name)
    resume(tmp_path / "a", **{name: value})
    with pytest.raises(ValueError, match=f"{name} of a run in progress can"):
        resume(tmp_path / "a", **{name: value * 2})
    with pytest.raises(ValueError, match="steps must be at least 5, which"):
        resume(tmp_path / "a", steps=4)


def changed(then, place, part, count):
    """The text with some tokens changed on the way into a part."""

    def prepare_other(config):
        data = then(config)
        tokens = getattr(data, part).copy()
        at = int(len(tokens) * place)
        tokens[at : at + count] ^= 1
        return data._replace(**{part: tokens})

    return prepare_other


@pytest.mark.parametrize("part", ["train_tokens", "val_tokens"])
@pytest.mark.parametrize("place, count", [(0.5, 300), (0.9, 1), (0.3, 1)])
def test_a_text_changed_anywhere(tmp_path, monkeypatch, part, place, count):
    cut(tmp_path / "a", 7)
    before = files_of(tmp_path / "a")
    other = changed(the_run.prepare, place, part, count)
    monkeypatch.setattr("llmnb.train.run.prepare", other)
    with pytest.raises(ValueError, match="the text is not the one it began"):
        resume(tmp_path / "a")
    assert files_of(tmp_path / "a") == before, "nothing is written"


def shards_in(folder, change=None):
    """A folder of five shards, of which one may have one token changed."""
    folder.mkdir()
    tokens = np.random.RandomState(3).randint(0, 256, (5, 900)).astype("u2")
    if change is not None:
        tokens[change, 450] ^= 1
    write_shard(folder / "val.bin", tokens[0])
    for k in range(1, 5):
        write_shard(folder / f"train_{k:06}.bin", tokens[k])
    tokenizer.save(tokenizer.byte(), folder / "tokenizer.tiktoken")
    return str(folder)


def test_shards_that_have_moved(tmp_path, monkeypatch):
    monkeypatch.setattr("llmnb.train.run.prepare", prepare)
    config = replace(TINY, shards=shards_in(tmp_path / "here"))
    want = straight(tmp_path / "a", config)[0]
    cut(tmp_path / "b", 7, config)
    os.rename(tmp_path / "here", tmp_path / "there")
    before = files_of(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="moved, name its new place"):
        resume(tmp_path / "b")
    for change in (0, 1, 3):
        other = shards_in(tmp_path / f"other{change}", change)
        with pytest.raises(ValueError, match="the text is not the one it be"):
            resume(tmp_path / "b", shards=other)
    assert files_of(tmp_path / "b") == before, "nothing is written"
    run, warnings = resume(tmp_path / "b", shards=str(tmp_path / "there"))
    assert warnings == []
    list(islice(follow(run), 9))
    run, _ = resume(tmp_path / "b")  # it knows by now
    list(follow(run))
    assert np.array_equal(weights(run), weights(want))


def test_a_corpus_in_place_of_shards(tmp_path, monkeypatch):
    """The tokens decide, not the way they come."""
    monkeypatch.setattr("llmnb.train.run.prepare", prepare)
    text = tmp_path / "text.txt"
    text.write_text("spam and eggs, " * 500)
    config = replace(TINY, corpus=(str(text),))
    data = prepare(config)
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "train.bin", data.train_tokens)
    write_shard(tmp_path / "shards" / "val.bin", data.val_tokens)
    tokenizer.save(data.encoding, tmp_path / "shards" / "tokenizer.tiktoken")
    cut(tmp_path / "a", 7, replace(TINY, shards=str(tmp_path / "shards")))
    run, _ = resume(tmp_path / "a", corpus=config.corpus)
    assert run.config == config and run.at.step == 5


def test_a_fingerprint_keeps_one_shard_open(tmp_path):
    files = Path("/proc/self/fd")
    if not files.exists():
        pytest.skip("counts files in /proc")
    config = replace(TINY, shards=shards_in(tmp_path / "here"))
    feeds = loaders(config, prepare(config))
    before = len(list(files.iterdir()))
    found = fingerprint(*feeds)
    assert len(list(files.iterdir())) <= before + 1
    assert found == json.loads(json.dumps(found))
    together = np.random.RandomState(3).randint(0, 256, (5, 900)).astype("u2")
    data = Data(None, together[1:].ravel(), together[0], "")
    other = fingerprint(*loaders(config, data))
    assert other[0] != found[0], "where shards end is part of it"
    assert other[1] == found[1]


def older(path, first_batches):
    """Make of a state what an older llmnb would have written."""
    file = TensorFile(path)
    record = json.loads(file.metadata["record"])
    del record["begun"]
    record["text"] = first_batches
    text = json.dumps(record)
    note = file.metadata | {
        "record": text,
        "sum": str(zlib.crc32(text.encode())),
    }
    write_tensors(path, {name: file[name] for name in file.names}, note)


def test_a_state_of_an_older_llmnb(tmp_path):
    want = straight(tmp_path / "want")[0]
    run = cut(tmp_path / "a", 7)
    found = []
    for loader in (run.batches, run.validation):
        loader.reset()
        first = b"".join(x.tobytes() for x in loader.next_batch())
        found.append([loader.batches_per_epoch, zlib.crc32(first)])
    older(states(run.folder)[-1], found)
    run, (warning,) = resume(tmp_path / "a")
    assert "by an older llmnb: only the first batch of the text" in warning
    list(follow(run))
    assert np.array_equal(weights(run), weights(want))
    cut(tmp_path / "b", 7)
    found[1][1] ^= 1
    older(states(tmp_path / "b")[-1], found)
    with pytest.raises(ValueError, match="the text is not the one it began"):
        resume(tmp_path / "b")


# another machine


def test_other_versions_are_told(tmp_path, monkeypatch):
    cut(tmp_path / "a", 7)
    monkeypatch.setattr("llmnb.train.state.version", lambda name: f"{name}-9")
    for steps in (5, 99):  # of the new machine's own states too
        run, (warning,) = resume(tmp_path / "a")
        assert "may differ in their last bits" in warning
        for name in ("llmnb", "numpy", "numba", "llvmlite"):
            assert f"now {name}-9" in warning
        list(islice(follow(run), steps))
    monkeypatch.undo()


def test_another_processor_is_told(tmp_path, monkeypatch):
    cut(tmp_path / "a", 7)
    features = cpu_features() - {"avx2", "neon"} | {"new"}
    monkeypatch.setattr("llmnb.cpu.tile.cpu_features", lambda: features)
    run, (warning,) = resume(tmp_path / "a")
    assert "features " in warning and ", now new" in warning
    assert "Python" not in warning


def test_another_gpu_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMNB_CUDA", "simulator")
    cuda = pytest.importorskip("llmnb.cuda.model")
    begun = the_run.surroundings("cuda")
    monkeypatch.setattr(cuda, "gpu", lambda: "another")
    now = the_run.surroundings("cuda")
    (warning,) = the_run.differences(begun, now)
    assert "began with GPU none" in warning and ", now another" in warning
    assert "GPU" not in the_run.surroundings("cpu")


@pytest.mark.parametrize(
    "name", ["LLMNB_TILE", "NUMBA_OPT", "NUMBA_CPU_FEATURES", "LLMNB_BF16"]
)
def test_another_setting_is_told(tmp_path, monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    cut(tmp_path / "a", 7)
    monkeypatch.setenv(name, "other")
    run, (warning,) = resume(tmp_path / "a")
    assert warning.endswith(f"began with {name} none, now other")
    monkeypatch.delenv(name)
    del run
    assert resume(tmp_path / "a")[1] == []


def test_a_state_of_another_run(tmp_path):
    cut(tmp_path / "a", 7)
    other = cut(tmp_path / "b", 12, replace(TINY, seed=7))
    shutil.copy(states(other.folder)[-1], tmp_path / "a")
    with pytest.raises(ValueError, match="is of a run with other options"):
        resume(tmp_path / "a")


# damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good state."""
    with pytest.MonkeyPatch.context() as patch:
        small_data.__wrapped__(patch)
        run = cut(tmp_path_factory.mktemp("state") / "a", 5)
    return states(run.folder)[0].read_bytes()


def damaged_state(folder, data):
    path = folder / "state_00000010.safetensors"
    path.write_bytes(data)
    with pytest.raises((ValueError, OSError)) as error:
        read_state(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message


def test_truncated_states(tmp_path, whole):
    for size in {0, 1, 7, 8, 9, 100, *range(0, len(whole), len(whole) // 40)}:
        damaged_state(tmp_path, whole[:size])
    for data in (whole + b"\0", b"\xff" * 5000):
        damaged_state(tmp_path, data)
    path = tmp_path / "state_00000010.safetensors"
    write_tensors(path, {"x": np.zeros(3)})
    with pytest.raises(ValueError, match="its format must be"):
        read_state(path)


def test_flipped_bits(tmp_path, whole):
    """Anywhere but in the spaces that pad the header."""
    head = 8 + int.from_bytes(whole[:8], "little")
    stream = random.Random(1)
    places = [*range(16), *(stream.randrange(head) for _ in range(150))]
    places += [stream.randrange(head, len(whole)) for _ in range(150)]
    path = tmp_path / "state_00000010.safetensors"
    missed = 0
    for at in places:
        data = bytearray(whole)
        data[at] ^= 1 << stream.randrange(8)
        path.write_bytes(data)
        try:
            state = read_state(path)
        except (ValueError, OSError) as error:
            assert str(path) in str(error)
        else:
            missed += 1
            model = restore(state)
            path.write_bytes(whole)
            good = restore(read_state(path))
            for group in ("params", "m", "v"):
                pair = (x.memory.flat(group) for x in (model, good))
                assert np.array_equal(*pair), at
    assert missed < 10


def rewritten(whole, tmp_path, change, tensors=lambda x: x):
    """The state with another record, its checksum in order."""
    path = tmp_path / "state_00000010.safetensors"
    path.write_bytes(whole)
    file = TensorFile(path)
    record = json.loads(file.metadata["record"])
    arrays = tensors({name: file[name].copy() for name in file.names})
    record["sums"] = {k: zlib.crc32(x) for k, x in arrays.items()}
    change(record)
    text = json.dumps(record)
    check = str(zlib.crc32(text.encode()))
    note = file.metadata | {"record": text, "sum": check}
    write_tensors(path, arrays, note)
    return path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"m.wpe": None}, "m.wpe must be .*, got None"),
        ({"w": np.zeros(3, "f4")}, "w must be None"),
        ({"v.wte": np.float64}, "v.wte must be .'F32', .*, got .'F64'"),
        ({"v.wte": np.transpose}, "v.wte must be .*, got"),
    ],
)
def test_arrays_of_another_model(tmp_path, whole, tensors, message):
    def change(arrays):
        for name, x in tensors.items():
            x = x(arrays[name]).copy() if callable(x) else x
            arrays[name] = x
        return {k: x for k, x in arrays.items() if x is not None}

    path = rewritten(whole, tmp_path, lambda x: None, change)
    with pytest.raises(ValueError, match=message):
        read_state(path)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {}}, {"config": None}, {"config": {"corpus": 3}},
        {"model": {"channels": 0}}, {"model": {"channels": 64}},
        {"model": []}, {"progress": {"stepz": 1}}, {"progress": 3},
        {"progress": {"step": -1}}, {"progress": {"step": "5"}},
        {"progress": {"step": 3, "updates": 4}},
        {"progress": {"losses": ["x"]}}, {"progress": {"norms": 3.0}},
        {"sums": {}}, {"sums": 3}, {"model": {"num_layers": 10**9}},
        {"begun": 3}, {"begun": ["numba"]},
    ],
    ids=str,
)  # fmt: skip
def test_other_records(tmp_path, whole, change):
    path = rewritten(whole, tmp_path, lambda x: x.update(change))
    with pytest.raises(ValueError, match="is not a whole state: "):
        read_state(path)


def test_a_place_that_is_none(tmp_path):
    run = cut(tmp_path / "a", 7)
    good = states(run.folder)[0]
    for place in ({}, 3, {"epoch": 0, "shard": 9, "position": 0}):
        path = rewritten(
            good.read_bytes(),
            tmp_path,
            lambda x, place=place: x.update(place=place),
        )
        shutil.copy(path, good)
        with pytest.raises((ValueError, TypeError)):
            resume(tmp_path / "a")


def test_the_state_before_the_damaged_one(tmp_path):
    want = straight(tmp_path / "a")[0]
    cut(tmp_path / "b", 12)
    newest = states(tmp_path / "b")[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    run, warnings = resume(tmp_path / "b")
    assert run.at.step == 5
    assert len(warnings) == 1 and str(newest) in warnings[0]
    list(follow(run))
    assert np.array_equal(weights(run), weights(want))


def test_no_state_is_whole(tmp_path):
    run = cut(tmp_path / "a", 12)
    for path in states(run.folder):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="has no state to go on from: "):
        resume(tmp_path / "a")


# full disks


class SmallDisk(io.FileIO):
    """A file that fails when it is given more than `left` bytes."""

    def __init__(self, path, mode, left):
        super().__init__(path, mode)
        self.left = left

    def write(self, data):
        size = memoryview(data).nbytes
        super().write(memoryview(data).cast("B")[: max(0, self.left)])
        self.left -= size
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return size


def test_a_full_disk_at_every_block_of_a_state(tmp_path, monkeypatch):
    run = cut(tmp_path / "a", 7)
    before = files_of(run.folder)
    size = states(run.folder)[0].stat().st_size
    run.at.step = 8
    for left in range(0, size, 512):

        def opened(path, mode, left=left):
            return SmallDisk(path, mode, left)

        monkeypatch.setattr("llmnb.files.open", opened, raising=False)
        with pytest.raises(OSError, match="No space"):
            save_state(run)
        assert files_of(run.folder) == before, left
    monkeypatch.undo()
    read_state(states(run.folder)[0])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_the_end_of_a_state(tmp_path, monkeypatch, call):
    run = cut(tmp_path / "a", 7)
    before = files_of(run.folder)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(f"llmnb.files.os.{call}", fail)
    with pytest.raises(OSError):
        save_state(run)
    assert files_of(run.folder) == before


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    run = begin(run_folder(tmp_path / "a"), TINY)
    with pytest.raises(OSError) as error:
        for step in follow(run):
            if step.step == 7:
                monkeypatch.setattr(
                    "llmnb.files.open",
                    lambda path, mode: SmallDisk(path, mode, 999),
                    raising=False,
                )
    message = str(error.value)
    assert "No space left" in message and "\n" not in message
    assert message.endswith(
        "the last checkpoint is state_00000005.safetensors"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_for_the_log(tmp_path):
    run = begin(run_folder(tmp_path / "a"), TINY)
    steps = follow(run)
    list(islice(steps, 7))
    log = run.folder / "log.csv"
    kept = log.read_bytes()
    log.unlink()
    log.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left.*state_00000005"):
        next(steps)
    log.unlink()
    log.write_bytes(kept + b"7,3.1")
    run, _ = resume(run.folder)
    list(follow(run))
    want = straight(tmp_path / "b")[0]
    assert np.array_equal(weights(run), weights(want))
    assert log_of(run.folder) == log_of(want.folder)


# one folder, one owner

HOLDER = """
import sys
from llmnb.files import Lock
lock = Lock(sys.argv[1])
print("locked", flush=True)
{then}
sys.stdin.read()
"""


@contextlib.contextmanager
def held(folder, then=""):
    """Another process that has the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(then=then), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"locked\n"
    try:
        yield process
    finally:
        process.communicate(timeout=60)


def test_a_folder_of_another_process_is_refused(tmp_path):
    cut(tmp_path / "a", 7)
    (tmp_path / "empty").mkdir()
    before = files_of(tmp_path / "a")
    with held(tmp_path / "a") as process, held(tmp_path / "empty"):
        who = rf"is in use by process {process.pid} on \S+ since 20\d\d-"
        for call in (
            lambda: begin(tmp_path / "a", TINY),
            lambda: resume(tmp_path / "a"),
            lambda: run_folder(tmp_path / "a"),
            lambda: begin(run_folder(tmp_path / "a", force=True), TINY),
        ):
            with pytest.raises(OSError, match=who) as error:
                call()
            assert "\n" not in str(error.value)
            error = None  # noqa: F841
        with pytest.raises(BlockingIOError, match="empty is in use by"):
            begin(run_folder(tmp_path / "empty"), TINY)
        assert in_use(tmp_path / "a") and in_use(tmp_path / "empty")
    assert files_of(tmp_path / "a") == before, "nothing is written or removed"
    assert in_use(tmp_path / "a") == ""
    assert resume(tmp_path / "a")[0].at.step == 5


def test_a_dead_process_locks_nobody_out(tmp_path):
    folder = run_folder(tmp_path / "a")
    with held(folder) as process:
        process.kill()
    assert (folder / LOCK).exists() and in_use(folder) == ""
    assert run_folder(folder) == folder, "it counts as empty"
    want, run = straight(tmp_path / "b")[0], begin(folder, TINY)
    assert f"process {os.getpid()} on" in (folder / LOCK).read_text()
    list(follow(run))
    finish(run)
    finish(want)
    assert files_of(folder) == files_of(want.folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_holds_no_lock(tmp_path):
    child = "import os, time\nif os.fork() == 0: time.sleep(9)"
    with held(tmp_path, child) as process:
        time.sleep(0.3)
        assert in_use(tmp_path)
        process.kill()
        process.wait()
        Lock(tmp_path).release()
        process.stdout.close()
        process.stdout = None  # the child has the other end
    assert not (tmp_path / LOCK).exists()


def test_the_newer_run_of_a_process_has_the_folder(tmp_path):
    older = cut(tmp_path / "a", 7)
    steps = follow(older)
    next(steps)
    newer, _ = resume(tmp_path / "a")
    for call in (
        lambda: next(steps),
        lambda: save_state(older),
        lambda: finish(older),
        lambda: next(follow(older)),
    ):
        with pytest.raises(BlockingIOError, match="taken up anew, by this pr"):
            call()
    list(follow(newer))
    want = straight(tmp_path / "b")[0]
    finish(newer)
    finish(want)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_lock_ends_with_its_run(tmp_path):
    def free():
        return not (tmp_path / "a" / LOCK).exists()

    run = cut(tmp_path / "a", 7)
    assert not free()
    finish(run)
    assert free()
    save_state(run)
    next(follow(run))
    assert not free(), "it goes on"
    del run
    assert free()
    for change in ({"channels": 64}, {"steps": 2}):
        with pytest.raises(ValueError) as error:
            resume(tmp_path / "a", **change)
        assert error and free()
    with pytest.raises(ValueError) as error:
        begin(tmp_path / "a", replace(TINY, seq_len=10**6, total_batch=0))
    assert error and free()
    with Lock(tmp_path / "a"):
        assert not free()
    assert free()


def test_a_lock_whose_file_was_removed(tmp_path):
    """The run takes it again, unless another process was faster."""
    run = begin(run_folder(tmp_path / "a"), TINY)
    steps = follow(run)
    next(steps)
    (run.folder / LOCK).unlink()
    next(steps)
    assert f"process {os.getpid()} on" in (run.folder / LOCK).read_text()
    shutil.rmtree(run.folder)
    run.folder.mkdir()
    with held(run.folder) as process:
        with pytest.raises(BlockingIOError, match=f"process {process.pid} on"):
            next(steps)
        assert [x.name for x in run.folder.iterdir()] == [LOCK]


def test_a_lock_that_is_just_being_taken_away(tmp_path, monkeypatch):
    """Between opening and locking, the last owner removes the file."""
    from llmnb import files

    calls = []

    def late(place, then=files._flock):
        if not calls:
            os.unlink(tmp_path / LOCK)
        calls.append(place)
        then(place)

    monkeypatch.setattr(files, "_flock", late)
    kept = Lock(tmp_path)
    monkeypatch.undo()
    assert len(calls) == 2 and kept.release.alive
    code = "import sys; from llmnb.files import Lock; Lock(sys.argv[1])"
    process = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    got = subprocess.run(
        [*process, tmp_path], env=env, capture_output=True, text=True
    )
    assert f"is in use by process {os.getpid()}" in got.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def fail(place):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("llmnb.files._flock", fail)
    with pytest.warns(UserWarning, match="no locks on this file system"):
        run = begin(run_folder(tmp_path / "a"), TINY)
    list(follow(run))
    finish(run)
    assert not (tmp_path / "a" / LOCK).exists()


def test_a_link_in_place_of_the_lock(tmp_path):
    if not hasattr(os, "O_NOFOLLOW"):
        pytest.skip("links are followed")
    kept = tmp_path / "kept"
    kept.write_bytes(b"mine")
    run_folder(tmp_path / "a")
    (tmp_path / "a" / LOCK).symlink_to(kept)
    with pytest.raises(OSError):
        begin(tmp_path / "a", TINY)
    assert kept.read_bytes() == b"mine"


# the log


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (b"", 0), (b"step,loss\n", 0), (b"step,loss\n0,1\n1,2\n2,3\n", 2),
        (b"step,loss\n0,1\n1,2\n2,", 2), (b"step,loss\n\n0,1\nx\n\xff\n", 1),
    ],
)  # fmt: skip
def test_rows_of_a_log_that_stay(tmp_path, text, kept):
    path = tmp_path / "log.csv"
    path.write_bytes(text)
    start_log(path, 2)
    lines = path.read_text("utf-8").splitlines()
    assert lines[0].startswith("step,loss,val_loss")
    assert len(lines) == 1 + kept


def test_a_missing_log_is_begun_anew(tmp_path):
    cut(tmp_path / "a", 7)
    (tmp_path / "a" / "log.csv").unlink()
    list(follow(resume(tmp_path / "a")[0]))
    assert [s.step for s in log_of(tmp_path / "a")] == list(range(5, 21))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("x", "must have 3 values, has 1"),
        ("1,y,", "must hold numbers, not '1,y,'"),
        ("1,2,3,4,5,6,7,8", "must have 3 values, has 8"),
        ("1.5,2,", "must begin with a whole number, not 1.5"),
        ("1,nan,", "must hold numbers, not '1,nan,'"),
        ("1,1e999,", "must hold numbers"),
        (",2,", "has no step"),
        ("1," + "2" * 140_000 + ",", "must have at most 1,000 characters"),
        ("9" * 140_000 + ",2,", "must have at most 1,000 characters"),
    ],
)
def test_a_damaged_row_is_left_out_and_said(tmp_path, row, why):
    path = tmp_path / "log.csv"
    path.write_text(f"step,loss,val_loss\n0,1,\n{row}\n2,3,\n", "utf-8")
    with pytest.warns(UserWarning) as seen:
        steps = read_steps(path)
    (message,) = {str(x.message) for x in seen}
    assert message.startswith(f"{path}: left out line 3 ({why}")
    assert len(message) < 300 + len(str(path))
    assert [(x.step, x.loss) for x in steps] == [(0, 1.0), (2, 3.0)]
    with pytest.warns(UserWarning, match="left out line 3"):
        start_log(path, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_steps(path) == steps


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.binary() | st.text("0123456789,.-en\n").map(str.encode))
def test_any_log(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_bytes(b"step,loss\n" + text)
    _, rows = read_rows(path)
    rows = [(row, wrong) for _, row, wrong in rows]
    assert len(rows) == text.count(b"\n")
    steps = [(int(x["step"]), x["loss"]) for x, wrong in rows if not wrong]
    assert [(x.step, x.loss) for x in read_steps(path)] == steps
    start_log(path, 3)
    assert path.read_bytes().startswith(b"step,loss,val_loss,")


# a log or a picture that fails costs no model


def semicolons(lines):
    return [lines[0], *[b"1;2;3"] * 8, *lines[9:]]


# as people, editors and other programs edit a log, by its lines
EDITED = [
    (
        lambda x: [*x[:3], x[3][:9], *x[4:]],
        20,
        r"line 4 \(must have 7",
    ),
    (lambda x: [*x[:5], b"a, b", *x[6:]], 20, r"line 6 \(must .*, has 2\)"),
    (lambda x: x[1:], 21, None),  # the names of the columns are known
    (semicolons, 13, "line 4 .*, and 5 more$"),
    (lambda x: [b"\xef\xbb\xbf" + b"\r\n".join(x)], 21, None),  # a spreadsheet
    (None, 0, "goes on without .*log.csv: FileNotFoundError"),
    ("a folder", 0, "goes on without .*log.csv: (IsADir|Perm).*Error"),
]


@pytest.mark.parametrize(("edit", "count", "warning"), EDITED)
def test_an_edited_log_costs_no_model(tmp_path, edit, count, warning):
    run, _ = straight(tmp_path / "a")
    log = run.folder / "log.csv"
    lines = log.read_bytes().split(b"\n")
    log.unlink()
    if callable(edit):
        log.write_bytes(b"\n".join(edit(lines)))
    elif edit:
        log.mkdir()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        steps = finish(run)
    assert len(steps) == count
    assert len(seen) == (warning is not None)
    assert all(re.search(warning, str(x.message)) for x in seen)
    model = GPT2.from_checkpoint(run.folder / "model.bin", 1, 8, "reference")
    for name, x in model.params.items():
        assert np.array_equal(x, run.model.params[name])
    assert (run.folder / "loss.png").exists()
    if count:
        assert read_steps(run.folder / "log.csv") == steps


def test_settings_of_matplotlib_do_not_reach_a_run(tmp_path):
    run, _ = straight(tmp_path / "a")
    finish(run)
    whole = (run.folder / "loss.png").read_bytes()
    import matplotlib

    strange = {"font.family": "No Such Font", "text.usetex": True}
    with matplotlib.rc_context({**strange, "font.size": 99}):
        finish(run)
    assert (run.folder / "loss.png").read_bytes() == whole


@pytest.mark.parametrize("kind", ["a folder", "kept by another program"])
def test_rows_wait_for_a_log(tmp_path, monkeypatch, kind):
    """Nothing is lost, and the run goes on."""
    want, _ = straight(tmp_path / "a")
    run = begin(run_folder(tmp_path / "b"), TINY)
    log, steps = run.folder / "log.csv", follow(run)
    list(islice(steps, 6))
    kept = log.read_bytes()
    log.unlink()
    log.mkdir()
    if kind != "a folder":
        denied = OSError(errno.EACCES, os.strerror(errno.EACCES), str(log))

        def refuse(*args):
            raise denied

        monkeypatch.setattr("llmnb.train.log.add_to_log", refuse)
    with pytest.warns(UserWarning, match=r"log.csv: .*; rows wait") as seen:
        list(islice(steps, 7))
    assert len(seen) == 1, "said once"
    assert newest_state(run.folder)[0].at.step == 10
    monkeypatch.undo()
    log.rmdir()
    log.write_bytes(kept)
    list(steps)
    assert log_of(run.folder) == log_of(want.folder)
    assert np.array_equal(weights(run), weights(want))


def test_a_log_that_vanishes_is_begun_again(tmp_path):
    run = begin(run_folder(tmp_path / "a"), TINY)
    steps = follow(run)
    list(islice(steps, 6))
    (run.folder / "log.csv").unlink()
    list(steps)
    assert [x.step for x in finish(run)] == list(range(6, 21))
    text = (run.folder / "log.csv").read_text("utf-8")
    assert text.startswith("step,loss,val_loss,")


def test_a_folder_that_vanishes_is_told_in_one_line(tmp_path):
    run = begin(run_folder(tmp_path / "a"), TINY)
    steps = follow(run)
    list(islice(steps, 3))
    shutil.rmtree(run.folder)
    with pytest.raises(OSError, match="there is no checkpoint yet") as error:
        list(steps)
    assert "\n" not in str(error.value)


# numbers that are none


def spoil(array, value=np.nan):
    array.reshape(-1)[-1] = value


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", ["params", "m", "v"])
def test_no_state_takes_the_place_of_a_good_one(tmp_path, group, value):
    run = cut(tmp_path / "a", 12)
    before = files_of(run.folder)
    spoil(run.model.memory[group]["fcw"], value)
    with pytest.raises(FloatingPointError, match=f"{group}.fcw is -?[ni]"):
        save_state(run)
    assert files_of(run.folder) == before


def command_in(error):
    """The words of the command that a message ends with."""
    return shlex.split(str(error.value).partition(": llmnb ")[2])


def test_without_a_state_the_way_out_is_the_beginning(tmp_path):
    run = begin(run_folder(tmp_path / "a"), TINY)
    spoil(run.model.params["fcw"])
    with (
        np.errstate(all="ignore"),
        pytest.raises(FloatingPointError, match="validation loss is") as bad,
    ):
        list(follow(run))
    words = command_in(bad)
    assert "--init" not in words
    assert words[words.index("--channels") + 1] == "16"
    with pytest.raises(FloatingPointError, match="the validation loss is nan"):
        evaluate(run.model, run.validation, 2)


def test_a_state_is_a_model(tmp_path):
    """Of a run that is not over, --init, generate and eval take the newest."""
    run = cut(tmp_path / "a", 12, replace(TINY, precision="fp64"))
    path = run.folder / "state_00000010.safetensors"
    assert weights_path(run.folder) == path == weights_path(path)
    assert tokenizer_of(path, 257) == str(run.folder / "tokenizer.tiktoken")
    assert read_config(path) == run.model.cfg
    want = restore(read_state(path)).params
    for got in (
        GPT2.from_checkpoint(path, 1, 8, "reference", "fp64"),
        load_run(run.folder)[0],
        new_model(starting_from(str(run.folder), precision="fp64"), 257),
    ):
        assert all(np.array_equal(got.params[n], x) for n, x in want.items())
    list(follow(run))
    finish(run)
    assert weights_path(run.folder) == run.folder / "model.bin"
    os.utime(run.folder / "model.bin", (0, 0))
    assert weights_path(run.folder) == run.folder / "model.bin"
    list(islice(follow(resume(run.folder, steps=40)[0]), 6))
    newer = run.folder / "state_00000025.safetensors"
    os.utime(newer, (0, 0))  # no clock is asked
    assert weights_path(run.folder) == newer


def test_a_damaged_state_is_no_model(tmp_path, whole):
    path = tmp_path / "state_00000005.safetensors"
    path.write_bytes(whole)
    file = TensorFile(path)
    start, _ = file._span("params.wte")
    at = file._start + start
    for data, why in (
        (whole[: len(whole) // 2], "not a whole safetensors file"),
        (
            whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "params.wte is damaged",
        ),
        (whole.replace(b"channels", b"chanells"), "its record is damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=why) as error:
            GPT2.from_checkpoint(path, 1, 8, "reference")
        assert str(path) in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_not_read(tmp_path, whole, value):
    """From a state, as from every other format."""

    def change(arrays):
        spoil(arrays["params.lnfb"], value)
        return arrays

    path = rewritten(whole, tmp_path, lambda x: None, change)
    with pytest.raises(ValueError, match=r"lnfb is (nan|inf) at \(15,\), wh"):
        GPT2.from_checkpoint(path, 1, 8, "reference")


# kills


COMMAND = (
    "train --tokenizer byte --num-layers 1 --num-heads 2 --channels 96 "
    "--seq-len 32 --batch-size 2 --total-batch 128 --steps 20 "
    "--eval-every 6 --eval-batches 2 --save-every 1 --keep 2 "
    "--skip-loss 1 --skip-norm 1 --skip-window 6 --corpus text.txt "
    "--threads 1"
)


def start(folder, *args):
    command = [sys.executable, "-m", "llmnb.cli", *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    # a shell's background job ignores Ctrl-C, and so do its children
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        preexec_fn=listen if os.name == "posix" else None,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process, code=0):
    err = process.communicate(timeout=120)[1]
    assert process.returncode == code, err
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a text and a run that nobody disturbed."""
    place = tmp_path_factory.mktemp("kills")
    words = random.Random(3)
    text = " ".join(words.choice(["spam", "eggs", "ham"]) for _ in range(9000))
    (place / "text.txt").write_text(text, "utf-8")
    wait(start(place, *COMMAND.split(), "--out", "warm"))  # compiles
    wait(start(place, *COMMAND.split(), "--out", "straight"))
    return place


def rows(folder):
    with contextlib.suppress(OSError):
        return (folder / "log.csv").read_bytes().count(b"\n") - 1
    return -1


def kill(process, folder, stream):
    """Kill -9 after a random number of further rows and a random while."""
    target = rows(folder) + stream.randint(0, 5)
    pause = stream.random() * 0.04
    while process.poll() is None and rows(folder) < target:
        time.sleep(0.001)
    time.sleep(pause)
    process.kill()
    process.communicate()
    if process.returncode == 0:
        return "over"
    if any(folder.glob("state_*.new")):
        return "in a state"
    if any(folder.glob("*.new")):
        return "in another file"
    return "between" if states(folder) else "before the first state"


def test_killed_at_any_moment(finished):
    """Kill, resume, kill again; the end is that of the run in peace."""
    stream, seen, number = random.Random(KILLS), {}, 0
    while sum(seen.values()) < KILLS:
        number += 1
        folder = finished / f"killed-{number}"
        process = start(finished, *COMMAND.split(), "--out", folder.name)
        while True:
            moment = kill(process, folder, stream)
            if moment == "over":
                break
            seen[moment] = seen.get(moment, 0) + 1
            if not (folder / "config.json").exists():
                args = [*COMMAND.split(), "--force", "--out", folder.name]
            else:
                args = ["train", "--threads", 1, "--resume", folder.name]
            process = start(finished, *args)
            if sum(seen.values()) >= KILLS:
                wait(process)
                break
        assert files_of(folder) == files_of(finished / "straight")
    print(f"\n{KILLS} kills: {seen}")
    if KILLS >= 50:
        assert seen["in a state"] > 5 and seen["between"] > 5


def test_a_signal_finishes_the_step(finished):
    name, number = "cut", signal.SIGTERM
    folder = finished / name
    args = COMMAND.replace("--save-every 1", "--save-every 0").split()
    process = start(finished, *args, "--out", name)
    while rows(folder) < 5:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    err = wait(process, 128 + number)
    assert "finishing the step" in err and "Traceback" not in err
    assert len(states(folder)) == 1
    assert (folder / "model.bin").exists(), "it can be used"
    wait(start(finished, "train", "--threads", 1, "--resume", name))
    want, got = files_of(finished / "straight"), files_of(folder)
    assert want["model.bin"] == got["model.bin"]
    assert want["log.csv"] == got["log.csv"]


def test_two_commands_in_one_folder(finished):
    """The second is refused, however it is started, and harms nothing."""
    args = COMMAND.replace("--steps 20", "--steps 60").split()
    wait(start(finished, *args, "--out", "alone"))
    first = start(finished, *args, "--out", "shared")
    while rows(finished / "shared") < 3:
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    threads = "train", "--threads", 1
    seconds = [
        start(finished, *args, "--out", "shared"),
        start(finished, *args, "--out", "shared", "--force"),
        start(finished, *threads, "--resume", "shared"),
    ]
    for second in seconds:
        err = wait(second, 1)
        assert f"shared is in use by process {first.pid} on " in err
        assert err.count("\n") == 1
    first.send_signal(signal.SIGCONT)
    wait(first)
    assert files_of(finished / "shared") == files_of(finished / "alone")
