# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.encoder: 'The encoder in NumPy: token and position vectors, and their gradients.'
#       cpu.compiled: "Compiled kernels kept on disk, so that a second start is instant."
#       cpu.jit: "Compile a function for the processor, alone or for a team of threads."
#       cpu.encoder: "The encoder, compiled for the processor's cores."
# ---

# %% [markdown]
# # Turn tokens into vectors and send gradients back
#
# > A token's vector is a row of one table plus a row of another; the backward
# > pass adds into the rows that were read.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="encoder")

# %% [markdown]
# *Figure 1.5.1. The encoder is the first layer: it turns token numbers into
# the vectors that all other layers work on.*
#
# A token is a number between 0 and 50256, and the number itself means
# nothing: token 300 is not three times token 100. A network needs something
# that it can shift a little when it learns. So each token gets a vector of
# C numbers, its *embedding*, and these vectors are parameters, trained like
# all others. A second table holds a vector for each position in the text,
# because attention ([chapter 1.8](08_attention.ipynb)) sees a set of vectors
# and would otherwise not know which came first. The encoder adds the two.
#
# This chapter builds `encoder_forward` and `encoder_backward`, and on the
# way `kernel`, the decorator that compiles every CPU layer of this book. At
# its end you can
#
# - compute the encoder's output and gradients by hand;
# - say why a table lookup is a matrix product, and what that view costs;
# - name the line of NumPy that loses gradients, and catch it;
# - say what numba does with a function, and what its options promise;
# - write a parallel sum whose result does not depend on the threads.
#
# You need central differences from [chapter 1.4](04_gpt2.ipynb), tokens from
# [chapter 1.2](02_tokens.ipynb) and the argument checks of
# [chapter 1.13](13_memory.ipynb).

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports of the reference tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(3)

# %% [markdown]
# ## By hand
#
# Take a vocabulary of four letters, a to d, with C = 2 channels. Their
# embeddings are $a = (1, 0)$, $b = (0, 1)$, $c = (2, 3)$, $d = (5, 5)$.
# The vector of position $t$ is $(10, 10)$, $(20, 20)$, $(30, 30)$ or
# $(40, 40)$. Our batch is two texts of three letters, "cac" and "bca". The
# first letter c becomes $(2, 3) + (10, 10) = (12, 13)$, the a after it
# $(1, 0) + (20, 20) = (21, 20)$, and the second c
# $(2, 3) + (30, 30) = (32, 33)$: one letter, two places, two vectors.

# %% two texts by hand
wte = np.array([[1.0, 0], [0, 1], [2, 3], [5, 5]])
wpe = np.array([[10.0, 10], [20, 20], [30, 30], [40, 40]])
inp = np.array([[2, 0, 2], [1, 2, 0]], dtype=np.int32)
by_hand = np.array(
    [[[12, 13], [21, 20], [32, 33]], [[10, 11], [22, 23], [31, 30]]]
)

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | (B, T) | the tokens: B texts, T tokens in each |
# | `wte` | (Vp, C) | the embedding of each token of the vocabulary |
# | `wpe` | (max_T, C) | the vector of each position |
# | `out` | (B, T, C) | their sums |
#
# Vp is the padded size of the vocabulary: 50257 tokens and 47 unused rows
# make 50304, a multiple of 128, which suits the matrix product at the other
# end of the model. The names are short for *weights of the token
# embedding* and *of the position embedding*.

# %% [markdown]
# ## Forward
#
# Write $x_{b,t}$ for the token at position $t$ of text $b$, $E$ for `wte`
# and $P$ for `wpe`. Channel $i$ of the output is
#
# $$ y_{b,t,i} = E_{x_{b,t},\, i} + P_{t,i} . \tag{1.5.1} $$
#
# NumPy reads this almost as it stands. `wte[inp]` takes one row of the
# table for each element of `inp` and has the shape (B, T, C); the first T
# rows of `wpe` are added to every text of the batch. The line above the
# function says what the arrays must be: [chapter 1.13](13_memory.ipynb).


# %% the forward pass tags=["export"]
@shapes("B T C!, B T of Vp, Vp C, T+ C")
def encoder_forward(out, inp, wte, wpe):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float, overwritten
    inp   (B, T)         integer, each in [0, Vp)
    wte   (Vp, C)        float, the table of tokens
    wpe   (max_T, C)     float, the table of positions; T <= max_T
    """
    T = inp.shape[1]
    out[...] = wte[inp] + wpe[:T]


# %% the two texts through the function
out = np.empty((2, 3, 2))
encoder_forward(out, inp, wte, wpe)
compare("by hand", out, by_hand, tol=1e-12)

# %% [markdown]
# **The same as a matrix product.** Give each token a row of length Vp that
# is 1 at the token's number and 0 elsewhere, a *one-hot* row. With the
# Kronecker symbol $\delta_{v,w}$, which is 1 when $v = w$ and 0 otherwise,
# the one-hot rows of a batch are
#
# $$ O_{b,t,v} = \delta_{v,\, x_{b,t}} , \qquad
#    y_{b,t,i} = \sum_v O_{b,t,v}\, E_{v,i} + P_{t,i} . \tag{1.5.2} $$
#
# The sum over $v$ has one term that is not zero, and it is
# $E_{x_{b,t},\,i}$. So the encoder is a linear layer whose input happens to
# be one-hot. We use this view to derive the gradient, and not to compute:

# %% one-hot rows times the table
onehot = np.eye(4)[inp]
print(onehot[0].astype(int))
compare("one-hot", onehot @ wte + wpe[:3], by_hand, tol=1e-12)

# %% [markdown]
# At GPT-2's size all but one in 50304 of the product's multiplications
# would be by zero:

# %% what the matrix product would cost at GPT-2's size
B, T, C, Vp = 4, 64, 768, 50304
print(f"one-hot product  {2 * B * T * Vp * C:>14,} FLOPs")
print(f"lookup           {B * T * C:>14,} FLOPs")
print(f"one-hot matrix   {4 * B * T * Vp:>14,} bytes")

# %% [markdown]
# ## Backward, derived
#
# The layers above hand us $dy_{b,t,i} = \partial \mathcal L / \partial
# y_{b,t,i}$. Differentiate (1.5.2) with respect to one element of the table,
# $E_{v,j}$. The output $y_{b,t,i}$ depends on it only when the channel is
# the same and the token is $v$:
#
# $$ \frac{\partial y_{b,t,i}}{\partial E_{v,j}}
#    = O_{b,t,v}\, \delta_{i,j} = \delta_{v,\,x_{b,t}}\, \delta_{i,j} .
#    \tag{1.5.3} $$
#
# The chain rule sums over every output that the element reaches, and
# $\delta_{i,j}$ leaves one channel:
#
# $$ dE_{v,j} = \sum_{b,t,i} dy_{b,t,i}\,
#      \frac{\partial y_{b,t,i}}{\partial E_{v,j}}
#    = \sum_{b,t} \delta_{v,\,x_{b,t}}\, dy_{b,t,j}
#    = \sum_{(b,t)\,:\,x_{b,t} = v} dy_{b,t,j} . \tag{1.5.4} $$
#
# In words: row $v$ of the gradient is the sum of the rows of $dy$ at all
# places where token $v$ stood. A token that stands in three places pulls
# three times at its one row, and a token that stands nowhere gets zero. As
# a matrix product, (1.5.4) is $O^\top dy$, the transpose of the lookup: where
# the forward pass *gathers* rows of the table, the backward pass *scatters*
# rows back and adds where they meet.
#
# The position table enters (1.5.1) once for every text, so by the same steps
#
# $$ dP_{t,j} = \sum_{b} dy_{b,t,j} \quad (t < T), \qquad
#    dP_{t,j} = 0 \quad (t \ge T) . \tag{1.5.5} $$
#
# The tokens themselves get no gradient: they are integers, and there is no
# token a little to the side of token 300.
#
# **What to save.** Neither (1.5.4) nor (1.5.5) contains $E$, $P$ or $y$. The
# tokens are all that backward needs, and they are there already.


# %% the backward pass tags=["export"]
@shapes("Vp C!, T+ C!, B T C, B T of Vp")
def encoder_backward(dwte, dwpe, dout, inp):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        float, added to; rows of absent tokens stay
    dwpe  (max_T, C)     float, added to; rows from T on stay
    dout  (B, T, C)      float
    inp   (B, T)         integer, as in the forward pass
    """
    T = inp.shape[1]
    np.add.at(dwte, inp, dout)
    dwpe[:T] += dout.sum(axis=0)


# %% [markdown]
# `np.add.at(dwte, inp, dout)` goes through `inp` in order and adds each row
# of `dout` to its row of `dwte`, as (1.5.4) asks. Let every row of `dout` be
# $(1, 1)$. Then row $v$ of `dwte` counts how often token $v$ occurs: a
# twice, b once, c three times, d never. Each position occurs in both texts,
# and position 3 is beyond T.

# %% gradients that count
dwte, dwpe = np.zeros((4, 2)), np.zeros((4, 2))
encoder_backward(dwte, dwpe, np.ones((2, 3, 2)), inp)
print(dwte.T.astype(int))
print(dwpe.T.astype(int))

# %% [markdown]
# Both gradients are *added* to what is there. `wte` has a second use at the
# other end of the model, where it turns vectors into logits
# ([chapter 1.15](15_model.ipynb)), so its gradient is the sum of two layers'
# contributions.
#
# **The trap.** The line `dwte[inp] += dout` looks like (1.5.4) and is not.
# NumPy carries it out in three steps: it gathers `dwte[inp]` into a
# temporary, adds `dout` to the temporary, and writes the temporary's rows
# back. All copies of a repeated token start from the same old row, and the
# last one written wins.


# %% the line that loses repeats
def lossy_backward(dwte, dwpe, dout, inp):
    dwte[inp] += dout
    dwpe[: inp.shape[1]] += dout.sum(axis=0)


lost = np.zeros((4, 2))
lossy_backward(lost, np.zeros((4, 2)), np.ones((2, 3, 2)), inp)
print(lost.T.astype(int))

# %% [markdown]
# The letters a and c count once now. Nothing warns you: the shapes are right,
# and rare tokens get the right gradient. A frequent one learns from the last
# of its places only.

# %% [markdown]
# ## Proof
#
# Choose a fixed random array $g$ and let $\mathcal L = \sum g \cdot y$, so
# that $dy = g$. The gradients must agree with central differences of
# $\mathcal L$ in float64, with step $h = 10^{-5}$. The encoder is linear,
# so the method has no error of its own and only rounding remains, about
# $10^{-16} / h = 10^{-11}$ times the size of $\mathcal L$; we ask for
# $10^{-8}$. Five tokens at eight places must repeat.

# %% a problem to differentiate
B, T, C, Vp, max_T = 2, 4, 3, 5, 6
inp = rng.integers(0, Vp, (B, T), dtype=np.int32)
wte, wpe = rng.normal(size=(Vp, C)), rng.normal(size=(max_T, C))
g, out = rng.normal(size=(B, T, C)), np.empty((B, T, C))


def loss():
    encoder_forward(out, inp, wte, wpe)
    return (g * out).sum()


want = numerical_gradient(loss, wte), numerical_gradient(loss, wpe)
print(inp)


# %% against central differences
def gradients(backward):
    grads = np.zeros_like(wte), np.zeros_like(wpe)
    backward(*grads, g, inp)
    return grads


for name, got, numeric in zip(
    ("dwte", "dwpe"), gradients(encoder_backward), want, strict=True
):
    compare(name, got, numeric, tol=1e-8)

# %% [markdown]
# The check must also be able to fail. It catches the line of the trap:

# %% a gradient made wrong on purpose
try:
    compare("dwte, lossy", gradients(lossy_backward)[0], want[0], tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the trap", caught, "is caught")

# %% [markdown]
# It would not have caught it on a text without repeats, where both lines
# agree. A gradient check proves what its example exercises; choose examples
# that are small in size and rich in cases.

# %% [markdown]
# ## Fast on a CPU
#
# ### What NumPy wastes
#
# `wte[inp]` copies the rows into a temporary of the size of the output, the
# addition reads it again and makes a second one, and that is copied into
# `out`. `np.add.at` takes its rows one element at a
# time through general code that serves every type and shape. And NumPy uses
# one core for both. A loop that does the work in one sweep needs neither
# temporaries nor generality, but a loop in Python is slow: every `+` looks
# up the types of its operands, finds the function to call and allocates the
# result. numba is a package that compiles such a loop to machine code. Here is
# one to experiment with, the sum of $x/(1 + x^2)$.

# %% a loop
import numba


def total(x):
    one, s = x.dtype.type(1), x.dtype.type(0)
    for i in range(len(x)):
        s += x[i] / (one + x[i] * x[i])
    return s


# %% [markdown]
# ### What numba does
#
# `numba.njit(total)` returns an object that looks like the function. At its
# first call it takes the types of the arguments, works out from them the
# type of every variable, translates the function to the intermediate
# language of LLVM, the compiler behind clang, and LLVM makes machine code
# for the CPU it runs on. That takes part of a second. Later calls with the
# same types jump straight to the machine code; a call with new types
# compiles again.

# %% one version for each set of argument types
x = rng.normal(size=1 << 16).astype(np.float32)
compiled = numba.njit(total)
compiled(x)
compiled(x.astype(np.float64))
print([str(s.return_type) for s in compiled.nopython_signatures])

# %% [markdown]
# The types are fixed when the code is compiled, so they deserve a look. We
# wrote `x.dtype.type(1)` where Python would let us write `1`. In numba an
# integer plus a float32 is a float64, and one careless literal pulls the
# whole loop into float64, of which a register holds half as many:


# %% one literal changes the type
@numba.njit
def careless(x):
    s = x.dtype.type(0)
    for i in range(len(x)):
        s += x[i] / (1 + x[i] * x[i])
    return s


careless(x)
print([str(s.return_type) for s in careless.nopython_signatures])

# %% [markdown]
# ### Two promises that let LLVM use vectors
#
# A core of today's CPUs adds 4, 8 or 16 float32 numbers in one instruction, if
# LLVM may use such vector instructions. In our loop two things forbid it.
#
# **The order of the sum.** Floating-point addition rounds, so $(a + b) + c$
# and $a + (b + c)$ may differ in the last bit. LLVM respects the order you
# wrote, one number after the other. `fastmath=True` permits it to regroup:
# say, eight partial sums side by side, added up at the end. It also promises
# that no NaN and no infinity occurs.
#
# **The division.** Python raises an error when you divide by zero, and
# numba keeps that behaviour with a test before each division. A loop that
# may stop in the middle cannot run eight elements at a time.
# `error_model="numpy"` drops the test, and 1/0 becomes infinity as it does
# in NumPy.

# %% four versions of one loop
options = {
    "plain numba": {},
    "fastmath": {"fastmath": True},
    "error_model": {"error_model": "numpy"},
    "both": {"fastmath": True, "error_model": "numpy"},
}
versions = {name: numba.njit(total, **o) for name, o in options.items()}
exact = total(x.astype(np.float64))
for name, version in versions.items():
    compare(name, version(x), exact, tol=1e-4)

# %% nanoseconds an element tags=["nbval-ignore-output"]
print(machine())
seconds = {"Python": fastest(total, x[:4096], runs=3) * len(x) / 4096}
seconds["NumPy"] = fastest(lambda x: (x / (1 + x * x)).sum(), x)
seconds |= {name: fastest(f, x) for name, f in versions.items()}
for name, s in seconds.items():
    print(f"{name:<12} {s / len(x) * 1e9:8.2f} ns an element")

# %% [markdown]
# Each option alone takes one obstacle away and leaves the other; the last line
# is the loop with both gone. All four sums agree with the float64 sum to four
# digits and more, and a regrouped one is in general the closer, because eight
# short sums round less than one long one.
#
# The promise about NaN is serious. A compiler that may assume there is none
# answers the question `isnan` without looking:

# %% what fastmath believes tags=["nbval-ignore-output"]
import math


def is_nan(value):
    return math.isnan(value)


print("plain:   ", numba.njit(is_nan)(math.nan))
print("fastmath:", numba.njit(is_nan, fastmath=True)(math.nan))

# %% [markdown]
# So no kernel of this book asks for NaN, or uses infinity as a mark.
# [Attention](08_attention.ipynb), for one, must hide from each token those
# that come later: it skips them, where other programs set their scores to
# $-\infty$.
#
# ### Threads
#
# A CPU has several cores, and `parallel=True` lets one loop use all of
# them. Where you write `numba.prange` for `range`, numba cuts the range
# into as many pieces as there are threads, gives each thread one, and waits
# until all are done. `NUMBA_NUM_THREADS` in the environment sets how many
# threads there are at most, `numba.set_num_threads` how many of them the
# next loops use.
#
# numba does not check that the pieces are independent. When two threads
# add to the same element, each reads the old value, adds, and writes back;
# if they do so at the same time, one addition is lost. This is a *race*. The
# plain parallel version of (1.5.4) has one. Below, a million rows of ones all
# belong to token 0, so each element of its row must end at a million:


# %% a race tags=["nbval-ignore-output"]
@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def racy(dwte, dout, inp):
    for row in numba.prange(len(inp)):
        for c in range(dout.shape[1]):
            dwte[inp[row], c] += dout[row, c]


rows = 1_000_000
same, ones = np.zeros(rows, np.int32), np.ones((rows, 32), np.float32)
for _ in range(8):
    sums = np.zeros((1, 32), np.float32)
    racy(sums, ones, same)
    print(f"{int(rows - sums.min()):,} of {rows:,} lost")

# %% [markdown]
# The number changes from run to run, and it is 0 when the threads happen
# not to meet: a race can hide through a hundred tests. Locks and atomic
# additions would save every addition, and still leave the *order* of the
# additions to chance, and with it the last bits of each sum. We want more:
# the same bits from every run and from any number of threads, so that a
# training run can be repeated and resumed exactly.
#
# The rule for every kernel in this book follows. *A `prange` runs over
# outputs, never over the terms of a sum: each element of an output belongs
# to one thread, which adds its terms in one fixed order.* Here one row of
# `x` is one output:

# %% one output, one thread
inner_total = versions["both"]


@numba.njit(parallel=True, fastmath=True, error_model="numpy")
def row_totals(out, x):
    for n in numba.prange(len(x)):
        out[n] = inner_total(x[n])


def with_threads(n, function, *args):
    before = numba.get_num_threads()
    numba.set_num_threads(min(n, before))
    function(*args)
    numba.set_num_threads(before)


one, many = np.empty((2, 64), np.float32)
with_threads(1, row_totals, one, x.reshape(64, -1))
with_threads(99, row_totals, many, x.reshape(64, -1))
verdict("row totals", np.array_equal(one, many), "same bits, any threads")

# %% [markdown]
# ### The decorator, and where compiled kernels live
#
# Every CPU layer takes the same options, so we give them one name,
# `kernel`. It has a second duty. To compile takes time, for each function and
# each set of types, and a model has dozens of functions, so the machine code
# should be kept on disk for the next start of Python. `numba.njit(cache=True)`
# does that, next to the source file. But it compiles again only when *that
# file* changes. When a kernel calls a function of another file, and you edit
# that one, numba runs the old machine code without a word. To see it, we build
# a little package in which `triple.py` calls `scale.py`, run it, edit
# `scale.py`, and run it again. The editor is Python, and each run is a new
# process.

# %% a small package with a kernel and its callee
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path


def write_package(folder, decorator, factor):
    cpu = folder / "llmnb" / "cpu"
    cpu.mkdir(parents=True, exist_ok=True)
    (folder / "llmnb" / "__init__.py").write_text("")
    (cpu / "__init__.py").write_text("")
    for name in ("files.py", "compiled.py", "cpu/jit.py"):
        text = files("llmnb").joinpath(name).read_text("utf-8")
        (folder / "llmnb" / name).write_text(text, "utf-8")
    top = "import numba\nfrom llmnb.cpu.jit import inner\n"
    call = "from llmnb.cpu.scale import scale\n"
    at = f"@{decorator}\ndef "
    body = f"scale(x):\n    return {factor} * x\n"
    (cpu / "scale.py").write_text(top + at + body)
    body = "triple(x):\n    return scale(x)\n"
    if not (cpu / "triple.py").exists():
        (cpu / "triple.py").write_text(top + call + at + body)


# %% run, edit the callee, run again
def run_edit_run(decorator):
    code = "from llmnb.cpu.triple import triple; print(triple(10))"
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variables = {**os.environ, "LLMNB_CACHE": str(folder / "kernels")}
        for factor in (2, 3):
            write_package(folder, decorator, factor)
            run = subprocess.run(
                [sys.executable, "-B", "-c", code],
                cwd=folder,
                env=variables,
                capture_output=True,
                text=True,
                check=True,
            )
            results.append(int(run.stdout))
    return results


# %% numba's own cache tags=["nbval-ignore-output"]
print(run_edit_run("numba.njit(cache=True)"))

# %% [markdown]
# The second number should be 30, and numba's own cache gives 20. Our repair is
# to keep compiled kernels in a folder that is named by a hash of all that they
# are made from: the files of `llmnb/cpu`, and the versions of Python, of numba
# and of llvmlite, which brings LLVM. Change one letter, and the folder has
# another name and starts empty. What is in it cannot be stale.
#
# But it can be somebody else's. What numba keeps is a pickle with machine
# code inside, and to load it is to run it: whoever may write in that folder
# may run what they like as you. So the folder must belong to you, and nobody
# else may enter. Where there is no such folder, because the home is missing,
# the disk is full or another user was there first, the kernels are compiled
# at each start, and that is all. The environment variable `LLMNB_CACHE` can
# name another place.

# %% imports of what is kept tags=["export"] module="cpu.compiled"
import contextlib
import functools
import hashlib
import os
import pickle
import sys
from pathlib import Path

import llvmlite
import numba
from numba.core.caching import FunctionCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from llmnb.files import replacing


# %% what kernels are made from tags=["exporti"] module="cpu.compiled"
def _origin():
    """A hash of the sources, and of the versions of what compiles them."""
    parts = [numba.__version__, llvmlite.__version__, sys.version]
    parts.append(os.environ.get("LLMNB_TILE", ""))  # see chapter 1.7
    here = Path(__file__)
    for path in [here, *sorted((here.parent / "cpu").glob("*.py"))]:
        parts += [path.name, path.read_text("utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _ours(status):
    """Is a file this user's? Windows keeps the homes of users apart."""
    return os.name == "nt" or status.st_uid == os.geteuid()


# %% where compiled kernels are kept tags=["export"] module="cpu.compiled"
@functools.cache
def cache_folder():
    """The folder for compiled kernels, named by a hash of their sources.

    numba looks only at the file of the kernel it loads, so a change in a
    function that the kernel calls would go unseen. A folder for each state
    of the sources cannot hold a stale kernel. It is this user's, and closed
    to others. `LLMNB_CACHE` moves it. None where no such folder can be had.
    """
    try:
        home = os.environ.get("LLMNB_CACHE") or Path.home() / ".cache/llmnb"
        folder = Path(home).absolute() / "kernels" / _origin()
        folder.mkdir(0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if _ours(status) and status.st_mode & 0o077:
            folder.chmod(0o700)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder if _ours(status) else None


# %% [markdown]
# Files get damaged, too: a machine is switched off, a disk fills up, and half
# of a pickle is an exception at every start from then on. So each file begins
# with the SHA-256 of the rest and of its own name. What does not agree with
# it is not unpickled, and the kernel is compiled again, as if there were no
# file. A file that cannot be written is given up without a word.


# %% read and write a kernel tags=["exporti"] module="cpu.compiled"
def _seal(path, data):
    return hashlib.sha256(path.name.encode() + data).digest()


def _read(path):
    """What `_write` wrote, or None if it is not there, whole and ours."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        seal, data = file.read(32), file.read()
        if _ours(os.fstat(file.fileno())) and seal == _seal(path, data):
            return data
    return None


def _write(path, data):
    with contextlib.suppress(OSError), replacing(path) as file:
        file.write(_seal(path, data) + data)


# %% [markdown]
# numba hands what it has compiled to an object that it calls the function's
# cache, and asks this first when it is to compile. Ours inherits one thing
# from numba's: the key, which tells apart functions, types of arguments and
# processors. A few variables of the environment also change the code, some of
# them to the last bit of a sum: `NUMBA_OPT=0` tells LLVM not to optimise, and
# `NUMBA_BOUNDSCHECK=1` puts a test before each index. numba forgets these, so
# a kernel compiled under one of them would be loaded for good. They go into
# the key as well.

# %% options that change the code tags=["exporti"] module="cpu.compiled"
CHANGING = (
    *("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "USING_SVML", "ENABLE_AVX"),
    *("CPU_NAME", "CPU_FEATURES", "BOUNDSCHECK", "NRT_STATS", "DEBUG_NRT"),
    *("LLVM_REFPRUNE_PASS", "LLVM_REFPRUNE_FLAGS", "ENABLE_PROFILING"),
    *("DEBUGINFO_DEFAULT", "EXTEND_VARIABLE_LIFETIMES", "JIT_COVERAGE"),
    *("DEBUG_JIT", "DEBUG_ARRAY_OPT_RUNTIME"),
)


# %% what numba asks for and hands over tags=["export"] module="cpu.compiled"
class KernelCache(FunctionCache):
    """Keeps what numba compiles of one function, a file for each key.

    folder: what `cache_folder` gives. numba's own cache would choose the
    place, trust what it finds there, and stop when it cannot write.
    """

    def __init__(self, function, folder):
        self._name, self._py_func = repr(function), function
        self._cache_path = folder
        self.enable()

    def _path(self, signature, codegen):
        options = [getattr(numba.config, name, None) for name in CHANGING]
        key = repr((self._index_key(signature, codegen), options))
        one = self._py_func
        name = f"{one.__module__}.{one.__qualname__}-"
        name += hashlib.sha256((name + key).encode()).hexdigest()[:16]
        return self._cache_path / f"{name}.kernel"

    def _load_overload(self, sig, target_context):
        data = _read(self._path(sig, target_context.codegen()))
        if data is None:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(data))

    def _save_overload(self, sig, data):
        if not data.library.has_dynamic_globals:  # addresses, of this process
            _write(self._path(sig, data.codegen), dumps(data._reduce()))


# %% imports of the decorator tags=["export"] module="cpu.jit"
import contextlib
import os

import numba
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.extending import register_jitable

from llmnb.cpu.compiled import KernelCache, cache_folder


# %% [markdown]
# One more default needs changing. Between two kernels the threads have
# nothing to do. On Linux numba uses GNU's OpenMP, whose threads *spin*: they
# ask again and again whether there is work, for many milliseconds, and a
# spinning thread keeps its core from others. Alone on a machine that costs
# nothing. With a second program on the same cores the two get into each
# other's way, and a training step can take several times as long. A limit
# of 10,000 rounds lets the threads go to sleep early. A much lower one costs
# time on a quiet machine, where a thread that sleeps has to be woken for the
# next kernel. It has to be set before the first kernel runs, and a value
# that you have set yourself is kept.
#
# `fastmath=True` is a bundle of seven permissions, and we grant five of
# them by name: to regroup (`reassoc`), to fuse a product and a sum
# (`contract`), and to count on there being no NaN, no infinity and no
# difference between 0 and -0. The two that we withhold allow approximate
# functions and let LLVM put a rough reciprocal and a correction in the
# place of a division. It would do so in vector instructions only, and the
# few elements that are left over at the end of an array, which it computes
# one by one, would be rounded otherwise. With exact division each element
# gets the same bits wherever it falls, so a `prange` over single elements
# may be cut at any place.
#
# Last, `no_cfunc_wrapper` leaves out of a kernel the entry for callers
# written in C, which shortens compilation a little. A function that only
# kernels call needs no entry at all, not even for Python; we make it a
# `device` function, a word from the world of GPUs. A function that is to be
# called as C functions are is made by `routine`.


# %% compile, with or without a cache tags=["exporti"] module="cpu.jit"
FASTMATH = {"reassoc", "contract", "nnan", "ninf", "nsz"}
OPTIONS = {"fastmath": FASTMATH, "error_model": "numpy"}


def _kept(compiled, function):
    """Give a compiled function of this package a cache."""
    if numba.config.DISABLE_JIT:
        raise ImportError(
            "NUMBA_DISABLE_JIT is set, and the cpu backend's kernels only "
            "run compiled: unset it, or use the backend 'reference'"
        )
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    ours = function.__module__.startswith("llmnb.")
    if ours and (folder := cache_folder()):
        compiled._cache = KernelCache(function, folder)
    return compiled


def _compile(function, **options):
    return _kept(numba.njit(**options, **OPTIONS)(function), function)


# %% the decorator of all kernels tags=["export"] module="cpu.jit"
def kernel(function, parallel=True):
    """Compile a function with numba: parallel, fastmath, cached on disk.

    `fastmath` lets LLVM reorder sums into vectors and assumes that no NaN or
    infinity occurs; division stays exact. `error_model="numpy"` drops the
    test for division by zero, which would keep loops from being vectorised.
    A function defined in a notebook is compiled anew each time. Sets
    GOMP_SPINCOUNT, unless it is set, so that idle threads soon sleep. What
    must also run in a forked process is a `team`.
    """
    return _compile(function, parallel=parallel, no_cfunc_wrapper=True)


# %% the decorators for one thread tags=["export"] module="cpu.jit"
def inner(function):
    """Compile a function for the thread that calls it; see `kernel`.

    For what kernels call in their loops, and for work too small to share.
    """
    return _compile(function, forceinline=True, no_cfunc_wrapper=True)


def device(function):
    """Let kernels call a function, which is compiled along with them.

    Quicker to compile than `inner`, and not a compiled function for Python:
    a call from there runs it as it is written.
    """
    return register_jitable(forceinline=True, **OPTIONS)(function)


def routine(function, signature, parallel=False):
    """Compile a function for C, with the same options.

    signature: of numba's types. Returns numba's CFunc, whose address is
    good as long as it is kept.
    """
    options = {"parallel": parallel, **OPTIONS}
    made = CFunc(function, normalize_signature(signature), {}, options)
    _kept(made, function).compile()
    return made


# %% [markdown]
# A folder of an old state of the sources stays behind; all of
# `~/.cache/llmnb/kernels` may be deleted at any time. A kernel defined in a
# notebook is never cached.

# %% the callee's edit is seen
results = run_edit_run("inner")
print(results)
verdict("the cache", results == [20, 30], "no stale kernel")

# %% [markdown]
# ### One parallel loop for all kernels
#
# A `prange` is dear to compile. numba makes a second function of the loop's
# body, wraps that for threads, and optimises all of it two or three times:
# about a second for a kernel that takes a quarter of that without
# `prange`. And it leaves copies of one function, optimised in different
# company. A process that has just compiled a kernel may run another copy
# than one that loads it from the cache, and round the last bit of a sum
# differently. A run that you stop and resume would not be the run that you
# did not stop. That is also why `forceinline` stands above: code that is
# part of its caller has no other copy.
#
# So the book has one `prange`, compiled once. Its body calls a function by
# its address, with three numbers: which part of the work to do, of how many,
# and where the arguments lie. A kernel is that function, compiled for one
# thread. We call it a *team*: every thread runs it, and takes its share.
#
#     Python        _begin                    the loop          each thread
#     f(x, y)  ->   puts x and y in memory -> for part in   ->  f(part, parts,
#                   at some address           prange(parts)       address)
#
# Three small pieces of LLVM do what Python's syntax cannot say: store a
# tuple and give its address, load a tuple from an address, and call an
# address.

# %% imports of the team tags=["export"] module="cpu.jit"
import functools
import threading

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


# %% arguments by address tags=["exporti"] module="cpu.jit"
@intrinsic
def arguments(typing, address):
    """The arguments of a team, as a tuple; address: what its thread got.

    For functions that `team` compiles.
    """
    kind = address.dtype

    def load(context, builder, signature, args):
        value = context.unpack_value(builder, kind, args[0])
        context.nrt.incref(builder, kind, value)  # the caller's, on loan
        return value

    return kind(address), load


# %% store a tuple, call an address tags=["exporti"] module="cpu.jit"
@intrinsic
def _stored(typing, args):
    def store(context, builder, signature, values):
        kind = context.get_data_type(args)
        place = cgutils.alloca_once(builder, kind)
        context.pack_value(builder, args, values[0], place)
        return builder.ptrtoint(place, ir.IntType(64))

    return types.int64(args), store


@intrinsic
def _call(typing, code, part, parts, address):
    n, number = types.int64, ir.IntType(64)

    def call(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [number] * 3)
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, args[1:])
        return context.get_dummy_value()

    return types.void(n, n, n, n), call


# %% [markdown]
# `_begin` is compiled for each list of types, which is quick, since it only
# puts the arguments in their place. With one thread there is nothing to
# share, and it calls the kernel itself.


# %% the one parallel loop tags=["exporti"] module="cpu.jit"
def _every_part(code, parts, address):
    for part in numba.prange(parts):
        _call(code, part, parts, address)


@functools.cache
def _loop():
    n = types.int64
    return routine(_every_part, types.void(n, n, n), parallel=True)


@inner
def _begin(loop, code, parts, *args):
    if parts > 1:
        _call(loop, code, parts, _stored(args))
    else:
        _call(code, 0, 1, _stored(args))


# %% [markdown]
# Two things can go wrong with threads, and the one loop is the place to see
# to both. A process that *forks* gets a child with a copy of its memory and
# none of its threads. Python's `multiprocessing` makes its workers so on many
# systems. A child that now asks for the threads waits for ever, or is ended by
# GNU's OpenMP; a pool of workers hangs. In such a child a kernel runs on one
# thread, and its results are the same. And two threads of Python that call
# kernels at once abort the process where numba uses its own *workqueue*, which
# serves one caller at a time. So they queue up at a lock. A fork waits there
# too: the child of a thread that forks in the middle of another one's kernel
# would inherit a lock that nobody opens.

# %% one caller at a time tags=["exporti"] module="cpu.jit"
_orphaned = []  # filled in a child whose parent had started threads


def _door():
    """The lock for those who call the threads."""
    lock = threading.RLock()

    def forked():
        lock.release()
        with contextlib.suppress(ValueError):  # if none were started
            _orphaned.append(numba.threading_layer())

    if hasattr(os, "register_at_fork"):  # Windows does not fork
        os.register_at_fork(
            before=lock.acquire,
            after_in_parent=lock.release,
            after_in_child=forked,
        )
    return lock


_one_caller = _door()


# %% [markdown]
# The decorator compiles a routine for each list of types that it meets, and
# finds it again by the arrays' dtypes and dimensions. An array with gaps
# is another type for numba, so that counts too. So would be one that may not
# be written, such as weights that the system has mapped from a file; the
# layers have seen to it that what they write may be, and we make no
# difference.


# %% the decorator for teams tags=["export"] module="cpu.jit"
def _kind(x):
    if isinstance(x, np.ndarray):
        return x.dtype, x.ndim, x.flags.c_contiguous
    return type(x)


def _type(x):
    kind = numba.typeof(x)
    return kind.copy(readonly=False) if isinstance(x, np.ndarray) else kind


def team(function):
    """Compile a function that all threads run, each for its share.

    function: takes part, parts and address. It gets its arguments by
    `arguments(address)` and does part number `part` of `parts` of the work;
    `share` says which. What is returned here is called from Python with the
    arguments. Options and cache are those of `kernel`.
    """
    made, places = {}, {}

    @functools.wraps(function)
    def call(*args):
        kinds = tuple([_kind(x) for x in args])
        parts = 1 if _orphaned else numba.get_num_threads()
        with _one_caller:
            if kinds not in made:
                every = types.BaseTuple.from_types([_type(x) for x in args])
                address = types.CPointer(every)
                signature = types.void(types.int64, types.int64, address)
                made[kinds] = routine(function, signature)
                places[kinds] = _loop().address, made[kinds].address
            _begin(*places[kinds], parts, *args)

    call.routines = made
    return call


@device
def share(size, part, parts):
    """The slice of range(size) that is part number `part` of `parts`.

    For functions that `team` compiles.
    """
    return slice(part * size // parts, (part + 1) * size // parts)


# %% [markdown]
# Here is a team that takes square roots. Each thread cuts its share out of
# both arrays and walks through it from 0, which spares every index the
# question whether it is negative and counts from the end.


# %% a team of threads
@team
def roots(part, parts, address):
    out, inp = arguments(address)
    mine = share(inp.size, part, parts)
    y, x = out[mine], inp[mine]
    for i in range(y.size):
        y[i] = math.sqrt(x[i])


squares = np.arange(1000.0) ** 2
one, many = np.empty((2, 1000))
with_threads(1, roots, one, squares)
with_threads(99, roots, many, squares)
verdict("one thread", np.array_equal(one, np.arange(1000.0)), "0 to 999")
verdict("all threads", np.array_equal(many, one), "the same bits")

# %% [markdown]
# ### The encoder's kernels
#
# The CPU functions take the names of the NumPy ones, so we keep those at
# hand under `reference`.

# %% keep the NumPy versions
reference = SimpleNamespace(forward=encoder_forward, backward=encoder_backward)

# %% imports of the CPU version tags=["export"] module="cpu.encoder"
from llmnb.cpu.jit import inner
from llmnb.shapes import COMPILED, shapes

# %% [markdown]
# How would threads share the backward pass? The rule asks for an owner of
# each element of `dwte`. Rows are bad property: a common token would keep
# one thread busy while the others wait, and to find the places of its
# tokens each thread would search the whole batch. Channels are good
# property. A thread takes a slice of 64 channels and walks through the
# whole batch with it; all slices are equal work, and every element adds up
# its terms in the order of the text. The position table has the same
# owners, and each row of `dout` is read once for both.

# %% slices of channels
from numba import prange

from llmnb.cpu.jit import kernel

SLICE = 64  # channels that one thread owns at a time: 256 bytes of a row


@kernel
def sliced_backward(dwte, dwpe, dout, inp):
    B, T, C = dout.shape
    for s in prange((C + SLICE - 1) // SLICE):
        first, last = s * SLICE, min((s + 1) * SLICE, C)
        for b in range(B):
            for t in range(T):
                token = inp[b, t]
                for c in range(first, last):
                    dwte[token, c] += dout[b, t, c]
                    dwpe[t, c] += dout[b, t, c]


# %% [markdown]
# It keeps the rule, and it is not what we export. The encoder is one
# addition for every few bytes, so its time is that of moving rows through
# memory, and memory is fastest when whole rows are read from end to end.
# The slices take every row in a dozen short pieces, at a dozen different
# times. Nor is there much to share: the layer runs once in a step, beside
# twelve blocks of matrix products. One thread that goes through the text
# row by row is hard to beat. So both kernels of the encoder run on one
# thread, as `inner` compiles them. Below we measure whether that was wise.
#
# The texts of the batch follow each other in memory: B·T rows, of which row
# $n$ stands at position $n \bmod T$ of its text.


# %% the kernels tags=["exporti"] module="cpu.encoder"
@inner
def _encoder_forward(out, inp, wte, wpe, T):
    rows, C = out.shape
    for n in range(rows):
        y, token, position = out[n], wte[inp[n]], wpe[n % T]
        for c in range(C):
            y[c] = token[c] + position[c]


@inner
def _encoder_backward(dwte, dwpe, dout, inp, T):
    rows, C = dout.shape
    for n in range(rows):
        dtoken, dposition, dy = dwte[inp[n]], dwpe[n % T], dout[n]
        for c in range(C):
            dtoken[c] += dy[c]
            dposition[c] += dy[c]


# %% [markdown]
# Each element adds up its terms in the order of the text, as in the slices.
# Rows of absent tokens are never touched, so the time is that of B·T·C
# additions whatever the size of the vocabulary.

# %% [markdown]
# **Checks.** A compiled kernel does not check its indices: token 60000
# would read, or worse, write, memory that belongs to something else. So the
# public functions look first, by the same line as the reference, and take
# int32 alone: for each other type of integer numba would compile again.


# %% encoder, forward tags=["export"] module="cpu.encoder"
@shapes("B T C!, B T of Vp, Vp C, T+ C", COMPILED)
def encoder_forward(out, inp, wte, wpe):
    """Sum the vector of each token and the vector of its position.

    out   (B, T, C)      float32 or float64, overwritten
    inp   (B, T)         int32, each in [0, Vp)
    wte   (Vp, C)        as out, the table of tokens
    wpe   (max_T, C)     as out, the table of positions; T <= max_T

    Raises TypeError or ValueError where an array does not fit, a token is
    out of range or T exceeds max_T.
    """
    rows = out.reshape(inp.size, out.shape[2])
    _encoder_forward(rows, inp.reshape(-1), wte, wpe, inp.shape[1])


# %% encoder, backward tags=["export"] module="cpu.encoder"
@shapes("Vp C!, T+ C!, B T C, B T of Vp", COMPILED)
def encoder_backward(dwte, dwpe, dout, inp):
    """Add dout's rows to the rows of the tables that they came from.

    dwte  (Vp, C)        as dout, added to; rows of absent tokens stay
    dwpe  (max_T, C)     as dout, added to; rows from T on stay
    dout  (B, T, C)      float32 or float64
    inp   (B, T)         int32, as in the forward pass

    Raises as `encoder_forward` does. One thread adds all rows in the order
    of the text.
    """
    rows = dout.reshape(inp.size, dout.shape[2])
    _encoder_backward(dwte, dwpe, rows, inp.reshape(-1), inp.shape[1])


# %% [markdown]
# The verdict, first on the problem of the proof:

# %% the same gradients from the kernels
for name, got, numeric in zip(
    ("dwte", "dwpe"), gradients(encoder_backward), want, strict=True
):
    compare(name, got, numeric, tol=1e-8)


# %% a problem of any size
def problem(B, T, C, Vp, dtype=np.float32):
    p = SimpleNamespace(inp=rng.integers(0, Vp, (B, T), dtype=np.int32))
    p.wte = rng.normal(size=(Vp, C)).astype(dtype)
    p.wpe = rng.normal(size=(1024, C)).astype(dtype)
    p.dwte, p.dwpe = np.zeros_like(p.wte), np.zeros_like(p.wpe)
    p.out, p.dout = rng.normal(size=(2, B, T, C)).astype(dtype)
    return p


cpu = SimpleNamespace(forward=encoder_forward, backward=encoder_backward)


def run(p, layer):
    layer.forward(p.out, p.inp, p.wte, p.wpe)
    layer.backward(p.dwte, p.dwpe, p.dout, p.inp)


sliced = SimpleNamespace(forward=encoder_forward, backward=sliced_backward)

# %% float32, odd sizes: against NumPy, and the slices against one thread
p = problem(3, 37, 51, 331)
results = {}
for name, n, layer in (
    ("numpy", 1, reference),
    ("cpu", 1, cpu),
    ("sliced", 99, sliced),
):
    for grad in (p.dwte, p.dwpe):
        grad[...] = 0
    with_threads(n, run, p, layer)
    results[name] = [a.copy() for a in (p.out, p.dwte, p.dwpe)]
for i, name in enumerate(("out", "dwte", "dwpe")):
    compare(name, results["cpu"][i], results["numpy"][i])
for i, name in ((1, "dwte"), (2, "dwpe")):
    same = np.array_equal(results["cpu"][i], results["sliced"][i])
    verdict(f"{name}, sliced", same, "the same bits")

# %% [markdown]
# Rows that no token points to are left alone, here the odd ones, and what
# does not fit is refused:

# %% absent tokens are left alone
p.inp //= 2
p.inp *= 2
p.dwte[...] = 7
encoder_backward(p.dwte, p.dwpe, p.dout, p.inp)
verdict("odd rows", (p.dwte[1::2] == 7).all(), "not touched")
verdict("even rows", (p.dwte[::2] != 7).any(), "added to")

# %% what does not fit
long = np.zeros((1, 1025), np.int32)
for out, inp in (
    (p.out, p.inp + 300),
    (p.out, p.inp.astype(np.int64)),
    (p.out[:, ::-1], p.inp),
    (np.zeros((1, 1025, 51), np.float32), long),
):
    try:
        encoder_forward(out, inp, p.wte, p.wpe)
        verdict("bad input", False, "is refused")
    except (TypeError, ValueError) as error:
        print(error)

# %% NumPy against the kernels tags=["nbval-ignore-output"]
p = problem(4, 256, 768, 50304)
calls = {
    "forward": (p.out, p.inp, p.wte, p.wpe),
    "backward": (p.dwte, p.dwpe, p.dout, p.inp),
}
print(f"{machine()}, {numba.get_num_threads()} threads")
times = {}
for name, args in calls.items():
    slow = fastest(getattr(reference, name), *args, runs=5)
    times[name] = fast = fastest(getattr(cpu, name), *args)
    print(f"{name:<9} NumPy {slow * 1e3:7.2f} ms, numba {fast * 1e3:6.2f} ms")
    print(f"{'':<9} {slow / fast:.1f} times as fast")
shared = fastest(sliced_backward, *calls["backward"])
print(f"backward in slices, all threads: {shared * 1e3:.2f} ms")

# %% [markdown]
# The last line is the answer to our question. On a machine with many cores
# and fast memory the slices may win, by a time that no training step
# notices. What everybody notices is the wait at the very first step, while
# the kernels are compiled. `py_func` is the Python function that a compiled
# one was made from, so we can compile both once more and look at the clock:

# %% seconds to compile tags=["nbval-ignore-output"]
small = problem(1, 2, 8, 5)
grads = small.dwte, small.dwpe
flat = small.dout[0], small.inp[0], 2
sliced_anew = kernel(sliced_backward.py_func)
single_anew = inner(_encoder_backward.py_func)
seconds = fastest(sliced_anew, *grads, small.dout, small.inp, runs=1)
print(f"slices, prange  {seconds:.2f} s")
print(f"one thread      {fastest(single_anew, *grads, *flat, runs=1):.2f} s")

# %% [markdown]
# ## Count it
#
# Forward takes one addition for each of the B·T·C elements, backward two.
# In bytes: forward reads a row of `wte` and a row of `wpe` for each token
# and writes a row of `out`; the position rows are the same for each text
# and stay in cache. Backward reads `dout`, and reads and writes a row of
# `dwte`.

# %% FLOPs and bytes
B, T, C, Vp = 4, 256, 768, 50304
elements = B * T * C
traffic = {"forward": 2 * 4 * elements, "backward": 3 * 4 * elements}
flops = {"forward": elements, "backward": 2 * elements}
for name in traffic:
    ratio = flops[name] / traffic[name]
    print(f"{name:<9} {traffic[name]:>10,} bytes, {ratio:.2f} FLOP a byte")
print(f"wte       {4 * Vp * C:>10,} bytes")

# %% [markdown]
# An eighth of an operation a byte and a little more: memory decides. To
# predict the time, we measure how fast this machine copies an array that
# fits in no cache.

# %% predicted against measured time tags=["nbval-ignore-output"]
a, b = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * a.nbytes / fastest(np.copyto, a, b, runs=5)
print(f"copy: {bandwidth / 1e9:.1f} GB/s")
for name, moved in traffic.items():
    ms = moved / bandwidth * 1e3
    print(f"{name:<9} {ms:.2f} ms predicted, {times[name] * 1e3:.2f} measured")
print(f"zero dwte {fastest(p.dwte.fill, 0, runs=5) * 1e3:.2f} ms")

# %% [markdown]
# A time below the prediction means that the rows were still in a cache from
# the run before. One above it has to do with the order: the copy runs
# straight through memory, the encoder jumps to another row of the table for
# each token. The last line shows where the cost of an embedding lies. The table is much
# larger than the rows that a batch reads, and to set its gradient to zero
# takes longer than to compute it. The same holds for the optimiser, which
# visits every parameter. The encoder saves nothing for its backward pass: zero
# activations but its output, which the next layer needs.

# %% [markdown]
# ## See it
#
# Take a short text, one token a letter, and a random gradient `dout` with
# eight channels. The left panel is the transposed one-hot matrix of (1.5.2):
# a row for each letter of the alphabet, a column for each position. The
# right panel is `dwte`: its row for a letter is the sum of `dout`'s rows at
# the positions marked on its left.

# %% the gradient of a short text
text, letters = "to be or not to be", " abcdefghijklmnopqrstuvwxyz"
inp = np.array([[letters.index(c) for c in text]], dtype=np.int32)
dout = rng.normal(size=(1, len(text), 8))
dwte, dwpe = np.zeros((len(letters), 8)), np.zeros((len(text), 8))
encoder_backward(dwte, dwpe, dout, inp)
print(int(dwte.any(axis=1).sum()), "of", len(letters), "rows get a gradient")

# %% draw it
fig, (left, right) = plt.subplots(
    1, 2, figsize=(8, 6), dpi=100, sharey=True, width_ratios=(18, 10)
)
rows = np.arange(len(letters))
for row in np.unique(inp):
    for ax in (left, right):
        ax.axhspan(row - 0.5, row + 0.5, color=PALETTE["pale"], zorder=0)
left.scatter(np.arange(len(text)), inp[0], s=60, color=PALETTE["blue"])
left.set_xticks(np.arange(len(text)), list(text.replace(" ", "␣")))
left.set_yticks(rows, list(letters.replace(" ", "␣")))
left.set(title="where each letter stands", xlabel="the text, by position")
shown = np.where(dwte.any(axis=1, keepdims=True), dwte, np.nan)
image = right.imshow(shown, cmap="RdBu_r", vmin=-4, vmax=4, aspect="auto")
right.set_xticks(range(8))
right.set(title="dwte", xlabel="channel")
fig.colorbar(image, ax=right, label="gradient")
left.set(xlim=(-0.7, len(text) - 0.3), ylim=(len(letters) - 0.5, -0.5))
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.5.2. Six letters and the space occur in "to be or not to be", and
# only their rows of the gradient are coloured; the rows of all other
# letters stay empty. The row of o collects four positions, the row of n
# one.*

# %% [markdown]
# ## Take away
#
# - The encoder adds a row of the token table and a row of the position
#   table. It is a linear layer on one-hot rows, computed as a lookup.
# - Backward adds each row of `dout` to the row it came from. Repeated tokens
#   add up, and `dwte[inp] += dout` would lose them.
# - numba compiles a loop for the types it meets; fastmath and NumPy's error
#   model together let it use vector instructions.
# - A `prange` over outputs, each summed by one thread in a fixed order,
#   gives the same bits for any number of threads.

# %% [markdown]
# ## Design note
#
# GPT-2 learns its position vectors. The first transformer used fixed waves
# of sine and cosine instead, and later models turn the queries and keys of
# attention by an angle that grows with the position. A learned table costs
# max_T·C parameters and ends at max_T: there is no vector for position
# 1024, and that is why the length of the text is checked. We keep it,
# because GPT-2 has it.
#
# For the backward pass we could have sorted the tokens and let one thread
# sum each group of equal ones, as a GPU program may prefer, with thousands
# of threads to feed. It needs room for the sorted order and balance between
# rare and common tokens. On a CPU one thread in the order of the text is
# the shortest program, and its only rivals for the memory are the other
# threads that it does not start.

# %% [markdown]
# ## Exercises
#
# **1** (★). A batch has B = 4 texts of T = 64 tokens, the vocabulary 50257.
# At most how many rows of `dwte` and of `dwpe` get a gradient from the
# encoder? Write it for any B, T and V, and check it on a batch without
# repeats.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# At most $\min(B T, V) = 256$ rows of `dwte`, and exactly $T = 64$ rows of
# `dwpe`, whatever the tokens are.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
def touched_rows(B, T, V):
    return min(B * T, V), T


# %% exercise 1, checked
dwte, dwpe = np.zeros((50257, 1)), np.zeros((1024, 1))
distinct = rng.permutation(50257)[:256].reshape(4, 64).astype(np.int32)
encoder_backward(dwte, dwpe, np.ones((4, 64, 1)), distinct)
counted = np.count_nonzero(dwte), np.count_nonzero(dwpe)
verdict("rows", counted == touched_rows(4, 64, 50257), "counted as predicted")

# %% [markdown]
# **2** (★★). The encoder is blind to one change of its parameters: add a
# vector $u$ to every row of `wte`, subtract it from every row of `wpe`, and
# the output stays the same. What does that say about the gradients? Find
# the equation that ties `dwte` to `dwpe`, and derive it from (1.5.4) and
# (1.5.5) as well.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The loss does not change along this direction, so the gradient has no
# component along it: $\sum_v dE_{v,j} - \sum_t dP_{t,j} = 0$ for each
# channel $j$. From (1.5.4) and (1.5.5): summed over $v$ or over $t$, both are
# $\sum_{b,t} dy_{b,t,j}$.
# :::


# %% exercise 2, a solution tags=["hide-cell"]
def tie(dwte, dwpe):
    return dwte.sum(axis=0) - dwpe.sum(axis=0)


# %% exercise 2, checked
p = problem(3, 20, 6, 11, np.float64)
encoder_backward(p.dwte, p.dwpe, p.dout, p.inp)
compare("the tie", tie(p.dwte, p.dwpe), np.zeros(6), tol=1e-12)

# %% [markdown]
# **3** (★★). Write (1.5.4) in NumPy without `np.add.at` and without a loop:
# sort the places by token, then sum each group of equal tokens.
# `np.argsort`, `np.unique` with `return_index` and `np.add.reduceat` are
# enough.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# A stable sort brings equal tokens together and keeps the order of the text
# within each group. `np.unique` gives each token once, so the last line may
# use `+=`: there are no repeats left to lose.
# :::


# %% exercise 3, a solution tags=["hide-cell"]
def by_sorting(dwte, dout, inp):
    order = np.argsort(inp, axis=None, kind="stable")
    tokens, first = np.unique(inp.ravel()[order], return_index=True)
    rows = dout.reshape(-1, dout.shape[-1])[order]
    dwte[tokens] += np.add.reduceat(rows, first, axis=0)


# %% exercise 3, checked
got = np.zeros_like(p.dwte)
by_sorting(got, p.dout, p.inp)
compare("by sorting", got, p.dwte, tol=1e-12)

# %% [markdown]
# **4** (★★★). Write a race-free kernel with other owners: each turn of the
# `prange` owns a range of *tokens*, walks through all of `inp` and adds the
# rows of its own. Is it bit-identical to ours? What does it cost with eight
# owners, and on which texts is it slow?
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# It is bit-identical: each element of `dwte` adds the same terms in the
# order of the text. Every owner reads all of `inp`, which is little, since
# a token is one number and its row C numbers. It is slow when most tokens
# of a text belong to one owner; a text of one letter runs on one thread.
# :::


# %% exercise 4, a solution tags=["hide-cell"]
@kernel
def by_token(dwte, dout, inp, owners):
    B, T, C = dout.shape
    for owner in prange(owners):
        first = owner * len(dwte) // owners
        last = (owner + 1) * len(dwte) // owners
        for b in range(B):
            for t in range(T):
                if first <= inp[b, t] < last:
                    for c in range(C):
                        dwte[inp[b, t], c] += dout[b, t, c]


# %% exercise 4, checked
p = problem(3, 37, 51, 331)
encoder_backward(p.dwte, p.dwpe, p.dout, p.inp)
got = np.zeros_like(p.dwte)
by_token(got, p.dout, p.inp, 8)
verdict("by token", np.array_equal(got, p.dwte), "the same bits")

# %% [markdown]
# ## Further reading
#
# - Bengio et al. (2003),
#   [A Neural Probabilistic Language Model](https://www.jmlr.org/papers/v3/bengio03a.html):
#   section 2, where a table of word vectors is trained with the network.
# - Vaswani et al. (2017),
#   [Attention Is All You Need](https://arxiv.org/abs/1706.03762):
#   sections 3.4 and 3.5, embeddings and the fixed waves of position.
# - Press and Wolf (2017),
#   [Using the Output Embedding to Improve Language Models](https://arxiv.org/abs/1608.05859):
#   the case for one table at both ends of the model.
# - Lam, Pitrou and Seibert (2015),
#   [Numba: a LLVM-based Python JIT compiler](https://doi.org/10.1145/2833157.2833162):
#   how types are inferred and code is made.
# - Goldberg (1991),
#   [What Every Computer Scientist Should Know About Floating-Point Arithmetic](https://doi.org/10.1145/103162.103163):
#   why the order of a sum changes its last bits.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.5")
