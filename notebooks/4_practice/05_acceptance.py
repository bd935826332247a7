# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       formats.starter: "llm.c's starter pack: a state to compare with."
# ---

# %% [markdown]
# # Acceptance: does it compute the same?
#
# > A batch, and what a trusted program made of it: how sharp a comparison can
# > be, and a wrong gradient that a looser one lets pass.
#
# *Reading time: 25 minutes. You need: [chapter 4.2](02_checkpoints.ipynb), and
# the whole model of [chapter 1.17](../1_by_hand/17_model.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import PALETTE, gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 4.5.1. The same boxes stand in llm.c, in PyTorch and here. A file
# brings the weights from one to the other; whether the boxes then compute the
# same is a question that can be answered to the last digits of a float32.*
#
# A model that was read without complaint may still be another: a square matrix
# turned, a LayerNorm with another epsilon, an activation with another formula.
# The text that it writes looks like text. How do you know? At the end of this
# chapter you can
#
# - say what a file must hold so that a whole training step can be compared;
# - derive a tolerance from rounding;
# - show a wrong gradient that a tolerance of the usual kind lets pass;
# - say what the test does not see.

# %% [markdown]
# ## Setup

# %% imports of the starter pack tags=["export"]
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.checks import check_tokens
from llmnb.config import GPT2Config
from llmnb.files import read_small, replacing
from llmnb.formats.checkpoint import read_config
from llmnb.formats.llmc import HEADER_BYTES, check_header
from llmnb.formats.llmc import header_of, read_header
from llmnb.model.gpt2 import GPT2
from llmnb.model.tensors import parameter_shapes

# %% setup
import tempfile
import tracemalloc
from unittest.mock import patch

import matplotlib.pyplot as plt

from llmnb import reference
from llmnb.book.verify import compare, verdict
from llmnb.model.tensors import parameter_count
from llmnb.text import bpe

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# The model of [chapter 4.4](04_published.ipynb), which has learned one line:

# %% a small trained model
CFG = GPT2Config(64, 257, 2, 4, 64)
ids = np.array(bpe.byte().encode(bpe.WORDS * 40)[: 4 * 64 + 1])
batch = ids[:-1].reshape(4, 64), ids[1:].reshape(4, 64)
model = GPT2(CFG, 4, 64)
first = model.forward(*batch)
for step in range(1, 41):
    loss = model.forward(*batch)
    model.backward()
    model.update(learning_rate=3e-3, step=step)
verdict("training", loss < first / 4, "loss below a quarter")

# %% [markdown]
# ## A state to compare with
#
# llm.c's *debug state* holds a batch, and what GPT-2 in PyTorch made of it: a
# Python script writes it, and the C program compares. After a header of 256
# int32 numbers,
#
# | number | 0 | 1 | 2 | 3 |
# |---|---|---|---|---|
# | is | 20240327 | version 2 | $B$ | $T$ |
#
# follow tokens and targets (int32), logits, the loss, and the gradients of the
# 16 tensors, all float32. With $N$ parameters, padding included, the file
# has
#
# $$ 1024 + 4\,(2BT + BTV + 1 + N) \text{ bytes.} \tag{4.5.1} $$

# %% the debug state tags=["export"]
_MAGIC, _VERSION = 20240327, 2


class DebugState(NamedTuple):
    """A batch, and what a model makes of it.

    tokens, targets: int32 (B, T). logits: float32 (B, T, V). loss: a float.
    grads: a mapping from the 16 names to float32 arrays.
    """

    tokens: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    loss: float
    grads: dict


# %% [markdown]
# Reading asks the five questions of [chapter 4.2](02_checkpoints.ipynb). The
# arrays are mapped, and read from the file when they are compared.


# %% its parts tags=["exporti"]
_KINDS = {"tokens": "<i4", "targets": "<i4"}  # all else is float32


def _parts(cfg, B, T):
    """The shapes of what stands behind the header, in order."""
    return {
        "tokens": (B, T),
        "targets": (B, T),
        "logits": (B, T, cfg.vocab_size),
        "loss": (1,),
        **parameter_shapes(cfg),
    }


# %% read a debug state tags=["export"]
def read_debug_state(path, cfg):
    """Map llm.c's debug state of a model into memory, read only.

    cfg: the model's configuration, which fixes V and the gradients' shapes.
    Returns a DebugState. Raises ValueError, naming the file, when it is none
    of version 2, when its length is not what B, T and cfg require, and for
    tokens that the model lacks.
    """
    size, _, B, T = read_header(path, _MAGIC, [_VERSION], 3)
    parts, longest = _parts(cfg, B, T), cfg.max_seq_len
    right = HEADER_BYTES + 4 * sum(map(math.prod, parts.values()))
    rows = (
        (B > 0, "batch size", "positive", B),
        (0 < T <= longest, "length", f"in [1, {longest}]", T),
        (size == right, "size for this model", f"{right} bytes", size),
    )
    check_header(path, _MAGIC, rows)
    arrays, at = {}, HEADER_BYTES
    for name, shape in parts.items():
        arrays[name] = np.memmap(path, _KINDS.get(name, "<f4"), "r", at, shape)
        at += arrays[name].nbytes
    for name in _KINDS:
        check_tokens(f"{path}: {name}", arrays[name], cfg.vocab_size)
    tokens, targets, logits, loss = map(arrays.pop, [*parts][:4])
    return DebugState(tokens, targets, logits, float(loss[0]), arrays)


# %% write a debug state tags=["export"]
def write_debug_state(path, cfg, state):
    """Write a DebugState in llm.c's format, version 2.

    Raises ValueError when an array has not the shape that cfg requires, and
    for tokens that the model lacks; TypeError when they are no integers. The
    file appears whole or not at all.
    """
    arrays = state._asdict() | {"loss": np.array([state.loss])}
    arrays |= arrays.pop("grads")
    B, T = state.tokens.shape
    parts = _parts(cfg, B, T)
    for name, shape in parts.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"write_debug_state: {name} must have shape {shape}, "
                f"got {arrays[name].shape}"
            )
    for name in _KINDS:
        label = f"write_debug_state: {name}"
        check_tokens(label, arrays[name], cfg.vocab_size)
    with replacing(path) as file:
        file.write(header_of(_MAGIC, _VERSION, B, T).data)
        for name in parts:
            kind = _KINDS.get(name, "<f4")
            file.write(np.ascontiguousarray(arrays[name], kind).data)


# %% [markdown]
# Let the tiny model write a state, in float64 by the NumPy reference ([chapter
# 1.17](../1_by_hand/17_model.ipynb) compared it with PyTorch), and read it
# back:

# %% a state of our own
truth = GPT2(CFG, 4, 64, "reference", "fp64", seed=None)
for name, array in model.params.items():
    truth.params[name][...] = array
truth_loss = truth.forward(*batch)
logits = truth.logits.copy()
truth.backward()
state = DebugState(*batch, logits, truth_loss, truth.grads)
path = folder / "tiny_debug_state.bin"
write_debug_state(path, CFG, state)
B, T, V = logits.shape
N = parameter_count(CFG)
right = 1024 + 4 * (2 * B * T + B * T * V + 1 + N)
verdict("(4.5.1)", path.stat().st_size == right, f"{right} bytes")
compare("logits", read_debug_state(path, CFG).logits, logits, 1e-6)

# %% six lies, and how much memory they get
good = path.read_bytes()
lies = {
    "another kind": (0, 20240326),
    "an older version": (1, 1),
    "no rows": (2, 0),
    "too many rows": (2, 2**31 - 1),
    "too long": (3, 65),
    "an unknown token": (256, 257),
}
for name, (at, value) in lies.items():
    raw = bytearray(good)
    raw[4 * at : 4 * at + 4] = value.to_bytes(4, "little")
    (folder / "lie.bin").write_bytes(raw)
    tracemalloc.start()
    try:
        read_debug_state(folder / "lie.bin", CFG)
    except ValueError as error:
        print(str(error).partition("lie.bin: ")[2])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    verdict(name, peak < 1 << 20, "refused in less than 1 MiB")

# %% [markdown]
# The tests do this at random: bytes flipped, files cut, numbers replaced by
# huge ones, some hundreds of times for each reader. The answer is a result or
# one error that names the file.

# %% [markdown]
# ## How sharp can a test be?
#
# llm.c's test allows a logit to be off by $10^{-2}$, a gradient by
# $2 \cdot 10^{-2}$, whatever their size. A test should allow what rounding
# does and no more, so let us estimate that. A float32 operation has a relative
# error of at most $u = 2^{-24} \approx 6 \cdot 10^{-8}$. Errors of either sign
# add up like a random walk: $n$ of them make $\sqrt{n}\,u$. A logit of a
# model with $L$ blocks passes some $6L$ layers that matter, each a sum of $C$
# terms or more, so we expect errors near
#
# $$ \varepsilon \approx u \sqrt{6 L C} \tag{4.5.2} $$
#
# of the size of a typical logit. The constants are crude and do not matter:
# it is the size that we are after, for GPT-2 124M $1.4 \cdot 10^{-5}$ of a
# typical logit, or some $3 \cdot 10^{-6}$ of the largest of millions, which
# is five times as large. What was measured, as a share of the largest element:
#
# | pack, written with PyTorch | logits | loss | worst gradient | worst of ten losses |
# |---|---|---|---|---|
# | 3 blocks, C = 64, B = 4, T = 32 | $2.4 \cdot 10^{-7}$ | $2 \cdot 10^{-8}$ | $7 \cdot 10^{-7}$ | $1.6 \cdot 10^{-7}$ |
# | 12 blocks, C = 768, B = 4, T = 64: GPT-2 124M, new weights | $1.2 \cdot 10^{-6}$ | $2 \cdot 10^{-8}$ | $1.9 \cdot 10^{-6}$ | $9.5 \cdot 10^{-7}$ |
# | the same with 5,000 tokens, and all matrices five times as large | $7.5 \cdot 10^{-6}$ | $7 \cdot 10^{-8}$ | $4.8 \cdot 10^{-5}$ | $2.6 \cdot 10^{-3}$ |
#
# (`python tests/record_starter.py FOLDER`, with `d12` and with `large` behind;
# PyTorch 2.13, two cores; then `llmnb verify FOLDER`.) New weights are gentle.
# Attention's scores are near zero, so rounding hardly moves a probability.
# Trained weights are several times as large, the scores with them, and an
# exponential turns an absolute error of a score into a relative one of the
# probability. The last row has the size of trained weights without their
# sense. A network like that is chaotic: from the second loss to the tenth the
# difference grows five-hundred-fold, so that no test of its losses can be
# sharp. We take its first step for the worst that a sensible model may do.
#
# We allow a share of the largest element: $2 \cdot 10^{-5}$ for the logits,
# $10^{-4}$ for the gradients, twice what the last row shows and more.
# $10^{-5}$ for the loss, which is a mean, and $10^{-4}$ for the losses
# after steps, which the chaotic row exceeds and nothing sensible should:
# llm.c's own test for the GPU, when it computes in float32, allows the ten
# losses of GPT-2 124M no more than $10^{-5}$.


# %% one check tags=["export"]
class Check(NamedTuple):
    """One line of the acceptance test.

    error: the largest difference, divided by the largest element of what
    was expected; None where nothing was. allowed: the tolerance.
    """

    name: str
    error: float | None
    allowed: float

    @property
    def ok(self):
        """Whether the error is allowed; NaN is not. None without one."""
        return None if self.error is None else self.error <= self.allowed


# %% the tolerances tags=["export"]
_LOGITS, _LOSS, _GRADIENT, _LATER = 2e-5, 1e-5, 1e-4, 1e-4
_FLOOR = 1e-3  # a tensor whose numbers are smaller is measured against this


def relative_error(got, want):
    """max|got - want| / max|want|; NaN if there is one.

    Where max|want| is below 1e-3, that takes its place: a gradient that is
    zero but for rounding has no size of its own.
    """
    scale = np.maximum(np.max(np.abs(want)), _FLOOR)
    return float(np.max(np.abs(np.subtract(got, want))) / scale)


# %% [markdown]
# ## The acceptance test
#
# The test takes a folder with a model and its debug state. Which ten losses to
# expect is written nowhere in it: llm.c has those of GPT-2 124M in its source,
# and they are used here when model, batch and first loss are those. For
# another model they may stand in a text file beside.

# %% find the pack tags=["exporti"]
_STATE = "_debug_state.bin"


def _find_pack(folder):
    """The paths of a pack's model, debug state and losses."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    states = sorted(Path(folder).glob("*" + _STATE))
    if len(states) != 1:
        raise ValueError(
            f"{folder}: must hold one file *{_STATE}, got {len(states)}"
        )
    name = states[0].name.removesuffix(_STATE)
    beside = states[0].with_name
    return beside(f"{name}.bin"), states[0], beside(f"{name}_losses.txt")


# %% what the losses should be tags=["export"]
# llm.c's ten losses of GPT-2 124M on its starter pack
LOSSES = (
    5.270007, 4.059707, 3.375123, 2.800783, 2.315382,
    1.849029, 1.394656, 0.999147, 0.624080, 0.376511,
)  # fmt: skip


def _expected(path, cfg, state):
    """Ten losses to compare with, or ten times None."""
    if path.exists():
        words = read_small(path, 1 << 16).decode("ascii", "replace").split()
        try:
            losses = [float(word) for word in words]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if len(losses) != 10:
            raise ValueError(f"{path}: must hold 10 losses, got {len(losses)}")
        return losses
    known = cfg == GPT2Config() and state.tokens.shape == (4, 64)
    if known and abs(state.loss - LOSSES[0]) < 1e-3:
        return LOSSES
    return [None] * 10


# %% the acceptance test tags=["export"]
def accept(folder, backend="cpu"):
    """Run llm.c's acceptance test on a starter pack: an iterator of Checks.

    folder: holds NAME.bin and NAME_debug_state.bin, and perhaps
    NAME_losses.txt with ten losses. The logits, the loss and the 16
    gradients of the state's batch are compared, and then the losses of ten
    steps of AdamW on it. Raises OSError or ValueError for a missing or a
    damaged file at once; the checks are computed as they are asked for.
    """
    path, state_path, losses_path = _find_pack(folder)
    cfg = read_config(path)
    state = read_debug_state(state_path, cfg)
    expected = _expected(losses_path, cfg, state)
    model = GPT2.from_checkpoint(path, *state.tokens.shape, backend)
    return _checks(model, state, expected)


# %% what is compared tags=["exporti"]
def _checks(model, state, expected):
    """Logits, loss and gradients of a state's batch, and ten losses."""
    loss = model.forward(state.tokens, state.targets)
    logits = relative_error(model.logits, state.logits)
    yield Check("logits", logits, _LOGITS)
    yield Check("loss", relative_error(loss, state.loss), _LOSS)
    model.backward()
    for name, want in state.grads.items():
        error = relative_error(np.asarray(model.grads[name]), want)
        yield Check(name, error, _GRADIENT)
    yield from _ten_losses(model, state, loss, expected)


def _ten_losses(model, state, loss, expected):
    """Ten steps of AdamW on one batch; gradients and loss are there."""
    for step, want in enumerate(expected, 1):
        if step > 1:
            loss = model.forward(state.tokens, state.targets)
            model.backward()
        error = None if want is None else relative_error(loss, want)
        yield Check(f"loss {step}", error, _LATER)
        model.update(1e-4, 0.9, 0.999, 1e-8, 0.01, step)


# %% [markdown]
# Now a whole pack of our own. Its numbers come from float64 and the NumPy
# reference, the test computes in float32 with the compiled kernels, so what
# it sees is rounding, and whatever else is wrong.

# %% a pack, accepted
model.save_checkpoint(folder / "tiny.bin")
losses = []
for step in range(1, 11):
    losses.append(truth.forward(*batch))
    truth.backward()
    truth.update(1e-4, 0.9, 0.999, 1e-8, 0.01, step)
text = " ".join(f"{loss:.9f}" for loss in losses)
(folder / "tiny_losses.txt").write_text(text)
accepted = list(accept(folder))
for check in accepted:
    verdict(check.name, check.ok, f"within {check.allowed:.0e}")

# %% [markdown]
# ## A wrong gradient that looks right
#
# Hugging Face's configuration knows two GELUs: `gelu`, with the error
# function, and `gelu_new`, the tanh form of [chapter
# 1.9](../1_by_hand/09_gelu.ipynb), which GPT-2 uses. Their values differ by at
# most $5 \cdot 10^{-4}$. Suppose that somebody took the tanh form forward, as
# is right, and the derivative of the other one backward,
#
# $$ \frac{d}{dx}\, x\,\Phi(x) = \Phi(x) + x\,\varphi(x) , \tag{4.5.3} $$
#
# with $\Phi$ the normal distribution and $\varphi$ its density. The logits and
# the loss are perfect; training works.


# %% the other GELU's derivative
def wrong_gelu_backward(dinp, dout, inp, add=True):
    erf = np.array([math.erf(x) for x in (inp / math.sqrt(2)).flat])
    distribution = (1 + erf.reshape(inp.shape)) / 2
    density = np.exp(-(inp**2) / 2) / math.sqrt(2 * math.pi)
    slope = distribution + inp * density
    dinp[...] = dout * slope + (dinp if add else 0)


with patch.object(reference, "gelu_backward", wrong_gelu_backward):
    broken = list(accept(folder, "reference"))
failed = {check.name for check in broken if not check.ok}
verdict("logits and loss", broken[0].ok and broken[1].ok, "are right")
verdict("what GELU feeds", {"fcw", "fcb", "ln2w"} <= failed, "is refused")
verdict("what it does not", not {"lnfw", "lnfb"} & failed, "is not")

# %% [markdown]
# The tensors that fail most stand right behind the GELU, as the backward pass
# goes, which says where to look. And llm.c's tolerance? It is absolute, so
# multiply each error by the largest element of its gradient:

# %% would it pass?
sizes = {x: np.abs(state.grads[x]).max() for x in state.grads}
absolute = {c.name: c.error * sizes[c.name] for c in broken if c.name in sizes}
passed = sum(error < 2e-2 for error in absolute.values())
verdict("llm.c's 2e-2", passed == 16, f"lets {passed} of 16 pass")

# %% [markdown]
# A tolerance that does not know the size of what it compares is either too
# strict for large numbers or blind for small ones, and gradients are small.
#
# ## See it

# %% sixteen gradients, right and wrong
names = list(sizes)
fig, ax = plt.subplots(figsize=(7, 4.6), dpi=100)
rows = np.arange(len(names))
looks = ("right", accepted, "blue"), ("wrong GELU", broken, "orange")
for label, checks, color in looks:
    error = {check.name: check.error for check in checks}
    x = [error[name] for name in names]
    ax.plot(x, rows, "o", color=PALETTE[color], label=label)
loose = [2e-2 / sizes[name] for name in names]
ax.plot(loose, rows, "|", ms=12, color="gray", label="llm.c allows")
ax.axvline(_GRADIENT, color="black", lw=1, label="allowed here")
ax.set_yticks(rows, names)
ax.invert_yaxis()
ax.set(xscale="log", xlabel="largest error, as a share of the largest element")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 4.5.2. Rounding (blue) and one wrong derivative (orange) lie two
# orders of magnitude apart for this model, up to the last LayerNorm, whose
# gradient is complete before the first GELU. The tolerance (line) stands among
# the wrong ones. llm.c's (grey) lies far to the right, for most tensors of
# this small model past $10^0$: a gradient of zeros would pass.*
#
# What the test does *not* see is worth knowing too. Weight decay of 0.01 at a
# learning rate of $10^{-4}$ shrinks a weight by a millionth a step, less than
# the losses' tolerance can tell; exercise 1 shows it. And `beta2` barely
# matters when ten steps see the same batch. [Chapter
# 1.17](../1_by_hand/17_model.ipynb) compares the weights themselves after ten
# steps, and sees both.

# %% [markdown]
# ## Take away
#
# - A state to compare with holds the batch, the logits, the loss and every
#   gradient: what is wrong is then not only seen but found.
# - A tolerance follows from rounding and from the size of what is compared.
#   Chosen so, it sees what a guess lets pass.
# - A test that must pass needs another that must fail.
#
# ## Design note
#
# The acceptance test could have taken its tolerance from the model itself:
# compute in float64 too, and allow a multiple of what float32 loses. That
# adapts to any weights, and costs twice the memory and several times the time.
# A constant that was measured with room to spare is easier to argue about.
#
# ## Exercises
#
# **1** (★★). Show that the ten losses cannot see the weight decay: run the
# test with a decay of zero. How large must the decay be to be seen?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# `accept` calls `GPT2.update` with all its numbers, so a function that replaces
# one of them and calls the old one will do. A step multiplies a weight by
# $1 - 10^{-4} \lambda$; ten steps with $\lambda = 0.01$ by about
# $1 - 10^{-5}$, and the loss follows less than that. At $\lambda = 10$
# it is seen.
# :::


# %% exercise 1 tags=["hide-cell"]
def failures(decay):
    """How many checks fail when AdamW decays by another number."""
    update = GPT2.update

    def other(self, lr, beta1, beta2, eps, _, step):
        update(self, lr, beta1, beta2, eps, decay, step)

    with patch.object(GPT2, "update", other):
        return sum(not check.ok for check in accept(folder))


# %% exercise 1, checked
verdict("no decay", failures(0) == 0, "is not seen")
verdict("a decay of 10", failures(10) > 0, "is seen")

# %% [markdown]
# **2** (★★). A bit of the header flips. Which share of all single flipped bits
# of its first four numbers does `read_debug_state` refuse?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# All 128: magic and version must be equal, and $B$ and $T$ determine the length.
# The header's other 252 numbers mean nothing and are not looked at. A flip in a
# logit or a gradient is seen by the test when it is larger than the tolerance:
# the lowest bits of small elements are not.
# :::


# %% exercise 2 tags=["hide-cell"]
def refused(bit):
    raw = bytearray(good)
    raw[bit // 8] ^= 1 << bit % 8
    (folder / "flip.bin").write_bytes(raw)
    try:
        read_debug_state(folder / "flip.bin", CFG)
    except ValueError:
        return True
    return False


# %% exercise 2, checked
seen = sum(refused(bit) for bit in range(128))
verdict("flipped bits", seen == 128, f"{seen} of 128 are refused")

# %% [markdown]
# ## Further reading
#
# - Goldberg (1991), [What Every Computer Scientist Should Know About
#   Floating-Point Arithmetic](https://doi.org/10.1145/103162.103163):
#   rounding, ties and error bounds from the ground up.
# - Higham and Mary (2019), [A New Approach to Probabilistic Rounding Error
#   Analysis](https://doi.org/10.1137/18M1226312): why $\sqrt{n}\,u$ and not
#   $n\,u$.
# - [llm.c's
#   test_gpt2.c](https://github.com/karpathy/llm.c/blob/master/test_gpt2.c):
#   the acceptance test as it was first written.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.5")
