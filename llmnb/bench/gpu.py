# Written by `make export` from notebooks/appendix/17_gpu.py: edit that file.

"""Everything worth knowing from a GPU, in eight minutes."""

__all__ = ["PRECISIONS", "Result", "SMALL", "main", "measure"]


# imports of the measurement
import argparse
import json
import math
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np

from llmnb.arena import footprint, put
from llmnb.bench.bench import CONFIGS, WARM_UP, _specs, _step_row
from llmnb.bench.clock import Clock, no_times
from llmnb.bench.contest import (
    _fitted, _tensors, first_words, fitting_batch, free_bytes, in_turns,
    kernel_rows, on_gpu, prepared, torch_or_none, tried,
)
from llmnb.bench.ladders import GPT2_124M, LADDERS, TINY, ladder_named
from llmnb.bench.race import Settings, facts_of, race, ratios
from llmnb.bench.start import AGAIN
from llmnb.config import GPT2Config
from llmnb.cuda import cublas
from llmnb.cuda.bf16_attention import attention_scratch_bf16
from llmnb.cuda.bf16_matmul import multiply
from llmnb.cuda.cublas import no_cublas
from llmnb.cuda.matmul import matmul_scratch
from llmnb.files import make_folder, write_whole
from llmnb.gpu.fragments import pack
from llmnb.gpu.launch import empty, kernel, missing, to_device, to_host
from llmnb.gpu.simulator import cuda
from llmnb.gpu.toolkit import numba_cuda
from llmnb.model.gpt2 import GPT2
from llmnb.model.layout import gpt2_layout
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16


# a result on disk
class Result:
    """What has been measured so far, on disk after every row.

    path: of a JSON file. seconds: how long there is. facts: what the file
    begins with. resume: whether a process that has ended wrote it before.
    patience: seconds beyond twice what a row needs, after which the process
    ends, or None.

    Derived in chapter A.17.
    """

    def __init__(self, path, seconds, facts, resume=False, patience=None):
        self.path, self.patience, self.number = Path(path), patience, -1
        self.found = facts | {"began": time.time(), "contests": []}
        if resume:
            self._take_up()
        spent = time.time() - self.found["began"]
        self.end = time.monotonic() + seconds - spent
        make_folder(self.path.parent)
        self.write()

    def _take_up(self):
        with suppress(FileNotFoundError):  # it did not get that far
            found = json.loads(self.path.read_text("utf-8"))
            if found.get("began", 0) > time.time() - 3600:
                self.found = found  # and not another day's
        number, names = self.found.pop("under_way", (0, ()))
        for name in names:
            row = {"name": name, "unmeasured": "ended its process, or hung"}
            self.found["contests"][number]["contestants"].append(row)

    def write(self):
        """Write all of it beside its place, and rename."""
        text = json.dumps(self.found, indent=1) + "\n"
        write_whole(self.path, text.encode())

    def contest(self, name, kind, about, **more):
        """Begin a contest, to which `rows` adds; a dict, with more in it.

        One that was begun before is taken up as it is.
        """
        begun, self.number = self.found["contests"], self.number + 1
        if self.number == len(begun):
            found = {"name": name, "kind": kind, "about": about}
            begun.append(found | {"contestants": []} | more)
        return begun[self.number]

    def rows(self, contest, names, measure, needs):
        """Add the rows that measure() returns by name, or why there are none.

        names: whose they are; if they are there, nothing is done. needs:
        seconds without which it is not begun. Raises SystemExit where the
        GPU is lost.
        """
        if {*names} <= {x["name"] for x in contest["contestants"]}:
            return
        start = time.monotonic()
        if start + needs > self.end:
            found = dict.fromkeys(names, {"unmeasured": "no time was left"})
        else:
            found = self._measured(names, measure, needs)
        spent = f"{time.monotonic() - start:6.1f} s  {contest['name']}"
        for name, row in found.items():
            contest["contestants"].append({"name": name} | row)
            print(f"{spent}: {name} {row.get('unmeasured', '')}", flush=True)
        contest["ratios"] = ratios(contest["contestants"])
        self.write()
        if lost():
            raise SystemExit(AGAIN)

    def _measured(self, names, measure, needs):
        self.found["under_way"] = self.number, [*names]
        self.write()
        late = threading.Timer((self.patience or 0) + 2 * needs, _end)
        if self.patience:
            late.start()
        try:
            return measure()
        except Exception as error:  # these must not cost the others
            traceback.print_exc(file=sys.stdout)
            why = {"unmeasured": first_words(error)}
            return dict.fromkeys(names, why)
        finally:
            late.cancel()
            del self.found["under_way"]

    def row(self, contest, name, measure, needs=5):
        """Add one row, the dict that measure() returns."""
        self.rows(contest, [name], lambda: {name: measure()}, needs)


# when nothing more can be done
def lost():
    """Whether an error has made the GPU useless to this process."""
    if missing():
        return False
    try:
        numba_cuda().synchronize()
    except Exception:  # which the driver repeats from now on
        return True
    return False


def _end():
    """End the process, though it waits for a GPU that does not answer."""
    print("late: begins again after this", flush=True)
    os._exit(AGAIN)


# gradients against float64
def exact_gradients(cfg, rows, seq_len):
    """A model in float64 on the CPU after one backward pass.

    Returns three things: the GPT2, whose weights are all float32's; its
    batch, tokens and targets (2, rows, T); its loss.
    """
    draw = np.random.default_rng(3)
    model = GPT2(cfg, rows, seq_len, "cpu", "fp64", seed=3)
    for x in model.params.values():
        x[...] = np.float32(x + draw.normal(scale=0.02, size=x.shape))
    batch = draw.integers(0, cfg.vocab_size, (2, rows, seq_len))
    loss = model.forward(*batch)
    model.backward()
    return model, batch, loss


def gradients(found, copies, precision):
    """How far a GPU's loss and gradients are from those of float64.

    found: gives what `exact_gradients` does. copies: how often the batch is
    repeated on the GPU. Returns a dict: loss_apart; worst, the largest
    distance of a gradient over its norm, and tensor, whose it is.
    """
    exact, batch, want = found()
    rows = np.tile(batch, (1, copies, 1))
    model = GPT2(exact.cfg, *rows.shape[1:], "cuda", precision, seed=None)
    for name, x in exact.params.items():
        put(model.params[name], np.float32(x))
    loss, apart = model.forward(*rows), {}
    model.backward()
    for name, g in exact.grads.items():
        distance = np.linalg.norm(np.asarray(model.grads[name]) - g)
        apart[name] = float(distance / np.linalg.norm(g))
        if not math.isfinite(apart[name]):
            raise FloatingPointError(f"the gradient of {name} is not finite")
    worst = max(apart, key=apart.get)
    return {
        "loss_apart": abs(loss - want),
        "worst": apart[worst],
        "tensor": worst,
    }


def graph_of_parts(cfg, batch_size, seq_len, precision="fp32", steps=4):
    """In how many of some steps a graph leaves the bits of its parts."""
    shape = batch_size, seq_len, "cuda", precision
    whole, parts = (GPT2(cfg, *shape, seed=3) for _ in range(2))
    draw, same = np.random.default_rng(5), 0
    for k in range(1, 1 + steps):
        batch = draw.integers(0, cfg.vocab_size, (2, *shape[:2]))
        result = whole.step(*batch, 1.0, step=k)
        loss = parts.forward(*batch)
        parts.backward()
        norm = parts.clip_gradients(1.0)
        parts.update(step=k)
        a, b = (np.asarray(x.memory.flat("params")) for x in (whole, parts))
        same += result == (loss, norm) and np.array_equal(a, b)
    return {"same_steps": int(same)}


# the first contest
def ask_right(result, shapes, precisions):
    """Compare gradients with float64, the graph with its parts.

    shapes: by name (cfg, rows that differ, copies of them, T).
    """
    about = "loss and gradients against float64 on the CPU, relative in norm"
    contest = result.contest("right", "gradients", about)
    for name, (cfg, rows, copies, T) in shapes.items():
        exact = cache(partial(exact_gradients, cfg, rows, T))
        for precision in precisions:
            row = partial(gradients, exact, copies, precision)
            needs = 10 if exact.cache_info().currsize else 30
            result.row(contest, f"{name} {precision}", row, needs)
        for precision in precisions if rows > 1 else ():
            row = partial(graph_of_parts, cfg, rows, T, precision)
            both = f"{name} {precision}, graph and parts"
            result.row(contest, both, row, 15)


# what fits
def model_bytes(cfg, seq_len, batch_size):
    """Bytes in which a GPT2 trains in float32, without scratch memory."""
    return sum(footprint(gpt2_layout(cfg, batch_size, seq_len)).values())


def step_batch(cfg, batch_size, seq_len):
    """The batch size, halved until a step fits; 1 where it never does.

    What this process keeps for later is given back before.
    """
    try:
        if torch := torch_or_none():
            torch.cuda.empty_cache()
        needs = partial(model_bytes, cfg, seq_len)
        return fitting_batch(batch_size, needs, free_bytes())
    except Exception:  # the driver will say so to each contestant
        traceback.print_exc(file=sys.stdout)
        return 1


# the limit of mma
_TURNS = 1024  # of four products of 16 by 16 by 16


@kernel(launch_bounds=256)
def _mma_alone(out, turns):
    me, s = cuda.grid(1), cuda.local.array(32, np.float32)
    x = out[me]
    pair = pack(x, -x)
    a, b = (pair, pair, pair, pair), (pair, pair, pair, pair)
    for k in range(32):
        s[k] = x
    for _ in range(turns):
        for j in range(4):
            multiply(s, 8 * j, a, b)
    for k in range(1, 32):
        s[0] += s[k]
    out[me] = s[0]


def mma_peak(clock):
    """FLOP/s of `mma` in bfloat16 on registers alone."""
    grid = 8 * numba_cuda().get_current_device().MULTIPROCESSOR_COUNT
    out = to_device(np.full(256 * grid, 0.5, np.float32))
    turn = clock.timer(partial(_mma_alone[grid, 256], out, _TURNS))
    seconds = median(turn() for _ in range(20))
    return grid * 8 * _TURNS * 4 * 2 * 16**3 / seconds


# the second contest
HALVES = (
    "attention_backward", "attention_forward", "matmul_backward",
    "matmul_forward",
)  # fmt: skip
SINGLE = "bias", "dbias", "dweight", "lse"  # float32 in the layers too
FAR = 2**-8  # relative in norm: who is further from float64 is wrong


def half_arguments(ladder, sizes):
    """A layer's arguments, all but `SINGLE` rounded to bfloat16 and back."""
    a = SimpleNamespace(**ladder.draw(sizes))
    for name, x in vars(a).items():
        if name not in SINGLE and np.isfinite(x).all():
            setattr(a, name, from_bfloat16(to_bfloat16(x)))
    if ladder.layer == "attention_backward":
        ladder.settle(a, np)  # out and lse are those of rounded numbers
    return vars(a)


def half_apart(ladder, drawn, there):
    """How far results are from float64, relative in norm; a dict by name.

    drawn: arguments before, there: arrays after. Of attention two sequences
    are compared.
    """
    rows = ladder.checked if "attention" in ladder.layer else None
    want = ladder.expected({k: x[:rows] for k, x in drawn.items()})
    apart = {}
    for name, x in want.items():
        got = to_host(there[name])[:rows]
        got = got if name in SINGLE else from_bfloat16(got)
        if not np.isfinite(got).all():
            raise FloatingPointError(f"{name} is not finite everywhere")
        apart[name] = float(np.linalg.norm(got - x) / np.linalg.norm(x))
    return apart


def ask_halves(result, sizes, judging):
    """Judge and time the layers in bfloat16; judging: as for kernels."""
    tools, names = cache(_half_tools), ("llmnb bf16", "torch bf16")
    for layer in HALVES:
        contest = result.contest(
            f"{layer}_bf16", "kernel", "in bfloat16", work=0, limit=0
        )
        what = layer, sizes, tools, judging, contest
        result.rows(contest, names, partial(_half_rows, *what), needs=20)


def _half_tools():
    """A clock, and the limit, 0 where it cannot be had."""
    clock, peak = Clock(), 0
    try:
        peak = mma_peak(clock)
    except Exception:  # the layers are timed without
        traceback.print_exc(file=sys.stdout)
    return clock, peak


# one layer in bfloat16
def _half_rows(layer, sizes, tools, judging, contest):
    """The rows of a layer by name; fills in what the contest is about."""
    from llmnb import cuda as layers

    (clock, contest["limit"]), ladder = tools(), ladder_named(layer)
    sizes = _fitted(ladder, sizes, contest)
    contest["work"] = ladder.flops(sizes)
    drawn = half_arguments(ladder, sizes)
    there = {
        k: to_device(x if k in SINGLE else to_bfloat16(x))
        for k, x in drawn.items()
    }
    more = {}
    if layer.startswith("attention"):  # as in a step
        more["rest"] = to_device(np.zeros(drawn["out"].shape, np.uint16))
    if layer.endswith("backward"):
        B, T, NH = sizes.B, sizes.T, sizes.NH
        floats = attention_scratch_bf16(B, T, NH, NH, sizes.C // NH)
        more["work"] = empty(max(floats, ladder.work(sizes)))
    run = partial(getattr(layers, f"{layer}_bf16"), *there.values(), **more)
    run()
    row = {}
    if judging:
        row["apart"] = half_apart(ladder, drawn, there)
        row["worst"] = max(row["apart"].values())
        if row["worst"] > FAR:
            row["unmeasured"] = f"wrong: {row['worst']:.0e} from float64"
            why = {"unmeasured": "ours has failed"}
            return {"llmnb bf16": row, "torch bf16": why}
    rival = prepared(ladder, there, _half_tensors)
    rivals, found = tried({"torch bf16": rival})
    times = in_turns(clock, {"llmnb bf16": run} | rivals, budget=0.5)
    found |= {name: {"seconds": x} for name, x in times.items()}
    found["llmnb bf16"] |= row
    return found


def _half_tensors(torch, there):
    """PyTorch's view of our arrays, and all of them in bfloat16."""
    there = {
        k: x if k in SINGLE else x.view(np.int16) for k, x in there.items()
    }
    return {
        k: x.bfloat16() if k in SINGLE else x.view(torch.bfloat16)
        for k, x in _tensors(torch, there).items()
    }


# the third contest
_RIVALS = "torch-compile-bf16 torch torch-compile-tf32 torch-tf32 torch-bf16"
SETTINGS = Settings(
    ("bf16", "tf32", "fp32"), tuple(_RIVALS.split()), 10, backend="cuda",
    turn=0,  # alone, it finds nobody's numbers in the caches
    patience=90.0,  # PyTorch compiles for a minute
)  # fmt: skip


def ask_steps(result, name, shape, settings):
    """Time steps of every contestant on one shape, each alone."""
    cfg, B, T = shape
    contest = result.contest(name, "step", f"batches of {B} times {T} tokens")
    specs = _specs(cfg, B, T, settings)
    for who in sorted(specs, key=lambda k: k.endswith("no graph")):
        row = partial(_step, who, specs[who], settings, B * T)
        result.row(contest, who, row, needs=40)


def _step(name, spec, settings, tokens):
    (row,) = race({name: spec}, WARM_UP + settings.steps, settings)
    return _step_row(row, tokens, 0)


# the fourth contest
def ask_kernels(result, sizes, judging):
    """Judge and time every version of every layer, most work first.

    judging: whether a version must be right to be timed; not on a driver
    that computes nothing.
    """
    judged = TINY if judging else None
    gpu = cache(partial(on_gpu, judged=judged, budget=0.5, linked=True))
    for ladder in sorted(LADDERS, key=lambda x: x.flops is None):
        contest = result.contest(
            ladder.layer, "kernel", "in float32", work=0, limit=0
        )
        rows = partial(_version_rows, ladder, sizes, gpu, contest)
        result.rows(contest, ladder.names, rows, needs=15)


def _version_rows(ladder, sizes, gpu, contest):
    return kernel_rows(ladder, sizes, gpu(), contest)


# epilogues
ENDS = (
    "cublas_gelu_forward", "cublas_gelu_backward", "cublas_weight_backward",
)  # fmt: skip
_WAYS = [(p, way) for p in ("fp32", "tf32") for way in ("apart", "fused")]


def ask_ends(result, sizes, judging):
    """Time cuBLASLt's epilogues in turns with what they stand in for."""
    clock, names = cache(Clock), [" ".join(x) for x in _WAYS]
    for name in ENDS:
        contest = result.contest(name, "kernel", "apart, and by an epilogue")
        what = name, sizes, clock, judging, contest
        result.rows(contest, names, partial(_end_rows, *what), needs=10)


def _end_arguments(name, N, C):
    """A function's arrays: N rows of C and of 4 C numbers."""
    draw = np.random.default_rng(7).normal(size=1 << 16).astype(np.float32)
    slim, wide, aux, up, down, bias = (
        to_device(np.resize(draw, shape))
        for shape in (
            (1, N, C), (1, N, 4 * C), (1, N, 4 * C), (4 * C, C), (C, 4 * C),
            (4 * C,),
        )
    )  # fmt: skip
    return {
        "cublas_gelu_forward": (wide, aux, slim, up, bias),
        "cublas_gelu_backward": (wide, bias, slim, down, aux),
        "cublas_weight_backward": (up, bias, wide, slim, False),
    }[name]


def _end_rows(name, sizes, clock, judging, contest):
    """The rows of a function by name, and which epilogues win."""
    if no_cublas():
        raise RuntimeError(no_cublas())
    N, C = sizes.B * sizes.T, sizes.C
    arrays = _end_arguments(name, N, C)
    floats = max(cublas.cublas_scratch(), matmul_scratch(N, 4 * C))
    run = partial(getattr(cublas, name), *arrays, work=empty(floats))
    runs, left, found = {}, {}, {}
    for p, way in _WAYS:
        one = partial(run, tf32=p == "tf32", fused=way == "fused")
        for x in arrays[:2]:  # both are written, whole
            x.copy_to_device(np.full(x.shape, np.nan, np.float32))
        one()
        left[way] = [to_host(x).copy() for x in arrays[:2]]
        runs[f"{p} {way}"] = one
        if judging and way == "fused" and _far(left):
            found[f"{p} fused"] = {"unmeasured": "wrong: not what apart is"}
            del runs[f"{p} fused"]
    times = in_turns(clock(), runs, budget=0.5)
    best = {k: median(x) for k, x in times.items()}
    contest["wins"] = [
        p for p in ("fp32", "tf32")
        if best.get(f"{p} fused", math.inf) < best[f"{p} apart"]
    ]  # fmt: skip
    return found | {k: {"seconds": x} for k, x in times.items()}


def _far(left):
    """Whether what both ways have left is further apart than FAR."""
    return not all(
        np.linalg.norm(x - y) <= FAR * np.linalg.norm(x)
        for x, y in zip(left["apart"], left["fused"], strict=True)
    )


# everything, in order
SMALL = GPT2Config(64, 251, 2, 2, 128)
PRECISIONS = ("bf16", "fp32", "tf32")


def measure(path, seconds=450, rehearse=False, resume=False):
    """Ask a GPU everything, most important first; a dict, and a file.

    path: of the JSON. seconds: how long. rehearse: at sizes of nothing, and
    nothing is judged, and nothing is late. resume: go on where a process
    has ended. Raises RuntimeError where there is no GPU to ask, and
    SystemExit where it is lost.

    Derived in chapter A.17.
    """
    if no_times():
        raise RuntimeError(no_times())
    command = "make gpu" + " (rehearsed)" * rehearse
    facts = {"command": command} | facts_of(SETTINGS)
    patience = None if rehearse else 60
    result = Result(path, seconds, facts, resume, patience)
    precisions = PRECISIONS[: 2 if no_cublas() else 3]
    sizes = TINY if rehearse else GPT2_124M
    ask_right(result, {"small": (SMALL, 2, 1, 33)}, precisions)
    ask_halves(result, sizes, judging=not rehearse)
    settings, (cfg, B, T) = SETTINGS, CONFIGS["124m-16x1024"]
    B = step_batch(cfg, B, T)
    if rehearse:
        settings = SETTINGS._replace(
            precisions=("bf16",), against=("torch",), steps=2, patience=600.0
        )
        cfg, B, T = SMALL, 2, 33
    ask_steps(result, "step", (cfg, B, T), settings)
    if not rehearse:
        large = {f"124M, {B} x {T}": (cfg, 1, B, T)}
        ask_right(result, large, precisions)
    ask_ends(result, sizes, judging=not rehearse)
    ask_kernels(result, sizes, judging=not rehearse)
    return result.found


def main(argv=None):
    """Measure, as `make gpu` asks; argv: options, see --help.

    Derived in chapter A.17.
    """
    parser = argparse.ArgumentParser(prog="make gpu")
    parser.add_argument("--json", default="book/results/6-measured.json")
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    measure(args.json, args.seconds, args.rehearse, args.resume)


if __name__ == "__main__":
    main()
