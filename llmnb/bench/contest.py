# Written by `make export` from notebooks/appendix/07_ladders.py: edit that file.

"""The versions of a GPU kernel against each other: right, counted, timed."""

__all__ = [
    "FACTS", "GENERATIONS", "SEEN", "TOLERANCE", "compiled", "count",
    "in_turns", "judge", "kernel_contests", "timed",
]


# imports of the contest
import functools
from types import SimpleNamespace

import numpy as np

from llmnb.bench.clock import Clock, limits, no_times
from llmnb.bench.ladders import GPT2_124M, LADDERS, is_float, ladder_named
from llmnb.bench.peers import torch_on
from llmnb.bench.race import take_turns
from llmnb.cuda.cublas import no_cublas
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.ptx import compile_kernel, no_compiler
from llmnb.gpu.simulator import watch


# run a version
def _placed(arguments, place):
    """Arguments by name, the arrays among them on a device."""
    return {
        k: place(v) if isinstance(v, np.ndarray) else v
        for k, v in arguments.items()
    }


def _ready(ladder, version, sizes, there):
    """A version that has its arguments and its scratch memory."""
    run = ladder.function(version)
    if ladder.work:
        like = there[ladder.results[0]]
        run = functools.partial(run, work=empty(ladder.work(sizes), like=like))
    return functools.partial(run, *there.values())


# judge a version
TOLERANCE = 5e-5  # relative to the largest element of a result


def judge(ladder, version, sizes, place=to_device, seed=1):
    """Run a version on fresh arguments and compare with the reference.

    ladder: a Ladder. sizes: of the arguments; of B at most ladder.checked
    are used. place: to_device or simulated. Returns what is wrong, a text;
    an empty one where nothing is.

    Derived in chapter A.7.
    """
    sizes = ladder.few(sizes)
    arguments = ladder.draw(sizes, seed)
    there = _placed(arguments, place)
    _ready(ladder, version, sizes, there)()
    want = ladder.expected(arguments)
    for name in [k for k, v in arguments.items() if np.ndim(v)]:
        got = to_host(there[name])
        if name not in want:
            if not np.array_equal(got, arguments[name], is_float(got)):
                return f"{name} was changed"
            continue
        if not np.isfinite(got).all():
            return f"{name} is not finite everywhere"
        scale = max(1.0, np.abs(want[name]).max())
        error = np.abs(got - want[name]).max() / scale
        if error > TOLERANCE:
            return f"{name} is {error:.0e} from the reference"
    return ""


# what the simulator sees
SEEN = (
    "threads", "requests", "sectors", "shared_requests", "shared_passes",
    "barriers", "atomics",
)  # fmt: skip


def count(ladder, version, sizes=None):
    """Simulate a version under watch, and compare what it leaves.

    sizes: None for the ladder's own. Returns two things: a dict with the
    sizes, the least bytes, the number of launches, the counts of `SEEN`, how
    many times the least bytes moved and, where the result is not that of the
    reference, wrong; and the launches, as `Seen` holds them. An error of the
    watch is raised.

    Derived in chapter A.7.
    """
    sizes = ladder.few(sizes or ladder.counted)
    with watch() as seen:
        wrong = judge(ladder, version, sizes, simulated, seed=0)
    found = {"sizes": sizes._asdict(), "launches": len(seen.launches)}
    found |= {"least_bytes": ladder.least_bytes(ladder.draw(sizes))}
    found |= {name: int(getattr(seen, name)) for name in SEEN}
    found["moved"] = 32 * found["sectors"] / found["least_bytes"]
    return found | ({"wrong": wrong} if wrong else {}), seen.launches


# what the compiler says
GENERATIONS = {"sm_80": (8, 0), "sm_90": (9, 0)}
FACTS = (
    "registers", "spilled", "stack", "shared", "float64", "vector_loads",
    "vector_stores",
)  # fmt: skip


@functools.cache
def _compiled(kernel, kinds, cc):
    made = compile_kernel(kernel, kinds, cc)
    return {name: getattr(made, name) for name in FACTS}


def compiled(launches):
    """What the kernels of some launches are for each of `GENERATIONS`.

    Returns a list with a dict a kernel: name, and of each generation the
    `FACTS` of a Compiled. Needs numba-cuda and no GPU.

    Derived in chapter A.7.
    """
    kinds = dict.fromkeys((kernel, kinds) for kernel, _, _, kinds in launches)
    return [
        {"name": kernel.__name__.lstrip("_")}
        | {k: _compiled(kernel, types, cc) for k, cc in GENERATIONS.items()}
        for kernel, types in kinds
    ]


# in turns on a GPU
def in_turns(clock, runs, budget=2.0):
    """Time each of some functions once a round; see `take_turns`.

    clock: a `Clock`. runs: a dict from name to a function that launches.
    budget: seconds of GPU time to spend, roughly; at least five rounds and
    at most fifty are measured. Returns a dict from name to a list of
    seconds.

    Derived in chapter A.7.
    """
    turns = {name: clock.timer(run) for name, run in runs.items()}
    once = sum(turn() for turn in turns.values())
    rounds = int(budget / max(once, 1e-9))
    return take_turns(turns, range(min(max(rounds, 5), 50)))


def timed(ladder, versions, sizes, arguments, clock):
    """Let versions of a layer and their rivals take turns on a GPU.

    versions: numbers from 1, by name. sizes, arguments: a Sizes, and what
    `Ladder.draw` made for it. PyTorch joins in where it has a GPU, NVIDIA's
    library where the layer has one that starts. Returns a dict from name to
    a dict: seconds, or unmeasured.

    Derived in chapter A.7.
    """
    there = _placed(arguments, to_device)
    runs = {k: _ready(ladder, x, sizes, there) for k, x in versions.items()}
    rivals, found = _rivals(ladder, there)
    seconds = in_turns(clock, runs | rivals)
    return {k: {"seconds": x} for k, x in seconds.items()} | found


def _rivals(ladder, there):
    """Who runs a layer beside our versions, and why others cannot."""
    runs, found = {}, {}
    if ladder.library and no_cublas():
        found["cuBLASLt"] = {"unmeasured": no_cublas()}
    elif ladder.library:
        for name, run in ladder.library().items():
            runs[name] = functools.partial(run, *there.values())
    try:
        torch = torch_on("cuda")
    except (ImportError, NotImplementedError) as why:
        found["torch"] = {"unmeasured": str(why)}
    else:
        tensors = SimpleNamespace(**_tensors(torch, there))
        runs["torch"] = ladder.torch(torch, tensors)
    return runs, found


def _tensors(torch, there):
    """PyTorch's view of our arrays; numbers stay."""
    return {
        k: torch.as_tensor(v, device="cuda") if hasattr(v, "nbytes") else v
        for k, v in there.items()
    }


# the contest
def kernel_contests(layers=(), sizes=GPT2_124M, counted=None, bar=iter):
    """Compare the versions of layers: a list of contests, ready for JSON.

    layers: names in `LADDERS`, or none for all. sizes: of what is timed,
    where there is a GPU. counted: of what is simulated; None for the
    ladders' own. bar: takes the ladders and gives them back, such as tqdm.
    A row holds what `count` and `compiled` say of a version, and seconds or
    why they are unmeasured. Raises ValueError for a name that is not there.

    Derived in chapter A.7.
    """
    ladders = [ladder_named(x) for x in layers] or [*LADDERS]
    clock = None if no_times() else Clock()
    most = limits(clock) if clock else {}
    return [_contest(x, sizes, counted, clock, most) for x in bar(ladders)]


def _contest(ladder, sizes, counted, clock, most):
    """What is known of all versions of a layer, with a GPU or without."""
    rows = {}
    for number, name in enumerate(ladder.names, 1):
        row, launches = count(ladder, number, counted)
        if not no_compiler():
            row["compiled"] = compiled(launches)
        wrong = row.get("wrong") or (clock and judge(ladder, number, sizes))
        if wrong or not clock:
            row["unmeasured"] = f"wrong: {wrong}" if wrong else no_times()
        rows[name] = row
    about = f"counted at {_words(row['sizes'])}"
    found = {"name": ladder.layer, "kind": "kernel", "work": 0, "limit": 0}
    if clock:
        about += f", timed at {_words(sizes._asdict())}"
        found |= _race(ladder, rows, sizes, clock, most)
    rows = [{"name": name, **row} for name, row in rows.items()]
    return found | {"about": about, "contestants": rows}


def _race(ladder, rows, sizes, clock, most):
    """Time the versions that are right; fills in rows, returns the work."""
    numbers = enumerate(rows.items(), 1)
    good = {k: i for i, (k, row) in numbers if "unmeasured" not in row}
    arguments = ladder.draw(sizes)
    for name, each in timed(ladder, good, sizes, arguments, clock).items():
        rows[name] = rows.get(name, {}) | each
    return _goal(ladder, sizes, arguments, most)


def _goal(ladder, sizes, arguments, most):
    """The work of a layer, and what a GPU can do of it in a second."""
    if ladder.flops:
        return {"work": ladder.flops(sizes), "limit": most["fma_peak"]}
    least = ladder.least_bytes(arguments)
    return {"work": least, "limit": most["copy_bytes"]}


def _words(sizes):
    return ", ".join(f"{k} = {v}" for k, v in sizes.items())
