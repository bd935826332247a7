# Written by `make export` from notebooks/4_practice/16_resume.py: edit that file.

"""A run that is begun, followed, resumed and finished."""

__all__ = ["CHANGEABLE", "begin", "finish", "follow", "resume", "telling"]


# imports of run
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
    save_model, step_of, note_model, read_run, sparing, state_path, states,
    weights_path, write_log, write_record,
)
from llmnb.train.group import ALONE, group_of
from llmnb.train.log import log_steps, read_steps, start_log, sync_log
from llmnb.train.loop import Progress, train
from llmnb.train.options import FAMILY, SHAPE
from llmnb.train.start import new_model
from llmnb.train.state import (
    Run, differences, first_batches, fingerprint, newest_state, restore,
    save_state, surroundings,
)


# begin a run
def begin(folder, config, group=ALONE):
    """Make ready a new run in an existing folder; returns a `Run`.

    Locks the folder until `finish`, or until the Run is gone. Writes
    config.json, the tokenizer, and the chat template of a model that it
    starts from, and removes the states and the model of an older run there.
    In a group all processes call it, and the first does the writing. Raises
    ValueError, OSError, RuntimeError or MemoryError.

    Derived in chapter 4.16.
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


# its folder, locked
@contextmanager
def _locked(folder, group):
    """The lock of a folder, which stays unless there is an error.

    The first process has it for its group.
    """
    with ExitStack() as undo:
        yield undo.enter_context(Lock(folder)) if group.first else None
        undo.pop_all()


# a run, ready
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


# before several begin
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


# what a kill leaves
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


# what may change
CHANGEABLE = (
    "steps", "eval_every", "eval_batches", "save_every", "keep",
    "sample_every", "corpus", "shards",
)  # fmt: skip


# go on with a run
def resume(folder, group=ALONE, **changes):
    """Take up the run in a folder; returns a `Run` and a list of warnings.

    changes: fields of the TrainConfig, of which only those in `CHANGEABLE`
    may differ from the run's; `corpus` and `shards` say where the text is
    now. group: as for `begin`. The folder is locked as there. The warnings
    say which newer states are damaged, and what else has changed since the
    beginning that may change bits. Nothing is written before all is checked.
    Raises OSError or ValueError when the folder holds no run, no state of it
    is whole, or the text is not the one it began with.

    Derived in chapter 4.16.
    """
    folder = Path(folder)
    read_run(folder)  # only a run is locked
    with _locked(folder, group) as lock:
        config = _changed(folder, changes)
        state, warnings = newest_state(folder)
        data = _same_data(folder, config, state)
        run, more = _ready(lock, folder, config, data, state, group)
    return run, warnings + more


# the text again
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


# change it
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


# train and keep
def follow(run):
    """Train a `Run` to its end; yield each `Step`, its row in the log.

    Writes the state every `config.save_every` steps and after the last.
    Raises OSError, in one sentence that says which checkpoint is the last
    good one, when something cannot be written; and as `train` does.

    Derived in chapter 4.16.
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


# the end of a run
def finish(run):
    """Write the model, then loss.png, at any step; returns the log's steps.

    A log without the lines that do not count takes the old one's place. When
    a log or a figure fails, that is a warning; a model raises as `follow`
    does. Then the folder is no longer locked. Of a group only the first
    process writes; the others return an empty list.

    Derived in chapter 4.16.
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


# what is left when it fails
@contextmanager
def telling(run):
    """Make an error within say what is left, and what to do.

    An OSError names the last good checkpoint; a FloatingPointError a command
    that starts from it, at half the learning rate.

    Derived in chapter 4.16.
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


# the same at half the rate
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
