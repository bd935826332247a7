# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.lora: "Small matrices that learn beside frozen weights."
# ---

# %% [markdown]
# # LoRA: two thin matrices beside a frozen one
#
# > Fine-tuning moves a weight along few directions; two thin matrices hold
# > them, and only these have gradients and averages.
#
# *Reading time: 25 minutes. You need: the linear layer ([chapter
# 1.7](../1_by_hand/07_matmul.ipynb)), AdamW ([chapter
# 1.12](../1_by_hand/12_adamw.ipynb)) and fine-tuning ([chapter
# 4.18](../4_practice/18_finetuning.ipynb)).*

# %% [markdown]
# ## Where we are
#
# A published model fits into your machine's memory, and training it does not:
# to every weight belong a gradient and AdamW's two averages, so it takes four
# times as much. LoRA, *low-rank adaptation*, leaves the weights as they are
# and trains small matrices beside them. At the end of this chapter you can
#
# - say why few directions may be enough to fine-tune a weight;
# - derive the gradients of the two matrices, and say which of them is zero at
#   the first step, and why that is no mistake;
# - count what is left of gradients and averages;
# - merge what was learnt into the weights, or keep it in a small file.
#
# ## Setup

# %% setup
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

import llmnb
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict
from llmnb.text import tokenizer
from llmnb.train.feed import loaders, prepare
from llmnb.train.loop import evaluate
from llmnb.train.options import TrainConfig

folder = Path(tempfile.mkdtemp())

# %% imports tags=["export"]
import json
import math
from typing import NamedTuple

import numpy as np

from llmnb.backend import choose
from llmnb.checks import FLOATS, check_fit
from llmnb.formats.checkpoint import first_not_finite
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.model.architectures import architecture_record
from llmnb.model.gpt2 import GPT2
from llmnb.model.random import Generator
from llmnb.model.tensors import full_shape, tensor_table
from llmnb.shapes import check_number

# %% [markdown]
# ## Why it may work
#
# We take the setting of chapter 4.18 again: a model learns from Python's
# library, and then from the prose of Part 1. The model is a small Llama, and
# every run is this loop:


# %% a run
def run(model, config, text, rate, steps):
    """Train; returns the loss on text of the same kind that it did not see."""
    batches, unseen = loaders(config, text)
    for step in range(steps):
        how = {"learning_rate": rate * min(1, (step + 1) / 20)}
        how |= {"weight_decay": 0.0, "beta2": 0.95, "step": step + 1}
        model.step(*batches.next_batch(), max_norm=1.0, **how)
    return evaluate(model, unseen, 10)


def prose(path):
    """What a chapter says between its cells, without headings and tables."""
    lines = path.read_text("utf-8").splitlines()
    lines = [x[2:] for x in lines if x[:2] == "# "]
    return "\n".join(x for x in lines if x[:1].isalpha() and ":" not in x[:12])


# %% two texts, cut by one tokenizer
python = TrainConfig(
    corpus=("../../tests/data/library.jsonl.gz",), limit=500_000,
    vocab_size=512, eval_batches=10,
)  # fmt: skip
code = prepare(python)
tokenizer.save(code.encoding, folder / "own.tiktoken")
pages = sorted(Path("../1_by_hand").glob("*.py"))
prose_of_part_1 = "\n".join(map(prose, pages))[:60_000]
(folder / "book.txt").write_text(prose_of_part_1, "utf-8")
small = replace(
    python, corpus=(str(folder / "book.txt"),), limit=0,
    tokenizer=str(folder / "own.tiktoken"),
)  # fmt: skip
book = prepare(small)

# %% a model that knows Python
shape = llmnb.LlamaConfig(
    max_seq_len=128, vocab_size=code.encoding.n_vocab, num_layers=2,
    num_heads=4, channels=64, num_kv_heads=2, tied=True,
)  # fmt: skip
size = python.batch_size, python.seq_len
trained = llmnb.GPT2(shape, *size)
run(trained, python, code, rate=3e-3, steps=300)


def begin(made, **how):
    """Another model with the same weights."""
    model = made(shape, *size, seed=None, **how)
    for name, x in trained.params.items():
        model.params[name][...] = x
    return model


whole = begin(llmnb.GPT2)
before = evaluate(whole, loaders(small, book)[1], 10)
after = run(whole, small, book, rate=1e-3, steps=120)
verdict("the book", after < before - 0.5, "is being learnt")

# %% [markdown]
# What has this done to a weight? Take the difference of the matrices after and
# before. Every matrix is a sum of terms $\sigma\, u v^\top$, a number times a column
# times a row, in which all $u$ have length 1 and stand at right angles to one
# another, and all $v$ too. The numbers, largest first, are its *singular values*:
# they say how much of the change lies along one direction, a second one, and so
# on. Their squares sum to the square of the whole change. We ask how many
# directions hold half of it, and how many would in a matrix of the same shape
# drawn at random. Here it is, in all four matrices of the first block, fewer than
# three quarters as many:


# %% directions of a change
def half(matrix):
    """How many singular values hold half of a matrix's square."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return int(np.searchsorted(squares.cumsum(), squares.sum() / 2)) + 1


rng = np.random.default_rng(4)
for name in "qkvw", "attprojw", "fcw", "fcprojw":
    change = whole.params[name][0] - trained.params[name][0]
    random = half(rng.normal(size=change.shape))
    verdict(name, 4 * half(change) < 3 * random, "changes along fewer")

# %% [markdown]
# Half of the change lies along fewer directions than chance would use. That is
# no proof that the others are useless, but it suggests to allow only few, and
# to see how far one gets.
#
# ## By hand
#
# Let $W$ map three numbers to two, and let the thin matrices be $D$, which
# goes *down* to a single number, and $U$, which goes *up* again:
#
# $$ W = \begin{pmatrix} 1 & 0 & 2 \\ 0 & 1 & 1 \end{pmatrix} , \quad
#    D = \begin{pmatrix} 1 & -1 & 1 \end{pmatrix} , \quad
#    U = \begin{pmatrix} 3 \\ -1 \end{pmatrix} . $$
#
# Their product has the shape of $W$:
#
# $$ UD = \begin{pmatrix} 3 & -3 & 3 \\ -1 & 1 & -1 \end{pmatrix} . $$
#
# Every row of $UD$ is a multiple of $D$, every column one of $U$: a matrix of
# *rank* 1. For $x = (1, 2, 3)$ the frozen road gives $Wx = (7, 5)$. The small
# road goes down to $Dx = 2$ and up to $2U = (6, -2)$, and the sum is
# $(13, 3)$, as from the matrix $W + UD$. That matrix was never made.

# %% two roads by hand
W = np.array([[1.0, 0, 2], [0, 1, 1]])
D, U = np.array([[1.0, -1, 1]]), np.array([[3.0], [-1]])
x = np.array([1.0, 2, 3])
print(W @ x, D @ x, W @ x + U @ (D @ x), (W + U @ D) @ x)

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `weight` | (OC, C) | $W$, which stays as it is |
# | `down` | (r, C) | $D$, to $r$ numbers a token |
# | `up` | (OC, r) | $U$, and up again |
# | `mid` | (B, T, r) | $m$, what is between them |
#
# The paper calls them $A$ and $B$; here $B$ is the number of sequences.
#
# ## Forward
#
# $$ m = s\, D x , \qquad y = W x + U m , \qquad s = \frac{\alpha}{r} .
#    \tag{5.10.1} $$
#
# The **rank** $r$ is the number of directions that are allowed. The scale $s$
# has $r$ below the line, so that with another rank, and so another number of
# terms in $UD$, the learning rate need not be searched anew; $\alpha$ is a
# number that one sets once, such as 16.
#
# $U$ begins at zero. Then $y = Wx$ to the bit: before its first step the model
# is the one that was published. $D$ begins at random, with standard deviation
# $1/\sqrt C$, so that the numbers of $Dx$ have the size of those of $x$.


# %% both roads in NumPy
def two_roads(x, W, D, U, s):
    m = s * x @ D.T
    return x @ W.T + m @ U.T, m


# %% [markdown]
# ## Backward, derived
#
# $W$ is frozen: nobody asks for $dW$, which saves the most expensive of the
# linear layer's three products ([chapter 1.7](../1_by_hand/07_matmul.ipynb))
# and the room for its result. What is left follows from (5.10.1), which is two
# linear layers in a row and a scale. The second one, $Um$, gives by (1.7.2) and
# (1.7.3), for the rows $n$ of all tokens,
#
# $$ dU = \sum_n dy_n\, m_n^\top , \qquad dm = U^\top dy . \tag{5.10.2} $$
#
# The first one is $m = s D x$. Its factor $s$ belongs to the product, so it
# multiplies the gradient once on its way:
#
# $$ \begin{aligned}
# dD &= s \sum_n dm_n\, x_n^\top , \\
# dx &= W^\top dy + s\, D^\top dm .
# \end{aligned} \tag{5.10.3} $$
#
# Both gradients are *small products*: their results are thin. With $m$ and
# $dm$ put in, they read
#
# $$ \begin{aligned}
# dU &= s \sum_n dy_n\, (D x_n)^\top , \\
# dD &= s\, U^\top \sum_n dy_n\, x_n^\top .
# \end{aligned} \tag{5.10.4} $$
#
# The sum in $dD$ is the gradient $dW$ of the frozen weight. LoRA sees it
# through $U$ and through $D$ only, and never makes it.
#
# **The first step.** Where $U = 0$, (5.10.4) says $dD = 0$, but $dU$ is not
# zero, since $D$ is not. So the first step moves $U$ alone, and from the second
# on both move. Had both begun at zero, both gradients would be zero for ever;
# had both begun at random, the model would not be the published one.
#
# **What to save.** $x$ is there, as the linear layer needs it too in other
# models; $m$ has $r$ numbers a token.


# %% the gradients in NumPy
def two_roads_backward(dy, x, m, W, D, U, s):
    dm = dy @ U
    dU, dD = dy.T @ m, s * dm.T @ x  # (5.10.2), (5.10.3)
    return dy @ W + s * dm @ D, dD, dU


# %% [markdown]
# ## Proof
#
# As in Part 1: $\mathcal L = \sum g \cdot y$ with a random $g$, central
# differences in float64 with step $10^{-5}$, tolerance $10^{-8}$.

# %% against central differences
x, g = rng.normal(size=(6, 5)), rng.normal(size=(6, 4))
W = rng.normal(size=(4, 5))
D, U, s = rng.normal(size=(2, 5)), rng.normal(size=(4, 2)), 1.5


def loss():
    return (g * two_roads(x, W, D, U, s)[0]).sum()


_, m = two_roads(x, W, D, U, s)
found = two_roads_backward(g, x, m, W, D, U, s)
for name, got, of in zip(("dx", "dD", "dU"), found, (x, D, U), strict=True):
    compare(name, got, numerical_gradient(loss, of), tol=1e-8)

# %% [markdown]
# A likely mistake is the scale: it stands in $m$ already, and who multiplies
# $dU$ by it again has it twice. With $s = 1$ nobody would notice.

# %% a scale too many, caught
wrong = s * found[2]
try:
    compare("dU, s twice", wrong, numerical_gradient(loss, U), tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% the first step
nothing = np.zeros_like(U)
_, dD, dU = two_roads_backward(g, x, m, W, D, nothing, s)
verdict("U = 0", not dD.any() and dU.any(), "dD is 0, dU is not")

# %% [markdown]
# ## In the package
#
# The small road is two calls of the linear layer that each backend has, so
# there is no new kernel. Both add to what the frozen road has left: forward
# `out` is its own residual, backward `dinp` is added to.


# %% an adapter tags=["export"]
class Adapter(NamedTuple):
    """A frozen weight, and the two matrices that learn beside it.

    weight: (OC, C). down: (r, C) and up: (OC, r), with their gradients.
    mid, dmid: (B, T, r), what is between the two, and its gradient. The
    layer computes with weight + scale * up @ down.
    """

    weight: object
    down: object
    up: object
    ddown: object
    dup: object
    mid: object
    dmid: object
    scale: float


# %% the small road tags=["export"]
def adapter_forward(ops, out, inp, x, **how):
    """Add what an Adapter x makes of inp to out; x.mid is overwritten.

    ops: the layers of a backend of the host. out: (B, T, OC). inp: (B, T,
    C). how: what else its products take.
    """
    ops.matmul_forward(x.mid, inp, x.down, None, **how)
    np.multiply(x.mid, x.scale, out=x.mid)
    ops.matmul_forward(out, x.mid, x.up, None, residual=out, **how)


def adapter_backward(ops, dinp, dout, inp, x, add=False, **how):
    """Add the small road's gradient to dinp; overwrite those of x.

    x: an Adapter, as adapter_forward left it. add: whether to add to
    x.ddown and x.dup instead. The other arguments: as there.
    """
    how["add_dweight"] = add
    arrays = x.dmid, x.dup, None, dout, x.mid, x.up
    ops.matmul_backward(*arrays, add_dinp=False, **how)
    np.multiply(x.dmid, x.scale, out=x.dmid)
    ops.matmul_backward(dinp, x.ddown, None, x.dmid, inp, x.down, **how)


# %% [markdown]
# Equal to the functions by hand, in float64:

# %% the small road, and by hand
rows, outs, r = (1, 6, 5), (1, 6, 4), 2
arrays = [np.zeros(x) for x in ((r, 5), (4, r), (1, 6, r), (1, 6, r))]
small_road = Adapter(W, D, U, *arrays, scale=s)
out, dinp = (x @ W.T).reshape(outs), (g @ W).reshape(rows)
adapter_forward(llmnb.cpu, out, x.reshape(rows), small_road)
arrays = dinp, g.reshape(outs), x.reshape(rows), small_road
adapter_backward(llmnb.cpu, *arrays)
compare("out", out[0], two_roads(x, W, D, U, s)[0], tol=1e-12)
compare("dinp", dinp[0], found[0], tol=1e-12)
compare("ddown", small_road.ddown, found[1], tol=1e-12)
compare("dup", small_road.dup, found[2], tol=1e-12)

# %% [markdown]
# ## A frozen model
#
# The model of [chapter 1.17](../1_by_hand/17_model.ipynb) calls its layers
# through `ops`, and every product of every architecture is `matmul_forward` or
# `matmul_backward`. So one wrapper around them freezes a model: it passes on no
# gradient of a weight, and where the weight is an `Adapter` it takes the small
# road too. Norms have a gradient of a few numbers, which is written where
# nobody reads it.


# %% the layers, frozen tags=["exporti"]
class _Frozen:
    """A backend's layers for a model whose own weights do not learn.

    Where a weight is an Adapter, its small road is taken too.
    """

    def __init__(self, ops):
        self._ops = ops

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def matmul_forward(self, out, inp, weight, bias, residual=None, **how):
        """As the backend's."""
        x = weight if isinstance(weight, Adapter) else None
        arrays = out, inp, x.weight if x else weight, bias
        self._ops.matmul_forward(*arrays, residual=residual, **how)
        if x:
            adapter_forward(self._ops, out, inp, x, **how)

    def matmul_backward(
        self, dinp, dweight, dbias, dout, inp, weight,
        add_dinp=True, add_dweight=True, **how,
    ):  # fmt: skip
        """As the backend's, without the gradients of weight and bias."""
        x = weight if isinstance(weight, Adapter) else None
        arrays = dinp, None, None, dout, inp, x.weight if x else weight
        self._ops.matmul_backward(*arrays, add_dinp=add_dinp, **how)
        if x:
            how["add"] = add_dweight
            adapter_backward(self._ops, dinp, dout, inp, x, **how)

    def encoder_backward(self, *arrays):
        """Nothing: the tables of tokens and positions do not learn."""

    def embedding_backward(self, *arrays):
        """Nothing: the table of tokens does not learn."""


class _NoGradient:
    """What stands where a frozen weight's gradient would; it has no size."""

    def __getitem__(self, i):
        return self

    def fill(self, value):
        """Nothing."""


# %% [markdown]
# Which weights get a small road? The paper chose those of queries and values.
# We take all four matrices of a block, which costs little more and learns more
# for the same number of parameters, as later measurements found. The packed
# matrix of queries, keys and values is one matrix here, with one $D$.

# %% which weights tags=["export"]
TARGETS = "qkvw", "attprojw", "fcw", "fcprojw"


def adapter_shapes(cfg, rank=8, targets=TARGETS):
    """Shapes of the matrices that learn, by name.

    cfg: a model's configuration. rank: the least side of each, 1 to the
    least side of a target. targets: names of matrices that every block has.
    NAME.down is (L, rank, C), NAME.up (L, OC, rank). Raises ValueError.
    """
    matrices = {
        x.name: x.shape
        for x in tensor_table(cfg)
        if x.stacked and len(x.shape) == 2
    }
    targets = tuple(targets or ())
    if not targets:
        raise ValueError("LoRA: targets must name at least one weight")
    for name in targets:
        choose("LoRA: a name in targets", name, matrices)
    most = min(min(matrices[name]) for name in targets)
    if type(rank) is not int or not 1 <= rank <= most:
        raise ValueError(f"LoRA: rank must be 1 to {most}, got {rank!r}")
    found = {}
    for name in targets:
        OC, C = matrices[name]
        found[f"{name}.down"] = cfg.num_layers, rank, C
        found[f"{name}.up"] = cfg.num_layers, OC, rank
    return found


# %% [markdown]
# The arena of [chapter 1.16](../1_by_hand/16_memory.ipynb) now has gradients and
# averages in the shapes of the thin matrices. Where the passes ask for the
# gradient of a frozen matrix, an object without size stands in its place.


# %% the model's memory tags=["exporti", "fold-input"]
class _Adapted(GPT2):
    """Its arena: gradients and averages are those of the adapters."""

    def _allocate(self, layout):
        dtype, _ = layout["params"]
        B, T, r = self.batch_size, self.seq_len, self.rank
        layout |= dict.fromkeys(("grads", "m", "v"), (dtype, self._shapes))
        kept = dict.fromkeys(self.targets, (self.cfg.num_layers, B, T, r))
        rows = [x for x in tensor_table(self.cfg) if not x.decays]
        vectors = {x.name: full_shape(x, self.cfg) for x in rows}
        layout |= {
            "adapters": (dtype, self._shapes),
            "mids": (dtype, kept | {"dmid": (B, T, r)}),
            "unused": (dtype, vectors),
        }
        super()._allocate(layout)
        grads, unused = self.memory["grads"], self.memory["unused"]
        for x in tensor_table(self.cfg):
            grads[x.name] = unused.get(x.name, _NoGradient())

    def _layer(self, i):
        w, acts, dw = super()._layer(i)
        for name in self.targets:
            w[name] = self._adapter(name, i, w[name])
        return w, acts, dw

    def _adapter(self, name, i, weight):
        keys, mids = (f"{name}.down", f"{name}.up"), self.memory["mids"]
        learns = [self.memory["adapters"][x][i] for x in keys]
        grads = [self.memory["grads"][x][i] for x in keys]
        middle = mids[name][i], mids["dmid"]
        return Adapter(weight, *learns, *grads, *middle, self.scale)


# %% [markdown]
# The rest is a `GPT2` with another update. (`llmnb.GPT2` is the model of every
# architecture.) Making one draws $D$ and leaves $U$ at zero; `_apply` runs AdamW on
# the adapters, with weight decay where it would apply to the matrix beside them.


# %% the model tags=["export"]
HOSTS = "cpu", "reference"  # backends whose arrays are the host's


class LoRA(_Adapted):
    """A frozen model, of any architecture, with small matrices that learn.

    cfg, batch_size, seq_len, backend, precision, seed: as for GPT2, on the
    host. rank, targets: see `adapter_shapes`; alpha: alpha / rank is the
    scale of what they add. adapters and grads map the names of these
    matrices to arrays; params holds the weights, which no step changes. The
    other methods are GPT2's: from_checkpoint takes rank, alpha and targets
    too, and a name in decay means the matrices beside that weight. Raises
    ValueError for a value out of range.
    """

    backends = HOSTS

    def __init__(
        self, cfg, batch_size, seq_len, backend="cpu", precision="fp32",
        seed=42, *, rank=8, alpha=16.0, targets=TARGETS,
    ):  # fmt: skip
        check_number("LoRA: alpha", alpha, "above 0")
        # one road for a name that stands twice
        self.rank, self.targets = rank, tuple(dict.fromkeys(targets or ()))
        self._shapes = adapter_shapes(cfg, rank, self.targets)
        self.scale = float(alpha) / rank
        super().__init__(cfg, batch_size, seq_len, backend, precision, seed)
        self.ops = _Frozen(self.ops)
        self.adapters = self.memory["adapters"]
        self.begin(42 if seed is None else seed)

    def begin(self, seed=42):
        """Draw new adapters, which change nothing yet: up is zero."""
        generator = Generator(seed)
        for name, x in self.adapters.items():
            x.fill(0)
            if name.endswith(".down"):
                generator.normal_(x, std=1 / math.sqrt(x.shape[-1]))
        self._forget()

    def _forget(self):
        """Let the averages be those of no step."""
        self.memory.flat("m").fill(0)
        self.memory.flat("v").fill(0)

    def _apply(self, decay):
        """AdamW on the adapters alone."""
        update = getattr(self.ops, self._machine.update)
        groups = [self.memory[x] for x in ("adapters", "grads", "m", "v")]
        for name in self._shapes:
            target = name.partition(".")[0]
            row = self._settings[decay is not None and target not in decay]
            update(*[x[name].reshape(-1) for x in groups], row)


# %% [markdown]
# ## Count it
#
# A weight of $OC \times C$ gets $r (OC + C)$ numbers that learn. For SmolLM2
# (30 blocks, 576 channels, 3 kv heads) and $r = 8$:

# %% numbers that learn
from llmnb.model.tensors import parameter_count

smollm2 = llmnb.PRESETS["smollm2-135m"]
learns = sum(math.prod(x) for x in adapter_shapes(smollm2, 8).values())
all_of_it = parameter_count(smollm2)
print(f"{learns:,} of {all_of_it:,}: {learns / all_of_it:.2%}")
for name, count in ("whole", all_of_it), ("LoRA", learns):
    total = 4 * (all_of_it + 3 * count) / 1e6
    print(f"{name}: {total:,.0f} MB of weights, gradients and averages")

# %% [markdown]
# A step takes fewer operations too, though not by as much: of the three
# products of a weight, forward, input's gradient and weight's gradient, the
# third is gone. What stays are the activations, for the gradient still runs
# through every layer.
#
# `tests/record_lora.py` runs both ways to fine-tune SmolLM2 on sequences of 256
# tokens, each in a process of its own, and asks the system for its peak:

# %% measured
measured = json.loads(Path("../../book/lora.json").read_text("utf-8"))
for kind in "whole", "lora":
    row = measured[kind]
    print(f"{kind:6} peak {row['peak'] / 1e9:.2f} GB, "
          f"the arena {sum(row['sizes'].values()) / 1e9:.2f}")  # fmt: skip

# %% where the memory goes tags=["hide-input"]
kinds = ("params", "grads", "m", "v", "acts", "logits")
colours = "grey", "orange", "blue", "blue", "green", "purple"
fig, ax = plt.subplots(figsize=(7.5, 2.2), dpi=100)
for at, kind in enumerate(("lora", "whole")):
    left, sizes = 0.0, measured[kind]["sizes"]
    for name, colour in zip(kinds, colours, strict=True):
        width = sizes[name] / 1e9
        bar = {"color": PALETTE[colour], "edgecolor": "white"}
        ax.barh(at, width, left=left, height=0.6, **bar)
        if width > 0.1:
            ax.text(left + width / 2, at, name, color="white", ha="center",
                    va="center", size=9)  # fmt: skip
        left += width
    ax.plot([measured[kind]["peak"] / 1e9] * 2, [at - 0.35, at + 0.35],
            color=PALETTE["ink"], lw=2)  # fmt: skip
ax.set_yticks([0, 1], ["LoRA", "whole"])
ax.set_xlabel("GB")
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.10.1. Memory for fine-tuning SmolLM2 on 256 tokens at a time; the
# last piece is the logits. With LoRA, gradients and averages are too thin to be
# seen; the weights are most of what is left. The lines mark the peaks of the
# processes, which hold Python, the tokenizer and compiled code besides.*
#
# ## A run
#
# The same steps as at the beginning, now with thin matrices of three ranks. The
# rate is higher: with $U$ at zero, little moves at first. Of each model we take two
# losses: on text of the book that it did not see, and on Python, which it knew before.

# %% three ranks
losses = {}
for rank in 1, 4, 16:
    model = begin(LoRA, rank=rank, alpha=2 * rank)
    learnt = run(model, small, book, rate=5e-3, steps=120)
    losses[rank] = learnt, evaluate(model, loaders(python, code)[1], 10)
kept = evaluate(whole, loaders(python, code)[1], 10)
known = evaluate(trained, loaders(python, code)[1], 10)
one, four, sixteen = (losses[rank] for rank in (1, 4, 16))
verdict("rank 1", one[0] < before - 0.2, "learns some of the book")
verdict("more rank", sixteen[0] < four[0] < one[0], "learns more")
verdict("the whole", after < sixteen[0], "learns most")
verdict("more rank", one[1] < four[1] < sixteen[1], "forgets more Python")
verdict("the whole", sixteen[1] < kept, "forgets most")

# %% learnt and forgotten tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6, 3.4), dpi=100)
points = {"before": (before, known), "whole": (after, kept)}
points = {**points, **{f"rank {rank}": x for rank, x in losses.items()}}
for name, (book_loss, python_loss) in points.items():
    colour = PALETTE["blue" if name[:4] == "rank" else "orange"]
    ax.plot(book_loss, python_loss, "o", color=colour)
    ax.annotate(name, (book_loss, python_loss), (6, 4), color=colour,
                textcoords="offset points")  # fmt: skip
ax.set(xlabel="loss on the book, nats a token", ylabel="loss on Python")
ax.invert_xaxis()
ax.margins(0.15)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.10.2. What is learnt (to the right) and what is forgotten (upwards).
# All runs lie nearly along one line: the rank chooses how far along it a model goes.
# A frozen weight with few directions learns less, and forgets less.*
#
# This model is small, and its new text is another language, so its token table
# would have to move, which no small road does: the whole wins by far. For a
# large model that learns a manner and not a language the gap is much smaller,
# as the papers under *Further reading* measured.
#
# ## Keep, or merge
#
# There are two ways to use what was learnt. The first is to keep the thin
# matrices in a file of their own. One published model and a dozen such files
# take little more than the model, and a file is taken up in no time. It says
# which rank, scale and targets it was trained with, and for what shape of
# model; which weights of that shape, only you know.

# %% on the disk tags=["export"]
ADAPTERS = "llmnb adapters 1"


def _record(model):
    return {
        "rank": model.rank,
        "alpha": model.scale * model.rank,
        "targets": list(model.targets),
        "model": architecture_record(model.cfg),
    }


def save_adapters(path, model):
    """Write a LoRA's adapters as a safetensors file of their own."""
    note = {"format": ADAPTERS, "record": json.dumps(_record(model))}
    write_tensors(path, model.adapters, note)


def adapter_settings(path):
    """What a file of adapters was trained with: rank, alpha and targets.

    Raises ValueError, naming the file, when it is no such file.
    """
    record = _read_record(path, TensorFile(path))
    del record["model"]
    return record


def _read_record(path, file):
    note = file.metadata
    try:
        if note.get("format") != ADAPTERS:
            raise ValueError(f"its format must be {ADAPTERS!r}")
        found = json.loads(note["record"])
        return {x: found[x] for x in ("rank", "alpha", "targets", "model")}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: holds no adapters: {error}") from None


def load_adapters(path, model):
    """Read adapters into a LoRA that they fit; its averages become zero.

    Raises ValueError, naming the file, when they were trained on a model of
    another shape, with another rank, alpha or targets, or are damaged.
    """
    file = TensorFile(path)
    record, want = _read_record(path, file), _record(model)
    # as JSON has them
    for name, x in json.loads(json.dumps(want)).items():
        if record[name] != x:
            raise ValueError(
                f"{path}: {name} is {record[name]!r:.200}, the model's is "
                f"{x!r:.200}"
            )
    found = {}
    for name, x in model.adapters.items():
        if name not in file.names:
            raise ValueError(f"{path}: has no {name}")
        own = file[name]
        check_fit(f"{path}: {name}", own, x.shape, FLOATS)
        with np.errstate(over="ignore"):
            found[name] = own.astype(x.dtype)
    if wrong := first_not_finite(found):
        raise ValueError(f"{path}: {wrong}")
    for name, x in model.adapters.items():
        x[...] = found[name]
    model._forget()


# %% kept beside the model, and taken up again
tokens, targets = loaders(small, book)[1].next_batch()
told = model.forward(tokens, targets)
save_adapters(folder / "book.safetensors", model)
settings = adapter_settings(folder / "book.safetensors")
print(settings)
other = begin(LoRA, **settings)
load_adapters(folder / "book.safetensors", other)
verdict("the loss", other.forward(tokens, targets) == told, "the same bits")

# %% a rank that does not fit
try:
    load_adapters(folder / "book.safetensors", begin(LoRA, rank=4))
    verdict("rank 4", False, "is refused")
except ValueError as error:
    print(str(error).replace(str(folder), "FOLDER"))

# %% [markdown]
# The second way is to add $s\,UD$ to $W$ once. The result is an ordinary model,
# as fast as before, and written for other programs as any other.


# %% merge tags=["export"]
def merge(model):
    """Add a LoRA's adapters to its weights, and begin with up = 0 again.

    The model computes what it did, up to rounding, and its params are those
    of an ordinary model: save_checkpoint, write_folder and Decoder.of take
    them.
    """
    for name in model.targets:
        down, up = (model.adapters[f"{name}.{x}"] for x in ("down", "up"))
        for weight, d, u in zip(model.params[name], down, up, strict=True):
            weight += model.scale * u @ d
            u.fill(0)  # at once: stopped half-way it can go on
    model._forget()


# %% merged, and like any other
from llmnb.formats.checkpoint import write_folder

merge(model)
write_folder(folder / "merged", model.cfg, model.params)
again = llmnb.load(folder / "merged", *size)
compare("the loss", again.forward(tokens, targets), told, tol=1e-5)
# %% [markdown]
# With the real model, if its package is installed, it is the same few lines:
#
#     from llmnb.model.lora import LoRA, merge
#     model = LoRA.from_checkpoint(path, 1, 256, rank=8)
#     model.step(tokens, targets, learning_rate=2e-4, step=1)   # and so on
#     merge(model)
#     write_folder("mine", model.cfg, model.params)
#
# where `path` is what `llmnb fetch smollm2` prints.
#
# ## What it does not do
#
# Token tables, norms and biases stay as they are, so a new token cannot be
# learnt. The frozen weights are float32; QLoRA packs them in four bits. It runs
# on the host's backends, not on a GPU. Between `merge` and its opposite there
# is rounding: subtracting $s\,UD$ again does not give the same bits.
#
# ## Take away
#
# - A fine-tuned weight differs from the published one along few directions.
# - $W + s\,UD$ learns through two small products; $dW$ is never made.
# - $U$ begins at zero: the model begins as it was, and the first step moves $U$
#   alone.
# - Gradients and averages shrink to a few hundredths; activations do not.
# - The rank trades what is learnt against what is forgotten.
#
# ## Design note
#
# The wrapper around `ops` could have been a new kind of `Part`
# ([chapter 1.13](../1_by_hand/13_block.ipynb)), one for each of the parts that
# multiply. But a part that is wrapped must know all places where the inner one
# uses a weight, for every architecture. All of them meet in the two functions
# of the linear layer, and there it is said once.
#
# ## Exercises
#
# **1** (★). How many numbers learn in SmolLM2 with rank 8 if only the matrix of
# queries, keys and values gets a small road?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# It has $576 + 2 \cdot 192 = 960$ rows of 576 numbers, so $30 \cdot 8 \cdot
# (960 + 576) = 368{,}640$.
# :::

# %% exercise 1, checked tags=["hide-cell"]
shapes = adapter_shapes(smollm2, 8, ("qkvw",))
verdict("learns", sum(map(math.prod, shapes.values())) == 368_640, "368,640")

# %% [markdown]
# **2** (★★). What does the first step of AdamW do to $U$ if all of its gradients
# are tiny? Does the scale $s$ matter to it?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# AdamW's first step has the size of the rate, whatever that of the gradient
# ([chapter 1.12](../1_by_hand/12_adamw.ipynb)). $s$ multiplies all gradients of
# $U$ and drops out; but it still multiplies what the step changes in $y$. So
# doubling $\alpha$ does nearly what doubling the rate does.
# :::

# %% exercise 2, checked tags=["hide-cell"]
ups = []
for alpha in 1.0, 50.0:
    model = begin(LoRA, rank=2, alpha=alpha)
    how = {"learning_rate": 1e-3, "eps": 1e-12, "weight_decay": 0.0}
    model.step(tokens, targets, step=1, **how)
    ups.append(model.adapters["qkvw.up"].copy())
compare("the step", ups[0], ups[1], tol=1e-5)

# %% [markdown]
# ## Further reading
#
# - Hu et al. (2021), [LoRA](https://arxiv.org/abs/2106.09685): section 4 for the
#   two matrices and the scale, section 7 for how few directions there are.
# - Dettmers et al. (2023), [QLoRA](https://arxiv.org/abs/2305.14314): small roads
#   at every linear layer, beside weights of four bits.
# - Biderman et al. (2024),
#   [LoRA Learns Less and Forgets Less](https://arxiv.org/abs/2405.09673): figure
#   5.10.2 on large models.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.10")
