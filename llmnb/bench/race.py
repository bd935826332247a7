# Written by `make export` from notebooks/appendix/08_racing.py: edit that file.

"""A race in turns, on the same machine at the same time."""

__all__ = [
    "PAUSE", "PEERS", "STARTS", "Settings", "by_key", "facts_of", "lineup",
    "race", "race_starts", "ratios", "take_turns",
]


# imports of the race
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing, suppress
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from llmnb.backend import PRECISIONS, choose
from llmnb.bench import clock, peers
from llmnb.timing import cores, machine


# what a race is told
PAUSE = 0.05  # seconds between two turns, in which threads fall asleep
PEERS = (
    "torch", "torch-compile", "torch-bf16", "torch-tf32",
    "torch-compile-tf32", "torch-compile-bf16",
)  # fmt: skip


class Settings(NamedTuple):
    """How to race: what llmnb computes in, against whom, how often.

    precisions: of `GPT2`. against: names of `PEERS`, and "llmc=PATH", where
    PATH is llm.c's compiled train_gpt2. steps: how many rounds are
    measured. threads: of each contestant, or None for all cores. backend:
    of `GPT2`. torch_python: the interpreter that has torch. turn: seconds of
    training in a turn, at least. in_backward: whether a model that learns in
    its backward pass takes part too. patience: seconds after which one that
    has not answered is ended.

    Derived in chapter A.8.
    """

    precisions: tuple = ("fp32",)
    against: tuple = ()
    steps: int = 10
    threads: int | None = None
    backend: str = "cpu"
    torch_python: str = sys.executable
    turn: float = 1.0
    in_backward: bool = False
    patience: float = 86400.0


# the contestant's environment
def _environment(threads, cache=None):
    """Threads for every library; a folder for every compiler's cache."""
    count = str(threads or cores())
    env = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), count)
    if cache:
        env |= {"LLMNB_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    # a file's own folder is no place to look for modules
    env = os.environ | env | {"PYTHONSAFEPATH": "1"}
    env.pop("GOMP_SPINCOUNT", None)  # ours would slow PyTorch: see `inner`
    return env


# a contestant
class Contestant:
    """A process that runs `peers` and trains one step on command.

    name: for messages. spec: see `peers`. settings: a `Settings`, of which
    threads, torch_python and patience count. cache: a folder for compiled
    code, or None for the usual ones. Raises NotImplementedError, saying why,
    when there is nothing to measure, and ChildProcessError, in one sentence,
    when the process cannot do what it was asked, or not in time.
    """

    def __init__(self, name, spec, settings, cache=None):
        if "cuda" in spec.values() and clock.no_times():
            raise NotImplementedError(clock.no_times())
        self.name, python = name, settings.torch_python
        self._patience, self._late = settings.patience, False
        env = _environment(settings.threads, cache)
        if spec["kind"].startswith("llm"):  # which needs llmnb and no torch
            python = sys.executable
            paths = Path(peers.__file__).parents[2], env.get("PYTHONPATH")
            env["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, paths)))
        self._folder = tempfile.TemporaryDirectory()
        spec = {"folder": self._folder.name, **spec}
        self._said = Path(self._folder.name, "stderr")
        with self._said.open("w") as errors:
            self._process = subprocess.Popen(
                [python, peers.__file__, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
                start_new_session=True,  # so that it ends with what it starts
            )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self):
        watch = threading.Timer(self._patience, self._kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
            words = "" if line else self._last_words()
        finally:
            watch.cancel()
        answer = json.loads(line) if line else {"error": words}
        if "unmeasured" in answer:
            raise NotImplementedError(answer["unmeasured"])
        if "error" in answer:
            raise ChildProcessError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self):
        code = self._process.wait()
        if self._late:
            return f"gave no answer in {self._patience:.0f} s"
        if code < 0:
            name = signal.Signals(-code).name
            return f"was ended by {name}: is there enough memory?"
        said = self._said.read_text(errors="replace").strip()
        return said.split("\n")[-1] or f"ended with code {code}"

    def _ask(self, command):
        with suppress(OSError):  # the answer will say why
            print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def step(self, turn=0):
        """Train once, and again until `turn` seconds are over.

        Returns the last step's dict, with the mean of the seconds.
        """
        return self._ask(f"step {turn}")

    def finish(self):
        """Stop; a dict of what the process knows about itself."""
        return self._ask("finish")

    def _kill(self, late=True):
        self._late = late
        # macOS says of a process that has ended that one may not end it
        with suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def close(self):
        """End the process, whatever it is doing, and what it started."""
        self._kill(late=False)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # it has not read what it was asked
                pipe.close()
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
    if not 0 <= settings.turn <= 3600:
        raise ValueError(f"turn must be 0 to 3600 s, got {settings.turn}")
    specs, on_gpu = {}, settings.backend == "cuda"
    for precision in settings.precisions:
        choose("precision", precision, PRECISIONS)
        ours = {"backend": settings.backend, "precision": precision}
        ours |= {"kind": "llmnb", "graph": True}
        specs[f"llmnb {precision}"] = ours
        if settings.in_backward:
            lean = ours | {"in_backward": True}
            specs[f"llmnb {precision}, in backward"] = lean
        if on_gpu:
            specs[f"llmnb {precision}, no graph"] = ours | {"graph": False}
    for name in settings.against:
        specs |= _peer(name, on_gpu)
    return specs


def _peer(name, on_gpu):
    """A peer's name and its spec; raises where the device cannot run it."""
    kind, _, path = name.partition("=")
    if name in PEERS:
        spec = {x: x in name for x in ("compile", "bf16", "tf32")}
        if spec["tf32"] and not on_gpu:
            raise ValueError(f"{name} needs a GPU: --backend cuda")
        spec |= {"kind": "torch", "device": "cuda" if on_gpu else "cpu"}
        return {name: spec}
    if kind != "llmc" or not path:
        known = ", ".join([*PEERS, "llmc=PATH"])
        raise ValueError(f"no contestant {name!r}: choose from {known}")
    if on_gpu:
        raise ValueError("llmc: train_gpt2 runs on the CPU, not on a GPU")
    if not os.access(path, os.X_OK):
        raise FileNotFoundError(f"{path} is not a program")
    return {"llm.c": {"kind": "llmc", "path": str(Path(path).resolve())}}


# what every result says
def facts_of(settings):
    """When and where `Settings` are raced: a dict ready for JSON.

    date, commit (of this checkout, or None), machine, threads, backend, and
    load: how many threads have wanted to run in the last minute, on average,
    or None where the system does not say; with a GPU what `gpu_facts` says.

    Derived in chapter A.8.
    """
    folder, commit = Path(__file__).parents[2], None
    if (folder / ".git").exists():
        command = ["git", "describe", "--always", "--dirty"]
        how = {"cwd": folder, "text": True, "timeout": 20}
        # no git, or one that refuses, as in a folder of another user
        with suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.check_output(command, **how).strip()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts = {"date": date.today().isoformat(), "commit": commit}
    facts |= {"machine": machine(), "threads": settings.threads or cores()}
    facts |= {"load": load, "backend": settings.backend}
    if settings.backend == "cuda" and not clock.no_times():
        facts["gpu"] = clock.gpu_facts()
    return facts


# in turns
def take_turns(turns, rounds, pause=0.0):
    """One turn of each contestant a round; who begins changes each round.

    turns: a dict from name to a function. rounds: an iterable of round
    numbers. pause: seconds before each turn. Returns a dict from name to a
    list of what the function returned.

    Derived in chapter A.8.
    """
    names = [*turns]
    replies = {name: [] for name in names}
    for number in rounds if names else ():
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            replies[name].append(turns[name]())
    return replies


# the race
def _or_why(function, *args):
    """What a function returns; a dict that says why, where it cannot."""
    try:
        return function(*args)
    except (NotImplementedError, ChildProcessError) as why:
        return {"unmeasured": str(why)}


def race(specs, rounds, settings, bar=iter):
    """Let contestants, each in a process of its own, take turns.

    On a GPU, whose memory does not hold them all, each runs alone, one after
    the other. specs: a dict from name to a spec, see `peers`. rounds: how
    many. bar: takes the rounds and gives them back, such as tqdm. Returns a
    list of rows, dicts: name; for each key of a step's answer the list of its
    values, one a round, and what the process knows about itself; or why it is
    unmeasured, which stops nobody else.

    Derived in chapter A.8.
    """
    if settings.backend == "cuda" and len(specs) > 1:
        alone = [race({k: x}, rounds, settings, bar) for k, x in specs.items()]
        return [row for rows in alone for row in rows]
    found, runners = {}, {}
    with ExitStack() as stack:
        for name, spec in specs.items():
            runner = _or_why(Contestant, name, spec, settings)
            if isinstance(runner, dict):
                found[name] = runner
            else:
                runners[name] = runner
                stack.callback(runner.close)
        steps = {
            k: partial(_or_why, x.step, settings.turn)
            for k, x in runners.items()
        }
        turns = take_turns(steps, bar(range(rounds)), PAUSE)
        for name, each in turns.items():
            each = [*each, _or_why(runners[name].finish)]
            why = next((x for x in each if "unmeasured" in x), None)
            found[name] = why or by_key(each[:-1]) | each[-1]
    return [{"name": name, **found[name]} for name in specs]


def by_key(turns):
    """A list of dicts that are alike as one dict of lists.

    Derived in chapter A.8.
    """
    return {key: [x[key] for x in turns] for key in turns[0]}


# ratios
def ratios(rows, key="seconds"):
    """Compare every llmnb with every peer, round by round.

    rows: dicts with a name and, where they were measured, by that key a
    list with one number a round. Ours begin with "llmnb"; one that launches
    without a graph is a peer of those that do not. Returns a list of dicts:
    ours, peer, and of the rounds' ratios of our time to the peer's the
    median, ratio, the lowest, low, and the highest, high.

    Derived in chapter A.8.
    """
    seconds = {x["name"]: x[key] for x in rows if key in x}
    llmnbs = [x for x in seconds if x.startswith("llmnb")]
    ours = [x for x in llmnbs if not x.endswith("no graph")]
    table = []
    for a in ours:
        for b in [x for x in seconds if x not in ours]:
            each = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
            found = {"ours": a, "peer": b, "ratio": median(each)}
            table.append(found | {"low": min(each), "high": max(each)})
    return table


# time to the first step
STARTS = 3  # how often each contestant is started, cold and warm


def race_starts(specs, settings, bar=iter):
    """Seconds from starting a process to the end of its first step.

    specs, bar, settings: see `race`. In each of `STARTS` rounds each
    contestant starts cold and then warm. Returns a list of rows, dicts:
    name; cold and warm, lists of seconds, or unmeasured.

    Derived in chapter A.8.
    """
    starts = {
        k: partial(_or_why, _start, k, x, settings) for k, x in specs.items()
    }
    rows = []
    for name, each in take_turns(starts, bar(range(STARTS))).items():
        why = next((x for x in each if "unmeasured" in x), None)
        rows.append({"name": name} | (why or by_key(each)))
    return rows


def _start(name, spec, settings):
    """Seconds of a cold start and of a warm one."""
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("cold", "warm"):
            begin = time.perf_counter()
            with closing(Contestant(name, spec, settings, cache)) as runner:
                runner.step()
                seconds[kind] = time.perf_counter() - begin
    return seconds
