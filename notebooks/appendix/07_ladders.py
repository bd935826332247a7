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
# *Reading time: 40 minutes. You need: [Part 3](../3_gpu/01_threads.ipynb).*

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
# The chapters climbed a ladder for each layer, version by version. Here all
# ladders hang in one table, `LADDERS`. A row says what a contest needs to
# know about a layer: how to draw its arguments, which of them it writes,
# what PyTorch calls the same operation, and how many bytes and operations
# the work takes at least. The rest follows from names: the layer's
# function, its tuple of versions and its reference bear the layer's name.
#
# The least bytes are those of the arguments: each array that is read or
# written once, each that is read and written twice. A table of vectors, as
# the encoder's, counts only the rows that the batch asks for.

# %% imports of the ladders tags=["export"] module="bench.ladders"
import functools
import importlib.util
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

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
    def Vp(self):
        return -(-self.V // 128) * 128


GPT2_124M = Sizes(16, 1024, 768, 12, 50257, 12)
COUNTED = Sizes(1, 32, 64, 1, 253, 1)  # what the simulator counts
LONG_ROWS = Sizes(1, 4, 64, 1, 4301, 1)  # and of logits
TINY = Sizes(2, 5, 32, 2, 61, 1)  # for tests


# %% draw arguments tags=["exporti"] module="bench.ladders"
class _Draw:
    """Random arguments; what a layer must write is NaN before."""

    def __init__(self, seed):
        self._random = np.random.default_rng(seed)

    def floats(self, *shape, scale=1.0):
        x = self._random.standard_normal(shape, np.float32)
        return x if scale == 1 else x * np.float32(scale)

    def tokens(self, below, *shape):
        return self._random.integers(0, below, shape, np.int32)

    def nothing(self, *shape):
        return np.full(shape, np.nan, np.float32)


# %% one ladder tags=["export"] module="bench.ladders"
class Ladder(NamedTuple):
    """A layer whose versions are compared.

    module: of llmnb.cuda and llmnb.reference. layer: the function's name in
    both. arguments: a function of Sizes and a draw that returns the
    arguments as a dict, in order. writes, changes: names of those that are
    only written, and read and written. torch: a function of the module
    torch and the arguments that returns what to run; its tuple of results
    is in the order of writes and then changes, and may end early; None
    where PyTorch has no such operation. flops: a function of Sizes, or None
    where the bytes are what takes the time. moved: a function of the
    arguments, the least bytes; None for each array once or twice. work: a
    function of the module of llmnb.cuda, Sizes and a version, the floats of
    scratch memory. reference: in place of the function of that name.
    checked: at most how many rows of the batch are compared with the
    reference. tolerance: of that, relative to the largest element of a
    result. named: the tuple of versions, where it does not bear the layer's
    name. library: returns the calls of NVIDIA's library, by name, which are
    timed where it starts. counted: the sizes that the simulator counts at,
    large enough for the kernels that large sizes get.
    """

    module: str
    layer: str
    arguments: object
    writes: tuple = ()
    changes: tuple = ()
    torch: object = None
    flops: object = None
    moved: object = None
    work: object = None
    reference: object = None
    checked: int = 16
    tolerance: float = 5e-5
    named: str = ""
    library: object = None
    counted: Sizes = COUNTED

    def _found(self, package, name):
        return getattr(importlib.import_module(f"llmnb.{package}"), name)

    @property
    def versions(self):
        """The functions of the versions, in order; the last is the layer's."""
        name, rungs = self.named or self.layer.upper(), ()
        plainer = f"llmnb.bench.rungs_{self.module}"
        if importlib.util.find_spec(plainer):
            rungs = getattr(importlib.import_module(plainer), name, ())
        return (*rungs, self._found("cuda", self.layer))

    def function(self, version):
        """The layer in a version."""
        return self.versions[version - 1]

    def scratch(self, sizes, version):
        """How many floats of scratch memory a version wants, or 0."""
        if self.work is None:
            return 0
        return self.work(importlib.import_module("llmnb.cuda"), sizes)

    def draw(self, sizes, seed=0):
        """The arguments as a dict of NumPy arrays and numbers."""
        return self.arguments(sizes, _Draw(seed))

    def expected(self, arguments):
        """What the layer should leave, by name, from float64."""
        wide = {
            k: v.astype(np.float64) if is_float(v) else v
            for k, v in arguments.items()
        }
        compute = self.reference or self._found("reference", self.layer)
        compute(*wide.values())
        return {name: wide[name] for name in self.writes + self.changes}

    def least_bytes(self, arguments):
        """Bytes that must be moved whatever the version."""
        if self.moved:
            return int(self.moved(SimpleNamespace(**arguments)))
        arrays = {k: v for k, v in arguments.items() if hasattr(v, "nbytes")}
        return sum(
            v.nbytes * (2 if k in self.changes else 1)
            for k, v in arrays.items()
            if getattr(v, "ndim", 0)
        )


def version_name(function):
    """The name of a version's function, which may be a functools.partial."""
    return getattr(function, "func", function).__name__.strip("_")


def is_float(x):
    """Whether x is an array of floats."""
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


# %% [markdown]
# What follows is long but plain: for each layer its arguments, and what a
# user of PyTorch would call. Gradients by PyTorch come from its own
# backward operations where these have a name, so that no forward pass is
# timed with them.


# %% the encoder's row tags=["exporti"] module="bench.ladders"
def _encoder_forward(s, draw):
    return {
        "out": draw.nothing(s.B, s.T, s.C),
        "inp": draw.tokens(s.V, s.B, s.T),
        "wte": draw.floats(s.Vp, s.C),
        "wpe": draw.floats(s.T, s.C),
    }


def _encoder_backward(s, draw):
    return {
        "dwte": draw.floats(s.Vp, s.C),
        "dwpe": draw.floats(s.T, s.C),
        "dout": draw.floats(s.B, s.T, s.C),
        "inp": draw.tokens(s.V, s.B, s.T),
    }


def _torch_encoder(torch, a):
    from torch.nn import functional as F

    return lambda: (F.embedding(a.inp, a.wte) + a.wpe,)


def _torch_encoder_back(torch, a):
    inp, back = a.inp.long(), torch.ops.aten.embedding_dense_backward
    Vp = len(a.dwte)
    return lambda: (back(a.dout, inp, Vp, -1, False), a.dout.sum(0))


def _rows(a):
    """Bytes of the rows of a table that a batch asks for."""
    width = getattr(a, "wte", getattr(a, "dwte", None)).shape[1]
    return 4 * width * len(np.unique(a.inp))


# %% LayerNorm's row tags=["exporti"] module="bench.ladders"
def _layernorm_forward(s, draw):
    return {
        "out": draw.nothing(s.B, s.T, s.C),
        "mean": draw.nothing(s.B, s.T),
        "rstd": draw.nothing(s.B, s.T),
        "inp": draw.floats(s.B, s.T, s.C),
        "weight": draw.floats(s.C),
        "bias": draw.floats(s.C),
    }


def _layernorm_backward(s, draw):
    inp = draw.floats(s.B, s.T, s.C)
    return {
        "dinp": draw.floats(s.B, s.T, s.C),
        "dweight": draw.floats(s.C),
        "dbias": draw.floats(s.C),
        "dout": draw.floats(s.B, s.T, s.C),
        "inp": inp,
        "weight": draw.floats(s.C),
        "mean": inp.mean(-1),
        "rstd": 1 / np.sqrt(inp.var(-1) + np.float32(1e-5)),
    }


def _torch_layernorm(torch, a):
    layer, C = torch.native_layer_norm, a.weight.shape
    return lambda: layer(a.inp, C, a.weight, a.bias, 1e-5)


def _torch_layernorm_back(torch, a):
    back, bias = torch.ops.aten.native_layer_norm_backward, a.dbias
    fixed = a.inp, [len(bias)], a.mean[..., None], a.rstd[..., None]
    return lambda: back(a.dout, *fixed, a.weight, bias, [True] * 3)


# %% the product's row tags=["exporti"] module="bench.ladders"
def _matmul_forward(s, draw):
    return {
        "out": draw.nothing(s.B, s.T, 4 * s.C),
        "inp": draw.floats(s.B, s.T, s.C),
        "weight": draw.floats(4 * s.C, s.C, scale=0.02),
        "bias": draw.floats(4 * s.C),
    }


def _matmul_backward(s, draw):
    return {
        "dinp": draw.floats(s.B, s.T, s.C),
        "dweight": draw.floats(4 * s.C, s.C),
        "dbias": draw.floats(4 * s.C),
        "dout": draw.floats(s.B, s.T, 4 * s.C),
        "inp": draw.floats(s.B, s.T, s.C),
        "weight": draw.floats(4 * s.C, s.C, scale=0.02),
    }


def _library(name):
    """cuBLASLt's product, without and with TF32."""
    from llmnb.cuda import cublas

    multiply = getattr(cublas, name)
    work = empty(cublas.cublas_scratch())
    return {
        "cuBLASLt": functools.partial(multiply, work=work),
        "cuBLASLt, TF32": functools.partial(multiply, work=work, tf32=True),
    }


def _torch_matmul(torch, a):
    from torch.nn import functional as F

    return lambda: (F.linear(a.inp, a.weight, a.bias),)


def _torch_matmul_back(torch, a):
    inp, dout = a.inp.flatten(0, 1), a.dout.flatten(0, 1)
    return lambda: (
        (dout @ a.weight).view_as(a.inp),
        dout.T @ inp,
        dout.sum(0),
    )


# %% attention's row tags=["exporti"] module="bench.ladders"
def _attention_forward(s, draw):
    return {
        "out": draw.nothing(s.B, s.T, s.C),
        "lse": draw.nothing(s.B, s.NH, s.T),
        "inp": draw.floats(s.B, s.T, 3 * s.C),
    }


def _attention_backward(s, draw):
    from llmnb.cpu.attention import attention_forward as fast
    from llmnb.reference.attention import attention_forward as small

    a = SimpleNamespace(**_attention_forward(s, draw))
    (fast if s.T > 256 else small)(a.out, a.lse, a.inp)
    return {
        "dinp": draw.floats(s.B, s.T, 3 * s.C),
        "dout": draw.floats(s.B, s.T, s.C),
        "inp": a.inp,
        "out": a.out,
        "lse": a.lse,
    }


def _attend(torch, inp, NH):
    """PyTorch's attention on one array of queries, keys and values."""
    from torch.nn import functional as F

    B, T, C = inp.shape[0], inp.shape[1], inp.shape[2] // 3
    q, k, v = inp.view(B, T, 3, NH, C // NH).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C)


def _torch_attention(torch, a):
    return lambda: (_attend(torch, a.inp, a.lse.shape[1]),)


def _torch_attention_back(torch, a):
    inp = a.inp.detach().requires_grad_()
    out, grad = _attend(torch, inp, a.lse.shape[1]), torch.autograd.grad
    return lambda: grad(out, inp, a.dout, retain_graph=True)


# %% GELU's row and the residual's tags=["exporti"] module="bench.ladders"
def _gelu_forward(s, draw):
    shape = s.B, s.T, 4 * s.C
    return {"out": draw.nothing(*shape), "inp": draw.floats(*shape)}


def _gelu_backward(s, draw):
    shape = s.B, s.T, 4 * s.C
    return {name: draw.floats(*shape) for name in ("dinp", "dout", "inp")}


def _torch_gelu(torch, a):
    from torch.nn import functional as F

    return lambda: (F.gelu(a.inp, approximate="tanh"),)


def _torch_gelu_back(torch, a):
    back, how = torch.ops.aten.gelu_backward, {"approximate": "tanh"}
    return lambda: (back(a.dout, a.inp, **how),)


def _residual_forward(s, draw):
    shape = s.B, s.T, s.C
    first = {"out": draw.nothing(*shape)}
    return first | {x: draw.floats(*shape) for x in ("inp1", "inp2")}


def _residual_backward(s, draw):
    names = "dinp1", "dinp2", "dout"
    return {x: draw.floats(s.B, s.T, s.C) for x in names}


def _torch_residual(torch, a):
    return lambda: (torch.add(a.inp1, a.inp2),)


def _torch_residual_back(torch, a):
    return lambda: (a.dinp1.add_(a.dout), a.dinp2.add_(a.dout))


# %% logits tags=["exporti"] module="bench.ladders"
def _logits(s, draw):
    """Logits; the padding is NaN, for nobody may read it."""
    x = draw.floats(s.B, s.T, s.Vp)
    x[..., s.V :] = np.nan
    return x


def _loss_forward(s, draw):
    return {
        "losses": draw.nothing(s.B, s.T),
        "lse": draw.nothing(s.B, s.T),
        "logits": _logits(s, draw),
        "targets": draw.tokens(s.V, s.B, s.T),
        "V": s.V,
    }


def _loss_backward(s, draw):
    logits = _logits(s, draw)
    x = logits[..., : s.V]
    top = x.max(-1)
    lse = top + np.log(np.exp(x - top[..., None]).sum(-1))
    return {
        "dlogits": draw.nothing(s.B, s.T, s.Vp),
        "dlosses": draw.floats(s.B, s.T, scale=1 / (s.B * s.T)),
        "logits": logits,
        "lse": lse,
        "targets": draw.tokens(s.V, s.B, s.T),
        "V": s.V,
    }


# %% losses in PyTorch tags=["exporti"] module="bench.ladders"
def _torch_losses(torch, a, logits):
    from torch.nn import functional as F

    rows, targets = logits.flatten(0, 1), a.targets.long().flatten()
    losses = F.cross_entropy(rows, targets, reduction="none")
    return losses.view(a.targets.shape)


def _torch_loss(torch, a):
    return lambda: (_torch_losses(torch, a, a.logits),)


def _torch_loss_back(torch, a):
    logits, grad = a.logits.detach().requires_grad_(), torch.autograd.grad
    losses = _torch_losses(torch, a, logits)
    return lambda: grad(losses, logits, a.dlosses, retain_graph=True)


# %% AdamW's row tags=["exporti"] module="bench.ladders"
_SETTINGS = AdamW(1e-4, step=3)


def _adamw(s, draw):
    """As many parameters as L blocks and the tables have, nearly."""
    from llmnb.cuda.adamw import adamw_settings

    size = (s.Vp + s.T + 12 * s.L * s.C) * s.C
    arrays = {x: draw.floats(size) for x in ("params", "grads", "m", "v")}
    arrays["v"] **= 2
    return arrays | {"settings": adamw_settings(_SETTINGS)}


def _adamw_as_written(params, grads, m, v, settings):
    """The reference of adamw_apply, which reads its settings from memory."""
    from llmnb.reference.adamw import adamw_update

    adamw_update(params, grads, m, v, _SETTINGS)


def _torch_adamw(torch, a):
    weights = torch.nn.Parameter(a.params)
    weights.grad = a.grads
    lr, *betas, eps, decay, _ = _SETTINGS
    rules = {"betas": betas, "eps": eps, "weight_decay": decay}
    optimizer = torch.optim.AdamW([weights], lr, fused=True, **rules)

    def run():
        optimizer.step()
        return ()

    return run


# %% all ladders tags=["export"] module="bench.ladders"
LADDERS = (
    Ladder("encoder", "encoder_forward", _encoder_forward, ("out",),
           torch=_torch_encoder,
           moved=lambda a: a.out.nbytes + a.wpe.nbytes + a.inp.nbytes
           + _rows(a)),
    Ladder("encoder", "encoder_backward", _encoder_backward,
           changes=("dwte", "dwpe"), torch=_torch_encoder_back,
           moved=lambda a: a.dout.nbytes + 2 * a.dwpe.nbytes + a.inp.nbytes
           + 2 * _rows(a)),
    Ladder("layernorm", "layernorm_forward", _layernorm_forward,
           ("out", "mean", "rstd"), torch=_torch_layernorm),
    Ladder("layernorm", "layernorm_backward", _layernorm_backward,
           changes=("dinp", "dweight", "dbias"), torch=_torch_layernorm_back,
           work=lambda m, s: m.layernorm_scratch(s.B * s.T, s.C)),
    Ladder("matmul", "matmul_forward", _matmul_forward, ("out",),
           torch=_torch_matmul, flops=lambda s: 8 * s.B * s.T * s.C**2,
           library=lambda: _library("cublas_forward")),
    Ladder("matmul", "matmul_backward", _matmul_backward,
           changes=("dinp", "dweight", "dbias"), torch=_torch_matmul_back,
           flops=lambda s: 16 * s.B * s.T * s.C**2,
           work=lambda m, s: m.matmul_scratch(s.B * s.T, 4 * s.C),
           library=lambda: _library("cublas_backward")),
    Ladder("attention", "attention_forward", _attention_forward,
           ("out", "lse"), torch=_torch_attention, checked=2,
           flops=lambda s: 2 * s.B * s.T * (s.T + 1) * s.C),
    Ladder("attention", "attention_backward", _attention_backward,
           changes=("dinp",), torch=_torch_attention_back, checked=2,
           flops=lambda s: 5 * s.B * s.T * (s.T + 1) * s.C,
           work=lambda m, s: m.attention_scratch(s.B, s.T, s.NH)),
    Ladder("gelu", "gelu_forward", _gelu_forward, ("out",),
           torch=_torch_gelu),
    Ladder("gelu", "gelu_backward", _gelu_backward, changes=("dinp",),
           torch=_torch_gelu_back),
    Ladder("residual", "residual_forward", _residual_forward, ("out",),
           torch=_torch_residual),
    Ladder("residual", "residual_backward", _residual_backward,
           changes=("dinp1", "dinp2"), torch=_torch_residual_back),
    Ladder("crossentropy", "crossentropy_softmax_forward", _loss_forward,
           ("losses", "lse"), torch=_torch_loss, checked=1, counted=LONG_ROWS),
    Ladder("crossentropy", "crossentropy_softmax_backward", _loss_backward,
           ("dlogits",), torch=_torch_loss_back, checked=1, counted=LONG_ROWS),
    Ladder("adamw", "adamw_apply", _adamw, changes=("params", "m", "v"),
           torch=_torch_adamw, reference=_adamw_as_written),
)  # fmt: skip


def ladder_named(name):
    """The Ladder of a layer; raises ValueError where there is none."""
    found = [x for x in LADDERS if x.layer == name]
    if not found:
        known = ", ".join(x.layer for x in LADDERS)
        raise ValueError(f"no layer {name!r}: choose from {known}")
    return found[0]


# %% [markdown]
# ## The contest
#
# A version must be right before it is timed: it gets fresh random
# arguments, its outputs hold NaN, and what it leaves is compared with the
# reference in float64. Where the reference would take minutes, it is given
# fewer rows of the batch. Then all versions of a layer take turns, and with
# them PyTorch's operation, on the same arrays on the same GPU.
#
# Without a GPU the contest goes as far as it can. The simulator runs every
# version at a small size, compares it, and counts its requests and the
# sectors they move. The compiler says what each kernel would be on an A100
# and on an H100. The time is left out, and the row says why: no number
# stands in for it.

# %% imports of the contest tags=["export"] module="bench.contest"
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


# %% run a version tags=["exporti"] module="bench.contest"
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


# %% is it right tags=["exporti"] module="bench.contest"
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


# %% what the simulator sees tags=["export"] module="bench.contest"
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


# %% what the compiler says tags=["export"] module="bench.contest"
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
    """
    kinds = dict.fromkeys((kernel, kinds) for kernel, _, _, kinds in launches)
    return [
        {"name": kernel.__name__.lstrip("_")}
        | {k: _compiled(kernel, types, cc) for k, cc in GENERATIONS.items()}
        for kernel, types in kinds
    ]


# %% what is timed tags=["exporti"] module="bench.contest"
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


# %% one layer tags=["exporti"] module="bench.contest"
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


# %% the contest tags=["export"] module="bench.contest"
def contest(layers=(), sizes=GPT2_124M, counted=None, bar=iter):
    """Compare the versions of layers; a dict ready for JSON.

    layers: names in `LADDERS`, or none for all. sizes: of what is timed,
    where there is a GPU. counted: of what is simulated; None for the
    ladders' own. bar: takes the
    ladders and gives them back, such as tqdm. Raises ValueError for a name
    that is not there.
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


# %% medians and shares tags=["export"] module="bench.contest"
def speeds(result):
    """What follows from the times of a contest, for tables and figures.

    Yields dicts: layer, version (a number, or a peer's name), seconds (the
    median), low, high, and rate and share: bytes a second of what a copy
    reaches, or FLOP/s of the peak, whichever the layer counts. Rows
    without a time are left out.
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


# %% the contest in words tags=["export"] module="bench.contest"
def contest_report(result):
    """The result of `contest` as a text of lines to print."""
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


# %% the ladders drawn tags=["export"] module="bench.contest"
def ladders_figure(result):
    """The share of its limit that each version reaches, a panel a layer.

    A matplotlib figure. result: of `contest`, measured on a GPU. Raises
    ValueError when nothing in it was timed.
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


# %% [markdown]
# Here is one ladder, as far as it goes without a clock. On a machine with a
# GPU `llmnb bench --backend cuda --kernels` adds the times of all of them,
# with PyTorch beside; the [results page](../../book/results.md) shows what has
# been measured, and says what has not.

# %% one ladder, counted
from llmnb.book.verify import verdict
from llmnb.bench.contest import count
from llmnb.bench.ladders import TINY, ladder_named

ladder = ladder_named("layernorm_forward")
for number in range(1, 1 + len(ladder.versions)):
    seen, _ = count(ladder, number, TINY)
    moved = 32 * seen["sectors"] / seen["least_bytes"]
    print(f"{number}: {moved:.2f} times the least bytes moved")
    verdict(f"version {number}", "wrong" not in seen, "is right")

# %% [markdown]

# %% [markdown]
# ## Take away
#
# - A version must be right before it is timed, and one that is wrong gets no
#   time.
# - The least work is that of the arguments: each array read or written once.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.7")
