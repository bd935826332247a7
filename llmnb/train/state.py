# Written by `make export` from notebooks/4_practice/15_states.py: edit that file.

"""The state of a run: all that one step hands to the next."""

__all__ = [
    "Run", "State", "differences", "fingerprint", "first_batches",
    "newest_state", "read_state", "restore", "save_state", "surroundings",
]


# imports of state
import json
import math
import os
import platform
import zlib
from contextlib import suppress
from dataclasses import asdict
from hashlib import file_digest, sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.arena import put
from llmnb.config import GPT2Config
from llmnb.formats.checkpoint import STATE, first_not_finite, state_record
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.files import Lock
from llmnb.model.tensors import parameter_shapes
from llmnb.formats.llmc import HEADER_BYTES
from llmnb.formats.shard import shard_length
from llmnb.text.data import DataLoader
from llmnb.train.feed import Data
from llmnb.train.folder import step_of, config_from, state_path, states
from llmnb.train.folder import weights_path
from llmnb.train.group import ALONE, group_of
from llmnb.train.loop import GENTLER, Progress
from llmnb.train.options import TrainConfig
from llmnb.train.start import empty_model


# a run
class Run(NamedTuple):
    """A run in progress: all that `follow` works with.

    folder: a Path. model: a GPT2. batches, validation: DataLoaders. at: the
    Progress. text: a fingerprint of the text, see `fingerprint`. begun: the
    `surroundings` at its beginning. kept: the steps of the states to go on
    from, the oldest first. lock: the folder's, see `Lock`.

    Derived in chapter 4.15.
    """

    folder: Path
    config: TrainConfig
    data: Data
    model: object
    batches: DataLoader
    validation: DataLoader
    at: Progress
    text: list
    begun: dict
    kept: list
    lock: Lock


# what text it is
def fingerprint(*batches):
    """What tells one text from another, for JSON.

    For each DataLoader: the number of its batches, and a sha256 of all
    tokens of all its shards. One shard is open at a time.

    Derived in chapter 4.15.
    """
    return [[x.batches_per_epoch, _digest(x.shards)] for x in batches]


def _digest(shards):
    """A sha256 of tokens, as shards keep them, and of where shards end."""
    digest = sha256()
    for shard in shards:
        if isinstance(shard, np.ndarray):
            digest.update(len(shard).to_bytes(8, "little"))
            kind = "<u2" if shard.dtype == np.uint16 else "<u4"
            digest.update(np.ascontiguousarray(shard, kind))
            continue
        digest.update(shard_length(shard).to_bytes(8, "little"))
        # read, for to map a file is to die if it is cut
        with open(shard, "rb") as file:
            file.seek(HEADER_BYTES)
            file_digest(file, lambda: digest)
    return digest.hexdigest()


def first_batches(batches):
    """What stood for `fingerprint` once: it saw the first batch alone.

    Derived in chapter 4.15.
    """
    for loader in batches:
        loader.reset()
        first = zlib.crc32(b"".join(x.tobytes() for x in loader.next_batch()))
        loader.reset()
        yield [loader.batches_per_epoch, first]


# what else decides the bits
_SETTINGS = (
    "LLMNB_BF16", "LLMNB_CUDA", "LLMNB_MATMUL", "LLMNB_TILE",
    "NUMBA_BOUNDSCHECK", "NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME",
    "NUMBA_DISABLE_JIT", "NUMBA_LOOP_VECTORIZE", "NUMBA_OPT",
    "NUMBA_SLP_VECTORIZE",
)  # fmt: skip


def surroundings(backend="cpu"):
    """What the bits of a run depend on besides its options and its text.

    A dict of str to str: versions, the processor and its features, the GPU
    if that is the backend, and the variables that choose other kernels.

    Derived in chapter 4.15.
    """
    from llmnb.cpu.tile import cpu_features

    names = "llmnb", "numpy", "numba", "llvmlite"
    found = {name: version(name) for name in names}
    found["Python"] = ".".join(platform.python_version_tuple()[:2])
    found["processor"] = f"{platform.system()} {platform.machine()}"
    found["features"] = " ".join(sorted(cpu_features()))
    if backend == "cuda":
        from llmnb.cuda.model import gpu

        found["GPU"] = gpu()
        with suppress(PackageNotFoundError):
            found["numba-cuda"] = version("numba-cuda")
    return found | {x: os.environ[x] for x in _SETTINGS if x in os.environ}


def differences(begun, now):
    """A list of one sentence on what has changed, or an empty one.

    Derived in chapter 4.15.
    """
    found = []
    for name in sorted(begun | now):
        pair = [str(x.get(name, "none")) for x in (begun, now)]
        words = [set(x.split()) for x in pair]
        if name == "features":  # a hundred words: those that differ
            pair = [" ".join(sorted(words[i] - words[1 - i])) for i in (0, 1)]
        if words[0] != words[1]:
            then, here = (x or "none" for x in pair)
            found.append(f"{name} {then}, now {here}")
    return found and [
        "the weights may differ in their last bits from those of a run that "
        f"was not interrupted: it began with {'; '.join(found)}"
    ]


# save the state
_GROUPS = "params", "m", "v"


def save_state(run):
    """Write the state of a run into its folder; return the path.

    In a group all processes call it, and the first writes.

    The file appears whole or not at all. Then all up to this step are
    removed but the newest `config.keep` that the run itself has written or
    gone on from. Those from beyond the step, which may be damaged, stay
    until the run has come there. Raises FloatingPointError, and keeps what
    there is, when an array is not finite.

    Derived in chapter 4.15.
    """
    from llmnb.model.architectures import architecture_record  # Part 5

    memory, path = run.model.memory, state_path(run.folder, run.at.step)
    group = group_of(run.model)
    tensors = {}
    for kind, name in product(_GROUPS, parameter_shapes(run.model.cfg)):
        x = memory[kind][name]
        spread = hasattr(x, "collect")  # else it is all here, or on a GPU
        tensors[f"{kind}.{name}"] = x if spread else np.asarray(x)
    parts = {n: np.asarray(getattr(x, "part", x)) for n, x in tensors.items()}
    for wrong in filter(None, group.gather(first_not_finite(parts))):
        raise FloatingPointError(
            f"after the update at step {run.at.step - 1}, {wrong}: {GENTLER}"
        )
    if not group.first:
        _hand_over(tensors)
        return path
    record = {
        "config": asdict(run.config),
        "model": architecture_record(run.model.cfg),
        "progress": asdict(run.at),
        "place": run.batches.state,
        "text": run.text,
        "begun": run.begun,
    }
    run.lock.check()
    note = {"format": STATE, "record": json.dumps(record)}
    write_tensors(path, tensors, note)
    _forget_old(run)
    return path


def _hand_over(tensors):
    """Give the first process what it writes, in the order of its writing."""
    for x in tensors.values():
        if hasattr(x, "collect"):
            x.collect()


def _forget_old(run):
    step, kept = run.at.step, run.kept
    kept[:] = [*(x for x in kept if x < step), step][-run.config.keep :]
    for old in states(run.folder):
        if step_of(old) <= step and step_of(old) not in kept:
            old.unlink()


# a state read back
class State(NamedTuple):
    """What a file of `save_state` holds, but for the arrays.

    cfg: the model's GPT2Config. place: of the DataLoader. text: as
    `fingerprint` gives it. begun: as `surroundings` gives it, or empty.

    Derived in chapter 4.15.
    """

    path: Path
    config: TrainConfig
    cfg: GPT2Config
    at: Progress
    place: dict
    text: list
    begun: dict


# read and check
def read_state(path):
    """Read and check a state; returns a `State`, whose arrays are not kept.

    Raises OSError when it cannot be read, and ValueError, naming the file
    and the defect, when it is not whole: names, shapes, types and checksums
    of all arrays are checked.

    Derived in chapter 4.15.
    """
    from llmnb.model.architectures import architecture_from  # Part 5

    file = TensorFile(path)
    try:
        record = state_record(file)
        state = State(
            Path(path),
            config_from(record["config"]),
            architecture_from(record["model"]),
            Progress(**record["progress"]),
            record["place"],
            record["text"],
            dict(record.get("begun", {})),
        )
        _check_progress(state.at)
        _check_arrays(file, state)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole state: {error}") from None
    for name in file.names:
        file[name]  # reads it, and checks its sum
    return state


# its parts
def _check_progress(at):
    whole = all(isinstance(x, int) for x in (at.step, at.updates))
    known = [x for x in (at.last_loss, at.best_loss) if x is not None]
    numbers = at.losses + at.norms + known
    floats = all(isinstance(x, float) and math.isfinite(x) for x in numbers)
    if not (whole and floats and 0 <= at.updates <= at.step):
        raise ValueError(f"its progress makes no sense: {at}")


def _check_arrays(file, state):
    kind = "F64" if state.config.precision == "fp64" else "F32"
    shapes = parameter_shapes(state.cfg)
    want = {f"{g}.{n}": (kind, s) for g in _GROUPS for n, s in shapes.items()}
    got = {name: (file.dtype(name), file.shape(name)) for name in file.names}
    for name in want | got:
        there, right = got.get(name), want.get(name)
        if there != right:
            raise ValueError(f"{name} must be {right}, got {there}")


# the model of a state
def restore(state, group=ALONE):
    """The GPT2 of a `State`: its weights and AdamW's averages.

    group: the Group that goes on with it, each of whose processes reads it.

    Derived in chapter 4.15.
    """
    model = empty_model(state.config, state.cfg, group=group)
    file = TensorFile(state.path)
    for kind in _GROUPS:
        for name, x in model.memory[kind].items():
            put(x, file[f"{kind}.{name}"])
    return model


# the newest state that is whole
def newest_state(folder):
    """The newest whole state in a folder, and what is wrong with newer ones.

    Returns (a `State` or None when there is none, a list of sentences).
    Raises ValueError when there are states and none of them is whole, and
    when there is a model without a state.

    Derived in chapter 4.15.
    """
    wrong = []
    for path in reversed(states(folder)):
        try:
            return read_state(path), wrong
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    if weights_path(folder) != folder:
        wrong += ["it has a model, with which --init begins a new run"]
        raise ValueError(f"{folder} has no state to go on from: {wrong[0]}")
    return None, wrong
