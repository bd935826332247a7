"""Nothing lost: states, resuming, kills, signals, full disks, bad files."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from fuzz import fuzzed, mangled, refused
from processes import held
from runs import (
    PLAIN,
    TINY,
    cut,
    cut_and_resumed,
    files_of,
    log_of,
    rewrite,
    rows,
    small_data,
    straight,
    weights,
)

from llmnb.cpu.tile import cpu_features
from llmnb.files import LOCK, own_folder
from llmnb.formats.checkpoint import read_config
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.formats.shard import write_shard
from llmnb.formats.vocabulary import tokenizer_of
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer
from llmnb.train import folder as folders
from llmnb.train import run as the_run
from llmnb.train.feed import Data, loaders, prepare
from llmnb.train.finetune import starting_from
from llmnb.train.folder import state_path, states
from llmnb.train.loop import evaluate
from llmnb.train.run import CHANGEABLE, begin, finish, follow, resume
from llmnb.train.start import new_model
from llmnb.train.state import fingerprint, read_state, restore, save_state

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LLMNB_KILLS", 4))
ANOTHER = "the text is not the one it began with"


def steps_in(folder):
    return [folders.step_of(path) for path in states(folder)]


# resuming


@pytest.mark.parametrize(("count", "options"), [
    (1, {}), (4, {}), (5, {}), (6, {}), (13, {}), (19, {}), (20, {}),
    (8, {"precision": "fp64"}), (8, {"overfit": True}),
    (8, {"schedule": "wsd"}), (8, {"backend": "cpu"}),
], ids=str)  # fmt: skip
def test_a_resumed_run_is_the_straight_run(tmp_path, count, options):
    cut_and_resumed(tmp_path, count, replace(TINY, **options))


def test_a_longer_run(tmp_path):
    cut(tmp_path / "a", 12)
    run, _ = resume(tmp_path / "a", steps=30, keep=3, save_every=4)
    assert [s.step for s in follow(run)] == list(range(10, 31))
    assert steps_in(tmp_path / "a") == [24, 28, 30]
    again, _ = resume(tmp_path / "a")
    assert again.config.steps == 30 and again.at.step == 30
    assert [s.step for s in follow(again)] == [30]
    assert [s.step for s in log_of(tmp_path / "a")] == list(range(31))


def test_the_newest_states_are_kept(tmp_path):
    run = begin(own_folder(tmp_path / "a"), replace(TINY, save_every=3))
    seen = [steps_in(run.folder) for _ in follow(run)]
    assert seen[1:4] == [[], [3], [3]]
    assert seen[8] == [6, 9] and seen[-1] == [18, 20]
    straight(tmp_path / "b", replace(TINY, save_every=0))
    assert steps_in(tmp_path / "b") == [20]


def test_newer_states_stay_until_the_run_has_come_there(tmp_path):
    """A damaged one takes no good one's place, and goes when it is passed."""
    cut(tmp_path / "a", 7, replace(TINY, save_every=2))
    for step in (9, 13, 99):
        state_path(tmp_path / "a", step).write_bytes(b"damaged")
    run, warnings = resume(tmp_path / "a")
    assert run.at.step == 6 and len(warnings) == 3
    seen = {step.step + 1: steps_in(run.folder) for step in follow(run)}
    assert seen[7] == [4, 6, 9, 13, 99]
    assert seen[8] == [6, 8, 9, 13, 99]
    assert seen[10] == [8, 10, 13, 99]
    assert seen[14] == [12, 14, 99] and seen[20] == [18, 20, 99]


# the names of our own files

FOREIGN = (
    "state_best.safetensors", "state_00000005 copy.safetensors",
    "state_5.safetensors", "state_0000000005.safetensors",
    "state_00000005.safetensors.bak", "state_-0000005.safetensors",
    "state_٠٠٠٠٠٠٠٥.safetensors", "my_state_00000005.safetensors",
    "notes.new", "notes.2024.new", "state_best.safetensors.12.new",
    "log.csv.new", "my model.bin.0123456789abcdef.new",
    "log.csv.0123456789abcdef",
)  # fmt: skip
HALF = (
    "state_00000010.safetensors.00000000000000f0.new",
    "state_00000010.safetensors.1234.new", "config.json.0123456789abcdef.new",
    "log.csv.0000000000000001.new", "model.bin.0000000000000002.new",
)  # fmt: skip


@pytest.mark.parametrize("how", ["resume", "begin", "follow"])
def test_only_our_own_names_are_states_or_leftovers(tmp_path, how):
    """A copy beside the states is not gone on from, and stays."""
    run = cut(tmp_path / "a", 12)
    newest = states(run.folder)[-1].read_bytes()
    del run
    for name in FOREIGN + HALF:
        (tmp_path / "a" / name).write_bytes(b"better: " + newest)
    if how == "begin":
        run = begin(tmp_path / "a", replace(TINY, seed=1))
        assert states(run.folder) == []
        list(islice(follow(run), 2))
        assert [s.step for s in log_of(run.folder)] == [0, 1]
    else:
        run, warnings = resume(tmp_path / "a")
        assert run.at.step == 10 and warnings == []
    if how == "follow":
        list(follow(run))
        assert steps_in(run.folder) == [15, 20]
    left = {x.name: x.read_bytes() for x in run.folder.iterdir()}
    assert all(left[name] == b"better: " + newest for name in FOREIGN)
    assert not left.keys() & {*HALF}


def test_a_run_of_more_than_a_hundred_million_steps(tmp_path):
    run = begin(own_folder(tmp_path / "a"), replace(TINY, steps=10**9))
    for step in (99_999_998, 99_999_999, 100_000_000):
        run.at.step = step
        save_state(run)
    assert steps_in(run.folder) == [99_999_999, 100_000_000]
    assert the_run.newest_state(run.folder)[0].at.step == 100_000_000


def test_a_model_without_a_state_is_not_begun_anew(tmp_path):
    """What was learnt is neither lost nor taken for a new run's."""
    run, _ = straight(tmp_path / "a", PLAIN)
    finish(run)
    for path in states(run.folder):
        path.unlink()
    before = files_of(run.folder)
    with pytest.raises(ValueError, match="no state to go on .* --init"):
        resume(run.folder)
    assert files_of(run.folder) == before
    with pytest.raises(ValueError, match="model.bin would be lost: choose"):
        begin(run.folder, replace(PLAIN, init=str(run.folder)))
    assert files_of(run.folder) == before
    begin(run.folder, replace(PLAIN, seed=1))
    assert folders.weights_path(run.folder) == run.folder
    assert resume(run.folder)[0].at.step == 0


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced")
def test_a_state_is_safe_before_an_older_one_is_removed(tmp_path, calls):
    run = begin(own_folder(tmp_path / "a"), replace(TINY, keep=1))
    for step in (5, 10):
        run.at.step = step
        calls.clear()
        save_state(run)
    assert steps_in(run.folder) == [10]
    older, newer = (state_path("", step).name for step in (5, 10))
    written = calls.index(("replace", newer))
    assert calls[written - 1] == ("sync", "file")
    removed = calls.index(("unlink", older))
    assert ("sync", "folder") in calls[written:removed]


# what cannot be resumed


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
    with pytest.raises(ValueError, match="has '', got 'b.bin'"):
        resume(tmp_path / "a", init="b.bin")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        resume(tmp_path)


@pytest.mark.parametrize("part", ["train_tokens", "val_tokens"])
@pytest.mark.parametrize("place, count", [(0.5, 300), (0.9, 1), (0.3, 1)])
def test_a_text_changed_anywhere(tmp_path, monkeypatch, part, place, count):
    cut(tmp_path / "a", 7)
    before, data = files_of(tmp_path / "a"), small_data()
    tokens = getattr(data, part).copy()
    tokens[int(len(tokens) * place) :][:count] ^= 1
    other = data._replace(**{part: tokens})
    monkeypatch.setattr("llmnb.train.run.prepare", lambda _: other)
    refused(ANOTHER, resume, tmp_path / "a")
    assert files_of(tmp_path / "a") == before, "nothing is written"


def test_a_corpus_in_place_of_shards(tmp_path, monkeypatch):
    """The tokens decide, not the way they come."""
    monkeypatch.setattr("llmnb.train.run.prepare", prepare)
    text, shards = tmp_path / "text.txt", tmp_path / "shards"
    text.write_text("spam and eggs, " * 500)
    config = replace(TINY, corpus=(str(text),))
    data = prepare(config)
    shards.mkdir()
    write_shard(shards / "train.bin", data.train_tokens)
    write_shard(shards / "val.bin", data.val_tokens)
    tokenizer.save(data.encoding, shards / "tokenizer.tiktoken")
    cut(tmp_path / "a", 7, replace(TINY, shards=str(shards)))
    run, _ = resume(tmp_path / "a", corpus=config.corpus)
    assert run.config == config and run.at.step == 5


def test_a_fingerprint_keeps_one_shard_open(tmp_path):
    files = Path("/proc/self/fd")
    if not files.exists():
        pytest.skip("counts files in /proc")
    tokens = np.random.RandomState(3).randint(0, 256, (5, 900)).astype("u2")
    write_shard(tmp_path / "val.bin", tokens[0])
    for k in range(1, 5):
        write_shard(tmp_path / f"train_{k:06}.bin", tokens[k])
    config = replace(TINY, shards=str(tmp_path))
    feeds = loaders(config, prepare(config))
    before = len(list(files.iterdir()))
    found = fingerprint(*feeds)
    assert len(list(files.iterdir())) <= before + 1
    assert found == json.loads(json.dumps(found))
    data = Data(None, tokens[1:].ravel(), tokens[0], "")
    other = fingerprint(*loaders(config, data))
    assert other[0] != found[0], "where shards end is part of it"
    assert other[1] == found[1]


def test_a_state_of_an_older_llmnb(tmp_path):
    want = straight(tmp_path / "want")[0]
    run = cut(tmp_path / "a", 7)
    found = []
    for loader in (run.batches, run.validation):
        loader.reset()
        first = b"".join(x.tobytes() for x in loader.next_batch())
        found.append([loader.batches_per_epoch, zlib.crc32(first)])

    def older(record):
        del record["begun"]
        record["text"] = found

    rewrite(states(run.folder)[-1], older)
    run, (warning,) = resume(tmp_path / "a")
    assert "by an older llmnb: only the first batch of the text" in warning
    list(follow(run))
    assert np.array_equal(weights(run), weights(want))
    cut(tmp_path / "b", 7)
    found[1][1] ^= 1
    rewrite(states(tmp_path / "b")[-1], older)
    refused(ANOTHER, resume, tmp_path / "b")


def test_a_state_of_another_run(tmp_path):
    cut(tmp_path / "a", 7)
    other = cut(tmp_path / "b", 12, replace(TINY, seed=7))
    shutil.copy(states(other.folder)[-1], tmp_path / "a")
    refused("is of a run with other options", resume, tmp_path / "a")


# another machine

FEATURES = cpu_features() - {"avx2", "neon"} | {"new"}
VARIABLES = ["LLMNB_TILE", "NUMBA_OPT", "NUMBA_CPU_FEATURES", "LLMNB_BF16"]


def test_another_machine_is_told(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cut(tmp_path / "a", 7)
    says = [f"now {x}-9" for x in ("llmnb", "numpy", "numba", "llvmlite")]
    says += [f"{name} none, now other" for name in VARIABLES]
    says += ["features ", ", now new", "may differ in their last bits"]
    for steps in (5, 99):  # of the new machine's own states too
        with monkeypatch.context() as patch:
            patch.setattr("llmnb.train.state.version", "{}-9".format)
            patch.setattr("llmnb.cpu.tile.cpu_features", lambda: FEATURES)
            for name in VARIABLES:
                patch.setenv(name, "other")
            run, (warning,) = resume(tmp_path / "a")
        assert all(x in warning for x in says) and "Python" not in warning
        list(islice(follow(run), steps))
    assert resume(tmp_path / "a")[1] == []


def test_another_gpu_is_told(monkeypatch):
    monkeypatch.setenv("LLMNB_CUDA", "simulator")
    cuda = pytest.importorskip("llmnb.cuda.model")
    begun = the_run.surroundings("cuda")
    monkeypatch.setattr(cuda, "gpu", lambda: "another")
    (warning,) = the_run.differences(begun, the_run.surroundings("cuda"))
    assert "began with GPU none" in warning and ", now another" in warning
    assert "GPU" not in the_run.surroundings("cpu")


# damaged files


@fuzzed(300, derandomize=True)
def test_a_damaged_state_is_refused_or_the_same(tmp_path_factory, whole, data):
    """Or its damage is in the spaces that pad the header."""
    folder = tmp_path_factory.getbasetemp()
    good, path = (folder / f"{x}.safetensors" for x in ("good", "damaged"))
    good.write_bytes(whole)
    path.write_bytes(data.draw(mangled(whole)))
    try:
        model, want = restore(read_state(path)), restore(read_state(good))
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    for group in ("params", "m", "v"):
        pair = (x.memory.flat(group) for x in (model, want))
        assert np.array_equal(*pair), group


@pytest.mark.parametrize(("name", "change", "message"), [
    ("m.wpe", None, "m.wpe must be .*, got None"),
    ("w", lambda _: np.zeros(3, "f4"), "w must be None"),
    ("v.wte", np.float64, "v.wte must be .'F32', .*, got .'F64'"),
    ("v.wte", lambda x: x.T.copy(), "v.wte must be .*, got"),
])  # fmt: skip
def test_arrays_of_another_model(good, name, change, message):
    def changed(arrays):
        old = arrays.pop(name, None)
        return arrays | {name: change(old)} if change else arrays

    rewrite(good, arrays=changed)
    refused(message, read_state, good)
    write_tensors(good, {"x": np.zeros(3)})
    refused("its format must be", read_state, good)


@pytest.mark.parametrize("change", [
    {"config": {}}, {"config": None}, {"config": {"corpus": 3}},
    {"model": {"channels": 0}}, {"model": {"channels": 64}},
    {"model": []}, {"progress": {"stepz": 1}}, {"progress": 3},
    {"progress": {"step": -1}}, {"progress": {"step": "5"}},
    {"progress": {"step": 3, "updates": 4}},
    {"progress": {"losses": ["x"]}}, {"progress": {"norms": 3.0}},
    {"model": {"num_layers": 10**9}},
    {"begun": 3}, {"begun": ["numba"]},
], ids=str)  # fmt: skip
def test_other_records(good, change):
    rewrite(good, lambda record: record.update(change))
    refused("is not a whole state: ", read_state, good)


def test_states_of_which_none_is_whole(tmp_path):
    folder = cut(tmp_path / "a", 12).folder
    for place in ({}, 3, {"epoch": 0, "shard": 9, "position": 0}):
        for path in states(folder):
            rewrite(path, lambda x, y=place: x.update(place=y))
        with pytest.raises((ValueError, TypeError)):
            resume(folder)
    for path in states(folder):
        path.write_bytes(b"")
    refused("has no state to go on from: ", resume, folder)


# full disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_for_the_log(tmp_path):
    run = begin(own_folder(tmp_path / "a"), TINY)
    steps, log = follow(run), run.folder / "log.csv"
    list(islice(steps, 7))
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


def test_a_folder_that_vanishes_is_told_in_one_line(tmp_path):
    run = begin(own_folder(tmp_path / "a"), TINY)
    steps = follow(run)
    list(islice(steps, 3))
    shutil.rmtree(run.folder)
    with pytest.raises(OSError, match="there is no checkpoint yet") as error:
        list(steps)
    assert "\n" not in str(error.value)


# one folder, one owner


def test_the_newer_run_of_a_process_has_the_folder(tmp_path):
    older = cut(tmp_path / "a", 7)
    steps = follow(older)
    next(steps)
    newer, _ = resume(tmp_path / "a")
    for call, of in (
        (next, steps), (save_state, older), (finish, older),
        (next, follow(older)),
    ):  # fmt: skip
        with pytest.raises(BlockingIOError, match="taken up anew, by this pr"):
            call(of)
    list(follow(newer))
    want = straight(tmp_path / "b")[0]
    finish(newer)
    finish(want)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_lock_ends_with_its_run(tmp_path):
    lock = tmp_path / "a" / LOCK
    run = cut(tmp_path / "a", 7)
    assert lock.exists()
    finish(run)
    assert not lock.exists()
    assert own_folder(run.folder, force=True) == run.folder
    next(follow(run))
    assert lock.exists(), "it goes on"
    lock.unlink()
    next(follow(run))
    assert lock.exists(), "and takes it again"
    del run
    assert not lock.exists()
    large = replace(TINY, seq_len=10**6, total_batch=0)
    for call in (
        partial(resume, channels=64), partial(resume, steps=2),
        partial(begin, config=large),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            call(tmp_path / "a")
        assert error and not lock.exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / LOCK).touch()
    assert own_folder(tmp_path / "empty"), "a lock alone counts as empty"


# numbers that are none


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", ["params", "m", "v"])
def test_no_state_takes_the_place_of_a_good_one(tmp_path, group, value):
    run = cut(tmp_path / "a", 12)
    before = files_of(run.folder)
    run.model.memory[group]["fcw"].flat[-1] = value
    with pytest.raises(FloatingPointError, match=f"{group}.fcw is -?[ni]"):
        save_state(run)
    assert files_of(run.folder) == before


@np.errstate(all="ignore")
def test_without_a_state_the_way_out_is_the_beginning(tmp_path):
    run = begin(own_folder(tmp_path / "a"), TINY)
    run.model.params["fcw"].flat[-1] = np.nan
    with pytest.raises(FloatingPointError, match="validation loss is") as bad:
        list(follow(run))
    words = shlex.split(str(bad.value).partition(": llmnb ")[2])
    assert "--init" not in words
    assert words[words.index("--channels") + 1] == "16"
    with pytest.raises(FloatingPointError, match="the validation loss is nan"):
        evaluate(run.model, run.validation, 2)


def test_a_state_is_a_model(tmp_path):
    """Of a run that is not over, --init, generate and eval take the newest."""
    run = cut(tmp_path / "a", 12, replace(TINY, precision="fp64"))
    path, model = state_path(run.folder, 10), run.folder / "model.bin"
    assert (
        folders.weights_path(run.folder) == path == folders.weights_path(path)
    )
    assert tokenizer_of(path, 257) == str(run.folder / "tokenizer.tiktoken")
    assert read_config(path) == run.model.cfg
    want = restore(read_state(path)).params
    for got in (
        GPT2.from_checkpoint(path, 1, 8, "reference", "fp64"),
        folders.load_run(run.folder)[0],
        new_model(starting_from(str(run.folder), precision="fp64"), 257),
    ):
        assert all(np.array_equal(got.params[n], x) for n, x in want.items())
    list(follow(run))
    finish(run)
    assert folders.weights_path(run.folder) == model
    os.utime(model, (0, 0))
    assert folders.weights_path(run.folder) == model
    list(islice(follow(resume(run.folder, steps=40)[0]), 6))
    newer = state_path(run.folder, 25)
    os.utime(newer, (0, 0))  # no clock is asked
    assert folders.weights_path(run.folder) == newer


@pytest.mark.parametrize("step", ["1e999", "null", '"x"', "[]"])
def test_a_model_of_no_known_step_is_older_than_a_state(tmp_path, step):
    (tmp_path / "model.bin").touch()
    state_path(tmp_path, 0).touch()
    (tmp_path / "config.json").write_text(f'{{"model_step": {step}}}')
    assert folders.weights_path(tmp_path) == state_path(tmp_path, 0)


def test_a_damaged_state_is_no_model(good, whole):
    at = TensorFile(good)._start  # where the first array begins, params.wte
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for data, why in (
        (whole[: len(whole) // 2], "not a whole safetensors file"),
        (flipped, "params.wte is damaged"),
        (whole.replace(b"channels", b"chanells"), "is not a whole state"),
        (whole.replace(b"stdlib", b"stdlob"), "params.wte is damaged"),
    ):
        good.write_bytes(data)
        refused(why, GPT2.from_checkpoint, good, 1, 8, "reference")
    good.write_bytes(whole)
    rewrite(good, lambda record: record["model"].update(channels=32))
    says = "is not a whole state: params.wte must be .* got "
    refused(says, GPT2.from_checkpoint, good, 1, 8, "reference")


# kills

COMMAND = (
    "train --tokenizer byte --num-layers 1 --num-heads 2 --channels 96 "
    "--seq-len 32 --batch-size 2 --total-batch 128 --steps 20 "
    "--eval-every 6 --eval-batches 2 --save-every 1 --keep 2 "
    "--skip-loss 1 --skip-norm 1 --skip-window 6 --corpus text.txt "
    "--threads 1"
)
RESUME = "train", "--threads", 1, "--resume"


def start(folder, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "llmnb.cli", *map(str, args)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait(process):
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a text and a run that nobody disturbed."""
    place = tmp_path_factory.mktemp("kills")
    words = random.Random(3)
    text = " ".join(words.choice(["spam", "eggs", "ham"]) for _ in range(9000))
    (place / "text.txt").write_text(text, "utf-8")
    for name in ("warm", "straight"):  # the first one compiles
        wait(start(place, *COMMAND.split(), "--out", name))
    return place


def kill(process, folder, stream):
    """Kill -9 after a random number of further rows and a random while."""
    count = rows(folder) + stream.randint(0, 5)
    while process.poll() is None and rows(folder) < count:
        time.sleep(0.001)
    time.sleep(stream.random() * 0.04)
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
        while (moment := kill(process, folder, stream)) != "over":
            seen[moment] = seen.get(moment, 0) + 1
            again = [*RESUME, folder.name]
            if not (folder / "config.json").exists():
                again = [*COMMAND.split(), "--force", "--out", folder.name]
            process = start(finished, *again)
            if sum(seen.values()) >= KILLS:
                wait(process)
                break
        assert files_of(folder) == files_of(finished / "straight")
    print(f"\n{KILLS} kills: {seen}")
    if KILLS >= 50:
        assert seen["in a state"] > 5 and seen["between"] > 5


def test_a_folder_of_another_process_is_refused(tmp_path):
    run = cut(tmp_path / "a", 7)
    run.lock.release()
    before = files_of(run.folder)
    with held(run.folder) as process:
        says = f"a is in use by process {process.pid} on "
        for call in (resume, partial(begin, config=TINY), own_folder):
            with pytest.raises(OSError, match=says):
                call(run.folder)
    assert files_of(run.folder) == before
