# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.run: "A run that is begun, followed, resumed and finished."
#       train.log: "The log of a run: a row a step, safe on the disk, read back."
# ---

# %% [markdown]
# # Resume: nothing lost
#
# > A run that was cut and resumed ends with the weights of one that was not, bit
# > for bit; and each row of the table of states is needed for it.
#
# *Reading time: 30 minutes. You need: [chapter 4.15](15_states.ipynb).*

# %% [markdown]
# ## Where we are
#
# A state is on the disk. What remains is to write it when it is time, to take it up
# again, and to prove that nothing was lost. At the end of this chapter you can
#
# - cut a run at any step, and show that it ends with the same bytes;
# - say what is left after a kill, a full disk, a flipped bit;
# - say what may change when a run goes on, and what may not.

# %% [markdown]
# ## Setup

# %% setup
import os
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np

from llmnb.book.verify import verdict
from llmnb.files import own_folder
from llmnb.formats.shard import read_shard
from llmnb.train.options import TrainConfig

text = read_shard("../../tests/data/curve_tokens.bin")

# %% [markdown]
# ## The log
#
# A state is written whole. The log gets a row at each step, and to write all of it
# anew each time would take longer and longer. So the row is appended, and handed to
# the system; a kill can leave half a row at the end. That does no harm, since
# resuming drops every row at or after the state's step. They will be written again,
# with the same numbers. Only when a state is kept need the rows before it be safe on
# the disk too.
#
# A log is also what people open in other programs, sort, and save again. A
# row that is none any more is left out, and said, and the others count. And
# as long as such a program keeps the file to itself, the rows wait.

# %% imports of log tags=["export"] module="train.log"
import errno
import math
import os
import warnings
from pathlib import Path

from llmnb.train.folder import log_row, write_log
from llmnb.train.loop import Step


# %% the log of a run tags=["export"] module="train.log"
def start_log(path, step=0):
    """Begin a log.csv, or keep of an old one the rows before a step."""
    old = read_steps(path) if step and Path(path).exists() else []
    write_log(path, [row for row in old if row.step < step])


# %% rows that wait tags=["exporti"] module="train.log"
def log_steps(path, steps):
    """Add the row of each `Step` to a log; returns those that must wait."""
    try:
        with open(path, "ab") as file:
            file.writelines(f"{log_row(x)}\n".encode() for x in steps)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # the next state would have no room either
        if len(steps) == 1:
            why = error.strerror or error
            warnings.warn(
                f"{path}: {why}; rows wait until it can be written",
                stacklevel=3,
            )
        return steps
    return []


# %% rows safe on the disk tags=["export"] module="train.log"
def sync_log(path):
    """Have the system bring all rows of a log to the disk."""
    with open(path, "ab") as file:
        os.fsync(file.fileno())


# %% a log read back tags=["export"] module="train.log"
_LONGEST = 1000  # characters that a row has at most


def read_rows(path, columns=None):
    """A log.csv: its columns, its rows, and the lines that are none.

    columns: their names in a log that does not begin with them; None: it
    must. A row is a dict from name to number or None; of a line that is none
    there are its number and what is wrong with it. A last line without an
    end is left out. Raises OSError, or ValueError naming the file.
    """
    how = {"encoding": "utf-8-sig", "errors": "replace", "newline": "\n"}
    with open(path, **how) as file:
        lines = [x.rstrip("\r\n") for x in file if x[-1:] == "\n"]
    head = lines[0].split(",") if lines else []
    named = head[:1] == ["step"] and len({*head}) == len(head)
    if not (named or columns):
        raise ValueError(
            f"{path}: the first line must name the columns, step first"
        )
    columns, rows, wrong = head if named else columns, [], []
    for number, line in enumerate(lines[named:], 1 + named):
        try:
            rows.append(_row(columns, line))
        except ValueError as error:
            wrong.append((number, str(error)))
    return columns, rows, wrong


# %% one row tags=["exporti"] module="train.log"
def _row(names, line):
    """A line as a dict from name to number, or ValueError."""
    if len(line) > _LONGEST:
        most = f"{_LONGEST:,} characters"
        raise ValueError(f"must have at most {most}, has {len(line):,}")
    words = line.split(",")
    if len(words) != len(names):
        raise ValueError(f"must have {len(names)} values, has {len(words)}")
    if not words[0]:
        raise ValueError("has no step")
    try:
        row = [float(x) if x else None for x in words]
    except ValueError:
        row = [math.nan]
    if not all(x is None or math.isfinite(x) for x in row):
        raise ValueError(f"must hold numbers, not {line[:80]!r}")
    if not row[0].is_integer():
        raise ValueError(f"must begin with a whole number, not {words[0]}")
    return dict(zip(names, row, strict=True))


# %% the steps of a log tags=["export"] module="train.log"
def read_steps(path):
    """The rows of a log.csv as a list of `Step`.

    A line that is none is left out, and a warning says which. Raises
    OSError.
    """
    _, rows, wrong = read_rows(path, Step._fields)
    if wrong:
        said = ", ".join(f"line {line} ({why})" for line, why in wrong[:3])
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        warnings.warn(f"{path}: left out {said}{more}", stacklevel=2)
    return [Step(int(x["step"]), *map(x.get, Step._fields[1:])) for x in rows]


# %% [markdown]
# ## Begin, or go on
#
# A run **begins** with its configuration and its tokenizer on disk, so that
# a kill in the very first steps loses nothing that matters: with neither state
# nor model it begins anew, and as it depends on nothing but these, it takes the
# same way. To **resume** is to build the same loaders, check that they hold the
# same text, and take over the newest whole state. A few options may change
# on the way, those that do not touch the path of the weights, and the
# number of steps, for a run that shall go on longer. The text may lie in
# another place by now, as long as it is the same.

# %% imports of run tags=["export"]
import re
import shlex
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from zlib import crc32

import numpy as np

from llmnb.files import BESIDE, Lock
from llmnb.formats.vocabulary import KEPT, TOKENIZER_FILES, tokenizer_beside
from llmnb.train.drawing import loss_figure, save_figure
from llmnb.train.feed import landmarks, loaders, prepare
from llmnb.train.folder import (
    save_model,
    step_of,
    note_model,
    read_run,
    sparing,
    state_path,
    states,
    weights_path,
    write_log,
    write_record,
)
from llmnb.train.group import ALONE, group_of
from llmnb.train.log import log_steps, read_steps, start_log, sync_log
from llmnb.train.loop import Progress, train
from llmnb.train.options import FAMILY, SHAPE
from llmnb.train.start import new_model
from llmnb.train.state import (
    Run,
    differences,
    first_batches,
    fingerprint,
    newest_state,
    restore,
    save_state,
    surroundings,
)


# %% begin a run tags=["export"]
def begin(folder, config, group=ALONE):
    """Make ready a new run in an existing folder; returns a `Run`.

    Locks the folder until `finish`, or until the Run is gone. Writes
    config.json, the tokenizer, and the chat template of a model that it
    starts from, and removes the states and the model of an older run there.
    In a group all processes call it, and the first does the writing. Raises
    ValueError, OSError, RuntimeError or MemoryError.
    """
    from llmnb.formats.template import find_template, keep_template  # Part 5

    folder = Path(folder)
    with _locked(folder, group) as lock:
        init = config.init and weights_path(config.init)
        if init and init.resolve().parent == folder.resolve():
            raise ValueError(f"{init} would be lost: choose another folder")
        template = find_template(init) if init else None
        run, _ = _ready(lock, folder, config, prepare(config), None, group)
        if group.first:
            keep_template(template, folder)
        return run


# %% its folder, locked tags=["exporti"]
@contextmanager
def _locked(folder, group):
    """The lock of a folder, which stays unless there is an error.

    The first process has it for its group.
    """
    with ExitStack() as undo:
        yield undo.enter_context(Lock(folder)) if group.first else None
        undo.pop_all()


# %% [markdown]
# Both end in the same place: a `Run` that is ready to be followed. With a state
# it stands where the state stood, and what has changed since is said; without
# one it stands at its beginning, and the weights of an older run go, or they would
# be taken for its own. Until the model is there, nothing in the folder is touched.


# %% a run, ready tags=["exporti"]
def _ready(lock, folder, config, data, state, group):
    """A `Run` at a state, or at its beginning; and a list of warnings."""
    batches, validation = feeds = loaders(config, data)
    text, begun, found = fingerprint(*feeds), {}, []
    if group is not ALONE:
        from llmnb.train.gpus import placed  # Part 6

        group = placed(group, config.backend)
        begun |= {"group of GPUs": "yes"} if group.on_gpus else {}
    begun |= surroundings(config.backend)
    if group.size > 1:
        _check_group(group, config, text, begun, state)
    if state:
        found += _check_text(state, text, feeds)
        found += differences(state.begun or begun, begun)
        batches.state, begun = state.place, state.begun or begun
        model, at = restore(state._replace(config=config), group), state.at
    else:
        model = new_model(config, data.encoding.n_vocab, group)
        at = Progress()
    if group.size > 1:
        _check_weights(group, model)
    if group.first:
        _sweep(folder, anew=not state)
        write_record(folder, config, data)
    kept = [x for x in map(step_of, states(folder)) if x <= at.step]
    run = Run(
        folder=folder, config=config, data=data, model=model,
        batches=batches, validation=validation, at=at, text=text,
        begun=begun, kept=kept, lock=lock,
    )  # fmt: skip
    return run, found


# %% before several begin tags=["exporti"]
def _check_group(group, config, text, begun, state):
    """Raise ValueError unless all of a group can train, and the same."""
    from llmnb.train.machines import check_alike  # Part 6

    if config.in_backward:
        raise ValueError(
            f"in_backward wants one process, got a group of {group.size}"
        )
    if config.micro_batches % group.size:
        batch = config.batch_size * config.seq_len
        raise ValueError(
            f"{group.size} processes share the batches of an update: "
            f"total_batch must be a multiple of {group.size * batch} tokens "
            f"({group.size} batches of {batch}), got {config.total_batch}"
        )
    options = asdict(replace(config, corpus=(), shards=""))
    found = {name: str(value) for name, value in options.items()}
    found |= {"text": str(text), "state": state.path.name if state else ""}
    check_alike(group, begun | found)


def _check_weights(group, model):
    """Raise ValueError unless all of a group have read the same weights."""
    from llmnb.train.machines import check_alike  # Part 6

    found = crc32(np.asarray(model.memory.flat("params")))
    check_alike(group, {"checksum of the weights": f"{found:08x}"})


# %% what a kill leaves tags=["exporti"]
_TOKENIZERS = "|".join(map(re.escape, KEPT))
HALF = re.compile(
    r"(config\.json|log\.csv|loss\.png|sample\.txt|model\.(bin|safetensors)"
    r"|chat_template\.jinja"
    rf"|state_[0-9]+\.safetensors|{_TOKENIZERS})" + BESIDE
)


def _sweep(folder, anew):
    """Remove what was left half written; anew: all weights as well."""
    for half in [x for x in folder.iterdir() if HALF.fullmatch(x.name)]:
        half.unlink()
    while anew and (old := weights_path(folder)) != folder:
        old.unlink()


# %% what may change tags=["export"]
CHANGEABLE = (
    "steps", "eval_every", "eval_batches", "save_every", "keep",
    "sample_every", "corpus", "shards",
)  # fmt: skip


# %% go on with a run tags=["export"]
def resume(folder, group=ALONE, **changes):
    """Take up the run in a folder; returns a `Run` and a list of warnings.

    changes: fields of the TrainConfig, of which only those in `CHANGEABLE`
    may differ from the run's; `corpus` and `shards` say where the text is
    now. group: as for `begin`. The folder is locked as there. The warnings
    say which newer states are damaged, and what else has changed since the
    beginning that may change bits. Nothing is written before all is checked.
    Raises OSError or ValueError when the folder holds no run, no state of it
    is whole, or the text is not the one it began with.
    """
    folder = Path(folder)
    read_run(folder)  # only a run is locked
    with _locked(folder, group) as lock:
        config = _changed(folder, changes)
        state, warnings = newest_state(folder)
        data = _same_data(folder, config, state)
        run, more = _ready(lock, folder, config, data, state, group)
    return run, warnings + more


# %% the text again tags=["exporti"]
def _same_data(folder, config, state):
    """The Data of a run that goes on, if the state goes with it."""
    if state:
        _check_run(state, config)
    own = str(tokenizer_beside(folder) or folder / TOKENIZER_FILES[0])
    try:
        return prepare(replace(config, tokenizer=own))
    except FileNotFoundError as error:
        if error.filename == own:
            raise
        raise FileNotFoundError(
            f"{error}; if the text has moved, name its new place with "
            "--corpus or --shards"
        ) from None


def _check_text(state, text, feeds):
    """Raise if the text is another; warn if that cannot be said for sure."""
    if state.text == text:
        return []
    if state.text == [*first_batches(feeds)]:
        return [
            f"{state.path} was written by an older llmnb: only the first "
            "batch of the text was compared"
        ]
    folder = state.path.parent
    raise ValueError(f"{folder}: the text is not the one it began with")


# %% change it tags=["exporti"]
def _changed(folder, changes):
    """The run's configuration with changes, if they are possible."""
    config = read_run(folder)
    if "corpus" in changes:  # shards come first where both are given
        changes = {"shards": "", **changes}
    for name, value in changes.items():
        was = getattr(config, name)
        if value != was and name not in CHANGEABLE:
            raise ValueError(
                f"{name} of a run in progress cannot change: {folder} has "
                f"{was!r}, got {value!r}"
            )
    return replace(config, **changes)


def _check_run(state, config):
    """Raise unless the state is this run's, and not beyond its end."""
    if replace(state.config, **config.some(*CHANGEABLE)) != config:
        raise ValueError(f"{state.path} is of a run with other options")
    if state.at.step > config.steps:
        raise ValueError(
            f"steps must be at least {state.at.step}, which are done, "
            f"got {config.steps}"
        )


# %% [markdown]
# ## Train and keep
#
# The loop of [chapter 4.13](13_loop.ipynb) needs no change. `follow` wraps one
# generator into others: `_logged` takes each step from `train`, writes its row, and
# hands the step on; `follow` saves the state when it is time, and hands it on once
# more.


# %% train and keep tags=["export"]
def follow(run):
    """Train a `Run` to its end; yield each `Step`, its row in the log.

    Writes the state every `config.save_every` steps and after the last.
    Raises OSError, in one sentence that says which checkpoint is the last
    good one, when something cannot be written; and as `train` does.
    """
    feeds = run.batches, run.validation
    steps = train(run.config, run.model, *feeds, run.at)
    with telling(run):
        if group_of(run.model).first:
            steps = _logged(run, steps)
        for step in steps:
            if _due(run, step):
                save_state(run)
            yield step


def _logged(run, steps):
    """Pass steps on, with a row of each in the log, safe before a state."""
    log, rows = run.folder / "log.csv", []
    run.lock.check(hold=True)
    start_log(log, run.at.step)
    for step in steps:
        run.lock.check(hold=True)
        rows = log_steps(log, [*rows, step])
        if _due(run, step) and not rows:
            sync_log(log)
        yield step


def _due(run, step):
    """Whether a state is to be written after a step."""
    config, at = run.config, run.at
    due = config.save_every and at.step % config.save_every == 0
    return step.loss is not None and (due or at.step == config.steps)


# %% the end of a run tags=["export"]
def finish(run):
    """Write the model, then loss.png, at any step; returns the log's steps.

    A log without the lines that do not count takes the old one's place. When
    a log or a figure fails, that is a warning; a model raises as `follow`
    does. Then the folder is no longer locked. Of a group only the first
    process writes; the others return an empty list.
    """
    if not group_of(run.model).first:
        return []
    log, figure, steps = run.folder / "log.csv", run.folder / "loss.png", []
    with telling(run):
        run.lock.check(hold=True)
        save_model(run.folder, run.model)
        note_model(run.folder, run.at.step)
    with sparing(log):
        steps = read_steps(log)
        write_log(log, steps)
    with sparing(figure):
        marks = landmarks(run.config, run.data)
        save_figure(figure, loss_figure, steps, marks)
    run.lock.release()
    return steps


# %% what is left when it fails tags=["export"]
@contextmanager
def telling(run):
    """Make an error within say what is left, and what to do.

    An OSError names the last good checkpoint; a FloatingPointError a command
    that starts from it, at half the learning rate.
    """
    try:
        yield
    except BlockingIOError:  # the folder is another's
        raise
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}: {_gentler(run)}") from error
    except OSError as error:
        what, kept = error.strerror or str(error), _kept(run)
        left = f"the last checkpoint is {kept[-1].name}" if kept else ""
        left, where = left or "there is no checkpoint yet", error.filename
        raise OSError(f"{where or run.folder}: {what}; {left}") from error


def _kept(run):
    """The states it has written or gone on from, the oldest first."""
    return [state_path(run.folder, step) for step in run.kept]


# %% the same at half the rate tags=["exporti"]
def _gentler(run):
    """The command of a run, from its last state on, at half the rate."""
    config, now = run.config, state_path(run.folder, run.at.step)
    # a state of this very step has the weights that gave no number
    kept = [x for x in _kept(run) if x != now]
    asked = {"learning_rate": float(f"{config.learning_rate / 2:.3g}")}
    said = SHAPE if config.depth or kept else ()  # by the depth or the state
    if kept:
        said += "depth", "tokenizer", "vocab_size", *FAMILY
        asked = {"init": kept[-1]} | asked
    for each in fields(config):
        value = getattr(config, each.name)
        if value != each.default and each.name not in said:
            asked.setdefault(each.name, value)
    words = ["llmnb", "train"]
    for name, value in asked.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if type(value) is tuple else [value])
    return shlex.join(words)


# %% [markdown]
# ## Proof
#
# The run is small, and chosen so that every row of
# [table 4.15.1](15_states.ipynb) has work to do: it accumulates, it skips some
# updates, and a state is kept every five steps. First it runs straight to its end.

# %% a run with everything in it
from llmnb.model.init import init_params

place = TemporaryDirectory()
page = Path(place.name, "page.txt")
letters = text[:40_000][text[:40_000] < 256].astype(np.uint8)
excerpt = bytes(letters).decode("utf-8", "ignore")
page.write_text(excerpt, "utf-8")
careful = TrainConfig(
    corpus=(str(page),), tokenizer="byte", num_layers=1, num_heads=2,
    channels=32, seq_len=32, batch_size=2, total_batch=128, steps=20,
    eval_every=8, eval_batches=2, skip_loss=1.0, skip_norm=1.0,
    skip_window=8, save_every=5,
)  # fmt: skip


def straight(folder, config):
    run = begin(own_folder(folder), config)
    return run, list(follow(run))


first, steps_of = straight(Path(place.name, "straight"), careful)
finish(first)
whole = first.model.memory.flat("params").copy()
skipped = [x.step for x in steps_of if x.skipped]
print("skipped", skipped)
verdict("skips", skipped[0] < 10 < skipped[-1], "before and after step 10")
print(*sorted(x.name for x in first.folder.iterdir()), sep="\n")

# %% [markdown]
# Then one that is cut after 13 steps. Leaving the generator is what a kill
# does: the arrays in memory are gone, and the folder is as it was. The last
# state is that of step 10, the log has rows beyond it.


# %% cut and resumed
def cut(folder, config, forget=lambda run: None):
    run = begin(own_folder(folder, force=True), config)
    list(islice(follow(run), 13))
    run, _ = resume(folder)
    forget(run)
    list(follow(run))
    return run


second = cut(Path(place.name, "cut"), careful)
finish(second)
verdict("resumed", second.at == first.at, "at the same place")
for name in ("model.bin", "state_00000020.safetensors", "loss.png"):
    same = [(x.folder / name).read_bytes() for x in (first, second)]
    verdict(name, same[0] == same[1], "the same bytes")
rows = [
    [step._replace(tokens_per_second=None) for step in read_steps(x)]
    for x in (first.folder / "log.csv", second.folder / "log.csv")
]
verdict("log.csv", rows[0] == rows[1], "the same rows, but for the speed")

# %% [markdown]
# The same bytes, in every file. Would we have noticed if the state were not
# complete? Forget one row of table 4.15.1 at a time:


# %% forget one thing
def zero(group):
    return lambda run: run.model.memory.flat(group).fill(0)


ITEMS = {
    "weights": lambda run: init_params(run.model.params, run.model.cfg, 42),
    "m": zero("m"),
    "v": zero("v"),
    "place": lambda run: run.batches.reset(),
    "step": lambda run: setattr(run.at, "step", 9),
    "updates": lambda run: setattr(run.at, "updates", run.at.step),
    "windows": lambda run: (run.at.losses.clear(), run.at.norms.clear()),
}
for name, forget in ITEMS.items():
    run = cut(Path(place.name, "forgetful"), careful, forget)
    same = np.array_equal(run.model.memory.flat("params"), whole)
    verdict(f"without {name}", not same, "ends elsewhere")

# %% [markdown]
# Every row is needed, and all rows together are enough. (Forgotten updates
# were replaced by the steps taken, which is what a program does that does
# not tell the two apart.)
#
# ## Other dangers
#
# A disk that fills up while a state is written, at some fifty places along the
# file; a bit that flips on the disk; a text that has changed.

# %% a disk with so many bytes left
import errno
import io


class Small(io.FileIO):
    left = 0

    def write(self, data):
        self.left -= memoryview(data).nbytes
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def disk(left):
    def opened(path, mode):
        file = Small(path, mode)
        file.left = left
        return file

    return patch("llmnb.files.open", opened, create=True)


# %% full in the middle of a state
before = sorted(x.name for x in second.folder.iterdir())
size = states(second.folder)[-1].stat().st_size
failed, sizes = 0, range(0, size, size // 50)
for left in sizes:
    try:
        with disk(left):
            save_state(second)
    except OSError:
        failed += 1
    same = before == sorted(x.name for x in second.folder.iterdir())
    assert same and newest_state(second.folder)[0].at.step == 20, left
verdict("always", failed == len(sizes) > 49, "the old state stays whole")

# %% what the user sees
run = begin(own_folder(Path(place.name, "full")), careful)
try:
    for step in follow(run):
        if step.step == 12:
            disk(1000).start()
except OSError as error:
    print(str(error).replace(str(run.folder), "RUN"))
finally:
    patch.stopall()
run, _ = resume(run.folder)
list(follow(run))
same = np.array_equal(run.model.memory.flat("params"), whole)
verdict("room made", same, "and the end is the same")

# %% a bit flips
newest = states(second.folder)[-1]
damaged = bytearray(newest.read_bytes())
damaged[-1000] ^= 16
newest.write_bytes(damaged)
run, warnings = resume(second.folder)
print(*warnings[0].replace(str(second.folder), "RUN").split(": "), sep="\n")
print("goes on from step", run.at.step)
list(follow(run))
same = np.array_equal(run.model.memory.flat("params"), whole)
verdict("a flipped bit", same, "costs five steps")

# %% another text, another shape
page.write_text(excerpt.replace("self", "this"), "utf-8")
for change in ({}, {"channels": 64}, {"steps": 5}):
    try:
        resume(second.folder, **change)
    except ValueError as error:
        print(str(error).replace(str(second.folder), "RUN"))
place.cleanup()

# %% [markdown]
# A stop that you wish for is the gentlest kind. Whoever iterates over
# `follow` leaves its loop after a step and calls `save_state`;
# [chapter 4.24](24_train.ipynb) does so on Ctrl-C and on the signal by which
# a system asks a program to end. The tests go further: they kill the process
# with a signal that cannot be caught, at random moments, and compare.
#
# **What is not promised.** Another machine or another version of numba may
# lead elsewhere; `resume` warns of both.

# %% [markdown]
# ## Take away
#
# - A run can go on to the last bit if all that one step hands to the next is
#   kept, and if the file that keeps it appears whole or not at all.
# - Of the log, the rows before a state are safe before the state is; those behind it
#   will be written again.
# - What decides the bits and cannot be kept is compared, and a difference is
#   said.
#
# ## Exercises
#
# **1** (★★). A run that keeps a state every five steps is killed after 13 steps, in
# the middle of a row. How many rows can be read from its log, and how many when it
# has gone on by one step?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 13, of the steps 0 to 12: the half row has no end and does not count. Then 11: the
# ten before the state of step 10, and the row of step 10, written again.
# :::

# %% exercise 1, checked tags=["hide-cell"]
with TemporaryDirectory() as folder:
    page = Path(folder, "page.txt")
    page.write_text(excerpt, "utf-8")
    here, log = Path(folder, "run"), Path(folder, "run", "log.csv")
    run = begin(own_folder(here), replace(careful, corpus=(str(page),)))
    list(islice(follow(run), 13))
    with open(log, "a") as file:
        file.write("13,2.7")
    rows = [len(read_steps(log))]
    run, _ = resume(here)
    next(follow(run))
    rows.append(len(read_steps(log)))
    del run
verdict("rows", rows == [13, 11], "before, and one step on")

# %% [markdown]
# **2** (★★★). Which rows of table 4.15.1 may a run forget without harm if it
# never skips an update?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The windows, which nothing reads then, and the number of updates, for
# which the number of steps stands in. The others matter at once.
# :::

# %% exercise 2, checked tags=["hide-cell"]
same = []
with TemporaryDirectory() as folder:
    page = Path(folder, "page.txt")
    page.write_text(excerpt, "utf-8")
    calm = replace(careful, corpus=(str(page),), skip_loss=0.0, skip_norm=0.0)
    run, _ = straight(Path(folder, "a"), calm)
    whole = run.model.memory.flat("params")
    for name, forget in ITEMS.items():
        run = cut(Path(folder, "b"), calm, forget)
        if np.array_equal(run.model.memory.flat("params"), whole):
            same.append(name)
print(*same)
verdict("no skips", same == ["updates", "windows"], "two can be missed")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.16")
