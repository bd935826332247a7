# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.backend: "What the compiled layers ask of a model's memory, and offer it."
# ---

# %% [markdown]
# # The whole step: the same model on compiled layers
#
# > Another room of layers and one group of scratch memory: the model of Part 1
# > trains as fast as the processor multiplies, and computes the same.
#
# *Reading time: 20 minutes. You need: [chapter 1.17](../1_by_hand/17_model.ipynb)
# and the kernels of this part.*

# %% [markdown]
# ## Where we are
#
# The layers have been compiled, one by one. Now the model calls them. At the end
# of this chapter you can
#
# - say what a backend changes of a model, and what it does not;
# - tell the rounding of float32 from a mistake;
# - say how many operations a second a training step comes to.

# %% [markdown]
# ## Setup

# %% setup
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.model.tensors import parameter_count
from llmnb.timing import fastest, machine

# %% [markdown]
# ## What the compiled layers ask for
#
# Their products pack the matrices into panels ([chapter 2.4](04_matmul.ipynb)),
# and the panels need a place. It is one more group of the arena, so that a step
# still allocates nothing. And they may round the factors of products to
# bfloat16 ([chapter 2.6](06_bfloat16.ipynb)), where the processor has such
# products; where it has not, rounding would gain nothing, and the model
# computes in float32 and says so.
#
# `replays` says that these layers note down all that they do, a launch of a kernel
# or a line of NumPy. So a model asks them once what is to be done, and does the same
# in each step that follows ([chapter A.13](../appendix/13_backend.ipynb)); [chapter
# 2.8](08_time.ipynb) measures what that saves.

# %% imports of the backend tags=["export"]
import warnings

from llmnb import backend
from llmnb.cpu.panels import work_shape


# %% the backend tags=["export"]
class Backend(backend.Backend):
    """The host with compiled layers: scratch for products, and bfloat16."""

    replays = True

    def __init__(self, layers, precision):
        if precision == "bf16" and not layers.has_bf16():
            warnings.warn(
                "GPT2: this processor has no bfloat16 products "
                "(AVX512-BF16); computing in fp32",
                stacklevel=4,
            )
            precision = "fp32"
        super().__init__(layers, precision)

    def groups(self, cfg, batch_size, seq_len):
        """Scratch memory that the products pack their panels into."""
        return {"work": (self.dtype, {"panels": work_shape()})}

    def allocate(self, layout, needed):
        """An Arena; the products take its scratch, and know the precision."""
        memory = super().allocate(layout, needed)
        work = memory["work"]["panels"]
        self.how = {"work": work, "bf16": self.precision == "bf16"}
        return memory


# %% [markdown]
# ## The same numbers
#
# Nothing else is to write: the model asks another room for its layers.

# %% compiled, in float64
cfg = GPT2Config(
    max_seq_len=5, vocab_size=7, num_layers=2, num_heads=2, channels=6
)
rng = np.random.default_rng(12)
model = GPT2(cfg, 2, 5, backend="reference", precision="fp64", seed=1)
for x in model.params.values():
    x[...] = rng.normal(scale=0.5, size=x.shape)
tokens, targets = rng.integers(0, 7, (2, 2, 5))
fast = GPT2(cfg, 2, 5, backend="cpu", precision="fp64")
fast.memory.flat("params")[...] = model.memory.flat("params")
got = fast.forward(tokens, targets)
compare("loss", got, model.forward(tokens, targets), tol=1e-12)
fast.backward()
model.backward()
want = model.memory.flat("grads")
compare("all gradients", fast.memory.flat("grads"), want, tol=1e-10)

# %% [markdown]
# ## In float32, beside PyTorch
#
# How large is the difference for each tensor, and how does it compare with
# what rounding alone does? PyTorch recorded the same step in float32 and in
# float64. The distance between these two is the rounding error of float32. If
# our float32 gradient is about as close to the float64 truth as PyTorch's is,
# rounding explains it.

# %% what PyTorch computed
recorded = np.load(Path("../../tests/data/parity_odd.npz"))
meta = json.loads(str(recorded["meta"]))
case = meta["case"]
print("torch", meta["torch"])
for name, value in case["model"].items():
    print(f"{name:<13}{value:>4}")
batch = recorded["tokens"]
inputs, answers = batch[:, :-1], batch[:, 1:]


# %% a model with PyTorch's weights, and how far apart
sizes = case["batch_size"], case["seq_len"]
model = GPT2(GPT2Config(**case["model"]), *sizes, "cpu", "fp32", seed=None)
for name, x in model.params.items():
    x[...] = recorded[f"initial.{name}"]


def distance(got, key):
    want = recorded[key]
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# %% distance from the float64 gradient
model.forward(inputs, answers)
model.backward()
us, torch = {}, {}
for name, grad in model.grads.items():
    exact = f"grads.fp64.{name}"
    us[name] = distance(grad, exact)
    torch[name] = distance(recorded[f"grads.fp32.{name}"], exact)
verdict("every tensor", max(us.values()) < 5e-6, "within 5e-06 of float64")
close = all(us[name] < 3 * torch[name] for name in us)
verdict("every tensor", close, "less than 3 x PyTorch's")

# %% draw it
fig, ax = plt.subplots(figsize=(7.5, 3.6), dpi=100)
at = np.arange(len(us))
ax.semilogy(
    at, list(torch.values()), "s", color=PALETTE["orange"], label="PyTorch"
)
ax.semilogy(at, list(us.values()), "o", color=PALETTE["blue"], label="llmnb")
ax.set_xticks(at, list(us), rotation=60, ha="right")
ax.set(
    ylim=(1e-8, 1e-5), ylabel="relative distance\nfrom the float64 gradient"
)
ax.grid(axis="y", color=PALETTE["pale"])
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 2.7.1. The float32 gradients of llmnb and of PyTorch, each compared
# with PyTorch's float64 gradient, tensor by tensor. Both are off by a few
# parts in ten million, which is the rounding error of float32. Ours is often
# the larger, by less than a factor of three: our sums take another order.*

# %% [markdown]
# ## In bfloat16
#
# The curve of [chapter 1.18](../1_by_hand/18_training.ipynb) once more: 200 losses
# that PyTorch recorded, of a model that both train from the same seed on the same
# bytes, here in float32 on the compiled layers and then in bfloat16.

# %% the run that PyTorch recorded
recorded = Path("../../tests/data/torch_curve.csv").read_text("utf-8")
lines = recorded.splitlines()
rows = [x.split(",") for x in lines if x[0].isdigit()]
theirs, theirs64 = np.array(rows, float).T[1:]
print(*[x for x in lines if x.startswith(("# torch", "# seed"))], sep="\n")
print(len(theirs), "steps")


# %% our curve
from dataclasses import replace
from itertools import islice

from llmnb.formats.shard import read_shard
from llmnb.text.readers import Readers
from llmnb.train.loop import train
from llmnb.train.options import TrainConfig
from llmnb.train.start import new_model

small = TrainConfig(
    tokenizer="byte", num_layers=2, channels=64, seq_len=64, batch_size=8,
    steps=200, learning_rate=2e-3,
)  # fmt: skip
text = read_shard("../../tests/data/curve_tokens.bin")


def curve(config, steps):
    student = new_model(config, 257)
    batches = Readers(text, config.batch_size, config.seq_len)
    run = islice(train(config, student, batches), steps)
    return np.array([x.loss for x in run])


ours = curve(small, 200)
worst = np.abs(ours - theirs).max()
verdict("200 losses", worst < 1e-4, "within 1e-04 of PyTorch's")
verdict("a rerun", np.array_equal(curve(small, 40), ours[:40]), "equal bits")

# %% [markdown]
# `precision="bf16"` rounds the factors of every product to
# 8 significant bits, and the products of its backward pass likewise. Then
# float32's agreement is out of reach: two correct programs need not round
# the same numbers. PyTorch's autocast also rounds the results of products,
# the logits among them, which we keep in float32. What can be asked is that
# the two stay together, and a yardstick is at hand: how far PyTorch's curve
# under autocast is from its own in float32.
#
# On a CPU with AVX512-BF16 the next cell runs on its instructions. On any
# other, `LLMNB_BF16=emulate` has the same pairs multiplied in float32,
# which is slower than float32 itself but rounds the factors the same.

# %% the curve in bfloat16
import os
from unittest.mock import patch

recorded = Path("../../tests/data/torch_curve_bf16.csv").read_text("utf-8")
rows = [x.split(",") for x in recorded.splitlines() if x[0].isdigit()]
their_half = np.array(rows, float).T[1]
with patch.dict(os.environ, LLMNB_BF16="emulate"):
    half = curve(replace(small, precision="bf16"), 200)


def away(x, y):
    return np.sqrt(np.mean((x - y) ** 2))


apart, yardstick = away(half, their_half), away(theirs, their_half)
worst = np.abs(half - their_half).max()
verdict("200 losses", worst < 3e-3, "in bf16 within 3e-03 of PyTorch's")
verdict("on average", apart < 0.75 * yardstick, "closer than its float32 is")

# %% three distances tags=["nbval-ignore-output"]
print("root mean square of the difference over 200 steps, and the largest:")
for name, x, y in (
    ("ours and PyTorch's, both bf16", half, their_half),
    ("PyTorch's, bf16 and float32", their_half, theirs),
    ("ours, bf16 and float32", half, ours),
):
    print(f"{name:<30}{away(x, y):.1e}  {np.abs(x - y).max():.1e}")

# %% draw the differences
fig, ax = plt.subplots(figsize=(8, 3.2), dpi=100)
difference = 1e3 * (their_half - theirs)
ax.plot(difference, color=PALETTE["orange"], label="PyTorch bf16")
ax.plot(1e3 * (half - theirs), color=PALETTE["blue"], label="llmnb bf16")
ax.axhline(0, color=PALETTE["grey"], lw=1)
ax.set(xlabel="step", ylabel="loss minus float32's, in 1/1000")
ax.legend(frameon=False, ncols=2)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 2.7.2. What bfloat16 changes in the loss, against PyTorch's float32
# run. Both curves rise and fall about zero by a few thousandths at most,
# and largely together.*
#
# They move together because most of the deviation comes from rounding the
# same weights and the same inputs of the products, which both programs do.
# So the second verdict has teeth: a run that forgot to round would be our
# float32 curve, which lies on PyTorch's, as far off as the yardstick. What
# is left between the two comes from what only PyTorch rounds, and from
# sums taken in another order, and like any rounding it is carried on from
# step to step.

# %% [markdown]
# ## Count it
#
# [Chapter 1.4](../1_by_hand/04_gpt2.ipynb) counted $6N + 6LCT$ operations a token. Divide them
# by the time that a step takes, and you have the speed at which the machine
# works, in operations a second. The four products of a block should come near
# the speed of [chapter 2.4](04_matmul.ipynb); all that stands between them, and
# AdamW, adds time and few operations. Here is a model of 3 million parameters.

# %% a step, timed tags=["nbval-ignore-output"]
from llmnb.model.tensors import flops_per_token

cfg = GPT2Config(128, 1024, 4, 4, 256)
model = GPT2(cfg, 4, 128)
tokens = rng.integers(0, 1024, (4, 128))


def step():
    model.forward(tokens, tokens)
    model.backward()
    model.update(step=1)


step()
seconds = fastest(step, runs=3)
work = flops_per_token(cfg, 128) * tokens.size
print(machine())
print(f"{parameter_count(cfg):,} parameters, {model.memory.nbytes:,} bytes")
print(
    f"{work / seconds / 1e9:.0f} GFLOP/s, "
    f"{tokens.size / seconds:,.0f} tokens/s"
)

# %% [markdown]
# ## Take away
#
# - A backend is a room of layers and a few answers; the model does not know
#   which one it runs on.
# - Our gradients and PyTorch's are off by the rounding of float32, and by no
#   more.
#
# ## Exercises
#
# **1** (★). GPT-2 124M trains on batches of 4 texts of 64 tokens, on a machine that
# does 200 GFLOP/s throughout. How many seconds does a step take? Count $6N$
# operations a token, in your head.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $6 \cdot 124 \cdot 10^6 \cdot 256 \approx 190 \cdot 10^9$: about 0.95 seconds. Attention,
# the $6LCT$ that we left out, is less than a hundredth of it at 64 tokens.
# :::

# %% exercise 1 tags=["hide-cell"]
answer = 0.95

# %% exercise 1, checked
exact = flops_per_token(GPT2Config(), 64) * 4 * 64 / 200e9
verdict("the step", abs(answer / exact - 1) < 0.02, "to one part in fifty")

# %% [markdown]
# **2** (★★). Let GELU's gradient come out too large by a part in $10^3$. This
# chapter has three checks: against float64, to $10^{-10}$; against PyTorch's rounding
# in float32, less than three times as far from float64; against PyTorch's curve, to
# $10^{-4}$. Which of them notice it? Which notice a part in $10^5$, and in $10^7$?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Only the first is noticed by all three. A curve forgives most: it moves by about
# as much. The gradients in float32 find a mistake that is larger than their
# rounding, some $5 \cdot 10^{-7}$. In float64 there is next to no rounding, and a
# factor that is off by $10^{-7}$ stands out. So new layers are proved in float64,
# and curves are for what no single step shows.
# :::

# %% exercise 2 tags=["hide-cell"]
noticed_by = {1e-3: 3, 1e-5: 2, 1e-7: 1}

# %% layers with a mistake tags=["hide-cell"]
from types import SimpleNamespace

from llmnb import cpu

recorded = np.load(Path("../../tests/data/parity_odd.npz"))


def layers_off_by(part):
    def gelu_backward(dinp, dout, inp, add=True):
        cpu.gelu_backward(dinp, dout, inp, add)
        dinp *= dinp.dtype.type(1 + part)

    return SimpleNamespace(**vars(cpu) | {"gelu_backward": gelu_backward})


def distances(part, precision):
    """Of all gradients of the model of the figure, from float64's."""
    student = GPT2(GPT2Config(**case["model"]), *sizes, "cpu", precision)
    student.ops = layers_off_by(part)
    for name, x in student.params.items():
        x[...] = recorded[f"initial.{name}"]
    student.forward(inputs, answers)
    student.backward()
    grads = student.grads.items()
    return {name: distance(x, f"grads.fp64.{name}") for name, x in grads}


# %% the three checks tags=["hide-cell"]
def checks(part):
    """Which of the three notice the mistake."""
    us = distances(part, "fp32")
    student = new_model(small, 257)
    student.ops = layers_off_by(part)
    batches = Readers(text, small.batch_size, small.seq_len)
    run = islice(train(small, student, batches), 40)
    off = [abs(x.loss - y) for x, y in zip(run, theirs, strict=False)]
    return (
        max(distances(part, "fp64").values()) > 1e-10,
        any(us[name] > 3 * torch[name] for name in us),
        max(off) > 1e-4,
    )


# %% exercise 2, checked
verdict("no mistake", not any(checks(0)), "is noticed by none")
for part, count in noticed_by.items():
    verdict(f"{part:.0e}", sum(checks(part)) == count, f"noticed by {count}")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("2.7")
