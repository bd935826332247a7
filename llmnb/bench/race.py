# Written by `make export` from notebooks/appendix/08_racing.py: edit that file.

"""A race in turns, on the same machine at the same time."""

__all__ = [
    "Contestant",
    "LlmC",
    "PAUSE",
    "PEERS",
    "STARTS",
    "Settings",
    "WARM_UP",
    "WRITERS",
    "lineup",
    "no_device",
    "race",
    "race_writers",
    "ratios",
    "start_times",
    "take_turns",
]


# imports of the race
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from llmnb.bench import peers
from llmnb.arena import Arena
from llmnb.formats.llmc import write_checkpoint
from llmnb.formats.published import write_folder
from llmnb.config import GPT2Config
from llmnb.model.tensors import parameter_shapes
from llmnb.formats.shard import write_shard
from llmnb.model.init import init_params
from llmnb.timing import cores
from llmnb.arena import footprint
from llmnb.model.layout import gpt2_layout
from llmnb.checks import SMALLER, check_room


# what a race is told
WARM_UP = 2  # rounds that are not measured: they compile and touch memory
WRITERS = {"llmnb": "llmnb-decoder", "transformers": "transformers"}
PAUSE = 0.05  # seconds between two turns, in which threads fall asleep
_PLAIN = {"kind": "torch", "compile": False, "bf16": False, "tf32": False}
PEERS = {
    "torch": _PLAIN,
    "torch-compile": _PLAIN | {"compile": True},
    "torch-bf16": _PLAIN | {"bf16": True},
    "torch-tf32": _PLAIN | {"tf32": True},
    "torch-compile-tf32": _PLAIN | {"compile": True, "tf32": True},
}


class Settings(NamedTuple):
    """How to race: what llmnb computes in, against whom, how often.

    precisions: of `GPT2`. against: names of `PEERS`, and "llmc=PATH", where
    PATH is llm.c's compiled train_gpt2. steps: how many are measured, one a
    round. threads: of each contestant, or None for all cores. backend: of
    `GPT2`. torch_python: the interpreter that has torch.

    Derived in chapter A.8.
    """

    precisions: tuple = ("fp32",)
    against: tuple = ()
    steps: int = 10
    threads: int | None = None
    backend: str = "cpu"
    torch_python: str = sys.executable


# the contestant's environment
def _environment(threads, cache=None):
    """Threads for every library; a folder for every compiler's cache."""
    count = str(threads or cores())
    env = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), count)
    if cache:
        env |= {"LLMNB_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    # a file's own folder is no place to look for modules
    env = os.environ | env | {"PYTHONSAFEPATH": "1"}
    env.pop("GOMP_SPINCOUNT", None)  # ours would slow PyTorch: see `kernel`
    return env


# a contestant
class Contestant:
    """A process that runs `peers` and trains one step on command.

    name: for messages. spec: see `peers`. python: the interpreter. cache: a
    folder for compiled code, or None for the usual ones. unmeasured: None,
    or why there is nothing to measure. Raises ChildProcessError, in one
    sentence, when the process cannot do what it was asked.

    Derived in chapter A.8.
    """

    def __init__(self, name, spec, python, threads=None, cache=None):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        env = _environment(threads, cache)
        if spec["kind"].startswith("llmnb"):
            package = str(Path(peers.__file__).parents[2])
            env["PYTHONPATH"] = package
        self._process = subprocess.Popen(
            [python, peers.__file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        try:
            self.unmeasured = self._answer().get("unmeasured")
        except ChildProcessError:
            self.close()
            raise

    def _answer(self):
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise ChildProcessError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self):
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        said = [x for x in lines if x.strip()]
        if code < 0:
            name = signal.Signals(-code).name
            return f"was ended by {name}: is there enough memory?"
        return said[-1] if said else f"ended with code {code}"

    def _ask(self, command):
        with suppress(OSError):  # the answer will say why
            print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def step(self):
        """Train once; a dict with the seconds and the loss."""
        return self._ask("step")

    def finish(self):
        """Stop; a dict of what the process knows about itself."""
        return self._ask("finish")

    def close(self):
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                file.close()


# what llm.c reads
def _llmc_folder(folder, cfg):
    """A folder with a random model and random tokens for train_gpt2."""
    arena = Arena({"params": (np.float32, parameter_shapes(cfg))})
    init_params(arena["params"], cfg, 42)
    path = Path(folder)
    write_checkpoint(path / "gpt2_124M.bin", cfg, arena["params"])
    data = path / "dev" / "data" / "tinyshakespeare"
    data.mkdir(parents=True)
    tokens = np.random.RandomState(0).randint(0, cfg.vocab_size, 1 << 16)
    for part in ("train", "val"):
        name = f"tiny_shakespeare_{part}.bin"
        write_shard(data / name, tokens.astype(np.uint16))


# llm.c as a contestant
class LlmC:
    """llm.c's train_gpt2, asleep between its steps; see `Contestant`.

    binary: the path of the program. shape: a dict with model, batch_size and
    seq_len.

    Derived in chapter A.8.
    """

    def __init__(self, binary, shape, threads=None):
        self.unmeasured = None
        if (shape["batch_size"], shape["seq_len"]) != (4, 64):
            self.unmeasured = "has B=4 T=64 compiled in"
        if os.name != "posix":
            self.unmeasured = "can be put to sleep on Linux and macOS only"
        if self.unmeasured:
            return
        import pty  # its end of a terminal makes C print line by line

        self._folder = tempfile.TemporaryDirectory()
        _llmc_folder(self._folder.name, GPT2Config(**shape["model"]))
        screen, keyboard = pty.openpty()
        self._lines = os.fdopen(screen, errors="replace")
        self._process = subprocess.Popen(
            [str(Path(binary).resolve())],
            cwd=self._folder.name,
            stdin=subprocess.DEVNULL,
            stdout=keyboard,
            stderr=keyboard,
            env=_environment(threads),
        )
        os.close(keyboard)
        self._sleep()

    def _sleep(self):
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def step(self):
        """Train once; a dict with the seconds and the loss."""
        self._process.send_signal(signal.SIGCONT)
        start, line = time.perf_counter(), ""
        while True:
            try:
                line = self._lines.readline()
            except OSError:  # how a terminal says that its program has ended
                line = ""
            now = time.perf_counter()
            if not line:
                raise ChildProcessError("llm.c: the program has ended")
            found = re.match(r"step \d+: train loss (\S+)", line)
            if found:
                self._sleep()
                return {"seconds": now - start, "loss": float(found[1])}
            start = now

    def finish(self):
        """A dict of what is known about the process."""
        return {"peak_bytes": peers.peak_memory(self._process.pid)}

    def close(self):
        """End the process and remove its folder."""
        if self.unmeasured is None:
            self._process.kill()
            self._process.wait()
            self._lines.close()
            self._folder.cleanup()


# who races
def lineup(settings):
    """The names of all contestants of some `Settings`, each with its spec.

    Returns a dict; llm.c's spec holds the path of its program. Raises
    ValueError for a name that nobody has and a number below 1, OSError for
    a program that is not there.

    Derived in chapter A.8.
    """
    for name in ("steps", "threads"):
        number = getattr(settings, name)
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    specs = {}
    for precision in settings.precisions:
        ours = {"backend": settings.backend, "precision": precision}
        specs[f"llmnb {precision}"] = {"kind": "llmnb", **ours}
        if settings.backend == "cuda":
            specs[f"llmnb {precision}"]["graph"] = True
            alone = {"kind": "llmnb", **ours, "graph": False}
            specs[f"llmnb {precision}, no graph"] = alone
    for name in settings.against:
        _check_peer(name, settings.backend)
        kind, _, path = name.partition("=")
        if kind == "llmc" and path:
            if not os.access(path, os.X_OK):
                raise FileNotFoundError(f"{path} is not a program")
            specs["llm.c"] = {"kind": "llmc", "path": path}
        elif name in PEERS:
            device = "cuda" if settings.backend == "cuda" else "cpu"
            specs[name] = PEERS[name] | {"device": device}
        else:
            known = ", ".join([*PEERS, "llmc=PATH"])
            raise ValueError(f"no contestant {name!r}: choose from {known}")
    return specs


def _check_peer(name, backend):
    """Raise for a contestant that the backend's device cannot run."""
    if backend == "cuda" and name.startswith("llmc="):
        raise ValueError("llmc: train_gpt2 runs on the CPU, not on a GPU")
    if backend != "cuda" and name in PEERS and PEERS[name]["tf32"]:
        raise ValueError(f"{name} needs a GPU: --backend cuda")


def no_device(backend):
    """Why nothing can be timed with a backend here; empty if it can.

    Derived in chapter A.8.
    """
    if backend != "cuda":
        return ""
    from llmnb.bench.clock import no_times

    return no_times()


# start a contestant
def _start(name, spec, shape, settings, cache=None):
    spec = {**shape, **spec}
    if spec["kind"] == "llmc":
        return LlmC(spec["path"], shape, settings.threads)
    ours = spec["kind"] == "llmnb"
    python = sys.executable if ours else settings.torch_python
    try:
        return Contestant(name, spec, python, settings.threads, cache)
    except ChildProcessError as error:
        if "No module named 'torch'" not in str(error):
            raise
        raise ChildProcessError(
            f"{name}: {python} has no torch; name a Python that has it with "
            "--torch-python"
        ) from None


# in turns
def take_turns(contestants, rounds):
    """One step of each contestant a round; who begins changes each round.

    contestants: a dict from name to an object with `step`. rounds: an
    iterable of round numbers. Returns a dict from name to a list of what
    `step` returned.

    Derived in chapter A.8.
    """
    names = [*contestants]
    replies = {name: [] for name in names}
    for number in rounds:
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            replies[name].append(contestants[name].step())
    return replies


# all in memory at once
def _check_together(shape, settings):
    """Raise MemoryError when our own contestants alone do not fit."""
    specs = lineup(settings).values()
    ours = [
        x for x in specs
        if x["kind"] == "llmnb"
        and x["backend"] != "cuda"
        and not peers.missing(x["precision"], x["backend"])
    ]  # fmt: skip
    if ours:
        cfg = GPT2Config(**shape["model"])
        layout = gpt2_layout(cfg, shape["batch_size"], shape["seq_len"])
        size = sum(footprint(layout).values())
        check_room(len(ours) * size, "fewer precisions, or " + SMALLER)


# the race
def race(shape, settings, bar=iter):
    """Race all contestants of some `Settings` on one shape.

    shape: a dict with model (what GPT2Config takes), batch_size, seq_len.
    bar: takes the rounds and gives them back, such as tqdm. Returns two
    dicts by name: of each contestant its steps (one dict a round, the
    `WARM_UP` rounds first) and its facts, or else why it is unmeasured.

    Derived in chapter A.8.
    """
    found, why = {}, {}
    if no_device(settings.backend):
        reason = no_device(settings.backend)
        return found, dict.fromkeys(lineup(settings), reason)
    _check_together(shape, settings)
    with ExitStack() as stack:
        runners = {}
        for name, spec in lineup(settings).items():
            runner = _start(name, spec, shape, settings)
            stack.callback(runner.close)
            if runner.unmeasured:
                why[name] = runner.unmeasured
            else:
                runners[name] = runner
        if runners:
            rounds = bar(range(WARM_UP + settings.steps))
            replies = take_turns(runners, rounds)
            for name, runner in runners.items():
                facts = runner.finish()
                found[name] = {"steps": replies[name], "facts": facts}
    return found, why


# a race of writers
def race_writers(cfg, prompt, count, rounds, threads=None, python=None):
    """Race a Decoder and transformers' generate on one random model.

    cfg: a GPT2Config. prompt, count: tokens to read and to write. rounds:
    texts of each to measure, after one that is not. threads: of each, or
    None for all cores. python: the interpreter that has transformers.
    Returns a dict from name to the steps (dicts, as `peers` answers) and
    the facts. Raises ValueError for numbers that do not fit the model and
    ChildProcessError in one sentence.

    Derived in chapter A.8.
    """
    if prompt < 1 or count < 2 or prompt + count > cfg.max_seq_len:
        raise ValueError(
            f"a prompt of {prompt} and {count} more tokens: must be at least "
            f"1 and 2, together at most {cfg.max_seq_len}"
        )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arena = Arena({"params": (np.float32, parameter_shapes(cfg))})
        init_params(arena["params"], cfg, 42)
        write_folder(folder, cfg, arena["params"])
        spec = {"folder": folder, "vocab_size": cfg.vocab_size}
        spec |= {"prompt": prompt, "count": count}
        runners = {}
        for name, kind in WRITERS.items():
            ours = kind.startswith("llmnb")
            program = sys.executable if ours else python or sys.executable
            runner = Contestant(name, spec | {"kind": kind}, program, threads)
            stack.callback(runner.close)
            runners[name] = runner
        replies = take_turns(runners, range(1 + rounds))
        return {
            name: {"steps": replies[name][1:], "facts": runner.finish()}
            for name, runner in runners.items()
        }


# ratios
def ratios(seconds):
    """Compare every llmnb with every peer, round by round.

    seconds: a dict from name to a list, one number a round; ours begin with
    "llmnb". Returns a list of dicts: ours, peer, and of the rounds' ratios
    of our time to the peer's the median, the lowest and the highest.

    Derived in chapter A.8.
    """
    ours = [x for x in seconds if x.startswith("llmnb")]
    table = []
    for a in ours:
        for b in [x for x in seconds if x not in ours]:
            pairs = zip(seconds[a], seconds[b], strict=True)
            each = [x / y for x, y in pairs]
            row = {"ours": a, "peer": b, "ratio": median(each)}
            table.append(row | {"low": min(each), "high": max(each)})
    return table


# time to the first step
STARTS = 3  # how often each contestant is started, cold and warm


def start_times(shape, settings, bar=iter):
    """Seconds from starting a process to the end of its first step.

    shape, bar: see `race`. In each of `STARTS` rounds each contestant starts
    cold and then warm. Returns a list of dicts: name, cold and warm (lists
    of seconds), or name and unmeasured. llm.c is left out: it has no
    compiled code to keep.

    Derived in chapter A.8.
    """
    specs = lineup(settings)
    specs.pop("llm.c", None)
    why = no_device(settings.backend)
    if why:
        return [{"name": name, "unmeasured": why} for name in specs]
    rows = {name: {"name": name, "cold": [], "warm": []} for name in specs}
    for _ in bar(range(STARTS)):
        for name, spec in specs.items():
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    what = spec, shape, settings, cache
                    spent, why = _first_step(name, *what)
                    rows[name][kind].append(spent)
            if why:
                rows[name] = {"name": name, "unmeasured": why}
                specs = {k: v for k, v in specs.items() if k != name}
    return [*rows.values()]


# one start
def _first_step(name, spec, shape, settings, cache):
    """Seconds to the first step, and why there are none."""
    start = time.perf_counter()
    runner = _start(name, spec, shape, settings, cache)
    try:
        if not runner.unmeasured:
            runner.step()
        return time.perf_counter() - start, runner.unmeasured
    finally:
        runner.close()
