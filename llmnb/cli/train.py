# Written by `make export` from notebooks/4_practice/24_train.py: edit that file.

"""`llmnb train`: a run from the terminal, with a bar, samples and signals."""

__all__ = ["FolderOptions", "OPTIONS", "check_apart", "run"]


# imports of the command
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


# its options
@dataclass
class FolderOptions:
    """Where `llmnb train` writes, or goes on.

    Derived in chapter 4.24.
    """

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


# begin or go on
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
    """Refuse to write into the folder that is read.

    Derived in chapter 4.24.
    """
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


# train, with a bar
def run(args):
    """Train a GPT-2 from scratch, or from a checkpoint.

    The defaults take about two minutes on two cores. Ctrl-C finishes the
    step and saves; a second one stops at once. Exits with 128 plus the
    signal that stopped it.

    Derived in chapter 4.24.
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


# the size of a model
def _size_of(model):
    cfg = model.cfg
    count = sum(x.size for x in model.params.values())
    return (
        f"{cfg.num_layers} layers, {cfg.num_heads} heads, {cfg.channels} "
        f"channels, {cfg.vocab_size} tokens: {count:,} parameters, "
        f"{model.memory.nbytes / 1e6:.0f} MB in all"
    )


# stop when asked to
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


# follow a run
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


# show a step
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


# events for TensorBoard
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


# the end of a run
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
