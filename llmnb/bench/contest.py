# Written by `make export` from notebooks/appendix/07_ladders.py: edit that file.

"""The versions of a GPU kernel against each other: right, counted, timed."""

__all__ = [
    "FACTS",
    "GENERATIONS",
    "SEEN",
    "compiled",
    "contest",
    "contest_report",
    "count",
    "ladders_figure",
    "speeds",
]


# imports of the contest
import functools
from statistics import median

import numpy as np

from llmnb.bench.clock import Clock, gpu_facts, in_turns, limits, no_times
from llmnb.cuda.cublas import no_cublas
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.ptx import compile_kernel, no_compiler
from llmnb.gpu.simulator import watch
from llmnb.bench.ladders import (
    GPT2_124M,
    LADDERS,
    is_float,
    ladder_named,
    version_name,
)


# run a version
def _prepared(ladder, version, arguments, sizes, place):
    """A version ready to run, and its arguments on a device, by name."""
    there = {
        k: place(v) if isinstance(v, np.ndarray) else v
        for k, v in arguments.items()
    }
    run = ladder.function(version)
    floats = ladder.scratch(sizes, version)
    if floats:
        like = there[(ladder.writes + ladder.changes)[0]]
        run = functools.partial(run, work=empty(floats, like=like))
    return functools.partial(run, *there.values()), there


# is it right
def _judged(ladder, there, arguments, want):
    """Compare what a version left: {"error": number} or {"wrong": text}."""
    worst = 0.0
    for name, array in there.items():
        if not hasattr(array, "copy_to_host"):
            continue
        got = to_host(array)
        if name not in want:
            if not np.array_equal(got, arguments[name], is_float(got)):
                return {"wrong": f"{name} was changed"}
            continue
        if not np.isfinite(got).all():
            return {"wrong": f"{name} is not finite everywhere"}
        scale = max(1.0, np.abs(want[name]).max())
        error = float(np.abs(got - want[name]).max() / scale)
        if error > ladder.tolerance:
            return {"wrong": f"{name} is {error:.0e} from the reference"}
        worst = max(worst, error)
    return {"error": worst}


def judge(ladder, version, sizes, place=to_device, seed=1):
    """Run a version on fresh arguments and compare with the reference.

    ladder: a Ladder. sizes: of the arguments; of B at most ladder.checked
    are used. place: to_device or simulated. Returns a dict: error, the
    worst relative to the largest element of a result; or wrong, a text.
    """
    sizes = sizes._replace(B=min(sizes.B, ladder.checked))
    arguments = ladder.draw(sizes, seed)
    run, there = _prepared(ladder, version, arguments, sizes, place)
    run()
    return _judged(ladder, there, arguments, ladder.expected(arguments))


# what the simulator sees
SEEN = (
    *("threads", "requests", "sectors", "shared_requests", "shared_passes"),
    *("barriers", "atomics"),
)


def count(ladder, version, sizes=None):
    """Simulate a version under watch, and compare what it leaves.

    sizes: None for the ladder's own. Returns two things: a dict with the
    sizes, the least bytes, the number of launches, the counts of `SEEN` and,
    where the result is not that of the reference, wrong; and the launches,
    as `Seen` holds them. An error of the watch is raised.

    Derived in chapter A.7.
    """
    sizes = sizes or ladder.counted
    arguments = ladder.draw(sizes)
    run, there = _prepared(ladder, version, arguments, sizes, simulated)
    with watch() as seen:
        run()
    found = {"sizes": sizes._asdict(), "launches": len(seen.launches)}
    found |= {"least_bytes": ladder.least_bytes(arguments)}
    found |= {name: int(getattr(seen, name)) for name in SEEN}
    verdict = _judged(ladder, there, arguments, ladder.expected(arguments))
    if "wrong" in verdict:
        found |= verdict
    return found, seen.launches


# what the compiler says
GENERATIONS = {"sm_80": (8, 0), "sm_90": (9, 0)}
FACTS = (
    *("registers", "spilled", "stack", "shared", "float64"),
    *("vector_loads", "vector_stores"),
)


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


# what is timed
def _no_torch():
    """PyTorch's module, and why there is none; one of them is None."""
    try:
        import torch
    except ImportError:
        return None, "this Python has no torch"
    if not torch.cuda.is_available():
        return None, "torch finds no GPU"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch, None


def _torch_run(ladder, torch, there):
    """PyTorch's operation on the memory of a device's arrays."""
    from types import SimpleNamespace

    tensors = {
        k: torch.as_tensor(v, device="cuda") if hasattr(v, "nbytes") else v
        for k, v in there.items()
    }
    return ladder.torch(torch, SimpleNamespace(**tensors))


def timed(ladder, versions, sizes, clock, peer=None):
    """Let versions of a layer take turns on a GPU, and PyTorch with them.

    versions: numbers from 1. clock: a `Clock`. peer: the module torch, or
    None. NVIDIA's library joins in where the layer has one that starts.
    Returns the least bytes and a dict from number, the library's names and
    "torch" to lists of seconds.
    """
    arguments = ladder.draw(sizes)
    least = ladder.least_bytes(arguments)
    _, there = _prepared(ladder, 1, arguments, sizes, to_device)
    runs = {}
    for version in versions:
        run = ladder.function(version)
        floats = ladder.scratch(sizes, version)
        if floats:
            run = functools.partial(run, work=empty(floats))
        runs[version] = functools.partial(run, *there.values())
    if ladder.library and not no_cublas():
        for name, run in ladder.library().items():
            runs[name] = functools.partial(run, *there.values())
    if peer and ladder.torch:
        runs["torch"] = _torch_run(ladder, peer, there)
    return least, in_turns(clock, runs)


# one layer
def _says(function):
    """What a version is, in words: its name."""
    return version_name(function).replace("_", " ")


def _without_gpu(ladder, number, function, counted, why):
    """The row of a version: what can be known with no GPU."""
    row = {"version": number, "name": version_name(function)}
    row |= {"says": _says(function)}
    row["counted"], launches = count(ladder, number, counted)
    if no_compiler():
        row["compiled"] = {"unmeasured": no_compiler()}
    else:
        row["compiled"] = compiled(launches)
    row["time"] = {"unmeasured": why}
    return row


def _time_layer(ladder, rows, sizes, clock):
    """Judge the versions on the GPU, time those that are right.

    Fills in rows; returns the entries of the layer.
    """
    good = []
    for row in rows:
        row["judged"] = judge(ladder, row["version"], sizes)
        wrong = row["judged"].get("wrong")
        if wrong:
            row["time"] = {"unmeasured": f"wrong: {wrong}"}
        else:
            good.append(row["version"])
    torch, why = _no_torch()
    least, seconds = timed(ladder, good, sizes, clock, torch)
    for row in rows:
        if row["version"] in seconds:
            row["time"] = {"seconds": seconds[row["version"]]}
    found = {"sizes": sizes._asdict(), "least_bytes": least}
    if ladder.flops:
        found["flops"] = ladder.flops(sizes)
    found["peers"] = {
        name: {"seconds": spent}
        for name, spent in seconds.items()
        if isinstance(name, str)
    }
    if "torch" not in seconds:
        why = why or "PyTorch has no such operation by itself"
        found["peers"]["torch"] = {"unmeasured": why}
    if ladder.library and no_cublas():
        found["peers"]["cuBLASLt"] = {"unmeasured": no_cublas()}
    return found


# the contest
def contest(layers=(), sizes=GPT2_124M, counted=None, bar=iter):
    """Compare the versions of layers; a dict ready for JSON.

    layers: names in `LADDERS`, or none for all. sizes: of what is timed,
    where there is a GPU. counted: of what is simulated; None for the
    ladders' own. bar: takes the
    ladders and gives them back, such as tqdm. Raises ValueError for a name
    that is not there.

    Derived in chapter A.7.
    """
    ladders = [ladder_named(x) for x in layers] or [*LADDERS]
    why = no_times()
    clock = None if why else Clock()
    result = {"gpu": {"unmeasured": why}, "limits": {"unmeasured": why}}
    if clock:
        result = {"gpu": gpu_facts(), "limits": limits(clock)}
    result["ladders"] = []
    for ladder in bar(ladders):
        rows = [
            _without_gpu(ladder, 1 + i, function, counted, why)
            for i, function in enumerate(ladder.versions)
        ]
        found = {"layer": ladder.layer, "versions": rows}
        if clock:
            found |= _time_layer(ladder, rows, sizes, clock)
        else:
            found["peers"] = {"torch": {"unmeasured": why}}
            if ladder.library:
                found["peers"]["cuBLASLt"] = {"unmeasured": why}
        result["ladders"].append(found)
    return result


# medians and shares
def speeds(result):
    """What follows from the times of a contest, for tables and figures.

    Yields dicts: layer, version (a number, or a peer's name), seconds (the
    median), low, high, and rate and share: bytes a second of what a copy
    reaches, or FLOP/s of the peak, whichever the layer counts. Rows
    without a time are left out.

    Derived in chapter A.7.
    """
    for found in result["ladders"]:
        rows = [(x["version"], x["time"]) for x in found["versions"]]
        work = found.get("flops", found.get("least_bytes"))
        kind = "fma_peak" if "flops" in found else "copy_bytes"
        for version, each in [*rows, *found["peers"].items()]:
            if "unmeasured" in each:
                continue
            middle = median(each["seconds"])
            low, high = min(each["seconds"]), max(each["seconds"])
            rate = work / middle
            yield {
                "layer": found["layer"], "version": version, "rate": rate,
                "share": rate / result["limits"][kind], "kind": kind,
                "seconds": middle, "low": low, "high": high,
            }  # fmt: skip


# the contest in words
def contest_report(result):
    """The result of `contest` as a text of lines to print.

    Derived in chapter A.7.
    """
    gpu, most = result["gpu"], result["limits"]
    nothing = gpu.get("unmeasured")  # the one reason of all rows
    lines = [f"GPU      {gpu.get('name') or 'none: ' + gpu['unmeasured']}"]
    if "fma_peak" in most:
        lines.append(
            f"limits   {most['fma_peak'] / 1e12:.1f} TFLOP/s, "
            f"{most['copy_bytes'] / 1e9:,.0f} GB/s of copying"
        )
    fast = {(x["layer"], x["version"]): x for x in speeds(result)}
    for found in result["ladders"]:
        titles = "sectors", "of least", "requests", "registers", "vectors"
        lines += ["", found["layer"], ""]
        lines.append(f"{'':<34}" + "".join(f"{x:>11}" for x in titles))
        for row in found["versions"]:
            speed = fast.get((found["layer"], row["version"]))
            lines += _version_lines(row, speed, nothing)
        for name, row in found["peers"].items():
            speed = fast.get((found["layer"], name))
            said = _speed(speed) if speed else row["unmeasured"]
            lines += [] if said == nothing else [f"{name}: {said}"]
        if nothing:
            lines.append(f"  all of these and PyTorch's: {nothing}")
    return "\n".join(lines)


def _version_lines(row, speed, nothing):
    """A line of counts, and one of the time, or why this row has none."""
    seen, made = row["counted"], row["compiled"]
    least = seen["sectors"] * 32 / seen["least_bytes"]
    cells = [f"{seen['sectors']:,}", f"{least:.2f}", f"{seen['requests']:,}"]
    if isinstance(made, list):
        for fact in ("registers", "vector_loads"):
            cells.append("+".join(f"{x['sm_90'][fact]}" for x in made))
    title = f"{row['version']} {row['says']}"
    yield f"{title[:33]:<34}" + "".join(f" {x:>10}" for x in cells)
    said = _speed(speed) if speed else row["time"]["unmeasured"]
    if said != nothing:
        yield f"  {said}"
    if "wrong" in seen:
        yield f"  WRONG on the simulator: {seen['wrong']}"


def _speed(x):
    units = {"fma_peak": (1e12, "TFLOP/s"), "copy_bytes": (1e9, "GB/s")}
    scale, unit = units[x["kind"]]
    return (
        f"{x['seconds'] * 1e6:,.1f} us ({x['low'] * 1e6:,.1f} to "
        f"{x['high'] * 1e6:,.1f}), {x['rate'] / scale:,.1f} {unit}, "
        f"{x['share']:.0%} of the limit"
    )


# the ladders drawn
def ladders_figure(result):
    """The share of its limit that each version reaches, a panel a layer.

    A matplotlib figure. result: of `contest`, measured on a GPU. Raises
    ValueError when nothing in it was timed.

    Derived in chapter A.7.
    """
    from matplotlib.figure import Figure

    from llmnb.book.diagram import PALETTE

    panels = {}
    for x in speeds(result):
        panels.setdefault(x["layer"], []).append(x)
    if not panels:
        raise ValueError("there is nothing to draw: no kernel was timed")
    counts = [len(rows) for rows in panels.values()]
    size = 8, sum(0.9 + 0.3 * n for n in counts)
    fig = Figure(figsize=size, dpi=100)
    axes = fig.subplots(len(panels), squeeze=False, height_ratios=counts)
    for ax, (layer, rows) in zip(axes[:, 0], panels.items(), strict=True):
        ours = [isinstance(x["version"], int) for x in rows]
        names = [
            f"version {x['version']}" if mine else x["version"]
            for x, mine in zip(rows, ours, strict=True)
        ]
        colours = [PALETTE["blue" if x else "grey"] for x in ours]
        ax.barh(names, [100 * x["share"] for x in rows], color=colours)
        ax.invert_yaxis()
        ax.set_title(layer, loc="left", size=11, parse_math=False)
        limit = {"fma_peak": "peak of multiply-adds", "copy_bytes": "copy"}
        ax.set_xlabel(f"per cent of the GPU's {limit[rows[0]['kind']]}")
    fig.tight_layout()
    return fig
