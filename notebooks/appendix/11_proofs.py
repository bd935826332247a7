# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       book.verify: "Proof helpers: comparisons, numerical gradients, verdicts."
#       book.diagram: "The diagram of GPT-2, and the colours of all figures."
#       book.moving: "Figures that move in the rendered book."
#       timing: "The fastest of some calls, and the name of the machine."
# ---

# %% [markdown]
# # Proofs: let a cell check each claim
#
# > A verdict, a central difference and a stopwatch: the three instruments of
# > this book, and the diagram that opens its chapters.
#
# *Reading time: 15 minutes. You need: partial derivatives.*

# %% [markdown]
# ## Where we are
#
# Every chapter claims something: that a formula is a gradient, that two
# programs compute the same, that one is faster. You need not believe any of
# it. Each claim stands beside a cell that checks it, and `pytest --nbval` runs
# the cell again. This chapter makes the instruments that those cells use, and
# the picture that shows where a chapter stands. At its end you can
#
# - read a verdict, and say what makes it fail;
# - choose the step of a central difference, and say how many digits it proves;
# - say why the shortest of several runs is the one to believe.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt
import numpy as np

# %% [markdown]
# ## The diagram
#
# Many chapters open with the same picture and light the part that they build.
# A box has a label, a name that lights it and a place; the arrows follow from
# the places. Some chapters build no box: the wiring of a block, the arrays
# that the arrows stand for, the loop of training. Their names light arrows.
# The letters are large for the picture's width, for those who read on a phone.

# %% imports of the diagram tags=["export"] module="book.diagram"
import itertools

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

# %% colours tags=["export"] module="book.diagram"
PALETTE = {
    "ink": "#1f2933",
    "grey": "#9aa5b1",
    "pale": "#eef1f4",
    "blue": "#0b6fb8",
    "orange": "#d95f02",
    "green": "#1b7f5c",
    "purple": "#7a4fa3",
    "yellow": "#f2b134",
}

# %% the boxes tags=["export"] module="book.diagram"
# label, the name that lights it, where the box's middle stands (x, y)
BOXES = [
    ("text", "tokens", 0.0, 0.0),
    ("tokens", "tokens", 1.0, 0.0),
    ("batches", "batches", 2.0, 0.0),
    ("encoder", "encoder", 3.0, 0.0),
    ("layernorm", "layernorm", 0.0, -1.25),
    ("matmul\nq, k, v", "matmul", 1.0, -1.25),
    ("attention", "attention", 2.0, -1.25),
    ("matmul\nprojection", "matmul", 3.0, -1.25),
    ("residual\n+", "residual", 4.0, -1.25),
    ("layernorm", "layernorm", 0.0, -2.2),
    ("matmul\nup to 4C", "matmul", 1.0, -2.2),
    ("GELU", "gelu", 2.0, -2.2),
    ("matmul\ndown to C", "matmul", 3.0, -2.2),
    ("residual\n+", "residual", 4.0, -2.2),
    ("layernorm", "layernorm", 0.0, -3.45),
    ("matmul\nlogits", "matmul", 1.0, -3.45),
    ("softmax,\ncross-\nentropy", "crossentropy", 2.0, -3.45),
    ("loss", "loss", 3.0, -3.45),
    ("AdamW", "adamw", 4.0, -3.45),
]
LAYERS = dict.fromkeys(box[1] for box in BOXES)
# names that light other boxes than their own
GROUPS = {
    "all": tuple(LAYERS),
    "arrays": (),
    "block": (),
    "crossentropy": ("crossentropy", "loss"),
    "training": (),
    "weights": ("encoder", "matmul"),
    "writing": ("crossentropy",),
}
# arrows that lead back: from which box of the last row to which of the first
LOOPS = {"training": (4.0, 2.0), "writing": (2.0, 1.0)}


# %% one box tags=["export"] module="book.diagram"
def draw_rounded(ax, corner, width, height, radius, **style):
    """Draw a rectangle with round corners; corner: its least x and y."""
    box = f"round,pad=0,rounding_size={radius}"
    shape = FancyBboxPatch(corner, width, height, boxstyle=box, **style)
    ax.add_patch(shape)


def draw_box(ax, label, x, y, lit):
    """Draw one box of the diagram with its middle at (x, y)."""
    edge = PALETTE["orange" if lit else "grey"]
    face, ink = (edge, "white") if lit else ("white", PALETTE["ink"])
    style = {"facecolor": face, "edgecolor": edge, "linewidth": 1.2}
    draw_rounded(ax, (x - 0.43, y - 0.27), 0.86, 0.54, 0.07, **style)
    style = {"size": 11, "linespacing": 1.0, "color": ink}
    ax.text(x, y, label, ha="center", va="center", **style)


# %% one arrow tags=["export"] module="book.diagram"
def draw_arrow(ax, points, **style):
    """Draw an arrow through these points; style: of matplotlib's lines."""
    style = {"color": PALETTE["ink"], "linewidth": 1.0, "zorder": 2} | style
    xs, ys = zip(*points[:-1], strict=True)
    ax.plot(xs, ys, solid_joinstyle="round", **style)
    head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0} | style
    ax.annotate("", points[-1], points[-2], arrowprops=head, zorder=2)


# %% the arrows tags=["export"] module="book.diagram"
BLOCK = (-1.25, -2.2)  # the rows of a block


def draw_arrows(ax, lit=None):
    """Draw the arrows between neighbours, rows, and past each half block.

    lit: "arrays" lights them all, "block" those within the block.
    """

    def arrow(points, y):
        bright = lit == "arrays" or (lit == "block" and y in BLOCK)
        style = {"color": PALETTE["orange"], "linewidth": 1.8, "zorder": 3}
        draw_arrow(ax, points, **(style if bright else {}))

    rows = {y: [b[2] for b in BOXES if b[3] == y] for _, _, _, y in BOXES}
    for y, xs in rows.items():
        for x in xs[:-1]:
            arrow([(x + 0.43, y), (x + 0.57, y)], y)
    for upper, y in itertools.pairwise(rows):
        x, middle = rows[upper][-1], y + 0.39
        down = [(x, upper - 0.27), (x, middle), (0.0, middle), (0.0, y + 0.27)]
        arrow(down, y)
    for y in BLOCK:
        top = y + 0.39
        arrow([(0.0, top), (4.0, top), (4.0, y + 0.27)], y)


# %% the arrow that leads back tags=["export"] module="book.diagram"
def draw_loop(ax, start, end):
    """Draw a lit arrow from below the last row to above the first."""
    left, low, top = -0.62, -3.95, 0.5
    points = [(start, -3.72), (start, low), (left, low), (left, top)]
    points += [(end, top), (end, 0.27)]
    draw_arrow(ax, points, color=PALETTE["orange"], linewidth=1.8)


# %% the diagram tags=["export"] module="book.diagram"
def gpt2_diagram(lit=None):
    """Draw GPT-2's forward pass, one box a layer, with some parts lit.

    lit: None; one of the layers "tokens", "batches", "encoder", "layernorm",
    "matmul", "attention", "gelu", "residual", "crossentropy", "adamw"; "all"
    of them; the "weights" that are drawn at random; the arrows of a "block",
    or of all "arrays"; or the loop of "training" or of "writing". Raises
    ValueError for another name. Shows a matplotlib figure of 5.6 by 4.8
    inches.
    """
    if lit not in {None, *LAYERS, *GROUPS}:
        raise ValueError(f"gpt2_diagram: nothing is called {lit!r}")
    fig, ax = plt.subplots(figsize=(5.6, 4.8), dpi=100)
    frame = {"edgecolor": PALETTE["orange"], "linewidth": 1.8}
    frame = frame if lit == "block" else {"edgecolor": "none"}
    corner, pale = (-0.52, -2.62), PALETTE["pale"]
    draw_rounded(ax, corner, 5.04, 1.92, 0.1, facecolor=pale, **frame)
    ax.text(4.5, -0.64, "one block, L times", ha="right", size=11)
    bright = GROUPS.get(lit, (lit,))
    for label, name, x, y in BOXES:
        draw_box(ax, label, x, y, name in bright)
    draw_arrows(ax, lit)
    if lit in LOOPS:
        draw_loop(ax, *LOOPS[lit])
    ax.set(xlim=(-0.7, 4.6), ylim=(-4.02, 0.56))
    ax.axis("off")
    fig.subplots_adjust(0, 0, 1, 1)
    plt.show()


# %% the diagram with one layer lit
gpt2_diagram(lit="attention")

# %% [markdown]
# *Figure A.11.1. The picture at the head of the chapter on attention. Text
# comes in at the top left; the loss and AdamW stand at the end.*
#
# ## Figures that move
#
# Some figures want to be stepped through. A notebook has the still picture;
# the rendered book can do more, without a kernel, if it is given the numbers.
# So a cell draws the still, and then calls `moving`, which hands the numbers to
# the book beside a line of text for whoever reads the notebook. The script that
# draws them is named by `kind`: it lies in `book/_static/move/`. The cell of
# figure 2.5.1, for instance, ends with `moving("softmax", "group by group",
# row=..., group=4)`: sixteen scores, which `softmax.js` takes four at a time.

# %% imports of figures that move tags=["export"] module="book.moving"
import json

from IPython.display import display

# %% numbers for a figure that moves tags=["export"] module="book.moving"
MIME = "application/vnd.llmnb.figure+json"


def moving(kind, said, **data):
    """Hand a figure's numbers to the rendered book, below its still picture.

    kind: the script book/_static/move/<kind>.js that draws it. said: what a
    notebook shows in its place. data: numbers, texts, lists and mappings of
    these, as JSON has them. They must be the same on every machine, since
    the notebook's test compares them. A notebook keeps them in one line.
    """
    facts = json.dumps({"kind": kind, **data}, separators=(",", ":"))
    display({"text/plain": said, MIME: facts}, raw=True)


# %% [markdown]
# ## Verdicts
#
# A derivation can be wrong on paper, and a program can be wrong although the
# derivation is right. So every claim of this book that can be computed is
# computed, and ends in a *verdict*: a line that says `ok`, or says `FAIL` and
# stops the notebook. When `pytest --nbval` runs the notebooks it compares
# these lines with the ones you see.

# %% imports of the proofs tags=["export"] module="book.verify"
import numpy as np


# %% a verdict tags=["export"] module="book.verify"
def verdict(name, ok, claim):
    """Print "name  claim  ok", or "FAIL" and raise AssertionError.

    `ok` is the truth of the claim; both texts are printed as they are.
    """
    print(f"{name:<16} {claim:<28} {'ok' if ok else 'FAIL'}")
    if not ok:
        raise AssertionError(f"{name}: not {claim}")


# %% compare two arrays tags=["export"] module="book.verify"
def compare(name, got, want, tol=1e-5):
    """Print a verdict on two arrays: is their largest difference below tol?

    The difference is taken relative to the largest element of `want` where
    that exceeds 1. Shapes that differ and NaN count as failure, which prints
    FAIL with the difference and raises AssertionError.
    """
    # no integers, whose differences may wrap around
    got, want = 1.0 * np.asarray(got), 1.0 * np.asarray(want)
    claim = f"max|diff| < {tol:.0e}"
    if got.shape != want.shape:
        verdict(name, False, f"shape {want.shape}, got {got.shape}")
    scale = max(1.0, np.abs(want).max(initial=0.0))
    error = np.abs(got - want).max(initial=0.0) / scale
    ok = bool(error < tol)
    verdict(name, ok, claim if ok else f"{claim}, got {error:.1e}")


# %% two verdicts
third = np.float32(1) / np.float32(3)
compare("a third", third, 1 / 3, tol=1e-7)
try:
    compare("a third", third, 1 / 3, tol=1e-9)
except AssertionError:
    print("stopped")

# %% [markdown]
# The difference is taken relative to the largest number of `want` when that
# exceeds 1, because float32 keeps about seven digits, wherever the point
# stands.
#
# ## Gradients
#
# A gradient is proved by central differences. For a function $f$ of one
# number, Taylor's theorem gives
#
# $$
# \begin{aligned}
# &\frac{f(x+h) - f(x-h)}{2h} \\
# &\quad {} = f'(x) + \frac{h^2}{6} f'''(x) + O(h^4) .
# \end{aligned}
# \tag{A.11.1}
# $$
#
# The error falls with $h^2$. But each of the two values in the numerator is
# known only to about $\epsilon\,|f|$, where $\epsilon$ is the spacing of
# floating-point numbers near 1. Divided by $2h$, that is an error of up to
# $\epsilon |f| / h$, which *grows* as $h$ falls. In float64, with
# $\epsilon \approx 2 \cdot 10^{-16}$, the two errors balance near
# $h = 10^{-5}$, and a gradient can be proved to about ten digits. In float32,
# with $\epsilon \approx 10^{-7}$, the best is about five digits, and fewer
# for a sum over thousands of terms: too few to tell a wrong formula from a
# rounded one. That is why the proofs of this book run in float64.


# %% central differences tags=["export"] module="book.verify"
def numerical_gradient(f, x, h=1e-5):
    """Central differences of a scalar function in every element of x.

    f takes no argument and reads x, a float64 array, which is changed in
    place element by element and restored. Returns an array like x. Raises
    TypeError for another dtype: in float32 the differences drown in rounding.
    """
    if x.dtype != np.float64:
        raise TypeError(
            f"numerical_gradient: x must be float64, got {x.dtype}"
        )
    grad = np.empty_like(x)
    for i in np.ndindex(x.shape):
        old = x[i]
        x[i] = old + h
        above = f()
        x[i] = old - h
        below = f()
        x[i] = old
        grad[i] = (above - below) / (2 * h)
    return grad


# %% a gradient we know
x = np.linspace(-2, 2, 5)
compare(
    "sum of sin", numerical_gradient(lambda: np.sin(x).sum(), x), np.cos(x)
)

# %% the error against the step
steps = 10.0 ** np.arange(-12, 0.1, 0.5)


def errors(dtype):
    at, h = dtype(1), steps.astype(dtype)
    got = (np.sin(at + h) - np.sin(at - h)) / (2 * h)
    return np.maximum(np.abs(got.astype(np.float64) - np.cos(1.0)), 1e-13)


fig, ax = plt.subplots(figsize=(7, 3.4), dpi=100)
ax.loglog(steps, errors(np.float64), "o-", color=PALETTE["blue"])
ax.loglog(steps, errors(np.float32), "s-", color=PALETTE["orange"])
ax.axvline(1e-5, color=PALETTE["grey"], lw=1, ls="--")
ax.text(2e-12, 1e-9, "float64", color=PALETTE["blue"])
ax.text(1e-9, 1e-2, "float32", color=PALETTE["orange"])
ax.set(xlabel="step h", ylabel="error of the central difference")
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure A.11.2. The derivative of sin at 1 by central differences. From the
# right the error falls with the square of the step, until rounding takes
# over. At the dashed line, h = 1e-5, float64 has about eleven digits and
# float32 three; float32 never has more than about five.*

# %% [markdown]
# ## Speed
#
# Speed is measured by the shortest of several runs, always next to
# something that does the same work in the same run, and the machine is named.

# %% imports of the stopwatch tags=["export"] module="timing"
import os
import platform
import timeit
from pathlib import Path


# %% a stopwatch tags=["export"] module="timing"
def fastest(function, *args, runs=15):
    """The shortest of several runs of function(*args), in seconds.

    Other programs on the machine can only make a run longer, so the
    shortest one says most about the function.
    """
    return min(timeit.repeat(lambda: function(*args), number=1, repeat=runs))


# %% the machine's name tags=["export"] module="timing"
def machine():
    """One line that names this machine's processor, system and Python."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return f"{cpu}, {platform.system()}, Python {platform.python_version()}"


# %% the cores tags=["export"] module="timing"
def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# %% time a sum tags=["nbval-ignore-output"]
print(machine())
x = np.ones(1 << 20)
print(f"NumPy sums a million numbers in {fastest(np.sum, x) * 1e6:.0f} us")

# %% [markdown]
# ## Take away
#
# - A claim is a verdict: a line that says `ok`, or stops the notebook.
# - A gradient is proved in float64, with a step of $10^{-5}$: the error of the
#   formula and that of rounding are then about equal.
# - The shortest of several runs says most about a program, and only beside
#   another program in the same run.

# %% [markdown]
# ## Exercises
#
# **1** (★★). One-sided differences, $(f(x+h) - f(x))/h$, need half as many
# evaluations. How many digits do they give in float64 at their best step?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Their error is $\tfrac h2 |f''| + \epsilon |f| / h$. It is least near
# $h = \sqrt\epsilon \approx 10^{-8}$, where both terms are about $10^{-8}$:
# eight digits, two or three fewer than the central form has.
# :::


# %% exercise 1 tags=["hide-cell"]
def one_sided(h):
    return abs((np.sin(1 + h) - np.sin(1)) / h - np.cos(1))


best = min(one_sided(h) for h in steps)

# %% exercise 1, checked
verdict("one-sided", 1e-10 < best < 1e-7, "is right to 8 digits")
verdict("central", errors(np.float64).min() < best / 10, "is better")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.11")
