# Written by `make export` from notebooks/appendix/07_ladders.py: edit that file.

"""Every version of every GPU kernel: its arguments, its rival, its least work."""

__all__ = [
    "COUNTED", "GPT2_124M", "LADDERS", "LONG_ROWS", "Ladder", "Sizes", "TINY",
    "declared_shape", "drawn", "is_float", "ladder_named", "needed",
]


# imports of the ladders
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


# arguments from a layer's shapes
def needed(layer):
    """What a layer declares of each array without which it cannot run.

    Derived in chapter A.7.
    """
    parameters = inspect.signature(layer).parameters
    return [
        a for a in layer.arguments.arrays
        if parameters[a.name].default is inspect.Parameter.empty
    ]  # fmt: skip


def declared_shape(argument, letters, any="B T C"):
    """The shape of one of them, a list; any: what stands for "...".

    Derived in chapter A.7.
    """
    shape = [letters[x] for x in any.split()] if argument.open else []
    for factor, size in argument.sizes:
        shape.append(factor * letters[re.match(r"\w*", size)[0]])
    return shape


def drawn(layer, letters, makers, any="B T C"):
    """Arguments that fit a layer: a dict, in the layer's order.

    letters: sizes by their letters, and numbers by their names. makers:
    three functions of a shape, which make tokens, what a result holds
    before, and other numbers. any: what stands for "...".

    Derived in chapter A.7.
    """
    tokens, before, numbers = makers
    given = {}
    for a in needed(layer):
        make = tokens if a.limit else before if a.written else numbers
        given[a.name] = make(declared_shape(a, letters, any))
    return given | {x: letters[x] for x in layer.arguments.below}


# one ladder
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

    Derived in chapter A.7.
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
    """Whether x is an array of floats.

    Derived in chapter A.7.
    """
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


# arguments that can be
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


# PyTorch's operations
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


# NVIDIA's library
def _library(multiply):
    """cuBLASLt's product, without and with TF32."""
    work = empty(cuda.cublas_scratch())
    return {
        "cuBLASLt": functools.partial(multiply, work=work),
        "cuBLASLt, TF32": functools.partial(multiply, work=work, tf32=True),
    }


# all ladders
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
    """The Ladder of a layer; raises ValueError where there is none.

    Derived in chapter A.7.
    """
    found = {x.layer: x for x in LADDERS}
    if name not in found:
        known = ", ".join(found)
        raise ValueError(f"no layer {name!r}: choose from {known}")
    return found[name]
