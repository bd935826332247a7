# Written by `make export` from notebooks/appendix/07_ladders.py: edit that file.

"""Every version of every GPU kernel: its arguments, its rival, its least work."""

__all__ = [
    "COUNTED",
    "GPT2_124M",
    "LADDERS",
    "LONG_ROWS",
    "Ladder",
    "Sizes",
    "TINY",
    "is_float",
    "ladder_named",
    "version_name",
]


# imports of the ladders
import functools
import importlib.util
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from llmnb.gpu.launch import empty
from llmnb.reference.adamw import AdamW


# sizes
class Sizes(NamedTuple):
    """What a layer's arguments are drawn for: the book's letters.

    Derived in chapter A.7.
    """

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


# draw arguments
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


# one ladder
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

    Derived in chapter A.7.
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
    """The name of a version's function, which may be a functools.partial.

    Derived in chapter A.7.
    """
    return getattr(function, "func", function).__name__.strip("_")


def is_float(x):
    """Whether x is an array of floats.

    Derived in chapter A.7.
    """
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


# the encoder's row
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


# LayerNorm's row
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


# the product's row
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


# attention's row
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


# GELU's row and the residual's
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


# logits
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


# losses in PyTorch
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


# AdamW's row
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


# all ladders
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
    """The Ladder of a layer; raises ValueError where there is none.

    Derived in chapter A.7.
    """
    found = [x for x in LADDERS if x.layer == name]
    if not found:
        known = ", ".join(x.layer for x in LADDERS)
        raise ValueError(f"no layer {name!r}: choose from {known}")
    return found[0]
