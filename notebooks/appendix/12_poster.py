# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       book.wiring: "The wiring of GPT-2: every array, forward and backward."
#       book.poster: "The sheet that holds the whole model: its code, its wiring."
# ---

# %% [markdown]
# # The poster: a model on one sheet
#
# > The page of code and the wiring figure, drawn by a program, so that the sheet
# > cannot drift from the code unnoticed.
#
# *Reading time: 22 minutes. You need:
# [chapter 1.14](../1_by_hand/14_page.ipynb).*

# %% [markdown]
# ## Where we are
#
# [Chapter 1.14](../1_by_hand/14_page.ipynb) holds the whole model on one page, beside
# a figure of its wiring. Both should hang on a wall, and both should be right on the
# day after a line of the code was changed. So a program draws them. At the end of
# this chapter you can
#
# - draw the wiring of a model from the places of its boxes;
# - set a program in type, in colours, with nothing but matplotlib;
# - say how a drawing can tell that it is older than what it shows.

# %% [markdown]
# ## Setup

# %% setup
from pathlib import Path

from llmnb.book.verify import verdict

# %% imports of the wiring tags=["export"]
import matplotlib.pyplot as plt
from matplotlib.patches import Circle

from llmnb.book.diagram import PALETTE, draw_arrow, draw_rounded

# %% [markdown]
# ## Boxes and roads
#
# Two lines run from the top to the bottom: the stream, and its gradient. Each half
# block is a loop that leaves the stream to the right and comes back to it further
# down. A road of the loop has two lanes, one for the array and one for its gradient,
# which runs the other way. A unit of length is about a millimetre of the printed sheet.

# %% places tags=["exporti"]
FORWARD, BACK = PALETTE["ink"], PALETTE["orange"]
TABLE, STREAM, DSTREAM = 7.5, 37.0, 47.0  # what runs from top to bottom
COLUMNS = 74.0, 111.0, 151.0  # the middles of the boxes
HALF = 12.5, 14.0, 10.0  # and half their widths
LANE = 2.4  # from the middle of a road to each of its lanes
ADD = 2.3  # the radius of a circle


def _side(column, way):
    """Where the side of a column's box is: -1 the left, 1 the right."""
    return COLUMNS[column] + way * HALF[column]


# %% the pen tags=["exporti"]
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


# %% [markdown]
# ## Half a block
#
# A loop is four boxes: two on the road out, one at its far end, one on the road back.
# Attention's loop and the feed-forward loop differ in titles and names only.

# %% half a block tags=["exporti"]
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


# %% a block tags=["exporti"]
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


# %% [markdown]
# ## The ends
#
# Before the blocks stands the encoder, after them the last LayerNorm, the logits
# and the loss. `wte` is a column at the left, because both ends read it.


# %% before and after the blocks tags=["exporti"]
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


# %% the table of tokens tags=["exporti"]
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


# %% [markdown]
# ## The figure
#
# One function draws all of it on given axes, and another shows it in a notebook: the
# whole model, or one block, which is the same drawing seen through a smaller window.


# %% the wiring tags=["export"]
def draw_wiring(ax, size=8.0, part="model"):
    """Draw the wiring of GPT-2 on matplotlib's axes.

    size: of the letters, in points. part: "model", or "block" for one block
    alone. Raises ValueError for another part.
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
    """Show the wiring of GPT-2, or of one block, as a figure."""
    height = 6.0 if part == "block" else 9.1
    fig, ax = plt.subplots(figsize=(7.6, height), dpi=100)
    fig.subplots_adjust(0, 0, 1, 1)
    draw_wiring(ax, part=part)
    plt.show()


# %% one block tags=["hide-input"]
wiring_figure("block")

# %% [markdown]
# *Figure A.12.1. One block. Each half leaves the stream and comes back to it; its
# gradients go the same way against the arrows.*

# %% [markdown]
# ## The page, set in type
#
# What is printed is the module's text without its banner and its docstrings: those
# are for `help`, and the sheet has a figure to explain it. A pattern tells names, numbers and strings apart, Python says which names are
# keywords, and in a font whose letters have one width, the place of a word follows
# from its column.

# %% imports of the poster tags=["export"] module="book.poster"
import ast
import hashlib
import keyword
import re
import sys

from matplotlib.figure import Figure

from llmnb.book.diagram import PALETTE
from llmnb.book.export import ROOT
from llmnb.book.wiring import draw_wiring

# %% the page's text tags=["exporti"] module="book.poster"
PAGE = ROOT / "llmnb" / "reference" / "gpt2.py"
POSTER = ROOT / "book" / "poster.pdf"


def page_code(text):
    """The code of a module: no docstrings, no `__all__`.

    Returns lines; functions are parted by one blank line. A comment stays if
    it is within a function, or ends a line.
    """
    lines = text.splitlines()
    kept = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Expr) or "__all__" in lines[node.lineno - 1]:
            continue
        first, doc = node.lineno, range(0)
        if isinstance(node, (ast.FunctionDef, ast.Assign)):
            kept.append("")
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            doc = node.body[0]
            doc = range(doc.lineno, doc.end_lineno + 1)
        numbers = range(first, node.end_lineno + 1)
        kept += [lines[n - 1] for n in numbers if n not in doc]
    return kept


# %% words and their colours tags=["exporti"] module="book.poster"
# a comment, a string, a number, a name, or another sign
WORD = re.compile(r"""#.*|"[^"]*"|\d+(?:\.\d+)?(?:e-?\d+)?|\w+|[^\w\s]""")


def coloured_words(line):
    """The words of a line of Python: (column, word, name of a colour)."""
    for x in WORD.finditer(line):
        colour = "blue" if x[0][0].isdigit() else "ink"
        colour = "green" if x[0][0] == '"' else colour
        colour = "purple" if keyword.iskeyword(x[0]) else colour
        yield x.start(), x[0], colour


# %% a line in colours
for word in coloured_words('    return x @ p[name + "w"][i].T'):
    print(*word)

# %% [markdown]
# ## The sheet
#
# An A3 sheet on its side, in millimetres: the layers, then the model, then the
# wiring. A sheet on A4 paper is the same at seven tenths of the size.

# %% a column of code tags=["exporti"] module="book.poster"
SHEET = 420.0, 297.0  # A3
LETTER = 8.0  # points, of the code
STEP = 4.1  # from a line to the next
POINT = 25.4 / 72
WIDTH = 0.602 * LETTER * POINT  # of a letter of DejaVu Sans Mono


def _column(ax, x, y, lines):
    """Set lines of code one under the other, from (x, y) on."""
    style = {"family": "DejaVu Sans Mono", "size": LETTER, "va": "baseline"}
    for k, line in enumerate(lines):
        bold = line.startswith("def ")
        for at, word, colour in coloured_words(line):
            where = x + at * WIDTH, y + k * STEP
            weight = "bold" if bold and word != "def" else "normal"
            ax.text(
                *where, word, color=PALETTE[colour], weight=weight, **style
            )


# %% the sheet tags=["exporti"] module="book.poster"
TITLE = "GPT-2, forward and backward"
LEGEND = """\
Dark: the forward pass. Orange: gradients, flowing back.
A circle: arrays add up.
p, g: parameters and gradients, by name; i: the block.

(B, T)         tokens, targets
(B, T, C)      x, ln1, atty, residual2, ln2, lnf
(B, T, 3C)     qkv
(B, T, 4C)     fch, fch_gelu
(B, T, V)      logits

Proved in chapter 1.14 of llmnb."""


def draw_poster(text):
    """The sheet as a matplotlib Figure; text: of the page's module."""
    fig = Figure(figsize=[x / 25.4 for x in SHEET])
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, SHEET[0]), ylim=(SHEET[1], 0))
    ax.axis("off")
    ink, lines = PALETTE["ink"], page_code(text)
    ax.text(12, 19, TITLE, size=24, weight="bold", color=ink)
    cut = lines.index("", len(lines) // 2)
    _column(ax, 12, 31, lines[:cut])
    _column(ax, 131, 31, lines[cut + 1 :])
    style = {"family": "DejaVu Sans Mono", "size": 7, "linespacing": 1.5}
    ax.text(262, 228, LEGEND, color=ink, va="top", **style)
    inset = fig.add_axes((257 / 420, 78 / 297, 157 / 420, 195 / 297))
    draw_wiring(inset, size=6.8)
    return fig


# %% [markdown]
# ## Is it stale?
#
# A drawing cannot be compared with the program that made it: another version of
# matplotlib draws other bytes. So the sheet carries, as a keyword in its file, the
# hash of the code that is printed on it. When the page changes the hash does, and the
# check says so.


# %% write and check tags=["export"] module="book.poster"
def source_hash(text):
    """A hash of what the sheet prints of the page."""
    code = "\n".join(page_code(text))
    return f"page-{hashlib.sha256(code.encode()).hexdigest()[:32]}"


def is_stale(poster, text):
    """Whether a PDF, its bytes, was drawn from another page than this."""
    found = re.search(rb"page-[0-9a-f]{32}", poster)
    return found is None or found[0].decode() != source_hash(text)


def write_poster(path, text):
    """Draw the sheet and write it as a PDF."""
    facts = {"Title": TITLE, "Keywords": source_hash(text)}
    facts |= {"CreationDate": None}
    draw_poster(text).savefig(path, format="pdf", metadata=facts)


def main(argv=None):
    """Draw the poster; with --check only say whether it is stale."""
    argv = sys.argv[1:] if argv is None else argv
    text = PAGE.read_text("utf-8")
    if "--check" not in argv:
        write_poster(POSTER, text)
        return
    if not POSTER.exists() or is_stale(POSTER.read_bytes(), text):
        sys.exit(f"{POSTER} is stale: run python -m llmnb.book.poster")


# %% the check, and a change of the page
text = Path("../../llmnb/reference/gpt2.py").read_text("utf-8")
sheet = Path("../../book/poster.pdf").read_bytes()
verdict("the sheet", not is_stale(sheet, text), "is the page's")
changed = text.replace("1e-5", "1e-6")
verdict("a change", is_stale(sheet, changed), "is noticed")
commented = text.replace("import math\n", "import math  # sqrt\n")
print(len(page_code(text)), "lines are printed")

# %% [markdown]
# ## Take away
#
# - A figure that shows a program should be drawn from it, and say when it is older.
# - Places of boxes are data; roads follow from them.
#
# ## Exercises
#
# **1** (★★). A comment at the end of a line is printed, and changes the hash. Should
# it? Write a `page_code` that leaves comments out.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The pattern makes a comment one word; cut each line where one begins. What is
# not printed should not make the sheet stale.
# :::


# %% exercise 1 tags=["hide-cell"]
def without_comments(lines):
    for line in lines:
        words = [w for w in coloured_words(line) if w[1].startswith("#")]
        yield line[: words[0][0]].rstrip() if words else line


# %% exercise 1, checked
same = [*without_comments(page_code(commented))] == page_code(text)
verdict("a comment", same, "does not matter")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.12")
