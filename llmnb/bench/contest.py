# Written by `make export` from notebooks/appendix/07_ladders.py: edit that file.

"""The versions of a GPU kernel against each other: right, counted, timed."""

__all__ = [
    "FACTS", "GENERATIONS", "SEEN", "TOLERANCE", "compiled", "count",
    "in_turns", "judge", "kernel_contests", "wrong_with",
]


# imports of the contest
import functools
import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from llmnb.bench.clock import Clock, limits, no_times
from llmnb.bench.ladders import (
    GPT2_124M, LADDERS, Sizes, declared_shape, ladder_named, needed,
)
from llmnb.bench.peers import torch_on
from llmnb.bench.race import take_turns
from llmnb.cuda.cublas import no_cublas
from llmnb.gpu.launch import Kernel, empty, simulated, to_device, to_host
from llmnb.gpu.ptx import compile_kernel, no_compiler
from llmnb.gpu.simulator import watch
from llmnb.gpu.toolkit import numba_cuda


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


def wrong_with(got, want, kept):
    """What is wrong with the arrays that a version leaves; empty if nothing.

    got: what it has left, by name. want: results in float64, or the first
    numbers of them. kept: what must be as it was before. All are NumPy's
    arrays or all are tensors.

    Derived in chapter A.7.
    """
    for name, x in want.items():
        x = x.reshape(-1)
        y = got[name].reshape(-1)[: len(x)]
        if not (abs(y) < math.inf).all():
            return f"{name} is not finite everywhere"
        error = float(abs(y - x).max()) / max(1.0, float(abs(x).max()))
        if not error <= TOLERANCE:
            return f"{name} is {error:.0e} from float64"
    for name, x in kept.items():
        y = got[name]
        if not ((x == y) | (x != x) & (y != y)).all():  # NaN stays NaN
            return f"{name} was changed"
    return ""


def _kept(ladder, arguments):
    """The arrays that a layer only reads, by name."""
    return {
        k: x for k, x in arguments.items()
        if np.ndim(x) and k not in ladder.results
    }  # fmt: skip


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
    got = {k: to_host(x) for k, x in there.items() if np.ndim(x)}
    want, kept = ladder.expected(arguments), _kept(ladder, arguments)
    return wrong_with(got, want, kept)


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


def _rivals(ladder, there):
    """Who runs a layer beside our versions, and why others cannot."""
    runs, found = {}, {}
    if ladder.library and no_cublas():
        found["cuBLASLt"] = {"unmeasured": no_cublas()}
    elif ladder.library:
        for name, run in ladder.library().items():
            runs[name] = functools.partial(run, *there.values())
    runs["torch"] = prepared(ladder, there, _tensors)
    good, others = tried(runs)
    return good, found | others


# arguments on the GPU
def drawn_by(torch, ladder, sizes, where="cuda"):
    """As `Ladder.draw`, but tensors, drawn where they are used."""
    torch.manual_seed(1)
    part = functools.partial
    tokens = part(torch.randint, sizes.V, dtype=torch.int32, device=where)
    before = numbers = part(torch.randn, device=where)
    added = ladder.layer.endswith("_backward")
    added = added and ladder.layer != "residual_backward"
    if not ladder.changes:
        before = part(torch.full, fill_value=math.nan, device=where)
    elif added:
        before = part(torch.zeros, device=where)
    made = ladder.fill(sizes, (tokens, before, numbers), torch)
    return {
        k: torch.from_numpy(x).to(where) if isinstance(x, np.ndarray) else x
        for k, x in made.items()
    }


# what should come out
def expected_by(torch, ladder, arguments):
    """What a layer should leave, by name, from PyTorch in float64.

    Of AdamW the first 4,096 elements, from the reference.
    """
    if ladder.layer == "adamw_apply":
        few = {k: x[:4096].cpu().numpy().copy() for k, x in arguments.items()}
        want = ladder.expected(few)
        where = arguments["params"].device
        return {k: torch.from_numpy(x).to(where) for k, x in want.items()}
    wide = {
        k: x.double() if hasattr(x, "dtype") and x.is_floating_point() else x
        for k, x in arguments.items()
    }
    if "logits" in wide:  # padding that takes no part
        wide["logits"][..., wide["V"] :] = -math.inf
    found = ladder.torch(torch, SimpleNamespace(**wide))()
    found = [x.detach() for x in found]
    return dict(zip(ladder.results, found, strict=False))


# what fits
def free_bytes():
    """Bytes that are free on the GPU, once numba gives back what it keeps."""
    context = numba_cuda().current_context()
    context.deallocations.clear()
    return context.get_memory_info()[0]


def fitting_batch(batch_size, needs, free):
    """The batch size, halved until needs(it) bytes are free.

    Raises MemoryError, in one sentence, where one sequence does not fit.
    """
    while needs(batch_size) > free:
        if batch_size == 1:
            raise MemoryError(
                f"one sequence needs {needs(1):,} bytes on the GPU, of which "
                f"{free:,} are free"
            )
        batch_size //= 2
    return batch_size


def layer_bytes(ladder, sizes, batch_size):
    """Bytes for judging and timing all versions of a layer, roughly."""
    letters = sizes._replace(B=batch_size).letters
    shapes = [
        declared_shape(x, letters, ladder.any) for x in needed(ladder.declared)
    ]
    wide = 0 if ladder.layer == "adamw_apply" else 6  # it is judged in part
    return (3 + wide) * sum(4 * math.prod(x) for x in shapes)


def _fitted(ladder, sizes, contest):
    """The sizes with as many sequences as fit; a contest tells them."""
    needs = functools.partial(layer_bytes, ladder, sizes)
    sizes = sizes._replace(B=fitting_batch(sizes.B, needs, free_bytes()))
    contest["about"] += f", timed at {_words(sizes._asdict())}"
    return sizes


def _words(sizes):
    return ", ".join(f"{k} = {v}" for k, v in sizes.items())


# arrays of both sides
def _there(torch, drawn):
    """Fresh copies of arguments, as arrays for our kernels."""
    if not torch:
        return _placed(drawn, to_device)
    share = functools.partial(numba_cuda().as_cuda_array, sync=False)
    return {
        k: share(x.clone()) if hasattr(x, "clone") else x
        for k, x in drawn.items()
    }


def torch_or_none():
    """The module torch where it has a GPU, or None."""
    try:
        return torch_on("cuda")
    except (ImportError, NotImplementedError):
        return None


def prepared(ladder, there, tensors):
    """PyTorch's operation on our arrays, which its first call makes ready.

    tensors: a function of torch and the arrays that gives its view of them.
    """

    @functools.cache
    def ready():
        torch = torch_on("cuda")
        return ladder.torch(torch, SimpleNamespace(**tensors(torch, there)))

    return lambda: ready()()


def tried(runs):
    """Of some functions those that run, and rows that say why others fail."""
    good, found = {}, {}
    for name, run in runs.items():
        try:
            run()
            good[name] = run
        except Exception as error:  # it must not cost the others
            found[name] = {"unmeasured": first_words(error)}
    return good, found


def first_words(error):
    """One line that an error says, or its name."""
    said = str(error).strip() or type(error).__name__
    return said.splitlines()[0][:300]


def _tensors(torch, there):
    """PyTorch's view of our arrays; numbers stay."""
    return {
        k: torch.as_tensor(v, device="cuda") if hasattr(v, "nbytes") else v
        for k, v in there.items()
    }


# a version with link-time optimisation
@functools.cache
def _linked(kernel):
    """What link-time optimisation makes of a kernel."""
    options = kernel.options | {"lto": True}
    return Kernel(kernel.function, **options).compiled()


def _with_lto(run):
    """The same launches, linked."""
    with watch() as seen:
        run()
    plain = {k: k._made for k, *_ in seen.launches}

    def linked():
        try:
            for k in plain:
                k._made = _linked(k)
            run()
        finally:
            for k, made in plain.items():
                k._made = made

    return linked


# right, then timed
class Gpu(NamedTuple):
    """What versions are judged and timed with.

    clock: a `Clock`. most: of `limits`. torch: the module where it has a
    GPU, or None. judged: the Sizes for the reference, or None: nothing is
    judged. budget: of `in_turns`. linked: whether the best version is timed
    with link-time optimisation too.
    """

    clock: Clock
    most: dict
    torch: object
    judged: Sizes | None
    budget: float = 2.0
    linked: bool = False


def on_gpu(**how):
    """A Gpu, with its clock, limits and PyTorch as they are here."""
    clock = Clock()
    return Gpu(clock, limits(clock), torch_or_none(), **how)


def kernel_rows(ladder, sizes, gpu, contest, wrong=None):
    """Judge and time all versions of a layer and its rivals: rows by name.

    contest: a dict; what is timed, its work and its limit are added. wrong:
    what is known to be wrong with versions, by name; they are not run.
    """
    torch, runs, wrong = gpu.torch, {}, wrong or {}
    if torch:
        torch.cuda.empty_cache()  # what it keeps for later is free too
    sizes = _fitted(ladder, sizes, contest)
    drawn = drawn_by(torch, ladder, sizes) if torch else ladder.draw(sizes)
    contest |= _goal(ladder, sizes, drawn, gpu.most)
    if gpu.judged:
        wrong = wrong | _found_wrong(ladder, sizes, gpu, drawn, wrong)
    there = _there(torch, drawn)
    for number, name in enumerate(ladder.names, 1):
        if name not in wrong:
            runs[name] = _ready(ladder, number, sizes, there)
    if runs and gpu.linked:
        name, run = [*runs.items()][-1]
        runs[f"{name}, LTO"] = _with_lto(run)
    rivals, found = _rivals(ladder, there)
    times = in_turns(gpu.clock, runs | rivals, gpu.budget)
    found |= {k: {"unmeasured": f"wrong: {x}"} for k, x in wrong.items()}
    return {k: {"seconds": x} for k, x in times.items()} | found


def _found_wrong(ladder, sizes, gpu, drawn, known):
    """What is wrong with versions, by name; those that are known are left.

    The reference sees a few rows, PyTorch, where it is, all that is drawn.
    """
    torch, found, kept = gpu.torch, {}, _kept(ladder, drawn)
    want = expected_by(torch, ladder, drawn) if torch else {}
    judged = gpu.judged._replace(B=min(gpu.judged.B, sizes.B))
    for number, name in enumerate(ladder.names, 1):
        if name in known:
            continue
        try:
            wrong = judge(ladder, number, judged)
            if want and not wrong:
                there = _there(torch, drawn)
                _ready(ladder, number, sizes, there)()
                wrong = wrong_with(_tensors(torch, there), want, kept)
        except Exception as error:  # it must not cost the others
            wrong = first_words(error)
        if wrong:
            found[name] = wrong
    return found


def _goal(ladder, sizes, arguments, most):
    """The work of a layer, and what a GPU can do of it in a second."""
    if ladder.flops:
        return {"work": ladder.flops(sizes), "limit": most["fma_peak"]}
    least = ladder.least_bytes(arguments)
    return {"work": least, "limit": most["copy_bytes"]}


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
    gpu = None if no_times() else on_gpu(judged=sizes)
    return [_contest(x, sizes, counted, gpu) for x in bar(ladders)]


def _contest(ladder, sizes, counted, gpu):
    """What is known of all versions of a layer, with a GPU or without."""
    rows = {}
    for number, name in enumerate(ladder.names, 1):
        row, launches = count(ladder, number, counted)
        if not no_compiler():
            row["compiled"] = compiled(launches)
        if not gpu or "wrong" in row:
            wrong = row.get("wrong")
            row["unmeasured"] = f"wrong: {wrong}" if wrong else no_times()
        rows[name] = row
    found = {"name": ladder.layer, "kind": "kernel", "work": 0, "limit": 0}
    found["about"] = f"counted at {_words(row['sizes'])}"
    if gpu:
        wrong = {k: x["wrong"] for k, x in rows.items() if "wrong" in x}
        timed = kernel_rows(ladder, sizes, gpu, found, wrong)
        rows |= {k: rows.get(k, {}) | x for k, x in timed.items()}
    rows = [{"name": name, **row} for name, row in rows.items()]
    return found | {"contestants": rows}
