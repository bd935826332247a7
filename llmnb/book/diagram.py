# Written by `make export` from notebooks/appendix/11_proofs.py: edit that file.

"""The diagram of GPT-2, and the colours of all figures."""

__all__ = [
    "BLOCK", "BOXES", "GROUPS", "LAYERS", "LOOPS", "PALETTE", "draw_arrow",
    "draw_arrows", "draw_box", "draw_loop", "draw_rounded", "gpt2_diagram",
]


# imports of the diagram
import itertools

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch


# colours
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


# the boxes
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


# one box
def draw_rounded(ax, corner, width, height, radius, **style):
    """Draw a rectangle with round corners; corner: its least x and y.

    Derived in chapter A.11.
    """
    box = f"round,pad=0,rounding_size={radius}"
    shape = FancyBboxPatch(corner, width, height, boxstyle=box, **style)
    ax.add_patch(shape)


def draw_box(ax, label, x, y, lit):
    """Draw one box of the diagram with its middle at (x, y).

    Derived in chapter A.11.
    """
    edge = PALETTE["orange" if lit else "grey"]
    face, ink = (edge, "white") if lit else ("white", PALETTE["ink"])
    style = {"facecolor": face, "edgecolor": edge, "linewidth": 1.2}
    draw_rounded(ax, (x - 0.43, y - 0.27), 0.86, 0.54, 0.07, **style)
    style = {"size": 11, "linespacing": 1.0, "color": ink}
    ax.text(x, y, label, ha="center", va="center", **style)


# one arrow
def draw_arrow(ax, points, **style):
    """Draw an arrow through these points; style: of matplotlib's lines.

    Derived in chapter A.11.
    """
    style = {"color": PALETTE["ink"], "linewidth": 1.0, "zorder": 2} | style
    xs, ys = zip(*points[:-1], strict=True)
    ax.plot(xs, ys, solid_joinstyle="round", **style)
    head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0} | style
    ax.annotate("", points[-1], points[-2], arrowprops=head, zorder=2)


# the arrows
BLOCK = (-1.25, -2.2)  # the rows of a block


def draw_arrows(ax, lit=None):
    """Draw the arrows between neighbours, rows, and past each half block.

    lit: "arrays" lights them all, "block" those within the block.

    Derived in chapter A.11.
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


# the arrow that leads back
def draw_loop(ax, start, end):
    """Draw a lit arrow from below the last row to above the first.

    Derived in chapter A.11.
    """
    left, low, top = -0.62, -3.95, 0.5
    points = [(start, -3.72), (start, low), (left, low), (left, top)]
    points += [(end, top), (end, 0.27)]
    draw_arrow(ax, points, color=PALETTE["orange"], linewidth=1.8)


# the diagram
def gpt2_diagram(lit=None):
    """Draw GPT-2's forward pass, one box a layer, with some parts lit.

    lit: None; one of the layers "tokens", "batches", "encoder", "layernorm",
    "matmul", "attention", "gelu", "residual", "crossentropy", "adamw"; "all"
    of them; the "weights" that are drawn at random; the arrows of a "block",
    or of all "arrays"; or the loop of "training" or of "writing". Raises
    ValueError for another name. Shows a matplotlib figure of 5.6 by 4.8
    inches.

    Derived in chapter A.11.
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
