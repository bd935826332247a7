# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cli.train: "`llmnb train`: a run from the terminal, with a bar, samples and signals."
#       train.newest: "The runs in runs/: a name for a new one, and which is the newest."
# ---

# %% [markdown]
# # The train command: start, stop, go on
#
# > A folder for each run, a bar that says how it goes, and signals that save
# > before they stop.
#
# *Reading time: 15 minutes. You need: [chapter 4.16](16_resume.ipynb)
# and [chapter 4.23](23_commands.ipynb).*

# %% [markdown]
# ## Where we are
#
# A run begins and goes on by the functions of the chapters before. What a
# terminal adds is small and has to be right: a place for the run, a word
# about how it goes, and an end that loses nothing. At the end of this chapter
# you can
#
# - say which run `llmnb train --resume` takes when you name none;
# - say what Ctrl-C, a shutdown and a closed terminal do to a step;
# - find the exit code by which a script tells a stopped run from a done one.

# %% [markdown]
# ## Setup

# %% setup
from pathlib import Path
from tempfile import TemporaryDirectory

from llmnb.book.verify import verdict

# %% [markdown]
# ## A folder for each run
#
# A run that is not given a folder gets one in `runs/`, named after its text.
# `mkdir` fails where the folder is there, also when another process has made
# it this instant, so that two runs never share one.

# %% imports of the runs tags=["export"] module="train.newest"
import warnings
from contextlib import suppress
from itertools import chain
from pathlib import Path

from llmnb.files import make_folder, sync_folder

# %% a name for a run tags=["export"] module="train.newest"
RUNS = Path("runs")


def new_folder(config):
    """Make runs/NAME, or the first of runs/NAME-2, -3, ... that is free."""
    first = Path(config.shards or config.corpus[0]).resolve().stem or "run"
    folder, number = RUNS / first, 1
    make_folder(RUNS)
    while True:
        with suppress(FileExistsError):  # or made by another this instant
            folder.mkdir()
            sync_folder(RUNS)
            return folder
        number += 1
        folder = RUNS / f"{first}-{number}"


# %% [markdown]
# Which run is the newest? The clock knows, unless it was set, or a folder was
# copied or a file touched. So the runs themselves say: whenever one begins or
# saves, its name goes to the end of a list, `runs/.order`. Only where the list
# cannot tell, for runs that were made elsewhere or renamed, the clock decides,
# and the command says so.

# %% the order of the runs tags=["export"] module="train.newest"
_ORDER = RUNS / ".order"


def _ordered():
    """Names of the runs in runs/, the last one worked on at the end."""
    with suppress(OSError):
        return _ORDER.read_text("utf-8", "surrogateescape").splitlines()
    return []


def note_newest(run):
    """Put a run in runs/ at the end of the list of runs."""
    folder = run.folder.resolve()
    if folder.parent == RUNS.resolve() and _ordered()[-1:] != [folder.name]:
        with suppress(OSError), open(_ORDER, "ab") as file:
            file.write(f"{folder.name}\n".encode("utf-8", "surrogateescape"))


_MODELS = "model.bin", "model.safetensors", "state_*.safetensors"


def newest_run(*files):
    """The run in runs/ that was worked on last."""
    ordered, found = _ordered(), {}
    for path in chain(*(RUNS.glob(f"*/{name}") for name in files or _MODELS)):
        with suppress(FileNotFoundError):  # a state that has just gone
            name, when = path.parent.name, path.stat().st_mtime
            found[name] = max(when, found.get(name, when))
    if not found:
        raise FileNotFoundError(
            f"there is no run in {RUNS}/ here: name a folder, or train one "
            "with `llmnb train`"
        )
    for name in reversed(ordered):
        if name in found:
            return RUNS / name
        if not (RUNS / name).exists() and found.keys() - {*ordered}:
            break  # it may have another name now
    return _newest_by_clock(found)


def _newest_by_clock(found):
    newest = max(found, key=found.get)
    if len(found) > 1:
        warnings.warn(
            f"which of the {len(found)} runs in {RUNS}/ is the newest is not "
            f"certain; taken is {RUNS / newest}: name one to be sure",
            stacklevel=3,
        )
    return RUNS / newest


# %% [markdown]
# ## Begin or go on

# %% imports of the command tags=["export"] module="cli.train"
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

from llmnb.cli.options import GroupOptions, ThreadOptions, check_backend
from llmnb.cli.options import fields_of, say, set_threads, tell_compiling
from llmnb.cli.options import typed, warn
from llmnb.files import own_folder, unmade, write_whole
from llmnb.formats.vocabulary import tokenizer_beside
from llmnb.model.generate import decoded, generate
from llmnb.text.tokenizer import text_start
from llmnb.train.newest import RUNS, new_folder, newest_run, note_newest
from llmnb.train.run import begin, finish, follow, resume, telling
from llmnb.train.state import save_state
from llmnb.train.terminal import progress_bar
from llmnb.train.feed import landmarks
from llmnb.train.folder import load_run, read_run, sparing
from llmnb.train.group import group_of
from llmnb.train.options import SHAPE, DataOptions, KeepOptions
from llmnb.train.options import LearningOptions, ModelOptions, TrainConfig
from llmnb.train.options import UpdateOptions, option
from llmnb.train.finetune import starting_from


# %% its options tags=["export"] module="cli.train"
@dataclass
class FolderOptions:
    """Where `llmnb train` writes, or goes on."""

    out: str = option(
        None, "where to write (default: a new folder in runs/)",
        metavar="FOLDER",
    )  # fmt: skip
    force: bool = option(False, "write into a folder in use")
    resume: str = option(
        None,
        "go on with a run from its newest checkpoint (default: the newest "
        "run in runs/); --corpus or --shards say where its text is now",
        nargs="?", const="", metavar="FOLDER",
    )  # fmt: skip
    tensorboard: bool = option(
        False, "write events for TensorBoard into the folder as well"
    )


OPTIONS = {
    "": fields(FolderOptions) + fields(GroupOptions) + fields(ThreadOptions),
    "what to read": fields(DataOptions),
    "what the model looks like": fields(ModelOptions),
    "how it learns": fields(LearningOptions),
    "what an update is": fields(UpdateOptions),
    "what it keeps": fields(KeepOptions),
}


# %% begin or go on tags=["export"] module="cli.train"
_OF_TEXT = "corpus", "limit", "field", "skip_bad", "endoftext"
_OF_TOKENS = "tokenizer", "vocab_size"


def _begun(args, group):
    """A new run, from scratch or from a checkpoint."""
    given = fields_of(args.given, TrainConfig)
    if given.get("depth") and not given.keys().isdisjoint(SHAPE):
        names = ", ".join(name.replace("_", "-") for name in SHAPE)
        raise ValueError(f"--depth sets {names}: leave those out")
    shards = given.get("shards")
    own = shards and tokenizer_beside(Path(shards))
    ignored = given.keys() & {*_OF_TEXT, *(_OF_TOKENS if own else ())}
    if shards and ignored:
        names = ", ".join(f"--{x.replace('_', '-')}" for x in sorted(ignored))
        raise ValueError(f"--shards stands for a corpus: leave out {names}")
    check_backend(given.get("backend"))
    make = starting_from if given.get("init") else TrainConfig
    config = make(**given)
    check_apart(args.out, config.corpus)
    folder = ""
    with unmade(args.out or RUNS) as made:
        if group.first:
            folder = args.out or new_folder(config)
            made += [] if args.out else [folder]
            folder = own_folder(folder, args.force)
        return begin(group.gather(str(folder))[0], config, group)


def check_apart(out, corpus):
    """Refuse to write into the folder that is read."""
    for name in corpus:
        same = out and Path(name).is_dir() and Path(out).is_dir()
        if same and Path(out).samefile(name):
            raise ValueError(
                f"{name} is the corpus: what is written there would be read "
                "as text; choose another folder, such as one within it"
            )


def _resumed(args, group):
    """The run that --resume names, at its newest checkpoint."""
    if args.out or args.force:
        raise ValueError("--resume needs neither --out nor --force")
    folder = args.resume or ""
    if group.first and not folder:
        folder = newest_run("config.json")
    folder = group.gather(str(folder))[0]
    check_backend(read_run(folder).backend)
    changes = fields_of(args.given, TrainConfig)
    run, found = resume(folder, group, **changes)
    for warning in found if group.first else ():
        warn(warning)
    where = f"at step {run.at.step:,} of {run.config.steps:,}"
    known = {"loss": run.at.last_loss, "best validation": run.at.best_loss}
    known = [f", {k} {x:.3f}" for k, x in known.items() if x is not None]
    say("resumes", where + "".join(known))
    return run


# %% [markdown]
# The very first step on a machine waits for its kernels. A second process
# compiles half of them ([chapter A.4](../appendix/04_kernels.ipynb)).


# %% train, with a bar tags=["export"] module="cli.train"
def run(args):
    """Train a GPT-2 from scratch, or from a checkpoint.

    The defaults take about two minutes on two cores. Ctrl-C finishes the
    step and saves; a second one stops at once. Exits with 128 plus the
    signal that stopped it.
    """
    sys.stdout.ends = False  # who trains does not need to be read
    set_threads(args)
    from llmnb.cli.together import in_group  # Part 6

    code = in_group(args, _run)
    if code:
        sys.exit(code)


def _run(args, group):
    """The run of a group, in one of its processes; returns an exit code."""
    start = time.perf_counter()
    begun = _begun if args.resume is None else _resumed
    this = begun(args, group)
    if not group.first:
        with _Stop(says=False) as stop:
            for _ in _steps(this, stop):
                pass
        return 0
    note_newest(this)
    data = this.data
    say("corpus", data.source)
    tokens = len(data.train_tokens), len(data.val_tokens)
    say("tokens", "{:,} to train on, {:,} to validate on".format(*tokens))
    say("model", _size_of(this.model))
    say("folder", this.folder)
    tell_compiling(this.config.backend)
    if this.config.backend == "cpu" and group.size == 1:
        from llmnb.model.ahead import compile_ahead

        compile_ahead(this.model.cfg, this.model.precision)
    with _Stop(says=group.size == 1) as stop:
        _follow(this, args, stop)
        steps = finish(this)
    say("took", f"{time.perf_counter() - start:.0f} s")
    if stop.signal:
        say("stopped", f"at step {this.at.step:,}, and saved")
        say("go on", f"llmnb train --resume {typed(this.folder)}")
        return 128 + stop.signal
    _report(this, steps)
    return 0


# %% the size of a model tags=["exporti"] module="cli.train"
def _size_of(model):
    cfg = model.cfg
    count = sum(x.size for x in model.params.values())
    return (
        f"{cfg.num_layers} layers, {cfg.num_heads} heads, {cfg.channels} "
        f"channels, {cfg.vocab_size} tokens: {count:,} parameters, "
        f"{model.memory.nbytes / 1e6:.0f} MB in all"
    )


# %% [markdown]
# Ctrl-C sends a process the signal `SIGINT`, a system that shuts down, or a
# scheduler that wants the machine back, sends `SIGTERM`, and a terminal that
# is closed sends `SIGHUP`. Left alone, they would end training in the middle
# of a step. So while `train` runs they only set a note; the loop finishes its
# step, finds the note, saves the state and leaves. The handlers go with the
# first signal: a second one does what it always did, and stops at once. The
# exit code is 128 plus the signal's number, 130, 143 or 129, so that a script
# can tell a run that was stopped from one that is done.
#
# `SIGHUP` has two customs of its own. `nohup llmnb train` starts us with the
# signal ignored, and ignored it stays. And a shell that loses its terminal
# passes the signal on while the system sends it too: it comes twice though
# nobody asked twice, so a second one is ignored.


# %% stop when asked to tags=["exporti"] module="cli.train"
class _Stop:
    """Notes the first Ctrl-C, SIGTERM or SIGHUP; the next stops at once."""

    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    signal = 0

    def __init__(self, says=True):
        self._says = says  # that it has noted one

    def __enter__(self):
        known = {signal.SIGINT, signal.SIGTERM}
        if self.hangup and signal.getsignal(self.hangup) != signal.SIG_IGN:
            known.add(self.hangup)
        self.old = {x: signal.signal(x, self._note) for x in known}
        return self

    def _note(self, number, frame):
        self.signal = number
        for other in self.old:
            again = signal.SIG_IGN if other == self.hangup else self.old[other]
            signal.signal(other, again)
        if self._says:
            said = b"\nfinishing the step; once more to stop at once\n"
            # not print, which may be at work when the signal comes
            with suppress(OSError):
                os.write(2, said)

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)


# %% follow a run tags=["exporti"] module="cli.train"
def _follow(run, args, stop):
    """Train to the end, or until a signal is noted, and show it."""
    done, total, shown = run.at.step, run.config.steps, {}
    bar = progress_bar(total=total, initial=done, unit="step")
    with bar, _board(run, args) as board:
        for step in _steps(run, stop):
            board(step)
            _show(bar, run, step, shown)
            if run.kept[-1:] == [run.at.step]:
                note_newest(run)


def _steps(run, stop):
    """The steps of a run, until a signal is noted; then its state is saved."""
    for step in follow(run):
        yield step
        if _stopped(run, stop) and step.loss is not None:
            with telling(run):
                save_state(run)
            return


def _stopped(run, stop):
    """Whether a signal has come, to this process or another of its group."""
    found = max(group_of(run.model).gather(stop.signal))
    if found:
        stop.signal = found
    return found  # not stop.signal: one may have come since, here alone


# %% show a step tags=["exporti"] module="cli.train"
def _show(bar, run, step, shown):
    """Bring the bar up to date, and print a sample when it is time."""
    if step.val_loss is not None:
        shown["val"] = f"{step.val_loss:.3f}"
    if step.loss is not None:
        shown["loss"] = f"{step.loss:.3f}"
        shown["tok/s"] = f"{step.tokens_per_second:,.0f}"
        if step.skipped:
            bar.write(f"step {step.step}: an outlier, skipped")
        every = run.config.sample_every
        if every and run.at.step % every == 0:
            text = "none"
            with sparing("a sample"):
                text = _sample(run.model, run.data.encoding)
            bar.write(f"after {run.at.step} steps:\n{text}\n")
        bar.update()
    bar.set_postfix(shown, refresh=step.val_loss is not None)


# %% events for TensorBoard tags=["exporti"] module="cli.train"
@contextmanager
def _board(run, args):
    """A function that writes a step for TensorBoard, if that is wanted."""
    if not args.tensorboard:
        yield lambda step: None
        return
    from llmnb.train.watch import Board

    board, lost = Board(run.folder), []

    def write(step):
        if not lost:
            lost.append(step)  # unless it can be written
            with sparing("TensorBoard's events"):
                board.write(step.step, step._asdict())
                lost.clear()

    yield write
    if not lost:
        with sparing("TensorBoard's events"):
            board.close()


# %% the end of a run tags=["exporti"] module="cli.train"
SAMPLE = {"count": 200, "temperature": 0.8, "top_p": 0.95}


def _sample(model, encoding):
    from llmnb.model.decode import Decoder

    # a GPU would compute the whole window for every token
    model = Decoder.of(model) if model.backend == "cuda" else model
    start, stop = [text_start(encoding)], encoding.eot_token
    tokens = generate(model, start, stop=stop, **SAMPLE)
    return "".join(decoded(encoding, tokens))


def _report(run, steps):
    losses = [x.val_loss for x in steps if x.val_loss is not None]
    folder, text = run.folder, "no sample"
    loss = f"{losses[-1]:.3f}" if losses else "unknown"
    with sparing("the landmarks"):
        marks = landmarks(run.config, run.data)
        known = ", ".join(f"{name} {x:.3f}" for name, x in marks.items())
        loss += f" on validation text ({known})"
    say("loss", loss)
    with sparing(folder / "sample.txt"):
        text = _keep_sample(run)
    print(f"\n{text}\n")
    names = " ".join(sorted(x.name for x in folder.iterdir()))
    say("wrote", f"{folder}: {names}")
    python = "stdlib" in run.config.corpus and not run.config.shards
    prompt = ' --prompt "def "' if python else ""
    say("go on", f"llmnb generate {typed(folder)}{prompt}")


def _keep_sample(run):
    """Write sample.txt with the model that is kept; returns the text."""
    folder, on_gpu = run.folder, run.config.backend == "cuda"
    model, encoding, _ = load_run(folder, backend="cpu" if on_gpu else None)
    text = _sample(model, encoding)
    write_whole(folder / "sample.txt", text.encode())
    return text


# %% [markdown]
# ## Try it
#
# A small run from a notebook cell, then the same run ten steps further, and a
# second run that is told the same folder:

# %% a run folder, written and used
from llmnb.cli.cell import TINY, run_command

place = TemporaryDirectory()
folder = Path(place.name, "run")
_, _, code = run_command("train", "--out", folder, *TINY.split())
print(code, *sorted(x.name for x in folder.iterdir()))
text, _, code = run_command("train", "--resume", folder, "--steps", 40)
verdict("resume", code == 0 and "step 30 of 40" in text, "goes on")
_, _, code = run_command("train", "--out", folder, *TINY.split())
verdict("train", code == 1, "keeps a folder in use")

# %% [markdown]
# ## Take away
#
# - A run's folder is made by `mkdir`, which two processes cannot both do.
# - The newest run is the one that was worked on last, by a list that the runs
#   keep themselves.
# - A signal sets a note; the step is finished, the state is saved, and the
#   exit code says that it was a signal.
#
# ## Exercises
#
# **1** (★★). In the third step of a run Ctrl-C is pressed twice; in that of another
# the terminal is closed, which sends `SIGHUP` twice. What has each run saved when
# it ends, and what is its exit code?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The second Ctrl-C stops the third step: no state, and 130. The second hang-up is
# ignored, the step is finished and saved, and the code is 129.
# :::

# %% exercise 1, checked tags=["hide-cell"]
from llmnb.train import loop


def ended(number, old):
    """Exit code and states of a run that gets a signal twice in its step 3."""
    folder, whole = Path(place.name, f"signal{number}"), loop.train_step

    def train_step(config, model, batches, at):
        if at.step == 2:
            signal.raise_signal(number)
            signal.raise_signal(number)
        return whole(config, model, batches, at)

    loop.train_step, before = train_step, signal.signal(number, old)
    _, _, code = run_command("train", "--out", folder, *TINY.split())
    loop.train_step = whole
    signal.signal(number, before)
    return code, [x.stem for x in folder.glob("state_*")]


err, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
os.dup2(nowhere, 2)  # where the handler writes
pressed = ended(signal.SIGINT, signal.default_int_handler)
closed = ended(signal.SIGHUP, signal.SIG_DFL)
os.dup2(err, 2)
verdict("Ctrl-C", pressed == (130, []), "130, and no state")
verdict("a hang-up", closed == (129, ["state_00000003"]), "129, and step 3")

# %% [markdown]
# **2** (★★). You have trained `runs/a` and then `runs/b`, and copied a file into
# `runs/a` since. Which run does `--resume` take? Which does it take when you have
# renamed `runs/b` to `runs/c`?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# `b`, the last of the list, whatever the clock says. Then the last of the list is
# gone, and there is a run that the list does not know: they may be one, or not. So
# the clock decides, for `a`, and a warning says that this is not certain.
# :::

# %% exercise 2, checked tags=["hide-cell"]
from contextlib import chdir
from types import SimpleNamespace

with chdir(place.name):
    for name in "ab":
        folder = RUNS / name
        folder.mkdir(parents=True)
        (folder / "model.bin").touch()
        note_newest(SimpleNamespace(folder=folder))
    os.utime(RUNS / "a" / "model.bin", (2e9, 2e9))
    verdict("the list", newest_run().name == "b", "takes b")
    (RUNS / "b").rename(RUNS / "c")
    with warnings.catch_warnings(record=True, action="always") as said:
        found = newest_run().name
    verdict("the clock", (found, len(said)) == ("a", 1), "takes a, and warns")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

place.cleanup()
gained("4.24")
