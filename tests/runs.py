"""What the tests of runs share: a tiny run, and what is left of it."""

import contextlib
import json
import random
from itertools import islice

import numpy as np

from llmnb.files import own_folder
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.text import tokenizer
from llmnb.train.feed import Data
from llmnb.train.log import read_steps
from llmnb.train.options import TrainConfig
from llmnb.train.run import begin, finish, follow, resume

SHAPE = {
    "num_layers": 1, "num_heads": 2, "channels": 16, "seq_len": 16,
    "batch_size": 2, "tokenizer": "byte", "backend": "reference",
    "eval_batches": 3,
}  # fmt: skip
PLAIN = TrainConfig(**SHAPE, steps=12, eval_every=5, learning_rate=1e-2)
TINY = TrainConfig(
    **SHAPE, steps=20, eval_every=7, learning_rate=1e-3, total_batch=64,
    skip_loss=1.0, skip_norm=1.0, skip_window=5, save_every=5,
)  # fmt: skip


def small_data():
    """A text of some thousand bytes in place of a corpus."""
    stream = random.Random(5)
    kinds = ["spam ", "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    lines = (stream.choices(stream.choice(kinds), k=90) for _ in range(150))
    text = "".join("".join(line) for line in lines).encode()
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16)
    return Data(tokenizer.byte(), tokens[900:], tokens[:900], "a test")


def begun(group, folder, config):
    """A run that each rank of a group begins in a new folder."""
    if group.first:
        own_folder(folder)
    group.gather("the folder is there")
    return begin(folder, config, group)


def straight(folder, config=TINY):
    run = begin(own_folder(folder), config)
    return run, list(follow(run))


def cut(folder, count, config=TINY):
    """A run that was left after so many steps."""
    run = begin(own_folder(folder), config)
    list(islice(follow(run), count))
    return run


def weights(run):
    return run.model.memory.flat("params").copy()


def cut_and_resumed(folder, count, config=TINY):
    """Such a run, resumed, which must be the straight one; and that one."""
    want, _ = straight(folder / "a", config)
    cut(folder / "b", count, config)
    run, warnings = resume(folder / "b")
    assert (warnings, run.at.step) == ([], count - count % config.save_every)
    list(follow(run))
    assert np.array_equal(weights(run), weights(want)) and run.at == want.at
    finish(want)
    finish(run)
    assert files_of(folder / "b") == files_of(folder / "a")
    return run, want


def without_speed(steps):
    return [x._replace(tokens_per_second=None) for x in steps]


def log_of(folder):
    """The rows of a log, but for the speed."""
    return without_speed(read_steps(folder / "log.csv"))


def files_of(folder):
    """What is in a run folder, the log without its speeds."""
    found = {x.name: x.read_bytes() for x in folder.iterdir()}
    found["log.csv"] = log_of(folder)
    return found


def learnt(folder):
    """What a run has learnt: its states, its weights, its log."""
    files = [*folder.glob("state_*"), folder / "model.bin"]
    found = {x.name: x.read_bytes() for x in files}
    return found | {"log.csv": log_of(folder)}


def rows(folder):
    """How many steps the log of a run has so far; -1 where there is none."""
    with contextlib.suppress(OSError):
        return (folder / "log.csv").read_bytes().count(b"\n") - 1
    return -1


def rewrite(path, change=lambda record: None, arrays=lambda x: x):
    """Write a state with another record, its checksums in order."""
    file = TensorFile(path)
    record = json.loads(file.metadata["record"])
    tensors = arrays({name: file[name].copy() for name in file.names})
    change(record)
    note = file.metadata | {"record": json.dumps(record)}
    write_tensors(path, tensors, note)
