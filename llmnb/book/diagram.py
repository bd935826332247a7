# Written by `make export` from notebooks/appendix/11_proofs.py: edit that file.

"""The diagram of GPT-2, and the colours of all figures."""

__all__ = [
    "BOXES", "PALETTE", "draw_arrow", "draw_arrows", "draw_box",
    "draw_rounded", "gpt2_diagram",
]


# imports of the diagram
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
    ("encoder", "encoder", 2.0, 0.0),
    ("layernorm", "layernorm", 0.0, -1.25),
    ("matmul\nq, k, v", "matmul", 1.0, -1.25),
    ("attention", "attention", 2.0, -1.25),
    ("matmul\nprojection", "matmul", 3.0, -1.25),
    ("residual  +", "residual", 4.0, -1.25),
    ("layernorm", "layernorm", 0.0, -2.2),
    ("matmul\nup to 4C", "matmul", 1.0, -2.2),
    ("GELU", "gelu", 2.0, -2.2),
    ("matmul\ndown to C", "matmul", 3.0, -2.2),
    ("residual  +", "residual", 4.0, -2.2),
    ("layernorm", "layernorm", 0.0, -3.45),
    ("matmul\nlogits", "matmul", 1.0, -3.45),
    ("softmax and\ncross-entropy", "crossentropy", 2.0, -3.45),
    ("loss", "crossentropy", 3.0, -3.45),
    ("AdamW", "adamw", 4.0, -3.45),
]


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
    weight = "bold" if lit else "normal"
    style = {"size": 10, "weight": weight, "linespacing": 1.15}
    ax.text(x, y, label, ha="center", va="center", color=ink, **style)


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
def draw_arrows(ax):
    """Draw the arrows between neighbours, rows, and past each half block.

    Derived in chapter A.11.
    """
    rows = {y: [b[2] for b in BOXES if b[3] == y] for _, _, _, y in BOXES}
    for y, xs in rows.items():
        for x in xs[:-1]:
            draw_arrow(ax, [(x + 0.43, y), (x + 0.57, y)])
    ends = [(2.0, 0.0), (4.0, -1.25), (4.0, -2.2)]
    for (x, y), below in zip(ends, (-1.25, -2.2, -3.45), strict=True):
        middle = below + 0.39
        down = [(x, y - 0.27), (x, middle), (0.0, middle), (0.0, below + 0.27)]
        draw_arrow(ax, down)
    for y in (-1.25, -2.2):
        top = y + 0.39
        draw_arrow(ax, [(0.0, top), (4.0, top), (4.0, y + 0.27)])


# the diagram
def gpt2_diagram(lit=None):
    """Draw GPT-2's forward pass, one box a layer, with some boxes lit.

    lit: None, or one of "tokens", "encoder", "layernorm", "matmul",
    "attention", "gelu", "residual", "crossentropy", "adamw", or "all".
    Raises ValueError for another name. Shows a matplotlib figure of
    8 by 4.6 inches at 100 dots an inch.

    Derived in chapter A.11.
    """
    names = {box[1] for box in BOXES} | {None, "all"}
    if lit not in names:
        raise ValueError(f"gpt2_diagram: no layer is called {lit!r}")
    fig, ax = plt.subplots(figsize=(8, 4.6), dpi=100)
    pale = {"facecolor": PALETTE["pale"], "edgecolor": "none"}
    draw_rounded(ax, (-0.52, -2.78), 5.08, 2.12, 0.1, **pale)
    ax.text(4.5, -0.62, "one block, L times", ha="right", size=10)
    for label, name, x, y in BOXES:
        draw_box(ax, label, x, y, lit in (name, "all"))
    draw_arrows(ax)
    ax.set(xlim=(-0.55, 4.6), ylim=(-3.8, 0.35))
    ax.axis("off")
    fig.subplots_adjust(0, 0, 1, 1)
    plt.show()
