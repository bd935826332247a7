# Written by `make export` from notebooks/appendix/12_poster.py: edit that file.

"""The wiring of GPT-2: every array, forward and backward."""

__all__ = ["draw_wiring", "wiring_figure"]


# imports of the wiring
import matplotlib.pyplot as plt
from matplotlib.patches import Circle

from llmnb.book.diagram import PALETTE, draw_arrow, draw_rounded


# places
FORWARD, BACK = PALETTE["ink"], PALETTE["orange"]
TABLE, STREAM, DSTREAM = 7.5, 37.0, 47.0  # what runs from top to bottom
COLUMNS = 74.0, 111.0, 151.0  # the middles of the boxes
HALF = 12.5, 14.0, 10.0  # and half their widths
LANE = 2.4  # from the middle of a road to each of its lanes
ADD = 2.3  # the radius of a circle


def _side(column, way):
    """Where the side of a column's box is: -1 the left, 1 the right."""
    return COLUMNS[column] + way * HALF[column]


# the pen
class Pen:
    """What a wiring is drawn with: roads, boxes, names and circles.

    ax: matplotlib's axes. size: of the letters, in points.
    """

    def __init__(self, ax, size):
        self.ax, self.size = ax, size

    def road(self, points, colour=FORWARD):
        """An arrow through these points."""
        draw_arrow(self.ax, points, color=colour, linewidth=1.1)

    def trunk(self, x, ends, colour, heads):
        """A thick line from one end to the other, with arrow heads on it."""
        start, stop = ends
        self.ax.plot([x, x], ends, color=colour, lw=2.6, zorder=1)
        way = 1 if stop > start else -1
        for y in heads:
            self.road([(x, y - way), (x, y + 2 * way)], colour)

    def name(self, x, y, text, colour=FORWARD, smaller=0, **how):
        """The name of an array."""
        how = {"ha": "center", "va": "center", "zorder": 7} | how
        how = {"family": "monospace", "size": self.size - smaller} | how
        self.ax.text(x, y, text, color=colour, **how)

    def note(self, x, y, text, colour=FORWARD, **how):
        """A word that is no array's name."""
        how = {"family": "sans-serif", "linespacing": 1.1} | how
        self.name(x, y, text, colour, **how)

    def link(self, column, y, text, way=1):
        """Both lanes between a column's box and the next one's, with names.

        text: the array's name. way: 1 where it goes to the right, -1 else;
        the upper lane goes to the right, and the lower one to the left.
        """
        left, right = _side(column, 1), _side(column + 1, -1)
        words = [(text, FORWARD), (f"d{text}", BACK)][::way]
        for low, (word, colour) in zip((-1, 1), words, strict=True):
            ends = [(left, y + low * LANE), (right, y + low * LANE)]
            self.road(ends[::-low], colour)
            self.name((left + right) / 2, y + 2 * low * LANE, word, colour)

    def box(self, x, y, half, title, weights="", height=13.0):
        """A layer, with the names of its weights and of their gradients."""
        style = {"facecolor": PALETTE["pale"], "edgecolor": PALETTE["grey"]}
        corner = x - half, y - height / 2
        draw_rounded(self.ax, corner, 2 * half, height, 1.5, zorder=3, **style)
        self.note(x, y - 3.6 * bool(weights), title, weight="bold")
        back = " ".join(f"d{w}" for w in weights.split())
        self.name(x, y + 0.5, weights, smaller=0.8)
        self.name(x, y + 4.1, back, BACK, smaller=0.8)

    def add(self, x, y, colour=FORWARD):
        """A circle where arrays add up."""
        circle = Circle((x, y), ADD, fc="white", ec=colour, lw=1.7, zorder=5)
        self.ax.add_patch(circle)
        for dx, dy in ((1.3, 0), (0, 1.3)):
            xs, ys = [x - dx, x + dx], [y - dy, y + dy]
            self.ax.plot(xs, ys, color=colour, lw=1.4, zorder=6)


# half a block
LOOPS = {
    "residual2": (
        ("LayerNorm", "ln1w ln1b"),
        ("linear", "qkvw qkvb"),
        ("attention", ""),
        ("linear", "attprojw attprojb"),
        ("ln1", "qkv", "atty"),
    ),
    "x": (
        ("LayerNorm", "ln2w ln2b"),
        ("linear", "fcw fcb"),
        ("GELU", ""),
        ("linear", "fcprojw fcprojb"),
        ("ln2", "fch", "fch_gelu"),
    ),
}


def _out(pen, y, boxes, arrays, end=DSTREAM):
    """The road out of the stream, and its gradients' way back to `end`."""
    for k in (0, 1):
        pen.box(COLUMNS[k], y, HALF[k], *boxes[k])
        pen.link(k, y, arrays[k])
    pen.road([(STREAM, y - LANE), (_side(0, -1), y - LANE)])
    pen.road([(_side(0, -1), y + LANE), (end, y + LANE)], BACK)


def _in(pen, low, box, array, total):
    """The road back into the stream, and its gradients' way out."""
    there, back = low + LANE, low - LANE
    pen.box(COLUMNS[1], low, HALF[1], *box)
    pen.link(1, low, array, way=-1)
    pen.road([(_side(1, -1), there), (STREAM + ADD, there)])
    pen.road([(DSTREAM, back), (_side(1, -1), back)], BACK)
    pen.name(DSTREAM + 2, back - LANE, "dx", BACK, ha="left")
    pen.add(STREAM, there)
    pen.name(STREAM - 2, there + 5, total, ha="right")


# a block
def _block(pen, top):
    """The frame of a block and the two halves in it."""
    style = {"facecolor": "none", "edgecolor": PALETTE["grey"], "ls": "--"}
    draw_rounded(pen.ax, (18, top), 145, 112, 3, **style)
    pen.note(161, top + 108, "block i of L", ha="right")
    pen.name(STREAM - 2, top + 6, "x", ha="right")
    for start, (total, loop) in zip((13, 69), LOOPS.items(), strict=True):
        y = top + start
        _out(pen, y, loop, loop[4], DSTREAM + ADD)
        pen.add(DSTREAM, y + LANE, BACK)
        pen.box(COLUMNS[2], y + 13.5, HALF[2], *loop[2], height=40)
        _in(pen, y + 27, loop[3], loop[4][2], total)
    pen.add(_side(1, -1), top + 13 + LANE, BACK)
    small = {"size": pen.size - 1}
    share = "three shares: of q, k and v"
    pen.note(_side(1, -1), top + 23, share, BACK, **small)
    pen.note(COLUMNS[2], top + 33, "of q, k, v", **small)
    words = "a key and a\nvalue hear from\nall later t"
    pen.note(COLUMNS[2], top + 40, words, BACK, size=pen.size - 1.5)


# before and after the blocks
def _encoder(pen):
    middle = (STREAM + DSTREAM) / 2
    pen.box(middle, 16, 12, "encoder", height=9)
    pen.name(middle, 4, "tokens")
    pen.road([(middle, 6), (middle, 11.5)])
    pen.box(COLUMNS[1], 16, HALF[1], "positions", "wpe")
    there, back = 16 - LANE, 16 + LANE
    pen.road([(_side(1, -1), there), (middle + 12, there)])
    pen.road([(middle + 12, back), (_side(1, -1), back)], BACK)


def _head(pen, y):
    boxes = ("LayerNorm", "lnfw lnfb"), ("linear",)
    _out(pen, y, boxes, ("lnf", "logits"))
    pen.box(COLUMNS[2], y, HALF[2], "softmax,\ncross-\nentropy")
    x = COLUMNS[2]
    pen.road([(x + 3, y - 14), (x + 3, y - 6.5)])
    pen.name(x + 1, y - 12, "targets", ha="right")
    pen.road([(x - 3, y + 6.5), (x - 3, y + 15)])
    pen.name(x - 5, y + 13, "loss", ha="right")
    pen.road([(x + 3, y + 15), (x + 3, y + 6.5)], BACK)
    pen.name(x + 5, y + 13, "1", BACK, ha="left")


# the table of tokens
def _table(pen, head):
    """wte, which is read at both ends of the model."""
    right, low, x = TABLE + 5, head + 19, COLUMNS[1]
    pen.box(TABLE, 99, 5, "", height=198)
    pen.note(TABLE, 60, "tokens: wte", weight="bold", rotation=90)
    pen.name(TABLE, 130, "dwte", BACK, rotation=90)
    lane, edge = right + 2.9, (STREAM + DSTREAM) / 2 - 12
    pen.road([(right, 16 - LANE), (edge, 16 - LANE)])
    up = (edge, 16 + LANE), (lane, 16 + LANE), (lane, 130 - ADD)
    pen.road(up, BACK)
    under = head + 6.5
    pen.road([(right, low), (x - LANE, low), (x - LANE, under)])
    far = low + 2 * LANE
    down = (x + LANE, under), (x + LANE, far), (lane, far), (lane, 130 + ADD)
    pen.road(down, BACK)
    pen.add(lane, 130, BACK)


# the wiring
def draw_wiring(ax, size=8.0, part="model"):
    """Draw the wiring of GPT-2 on matplotlib's axes.

    size: of the letters, in points. part: "model", or "block" for one block
    alone. Raises ValueError for another part.

    Derived in chapter A.12.
    """
    if part not in ("model", "block"):
        raise ValueError(f"draw_wiring: no part is called {part!r}")
    pen, top, head = Pen(ax, size), 32, 172
    pen.trunk(STREAM, (20, head - LANE), FORWARD, (24, 66, 122, 158))
    pen.trunk(DSTREAM, (head + LANE, 20), BACK, (156, 100, 34, 25))
    _block(pen, top)
    if part == "model":
        _encoder(pen)
        _head(pen, head)
        _table(pen, head)
    window = {"model": (0, 165, 199, -1), "block": (16, 165, 147, 29)}[part]
    ax.set(xlim=window[:2], ylim=window[2:])
    ax.set_aspect("equal")
    ax.axis("off")


def wiring_figure(part="model"):
    """Show the wiring of GPT-2, or of one block, as a figure.

    Derived in chapter A.12.
    """
    height = 6.0 if part == "block" else 9.1
    fig, ax = plt.subplots(figsize=(7.6, height), dpi=100)
    fig.subplots_adjust(0, 0, 1, 1)
    draw_wiring(ax, part=part)
    plt.show()
