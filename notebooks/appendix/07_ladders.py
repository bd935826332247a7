# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       bench.ladders: "Every version of every GPU kernel: its arguments, its rival, its least work."
#       bench.contest: "The versions of a GPU kernel against each other: right, counted, timed."
# ---

# %% [markdown]
# # Ladders: every version of every GPU kernel
#
# > One table of all GPU layers and their versions, from which they are proved,
# > counted, compiled and, where there is a GPU, timed beside PyTorch.
#
# *Reading time: 28 minutes. You need: [Part 3](../3_gpu/01_threads.ipynb).*

# %% [markdown]
# ## Where we are
#
# The chapters of Part 3 climb a ladder for each layer, from the version that
# teaches to the one that is used. At the end of this chapter you can
#
# - add a version of a kernel, and have it proved and counted by one line;
# - say how much of the least work a version does.

# %% [markdown]
# ## Every version of every layer
#
# All ladders hang in one table, `LADDERS`, which the benchmark reads and the tests
# read. A row says only what cannot be known from elsewhere: what PyTorch calls
# the same operation, how many operations and bytes the work takes at least,
# and what must hold between arguments. The rest follows from names, for the
# layer's function, its tuple of versions and its reference bear one name, and
# from the layer's own line of shapes
# ([chapter A.9](09_checks.ipynb)): which arguments it takes, and which of them
# it writes.


# %% imports of the ladders tags=["export"] module="bench.ladders"
import functools
import importlib.util
import inspect
import math
import re
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from llmnb import cuda, reference
from llmnb.gpu.launch import empty
from llmnb.reference.adamw import AdamW


# %% sizes tags=["export"] module="bench.ladders"
class Sizes(NamedTuple):
    """What a layer's arguments are drawn for: the book's letters."""

    B: int
    T: int
    C: int
    NH: int
    V: int
    L: int

    @property
    def letters(self):
        """Each size by the letters in which layers declare their shapes.

        N is as many parameters as L blocks and the tables have, nearly.
        """
        B, T, C, _, V, L = self
        found = self._asdict() | {"Vp": -(-V // 128) * 128, "": 1}
        found["N"] = (found["Vp"] + T + 12 * L * C) * C
        return found | {"OC": 4 * C, "QKV": 3 * C}


GPT2_124M = Sizes(16, 1024, 768, 12, 50257, 12)
COUNTED = Sizes(1, 32, 64, 1, 253, 1)  # what the simulator counts
LONG_ROWS = Sizes(1, 4, 64, 1, 4301, 1)  # and of logits
TINY = Sizes(2, 5, 32, 2, 61, 1)  # for tests


# %% arguments from a layer's shapes tags=["export"] module="bench.ladders"
def needed(layer):
    """What a layer declares of each array without which it cannot run."""
    parameters = inspect.signature(layer).parameters
    return [
        a for a in layer.arguments.arrays
        if parameters[a.name].default is inspect.Parameter.empty
    ]  # fmt: skip


def declared_shape(argument, letters, any="B T C"):
    """The shape of one of them, a list; any: what stands for "..."."""
    shape = [letters[x] for x in any.split()] if argument.open else []
    for factor, size in argument.sizes:
        shape.append(factor * letters[re.match(r"\w*", size)[0]])
    return shape


def drawn(layer, letters, makers, any="B T C"):
    """Arguments that fit a layer: a dict, in the layer's order.

    letters: sizes by their letters, and numbers by their names. makers:
    three functions of a shape, which make tokens, what a result holds
    before, and other numbers. any: what stands for "...".
    """
    tokens, before, numbers = makers
    given = {}
    for a in needed(layer):
        make = tokens if a.limit else before if a.written else numbers
        given[a.name] = make(declared_shape(a, letters, any))
    return given | {x: letters[x] for x in layer.arguments.below}


# %% arguments of LayerNorm
made = drawn(cuda.layernorm_forward, TINY.letters, [np.empty] * 3)
for name, x in made.items():
    print(f"{name:<7} {x.shape}")


# %% one ladder tags=["export"] module="bench.ladders"
_NAN = np.float32(np.nan)


class Ladder(NamedTuple):
    """A layer whose versions are compared.

    layer: the function's name in llmnb.cuda and llmnb.reference. torch: a
    function of the module torch and the arguments that returns what to run;
    its tuple of results is in the order of the layer's, and may end early.
    changes: whether the layer reads what it writes, so that both count.
    settle: a function of drawn arguments and of their module, NumPy or
    torch, that makes them ones that can be. any: of `drawn`. flops: a
    function of Sizes, or None where the bytes are what takes the time.
    table: the argument that is a table of which a batch asks for some rows.
    work: a function of Sizes, the floats of scratch memory. reference: in
    place of the function of that name. library: returns the calls of
    NVIDIA's library, by name, which are timed where it starts. checked: at
    most how many rows of the batch are compared with the reference.
    counted: the sizes that the simulator counts at, large enough for the
    kernels that large sizes get.
    """

    layer: str
    torch: object
    changes: bool = False
    settle: object = lambda a, module: None
    any: str = "B T C"
    flops: object = None
    table: str = ""
    work: object = None
    reference: object = None
    library: object = None
    checked: int = 16
    counted: Sizes = COUNTED

    @property
    def declared(self):
        """The layer's function in llmnb.cuda, with its line of shapes."""
        return getattr(cuda, self.layer)

    @property
    def versions(self):
        """The functions of the versions, in order; the last is the layer's."""
        home = self.declared.__module__.replace("cuda.", "bench.rungs_")
        plainer = importlib.util.find_spec(home) and import_module(home)
        return (*getattr(plainer, self.layer.upper(), ()), self.declared)

    @property
    def names(self):
        """The names of the versions."""
        return [x.__name__.strip("_") for x in self.versions]

    def function(self, version):
        """The layer in a version."""
        return self.versions[version - 1]

    @property
    def results(self):
        """The names of the arrays that the layer writes, in its order."""
        return [a.name for a in needed(self.declared) if a.written]

    def draw(self, sizes, seed=0):
        """The arguments as a dict of NumPy arrays and numbers.

        What is only written is NaN before, and tokens are below V.
        """
        random = np.random.default_rng(seed)
        numbers = functools.partial(random.standard_normal, dtype=np.float32)
        makers = (
            lambda shape: random.integers(0, sizes.V, shape, np.int32),
            numbers if self.changes else lambda x: np.full(x, _NAN),
            numbers,
        )
        return self.fill(sizes, makers, np)

    def fill(self, sizes, makers, module):
        """Arguments from makers, see `drawn`, of NumPy or of torch."""
        made = drawn(self.declared, sizes.letters, makers, self.any)
        a = SimpleNamespace(**made)
        self.settle(a, module)
        return vars(a)

    def few(self, sizes):
        """Sizes at which the reference does not take minutes."""
        return sizes._replace(B=min(sizes.B, self.checked))

    def expected(self, arguments):
        """What the layer should leave, by name, from float64."""
        wide = {
            k: v.astype(np.float64) if is_float(v) else v
            for k, v in arguments.items()
        }
        compute = self.reference or getattr(reference, self.layer)
        compute(*wide.values())
        return {name: wide[name] for name in self.results}

    def least_bytes(self, arguments):
        """Bytes that must be moved whatever the version."""
        least = 0
        for name, array in arguments.items():
            size = getattr(array, "nbytes", 0)
            if name == self.table:
                asked = {*arguments["inp"].ravel().tolist()}
                size = array[0].nbytes * len(asked)
            twice = self.changes and name in self.results
            least += size * (1 + twice)
        return least


def is_float(x):
    """Whether x is an array of floats."""
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


# %% [markdown]
# The least bytes are those of the arguments: each array that is read or
# written once, each that is read and written twice. A table of vectors, as
# the encoder's, counts only the rows that the batch asks for.
#
# Drawn numbers are not always arguments that can be. A backward pass wants
# what the forward pass of the same input kept, the squares that AdamW carries
# are not negative, and nobody may read the logits of rows that are only
# padding, so these are NaN.


# %% arguments that can be tags=["exporti"] module="bench.ladders"
def _small_weight(a, _):
    a.weight *= np.float32(0.02)


def _after_layernorm(a, _):
    a.mean = a.inp.mean(-1)
    squares = (a.inp - a.mean[..., None]) ** 2
    a.rstd = (squares.mean(-1) + np.float32(1e-5)) ** -0.5


def _after_attention(a, module):
    from llmnb.cpu.attention import attention_forward as fast

    if module is np:
        long = a.inp.shape[1] > 256
        (fast if long else reference.attention_forward)(a.out, a.lse, a.inp)
    else:
        _attended(module, a)


def _attended(torch, a):
    """Attention's output and lse, row by row of the batch."""
    B, T, C = a.out.shape
    NH = a.lse.shape[1]
    later = torch.ones(T, T, dtype=bool, device=a.inp.device).triu(1)
    for b in range(B):
        q, k, v = a.inp[b].view(T, 3, NH, C // NH).permute(1, 2, 0, 3)
        scores = q @ k.mT / math.sqrt(C // NH)
        scores.masked_fill_(later, -math.inf)
        a.lse[b] = scores.logsumexp(-1)
        a.out[b] = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, C)


def _pad(a, _):
    a.logits[..., a.V :] = np.nan


def _after_loss(a, module):
    _pad(a, module)
    x = a.logits[..., : a.V]  # small: exp is never infinite
    a.lse = module.log(module.exp(x).sum(-1))
    a.dlosses /= math.prod(a.dlosses.shape)


_SETTINGS = AdamW(1e-4, step=3)


def _adamw_settled(a, _):
    a.v **= 2
    a.settings = cuda.adamw_settings(_SETTINGS)


def _adamw_as_written(params, grads, m, v, settings):
    """The reference of adamw_apply, which reads its settings from memory."""
    reference.adamw_update(params, grads, m, v, _SETTINGS)


def _classifier_as_written(losses, lse, logits, dlosses, targets, V):
    """The reference of fused_classifier: forward, then backward in place."""
    reference.crossentropy_softmax_forward(losses, lse, logits, targets, V)
    arrays = dlosses, logits, lse, targets
    reference.crossentropy_softmax_backward(logits, *arrays, V)


# %% [markdown]
# What a user of PyTorch would call comes next. Of a backward pass that is the
# gradient of PyTorch's forward pass, which is run once before, so that it is
# not timed with it.


# %% PyTorch's operations tags=["exporti"] module="bench.ladders"
def _rival(forward):
    """What runs a forward pass: a function of torch and the arguments."""
    return lambda torch, a: lambda: (forward(torch, a),)


def _gradient(forward, *names):
    """What runs the backward pass of a forward pass, by arguments' names.

    An argument that the backward pass does not have is one in the shape of
    its gradient.
    """

    def prepare(torch, a):
        inputs = SimpleNamespace(**vars(a))
        for name in names:
            found = getattr(a, name, None)
            found = getattr(a, f"d{name}") if found is None else found
            setattr(inputs, name, found.detach().requires_grad_())
        leaves = [getattr(inputs, name) for name in names]
        out = forward(torch, inputs)
        dout = vars(a).get("dout", vars(a).get("dlosses"))
        how = {"retain_graph": True}
        return lambda: torch.autograd.grad(out, leaves, dout, **how)

    return prepare


def _encoder(torch, a):
    return torch.nn.functional.embedding(a.inp, a.wte) + a.wpe


def _layernorm(torch, a):
    return torch.layer_norm(a.inp, a.weight.shape, a.weight, a.bias)


def _linear(torch, a):
    return torch.nn.functional.linear(a.inp, a.weight, a.bias)


def _attention(torch, a):
    """PyTorch's attention on one array of queries, keys and values."""
    B, T, C = a.inp.shape[0], a.inp.shape[1], a.inp.shape[2] // 3
    NH = a.lse.shape[1]
    q, k, v = a.inp.view(B, T, 3, NH, C // NH).permute(2, 0, 3, 1, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    y = attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C)


def _gelu(torch, a):
    return torch.nn.functional.gelu(a.inp, approximate="tanh")


def _losses(torch, a):
    rows, targets = a.logits.flatten(0, 1), a.targets.long().flatten()
    loss = torch.nn.functional.cross_entropy
    return loss(rows, targets, reduction="none").view(a.targets.shape)


def _losses_and_slopes(torch, a):
    """PyTorch's losses, and the gradient of their weighted sum."""

    def run():
        inputs = SimpleNamespace(**vars(a))
        inputs.logits = a.logits.detach().requires_grad_()
        out = _losses(torch, inputs)
        (slopes,) = torch.autograd.grad(out, [inputs.logits], a.dlosses)
        return out, torch.logsumexp(a.logits, -1), slopes

    return run


def _torch_adamw(torch, a):
    weights = torch.nn.Parameter(a.params)
    weights.grad = a.grads
    lr, *betas, eps, decay, _ = _SETTINGS
    rules = {"betas": betas, "eps": eps, "weight_decay": decay}
    optimizer = torch.optim.AdamW([weights], lr, fused=True, **rules)
    return lambda: optimizer.step() or ()


# %% NVIDIA's library tags=["exporti"] module="bench.ladders"
def _library(multiply):
    """cuBLASLt's product, without and with TF32."""
    work = empty(cuda.cublas_scratch())
    return {
        "cuBLASLt": functools.partial(multiply, work=work),
        "cuBLASLt, TF32": functools.partial(multiply, work=work, tf32=True),
    }


# %% all ladders tags=["export"] module="bench.ladders"
LADDERS = (
    Ladder("encoder_forward", _rival(_encoder), table="wte"),
    Ladder(
        "encoder_backward", _gradient(_encoder, "wte", "wpe"), True,
        table="dwte", work=lambda s: cuda.encoder_scratch(s.B * s.T),
    ),
    Ladder("layernorm_forward", _rival(_layernorm)),
    Ladder(
        "layernorm_backward", _gradient(_layernorm, "inp", "weight", "bias"),
        True, _after_layernorm,
        work=lambda s: cuda.layernorm_scratch(s.B * s.T, s.C),
    ),
    Ladder(
        "matmul_forward", _rival(_linear), settle=_small_weight,
        flops=lambda s: 8 * s.B * s.T * s.C**2,
        library=lambda: _library(cuda.cublas_forward),
    ),
    Ladder(
        "matmul_backward", _gradient(_linear, "inp", "weight", "bias"),
        True, _small_weight, flops=lambda s: 16 * s.B * s.T * s.C**2,
        work=lambda s: cuda.matmul_scratch(s.B * s.T, 4 * s.C),
        library=lambda: _library(cuda.cublas_backward),
    ),
    Ladder(
        "attention_forward", _rival(_attention), checked=2,
        flops=lambda s: 2 * s.B * s.T * (s.T + 1) * s.C,
    ),
    Ladder(
        "attention_backward", _gradient(_attention, "inp"),
        True, _after_attention, checked=2,
        flops=lambda s: 5 * s.B * s.T * (s.T + 1) * s.C,
        work=lambda s: cuda.attention_scratch(s.B, s.T, s.NH),
    ),
    Ladder("gelu_forward", _rival(_gelu), any="B T OC"),
    Ladder("gelu_backward", _gradient(_gelu, "inp"), True, any="B T OC"),
    Ladder(
        "residual_forward", _rival(lambda torch, a: torch.add(a.inp1, a.inp2))
    ),
    Ladder(
        "residual_backward",
        lambda _, a: lambda: (a.dinp1.add_(a.dout), a.dinp2.add_(a.dout)),
        True,
    ),
    Ladder(
        "crossentropy_softmax_forward", _rival(_losses), settle=_pad,
        checked=1, counted=LONG_ROWS,
    ),
    Ladder(
        "crossentropy_softmax_backward", _gradient(_losses, "logits"),
        settle=_after_loss, checked=1, counted=LONG_ROWS,
    ),
    Ladder(
        "fused_classifier", _losses_and_slopes, True, _pad,
        reference=_classifier_as_written, checked=1, counted=LONG_ROWS,
    ),
    Ladder(
        "adamw_apply", _torch_adamw, True, _adamw_settled,
        reference=_adamw_as_written,
    ),
)  # fmt: skip


def ladder_named(name):
    """The Ladder of a layer; raises ValueError where there is none."""
    found = {x.layer: x for x in LADDERS}
    if name not in found:
        known = ", ".join(found)
        raise ValueError(f"no layer {name!r}: choose from {known}")
    return found[name]


# %% [markdown]
# ## The contest
#
# A version must be right before it is timed: it gets fresh random
# arguments, its outputs hold NaN, and what it leaves is compared with the
# reference in float64. It is right if all is finite and off by no more than
# `TOLERANCE`, relative to the largest element of a result, or to 1 if that is
# smaller, and if what it only reads is unchanged. Where the reference would
# take minutes, it is given fewer rows of the batch. Then all versions of a
# layer take turns, and with them PyTorch's operation, on the same arrays on the
# same GPU.
#
# Without a GPU the contest goes as far as it can. The simulator runs every
# version at a small size, compares it, and counts its requests and the
# sectors they move. The compiler says what each kernel would be on an A100
# and on an H100. The time is left out, and the row says why: no number
# stands in for it.

# %% imports of the contest tags=["export"] module="bench.contest"
import functools
import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from llmnb.bench.clock import Clock, limits, no_times
from llmnb.bench.ladders import (
    GPT2_124M,
    LADDERS,
    Sizes,
    declared_shape,
    ladder_named,
    needed,
)
from llmnb.bench.peers import torch_on
from llmnb.bench.race import take_turns
from llmnb.cuda.cublas import no_cublas
from llmnb.gpu.launch import Kernel, empty, simulated, to_device, to_host
from llmnb.gpu.ptx import compile_kernel, no_compiler
from llmnb.gpu.simulator import watch
from llmnb.gpu.toolkit import numba_cuda


# %% run a version tags=["exporti"] module="bench.contest"
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


# %% judge a version tags=["export"] module="bench.contest"
TOLERANCE = 5e-5  # relative to the largest element of a result


def wrong_with(got, want, kept):
    """What is wrong with the arrays that a version leaves; empty if nothing.

    got: what it has left, by name. want: results in float64, or the first
    numbers of them. kept: what must be as it was before. All are NumPy's
    arrays or all are tensors.
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
    """
    sizes = ladder.few(sizes)
    arguments = ladder.draw(sizes, seed)
    there = _placed(arguments, place)
    _ready(ladder, version, sizes, there)()
    got = {k: to_host(x) for k, x in there.items() if np.ndim(x)}
    want, kept = ladder.expected(arguments), _kept(ladder, arguments)
    return wrong_with(got, want, kept)


# %% what the simulator sees tags=["export"] module="bench.contest"
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
    """
    sizes = ladder.few(sizes or ladder.counted)
    with watch() as seen:
        wrong = judge(ladder, version, sizes, simulated, seed=0)
    found = {"sizes": sizes._asdict(), "launches": len(seen.launches)}
    found |= {"least_bytes": ladder.least_bytes(ladder.draw(sizes))}
    found |= {name: int(getattr(seen, name)) for name in SEEN}
    found["moved"] = 32 * found["sectors"] / found["least_bytes"]
    return found | ({"wrong": wrong} if wrong else {}), seen.launches


# %% what the compiler says tags=["export"] module="bench.contest"
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
    """
    kinds = dict.fromkeys((kernel, kinds) for kernel, _, _, kinds in launches)
    return [
        {"name": kernel.__name__.lstrip("_")}
        | {k: _compiled(kernel, types, cc) for k, cc in GENERATIONS.items()}
        for kernel, types in kinds
    ]


# %% in turns on a GPU tags=["export"] module="bench.contest"
def in_turns(clock, runs, budget=2.0):
    """Time each of some functions once a round; see `take_turns`.

    clock: a `Clock`. runs: a dict from name to a function that launches.
    budget: seconds of GPU time to spend, roughly; at least five rounds and
    at most fifty are measured. Returns a dict from name to a list of
    seconds.
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


# %% [markdown]
# A GPU is asked at GPT-2's sizes. Drawing such arguments on the host and judging
# there takes minutes. So the reference sees a few rows, in all results and in
# what must not change; and where PyTorch sees the GPU, it draws the arguments
# there, and the rival computes in float64 what should come out of all rows: it
# is the same function in either precision. A gradient that a layer adds to is
# zero before, for PyTorch adds to nothing.


# %% arguments on the GPU tags=["exporti"] module="bench.contest"
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


# %% what should come out tags=["exporti"] module="bench.contest"
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


# %% [markdown]
# The sizes are GPT-2's, for a GPU with room for them. A smaller one gets a
# smaller batch, halved until the arrays fit into what is free at that moment,
# and the result says which. We count the arguments: once as they are drawn,
# once to judge and once to time, and six times more where PyTorch computes in
# float64, for wide copies, their gradients and what lies between. That is a
# guess, on the high side as we hope.


# %% what fits tags=["exporti"] module="bench.contest"
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


# %% [markdown]
# Our kernels take PyTorch's memory as it is, and everybody is timed on the same
# arrays. Where it is asked for, the last version that is right is timed once more
# with link-time optimisation, as a row of its own. [Chapter A.6](06_launch.ipynb)
# leaves that out, for reasons read from machine code; here it can be measured.


# %% arrays of both sides tags=["exporti"] module="bench.contest"
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


# %% a version with link-time optimisation tags=["exporti"] module="bench.contest"
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


# %% right, then timed tags=["exporti"] module="bench.contest"
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


# %% the contest tags=["export"] module="bench.contest"
def kernel_contests(layers=(), sizes=GPT2_124M, counted=None, bar=iter):
    """Compare the versions of layers: a list of contests, ready for JSON.

    layers: names in `LADDERS`, or none for all. sizes: of what is timed,
    where there is a GPU. counted: of what is simulated; None for the
    ladders' own. bar: takes the ladders and gives them back, such as tqdm.
    A row holds what `count` and `compiled` say of a version, and seconds or
    why they are unmeasured. Raises ValueError for a name that is not there.
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


# %% [markdown]
# Here is one ladder, as far as it goes without a clock. On a machine with a
# GPU `llmnb bench --backend cuda --kernels` adds the times of all of them,
# with PyTorch beside; the [results page](../../book/results.md) shows what has
# been measured, and says what has not.

# %% one ladder, counted
from llmnb.bench.contest import count
from llmnb.bench.ladders import TINY, ladder_named
from llmnb.book.verify import verdict

ladder = ladder_named("layernorm_forward")
for number in range(1, 1 + len(ladder.versions)):
    seen, _ = count(ladder, number, TINY)
    print(f"{number}: {seen['moved']:.2f} times the least bytes moved")
    verdict(f"version {number}", "wrong" not in seen, "is right")


# %% [markdown]
# ## Take away
#
# - A version must be right before it is timed, and one that is wrong gets no
#   time.
# - The least work is that of the arguments: each array read or written once.

# %% [markdown]
# ## Exercises
#
# **1** (★). How many bytes must the backward pass of GELU move at least, at the
# sizes `TINY`?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# `inp` and `dout` are read, `dinp` is read and written, for it is added to: four
# times an array of 2 · 5 · 128 numbers of 4 bytes, 20,480 bytes.
# :::

# %% exercise 1, checked tags=["hide-cell"]
ladder = ladder_named("gelu_backward")
least = ladder.least_bytes(ladder.draw(TINY))
verdict("GELU backward", least == 4 * (2 * 5 * 128) * 4, "20,480 bytes")

# %% [markdown]
# **2** (★★). A version of LayerNorm forgets the last sequence of the batch, and
# so it is fast. Write it, and see what `judge` says of it.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# It calls the right version with the batch cut short. What is only written is
# drawn as NaN, so what nobody has written is not finite.
# :::


# %% exercise 2, a solution tags=["hide-cell"]
class Forgetful(Ladder):
    def function(self, version):
        right = super().function(version)

        def layer(out, mean, rstd, inp, weight, bias):
            short = (x[:-1] for x in (out, mean, rstd, inp))
            right(*short, weight, bias)

        return layer


# %% exercise 2, checked tags=["hide-cell"]
for kind in (Ladder, Forgetful):
    ladder = kind(*ladder_named("layernorm_forward"))
    said = judge(ladder, len(ladder.versions), TINY, simulated)
    print(f"{kind.__name__}: {said or 'right'}")
verdict("it", said == "out is not finite everywhere", "is found")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.7")
