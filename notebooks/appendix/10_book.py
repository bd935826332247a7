# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       book.export: "Write the package from the notebooks' marked cells."
#       book.notebook: "Run the notebooks and keep what they print."
#       book.index: "What a chapter adds to the package."
#       __init__: |-
#         GPT-2 and its training, by hand, in Python.
#
#         Begin with a model and a batch of tokens:
#
#             cfg = llmnb.GPT2Config(max_seq_len=64, vocab_size=257)
#             model = llmnb.GPT2(cfg, batch_size=8, seq_len=64)
#             loss = model.forward(tokens, targets)
#             model.backward()
#             model.update(learning_rate=1e-3, step=1)
#
#         llmnb.tokenizer turns text into tokens; the command `llmnb` trains on
#         your own text. The rooms, each documented by help(): llmnb.reference,
#         cpu and cuda hold the layers; model the model; formats, text and train
#         what it reads, writes and learns from; bench measures it. Each module
#         is written by a chapter of the book, which its first line names.
# ---

# %% [markdown]
# # Book: how it builds itself
#
# > The exporter turns marked cells into the package; the builder runs the
# > notebooks and keeps what they print.
#
# *Reading time: 45 minutes. You need: Python and its `ast`.*
#
# ## Where we are
#
# A book about programs has an old difficulty: the program in the book and the
# program that runs are two texts, and they drift apart. Knuth's answer was to
# write one text from which both are made, and he called it *literate
# programming*. This book does the same with Python's means. A chapter is a
# notebook; cells with the tag `export` are the package. This chapter
# derives the program that does it. A *colophon* is the note at the end of a
# book that says how it was made, and this one exports itself. At its end you
# can
#
# - say what happens between a cell on this page and `import llmnb`;
# - read a Python program as a tree, and find the names it needs;
# - explain how it is checked that what you read is what runs.
#
# You need nothing from the other chapters but the wish to change them.

# %% [markdown]
# ## One source, two products
# A chapter's source is the one thing that a person edits. The exporter takes
# its marked cells, checks them, puts them in order and writes the package; the
# builder runs it from top to bottom and keeps what it prints.

# %% draw the two products tags=["hide-input"]
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE, draw_arrow, draw_rounded


def station(x, y, width, text, colour):
    style = {"fc": "white", "ec": PALETTE[colour], "lw": 1.5}
    draw_rounded(ax, (x, y), width, 0.8, 0.12, **style)
    ax.text(x + width / 2, y + 0.4, text, ha="center", va="center", size=9)


def way(points, text, x, y):
    draw_arrow(ax, points, color=PALETTE["blue"], linewidth=1.5)
    ax.text(x, y, text, ha="center", va="bottom", size=9,
            color=PALETTE["blue"], linespacing=1.1)  # fmt: skip


fig, ax = plt.subplots(figsize=(8, 3.0), dpi=100)
station(0, 1, 2, "02_rows.py\nwhat a person edits", "orange")
station(4, 2, 2.2, "llmnb/cpu/*.py\nthe package", "green")
station(4, 0, 2.2, "02_rows.ipynb\nwith its outputs", "green")
station(8, 0.6, 1.9, "the same outputs?", "grey")
station(8, -0.6, 1.9, "this page", "grey")
way([(2, 1.55), (2.4, 1.55), (2.4, 2.4), (4, 2.4)], "make export", 3.2, 2.45)
way(
    [(2, 1.25), (2.4, 1.25), (2.4, 0.4), (4, 0.4)], "make notebooks", 3.2, 0.45
)
way([(6.2, 0.55), (6.6, 0.55), (6.6, 1), (8, 1)], "pytest --nbval", 7.3, 1.05)
way(
    [(6.2, 0.25), (6.6, 0.25), (6.6, -0.2), (8, -0.2)], "make book", 7.3, -0.15
)
draw_arrow(ax, [(5.1, 2), (5.1, 0.8)], color=PALETTE["grey"], linewidth=1.2)
ax.text(5.2, 1.4, "later chapters import it", va="center", size=9)
ax.set(xlim=(-0.1, 10), ylim=(-0.7, 2.9))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure A.10.1. Both the package and the page come from one source, so
# neither can say what the other does not. Green is written by a program, and
# checked against the source.*
#
# The source is in jupytext's *percent format*: a plain Python file in which a
# line `# %%` begins a cell. Such a file can be read in a difference, searched,
# formatted, and opened in JupyterLab as a notebook. The notebook with its
# outputs is a product; nobody edits it.
#
# The first line of a cell holds its name and its metadata:
#
#     # %% layernorm, forward tags=["export"]
#     # %% the forward kernel tags=["exporti"] module="cpu.layernorm"
#
# `export` puts a cell into the package, `exporti` too, but its names stay out
# of `__all__`. `module` sends it elsewhere than the header of the notebook
# says.

# %% [markdown]
# ## Setup

# %% setup
from llmnb.book.verify import verdict

# %% imports of the exporter tags=["export"]
import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import jupytext

from llmnb.files import write_whole

# %% one exported cell tags=["export"]
MARKER = "# " + "%%"  # apart, so that no module holds a marker itself
ROOT = Path(__file__).parents[2] if "__file__" in globals() else Path("../..")
APPENDIX = "appendix"


class ExportError(Exception):
    """A notebook that cannot be exported; the message names file and line."""


class Cell(NamedTuple):
    """A code cell that goes into the package.

    `line` is the line in the notebook `path` where its source begins;
    `module` the dotted name of the module it goes to, without `llmnb.`.
    """

    path: Path
    line: int
    name: str
    module: str
    public: bool
    source: str

    def fail(self, line, message):
        """Raise an ExportError that names file and line."""
        raise ExportError(f"{self.path}:{line}: {message}")

    def after(self, text):
        """A text, empty lines, and the source, at its lines of the file."""
        gap = self.line - 1 - text.count("\n")
        return text + "\n" * gap + self.source + "\n"


# %% one chapter tags=["export"]
class Chapter(NamedTuple):
    """A notebook source: its heading, the modules it writes and their cells.

    `modules` maps each module's dotted name to its docstring, a line.
    """

    path: Path
    title: str
    summary: str
    modules: dict
    cells: list

    @property
    def label(self):
        """Its number in the book, such as "1.6"; "A.2" in the appendix."""
        return chapter_label(self.path)

    @property
    def name(self):
        """Its short name: what stands before the colon of its title."""
        return self.title.partition(":")[0]

    @property
    def part(self):
        """The folder that it is in, a part of the book."""
        return self.path.parent.name

    @property
    def place(self):
        """Its path below the folder of notebooks."""
        return f"{self.part}/{self.path.name}"


def chapter_label(path):
    """The number of the chapter that a source holds, such as "1.6"."""
    part = path.parent.name
    letter = "A" if part == APPENDIX else part.partition("_")[0]
    return f"{letter}.{int(path.name.partition('_')[0])}"


def cell_lines(path):
    """Line numbers of the first line of every cell in a percent file."""
    text = Path(path).read_text("utf-8")
    markers = re.finditer(rf"^{MARKER}.*\n\s*", text, re.M)
    return [text.count("\n", 0, x.end()) + 1 for x in markers]


# %% [markdown]
# ## Read a chapter
#
# jupytext knows how to parse the format, but not on which line of the file a
# cell began, and an error message without a line number is half a message. So
# `cell_lines` above finds the marker lines itself, and `read_chapter` pairs
# them with the cells.


# %% read a chapter tags=["export"]
def read_chapter(path):
    """Read a notebook source into a Chapter.

    Raises ExportError when the title, the summary or the module is missing.
    """
    book = jupytext.read(path, fmt="py:percent")
    modules = book.metadata.get("llmnb", {}).get("modules", {})
    title, summary = read_heading(path, book.cells[0].source)
    cells = []
    for cell, line in zip(book.cells, cell_lines(path), strict=True):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or not {"export", "exporti"} & {*tags}:
            continue
        module = cell.metadata.get("module", next(iter(modules), None))
        name = cell.metadata.get("title", "")
        public = "export" in tags
        cells.append(Cell(path, line, name, module, public, cell.source))
        if module not in modules:
            cells[-1].fail(line, f"the header has no line for module {module}")
    for module in set(modules) - {cell.module for cell in cells}:
        raise ExportError(f"{path}:1: no cell goes to module {module}")
    return Chapter(path, title, summary, modules, cells)


def read_heading(path, source):
    """Title and summary from the text of a chapter's first cell."""
    lines = source.splitlines()
    quoted = [x[1:].strip() for x in lines if x.startswith(">")]
    if not lines or not lines[0].startswith("# ") or not quoted:
        raise ExportError(
            f"{path}:1: the first cell must hold '# Title' and '> summary'"
        )
    return lines[0][2:].strip(), " ".join(quoted)


# %% this very chapter
here = read_chapter(ROOT / "notebooks" / "appendix" / "10_book.py")
print(here.title)
print(here.cells[1].line, here.cells[1].name, "->", here.cells[1].module)

# %% [markdown]
# ## What a cell may hold
#
# Importing a module must not do work: no printing, no reading of files, no
# computing of tables. So an exported cell may hold imports, assignments,
# functions and classes, and nothing else. We do not search for forbidden words
# in the text. Python's own parser turns the cell into a tree, the *abstract
# syntax tree*, and each statement is a node with a type. (One thing is sought
# in the text first: a line that begins with `%` or `!`, a command to the
# notebook and not Python. Such a line is called a *magic*.)

# %% a tree
for node in ast.parse("import math\nx = 1\nprint(x)").body:
    print(type(node).__name__, "on line", node.lineno)

# %% what a cell may hold tags=["exporti"]
IMPORTS = ast.Import, ast.ImportFrom
ASSIGNMENTS = ast.Assign, ast.AnnAssign
DEFINITIONS = ast.FunctionDef, ast.ClassDef
LOADERS = {"open", "load", "loadtxt", "fromfile", "memmap", "read_text"}


def parse_cell(cell):
    """Parse an exported cell and refuse what has no place in a module."""
    for line, words in enumerate(cell.source.splitlines(), cell.line):
        if words.startswith(("%", "!")):
            cell.fail(line, f"a magic in an export cell: {words}")
    try:
        tree = ast.parse(cell.after(""), feature_version=(3, 11))
    except SyntaxError as error:
        cell.fail(error.lineno or cell.line, f"not Python: {error.msg}")
    for node in tree.body:
        if not isinstance(node, IMPORTS + ASSIGNMENTS + DEFINITIONS):
            text = ast.unparse(node).splitlines()[0]
            cell.fail(node.lineno, f"runs code in an export cell: {text}")
        if isinstance(node, ASSIGNMENTS):
            refuse_loading(cell, node)
    return tree


def refuse_loading(cell, node):
    """Refuse a module-level assignment that prints or reads data."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            name = ast.unparse(call.func).split(".")[-1]
            if name in LOADERS | {"print", "input"}:
                cell.fail(call.lineno, f"{name}() in an export cell")


# %% [markdown]
# The third statement above is an expression on its own, which does something
# or is useless, and is refused in either case. An assignment may compute its
# value, but a call there of a function that prints or reads files is refused by
# its name.
#
# ## Names that nothing defines
#
# In a notebook all cells share one namespace. A function that uses a name from
# a cell that is *not* exported works there, and fails in the package, but only
# when it is called. We want to know at once. To find such a name one must know
# which names a function binds itself, and Python's rules for that are longer
# than they look, and change: since Python 3.12 the variable of a comprehension
# belongs to the function around it. A linter keeps up with them for a living,
# so we ask one. It names a name that nothing binds, and the line it stands on.


# %% what the linter says tags=["exporti"]
LINTER = (
    "-m ruff check --isolated --ignore-noqa --exit-zero --quiet "
    "--output-format json --target-version py311 --select"
)


def findings(texts, rule):
    """What the linter ruff finds in modules: tuples (module, line, words).

    texts: dict from a module's dotted name to its text. rule: of ruff's, such
    as F821 for a name that is not defined. words: what the rule is about, as
    it stands in the text; where the text is not Python, ruff's own words.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            Path(folder, f"{name}.py").write_text(text, "utf-8")
        command = [sys.executable, *LINTER.split(), rule, folder]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise ExportError(f"the linter does not run: {run.stderr.strip()}")
    found = []
    for x in json.loads(run.stdout):
        quoted = re.search("`(.+)`", x["message"]) if x["code"] == rule else 0
        words = quoted[1] if quoted else x["message"]
        found.append((Path(x["filename"]).stem, x["location"]["row"], words))
    return found


# %% a name that nothing binds
text = "def f(x):\n    return [k for k in x] + np.sum(x)\n"
print(findings({"thing": text}, "F821"))


# %% names a cell defines tags=["exporti"]
def defined_names(node):
    """Names that a module-level statement binds."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    if isinstance(node, IMPORTS):
        return [(a.asname or a.name).split(".")[0] for a in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [
        x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)
    ]


# %% one module tags=["exporti"]
class Module(NamedTuple):
    """A module to be written: its cells with their trees, and its names.

    `names` says of each name in which line it is defined; `public` lists
    those that stand in `__all__`.
    """

    name: str
    chapter: Chapter
    cells: list
    names: dict
    public: list


def build_module(name, chapter):
    """Collect one module's cells; refuse a name that is defined twice."""
    cells = [(c, parse_cell(c)) for c in chapter.cells if c.module == name]
    names, public = {}, []
    for cell, tree in cells:
        for node in tree.body:
            imported = isinstance(node, IMPORTS)
            for x in defined_names(node):
                if x in names and not imported:
                    text = f"{x} is exported twice, first at {names[x]}"
                    cell.fail(node.lineno, text)
                names[x] = f"{cell.path.name}:{node.lineno}"
                if cell.public and not imported and x[0] != "_":
                    public.append(x)
    return Module(name, chapter, cells, names, public)


# %% undefined names tags=["exporti"]
def check_undefined(modules):
    """Refuse a name that nothing in its module defines."""
    texts = dict.fromkeys(modules, "")
    for name, module in modules.items():
        for cell, _ in module.cells:
            texts[name] = cell.after(texts[name])
    for name, line, words in findings(texts, "F821"):
        text = f"{words} is not defined in llmnb.{name}"
        modules[name].cells[0][0].fail(line, text)


# %% [markdown]
# ## Order
#
# A reader goes through the chapters in order, so a chapter may use what came
# before it, and nothing that comes later. For notebooks that is a matter of
# taste; for exported cells it is checked, the appendix apart, which stands beside
# the parts. An import from `llmnb` must name
# something that an earlier chapter exports, or this one. So that every such
# name is seen, there is one way to write it, `from llmnb.module import name`.

# %% the rooms of the package tags=["exporti"]
# each room's docstring, from the ground up: a room uses those before it, and
# its neighbours on its own level
ROOMS = {
    "gpu": "The machine under `llmnb.cuda`: simulator, launch, PTX, graphs.",
    "book": "What readers of a chapter see, and how the book is built.",
    "reference": "The layers in NumPy, forward and backward.",
    "cpu": "The layers compiled by numba for the processor's cores.",
    "cuda": "The layers as kernels for a GPU, or for the simulator.",
    "model": "The tensors of a model, its blocks, the model, its writing.",
    "formats": "Models on disk: llm.c's .bin, safetensors, Hugging Face's.",
    "text": "Tokenizers, texts, shards and batches.",
    "train": "The training loop, its runs, and what a model has learnt.",
    "bench": "Time: stopwatch, race, ladders, report.",
    "cli": "The command line, a file a command.",
}
# rooms that offer all names of their modules, of gpu's too
BACKENDS = {"reference": (), "cpu": (), "cuda": ("gpu",)}


# %% imports from other chapters tags=["exporti"]
def check_imports(module, modules):
    """Refuse an import from `llmnb` that no earlier chapter exports.

    Inside a function a later chapter's name may be imported, and so may the
    appendix's anywhere, which stands beside the parts.
    """
    for cell, tree in module.cells:
        for node in filter(lambda x: isinstance(x, IMPORTS), ast.walk(tree)):
            for source, name in names_from_llmnb(cell, node):
                owner = exporter_of(modules, cell, node, source, name)
                if owner is None or owner.part == APPENDIX:
                    continue
                if node in tree.body and owner.place > module.chapter.place:
                    text = f"{name} belongs to a later chapter, {owner.place}"
                    cell.fail(node.lineno, text)


def names_from_llmnb(cell, node):
    """Pairs (module, name) that an import takes from `llmnb`.

    Refuses `import llmnb.module`, and an import that begins with a dot.
    """
    plain = isinstance(node, ast.Import)
    homes = [x.name for x in node.names] if plain else [node.module or ""]
    ours = any(x.partition(".")[0] == "llmnb" for x in homes)
    if (plain and ours) or getattr(node, "level", 0):
        text = f"write `from llmnb.module import`: {ast.unparse(node)}"
        cell.fail(node.lineno, text)
    source = homes[0].partition("llmnb.")[2]
    return [(source, x.name) for x in node.names] if ours else []


def exporter_of(modules, cell, node, source, name):
    """The chapter that an imported name, or module, comes from."""
    inner = f"{source}.{name}".strip(".")
    if source in modules and name in modules[source].names:
        return modules[source].chapter
    if inner in modules:
        return modules[inner].chapter
    if inner in ROOMS or source in BACKENDS:
        return None
    where = f"llmnb.{source}" if source else "llmnb"
    return cell.fail(node.lineno, f"no chapter exports {name} to {where}")


# %% collect all modules tags=["export"]
def collect(chapters):
    """Build and check all modules of these chapters, by dotted name.

    Raises ExportError at the first defect.
    """
    owners = {}
    for chapter in chapters:
        for cell in chapter.cells:
            owner = owners.setdefault(cell.module, chapter)
            if owner is not chapter:
                text = f"llmnb.{cell.module} already belongs to {owner.place}"
                cell.fail(cell.line, text)
    modules = {name: build_module(name, x) for name, x in owners.items()}
    check_undefined(modules)
    for module in modules.values():
        check_imports(module, modules)
    return modules


# %% [markdown]
# Let us see it refuse. Four chapters that nobody should write:

# %% four bad chapters
HEAD = (
    "# ---\n# jupyter:\n#   llmnb:\n#     modules:\n#       thing: A line.\n"
    "# ---\n\n# %% [markdown]\n# # Title\n#\n# > Summary.\n\n"
)
CELL = '# %% a cell tags=["export"]\n'
bad = {
    "twice": CELL + "def f():\n    return 1\n\n\n" + CELL + "f = 2\n",
    "undefined": CELL + "def f(x):\n    return np.sum(x)\n",
    "runs": CELL + "x = 1\nprint(x)\n",
    "unknown": CELL + "from llmnb.arena import Sand\n",
}
folder = Path(tempfile.mkdtemp())
for name, text in bad.items():
    path = folder / f"01_{name}.py"
    path.write_text(HEAD + text)
    try:
        collect([read_chapter(path)])
        verdict(name, False, "is refused")
    except ExportError as error:
        print(str(error).replace(f"{folder}/", ""))

# %% [markdown]
# ## Write the module
#
# The text of a module is a banner that names its source, the docstring that the
# chapter's header gives it, `__all__`, and the cells in order with their
# names as comments. Lists of names, and imports, fill their lines to a page's
# width: a name a line would make some longer than what they list. A module that exports `main` also gets the two lines that
# run it as a program. No date and no version number goes in: the same source
# gives the same bytes on every machine, so a difference in `llmnb/` always
# means a difference in a chapter.

# %% the text of a module tags=["exporti"]
WIDTH = 79  # columns
BANNER = "# Written by `make export` from notebooks/{}: edit that file.\n"


def render_module(module):
    """The text of a module: banner, docstring, `__all__`, cells in order."""
    chapter = module.chapter
    parts = [BANNER.format(chapter.place)]
    parts.append(f'"""{chapter.modules[module.name]}"""\n')
    public = [f'"{x}"' for x in sorted(module.public)]
    parts.append(packed("__all__ = ", public, "[]"))
    for cell, tree in module.cells:
        title = f"# {cell.name}\n" if cell.name else ""
        source = as_written(cell, tree, module).strip()
        parts.append(f"\n{title}{source}\n")
    if "main" in module.public:
        parts.append('\nif __name__ == "__main__":\n    main()\n')
    return "\n".join(parts)


def packed(start, words, marks):
    """`start` and words with commas between, in as few lines as they fit.

    marks: the brackets around them; parentheses only where they are needed.
    """
    words = ", ".join(words)
    line = words if marks == "()" else marks[0] + words + marks[1]
    if len(start + line) <= WIDTH:
        return f"{start}{line}\n"
    lines = textwrap.indent(textwrap.fill(words, WIDTH - 5), " " * 4)
    return f"{start}{marks[0]}\n{lines},\n{marks[1]}\n"


def as_written(cell, tree, module):
    """A cell's source: imports packed; public docstrings name the chapter."""
    lines = cell.after("").splitlines()
    note = f"    Derived in chapter {module.chapter.label}."
    for node in reversed(tree.body):
        if isinstance(node, ast.ImportFrom):
            whole = slice(node.lineno - 1, node.end_lineno)
            start = f"from {node.module} import "
            words = [ast.unparse(x) for x in node.names]
            lines[whole] = packed(start, words, "()").splitlines()
        elif getattr(node, "name", None) in module.public:
            last = node.body[0].end_lineno
            ends = lines[last - 1].rstrip().removesuffix('"""').rstrip()
            if ast.get_docstring(node) is not None:
                kept = [ends] if ends else []
                lines[last - 1 : last] = [*kept, "", note, '    """']
    return "\n".join(lines)


# %% the file of a room tags=["exporti"]
# all names that are no module's, such as `math`
PUBLIC = """
__all__ = [
    name
    for name, thing in vars().items()
    if name[0] != "_" and type(thing) is not types.ModuleType
]
"""


def render_room(room, modules):
    """`__init__.py` of a room: a docstring, a backend's also its names."""
    text = BANNER.format("*/*.py") + f'\n"""{ROOMS[room]}"""\n'
    if room not in BACKENDS:
        return text
    rooms, text = (room, *BACKENDS[room]), text + "\nimport types\n\n"
    for name in sorted(modules):
        if name.partition(".")[0] in rooms and modules[name].public:
            text += f"from llmnb.{name} import *\n"
    return text + PUBLIC


# %% the index tags=["exporti"]
def render_index(modules):
    """`index.json`: for every chapter, what it exports and in a line why."""
    index = {}
    for module in modules.values():
        rows = index.setdefault(module.chapter.label, [])
        for node in (node for _, tree in module.cells for node in tree.body):
            name = getattr(node, "name", None)
            if name in module.public:
                doc = (ast.get_docstring(node) or "").partition("\n")[0]
                rows.append({"module": module.name, "name": name, "doc": doc})
    return json.dumps(index, indent=1) + "\n"


# %% the book's contents tags=["exporti"]
# each part's heading in the contents
PARTS = {
    "1_by_hand": "Part 1: by hand",
    "2_cpu": "Part 2: on a CPU",
    "3_gpu": "Part 3: on a GPU",
    "4_practice": "Part 4: in practice",
    "5_modern": "Part 5: since GPT-2",
    "6_machines": "Part 6: many machines",
    APPENDIX: "Appendix",
}


def in_parts(chapters):
    """The heading of each part that has chapters, and those chapters."""
    for part, heading in PARTS.items():
        inside = [x for x in chapters if x.part == part]
        if inside:
            yield heading, inside


def render_toc(chapters):
    """`_toc.yml`: what the book's sidebar lists."""
    lines = ["# Written by `make export` from the chapters' headings."]
    lines += ["format: jb-book", "root: book/intro", "parts:"]
    for heading, inside in in_parts(chapters):
        lines += [f'  - caption: "{heading}"', "    chapters:"]
        for x in inside:
            place = x.place.removesuffix(".py")
            lines += [f"      - file: notebooks/{place}"]
            lines += [f'        title: "{x.label} {x.name}"']
    lines += ['  - caption: "Reference"', "    chapters:"]
    for page in ("about", "notation", "results"):
        lines += [f"      - file: book/{page}"]
    lines += ["      - file: book/api/index", "        sections:"]
    lines += ["          - glob: book/api/llmnb*"]
    for page in ("glossary", "bibliography"):
        lines += [f"      - file: book/{page}"]
    return "\n".join(lines) + "\n"


def render_contents(chapters):
    """`contents.md`: a table of the chapters for each part."""
    lines = ["<!-- Written by `make export` from the chapters' headings. -->"]
    for heading, inside in in_parts(chapters):
        lines += ["", f"### {heading}", "", "| | chapter | |", "|---|---|---|"]
        for x in inside:
            link = f"../notebooks/{x.place.removesuffix('.py')}.ipynb"
            lines += [f"| {x.label} | [{x.name}]({link}) | {x.summary} |"]
    return "\n".join(lines) + "\n"


# %% the pages of the package tags=["exporti"]
def render_api(modules):
    """The API pages, one a module and one that lists them, by path."""
    rooms = dict.fromkeys(["", *ROOMS])
    pages, lines = {}, [API_INDEX]
    for room in rooms:
        names = [n for n in modules if n.rpartition(".")[0] == room]
        names = [n for n in sorted(names) if modules[n].public]
        title = f"`llmnb.{room}`" if room else "`llmnb`"
        what = ROOMS.get(room, "What every room may use.")
        lines += ["", f"## {title}", "", what, "", "| | |", "|---|---|"]
        for name in names:
            doc = modules[name].chapter.modules[name]
            page = f"llmnb.{name}.md"
            lines += [f"| [`llmnb.{name}`]({page}) | {doc} |"]
            pages[f"book/api/{page}"] = API_PAGE.format(name=f"llmnb.{name}")
    pages["book/api/index.md"] = "\n".join(lines) + "\n"
    return pages


API_PAGE = """\
# {name}

```{{eval-rst}}
.. automodule:: {name}
```
"""
API_INDEX = """\
# API reference

> Every public name of `llmnb`, with the docstring that its chapter gave it.

The package is light to import: `import llmnb` compiles nothing, and a module
is loaded when it is first used. `llmnb.GPT2`, `llmnb.GPT2Config` and
`llmnb.tokenizer` are where most programs begin. The rooms below are in order:
each uses those before it, and its neighbours.

Every docstring names the chapter that derives its function, and *[source]*
beside a name shows the code as the package holds it, with the chapter's cell
names as comments. The [index of names](genindex) lists all of them."""


# %% all that is written tags=["export"]
def render(chapters):
    """All that the chapters write: a mapping from path to text.

    Raises ExportError at the first defect.
    """
    modules = collect(chapters)
    files = {}
    for name, module in modules.items():
        files[f"llmnb/{name.replace('.', '/')}.py"] = render_module(module)
    for room in dict.fromkeys(n.partition(".")[0] for n in modules):
        if room in ROOMS:
            files[f"llmnb/{room}/__init__.py"] = render_room(room, modules)
    files["llmnb/index.json"] = render_index(modules)
    files["book/_toc.yml"] = render_toc(chapters)
    files["book/contents.md"] = render_contents(chapters)
    return files | render_api(modules)


def write_text(path, text):
    """Write a text file, and the folders it needs, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


# %% [markdown]
# The rooms of the backends gather what their modules export, so that the model
# can ask each for `layernorm_forward`. The index records for each
# chapter what it gave; the last cell of every chapter shows it.
#
# Writing touches a file only when its text has changed, and the check reports
# what a write would do.


# %% compare and write tags=["export"]
def out_of_step(files, root=ROOT):
    """Paths whose text on the disk is missing, different or superfluous."""
    patterns = "llmnb/**/*.py", "llmnb/*.json", "book/api/*.md"
    there = {
        p.relative_to(root).as_posix() for x in patterns for p in root.glob(x)
    }
    changed = [
        f
        for f in files
        if not (root / f).exists() or (root / f).read_text("utf-8") != files[f]
    ]
    return sorted(changed), sorted(there - set(files))


def sources(folder):
    """The chapters' sources in the order of the book."""
    return sorted(folder.glob("*/[0-9]*.py"))


def read_chapters(folder):
    """Read every chapter of a folder in order."""
    return [read_chapter(p) for p in sources(folder)]


def main(argv=None):
    """Regenerate the package, or with --check say what differs."""
    parser = argparse.ArgumentParser("python -m llmnb.book.export")
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    try:
        files = render(read_chapters(ROOT / "notebooks"))
    except ExportError as error:
        sys.exit(str(error))
    changed, extra = out_of_step(files)
    if check and (changed or extra):
        sys.exit(f"run `make export`: out of date: {changed + extra}")
    for name in changed:
        write_text(ROOT / name, files[name])
    for name in extra:
        (ROOT / name).unlink()
    print(f"{len(files)} files, {len(changed)} written")


# %% this page and the package
files = render(read_chapters(ROOT / "notebooks"))
changed, extra = out_of_step(files)
verdict("llmnb", changed == extra == [], "is what the chapters export")

# %% [markdown]
# That is the fixed point of the construction. The cell above ran the functions
# of this page over this page, and the text they produced is the text of the
# module `llmnb.book.export`, letter for letter.
#
# ## Run the notebooks
#
# The builder reads a source, gives each cell a stable identity (the chapter's
# name and the cell's number), runs the whole and writes the notebook with its
# outputs. Times, versions and random identities are left out: running twice
# changes nothing but what is measured.

# %% imports of the builder tags=["export"] module="book.notebook"
import argparse
import os
import re
import sys
from base64 import b64decode, b64encode
from functools import partial
from io import BytesIO

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

from llmnb.book.export import ROOT, chapter_label, sources, write_text


# %% the notebook a source stands for tags=["export"] module="book.notebook"
def from_source(path):
    """The notebook of a percent source, not run, with stable cell ids."""
    book = jupytext.read(path, fmt="py:percent")
    book.metadata = {
        key: book.metadata[key]
        for key in ("kernelspec", "llmnb")
        if key in book.metadata
    }
    book.nbformat, book.nbformat_minor = 4, 5
    for number, cell in enumerate(book.cells):
        cell.id = f"{path.stem}-{number}"
    return book


def run(book, folder):
    """Run a notebook in `folder`, its cells in order; outputs in place.

    It imports the package beside the notebooks, whichever is installed.
    Raises nbclient's CellExecutionError at the first cell that fails.
    """
    NotebookClient(
        book,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR", FORMATS],
        resources={"metadata": {"path": str(folder)}},
    ).execute(env=os.environ | SETTINGS)
    book.metadata["language_info"] = {"name": "python"}
    for cell in book.cells:
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("execution", None)
            one_picture(output)


# %% [markdown]
# A figure is kept as lines, not as dots: an SVG is sharp at every size, and
# the page can turn its colours for dark mode. `notebooks/matplotlibrc` holds
# the colours, and a fixed salt for the names in the file. The kernel draws
# each figure twice, as an SVG and as dots, two to a pixel; a figure of
# thousands of points would be a heavy SVG, and for it the dots are kept.
# `slim` takes out what no reader sees: the date, comments, digits below a
# hundredth of a point, and the blanks around the letters of a path. A picture
# inside, such as a map of weights, has few colours: it keeps a table of them,
# and for each dot a place in the table.

# %% lines or dots tags=["exporti"] module="book.notebook"
FORMATS = "--InlineBackend.figure_formats={'svg', 'retina'}"
STYLE = ROOT / "notebooks" / "matplotlibrc"
SETTINGS = {"MATPLOTLIBRC": str(STYLE), "PYTHONPATH": str(ROOT)}
HEAVY = 150_000  # characters: an SVG above this is kept as dots
LINES, DOTS = "image/svg+xml", "image/png"


# %% one picture tags=["export"] module="book.notebook"
def one_picture(output):
    """Keep one of an output's two pictures: lines where they are light."""
    data = output.get("data", {})
    if LINES not in data:
        return
    data[LINES] = slim(data[LINES])
    drop = DOTS if len(data[LINES]) <= HEAVY else LINES
    data.pop(drop, None)
    output.metadata.pop(drop, None)


def slim(svg):
    """An SVG without date, comments, and what else nobody sees."""
    svg = svg[svg.index("<svg") :]
    unseen = r"(?s)\s*<metadata>.*?</metadata>|<!--.*?-->"
    svg = re.sub(unseen, "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    places = r'(?<= [dxy]=")[^"]*|(?<=translate\()[^)]*'
    number = r"-?\d+\.\d+(?:e-\d+)?"
    svg = re.sub(places, lambda x: re.sub(number, hundredths, x[0]), svg)
    inside = r"(?s)(?<=data:image/png;base64,)[^\"]+"
    svg = re.sub(inside, lambda x: with_table(x[0]), svg)
    blanks = partial(re.sub, r"\s*([A-Zz])\s*", r"\1")
    return re.sub(r'(?<= d=")[^"]*', lambda x: blanks(x[0]), svg)


def hundredths(number):
    """The text of a number, a match, with two decimals at most."""
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def with_table(text):
    """The base64 of a PNG, smaller if it has few colours; the same dots."""
    picture, file = Image.open(BytesIO(b64decode(text))), BytesIO()
    table = picture.convert("RGB").quantize(256)
    if table.convert(picture.mode).tobytes() != picture.tobytes():
        return text
    table.save(file, "png", optimize=True)
    return min(text, b64encode(file.getvalue()).decode(), key=len)


# %% write one notebook tags=["export"] module="book.notebook"
def build(path):
    """Write the .ipynb of a source, run from top to bottom."""
    book = from_source(path)
    run(book, path.parent)
    write_text(path.with_suffix(".ipynb"), nbformat.writes(book) + "\n")


def defects(path):
    """Sentences that say where a .ipynb does not match its source."""
    built = path.with_suffix(".ipynb")
    if not built.exists():
        return [f"{built.name} is missing"]
    want, got = from_source(path), nbformat.read(built, as_version=4)
    if len(want.cells) != len(got.cells):
        return [f"{built.name}: not the cells of {path.name}"]
    found = []
    for a, b in zip(want.cells, got.cells, strict=True):
        same = (a.cell_type, a.source, a.metadata, a.id)
        if same != (b.cell_type, b.source, b.metadata, b.id):
            found.append(f"{built.name}: cell {b.id} differs from {path.name}")
        elif a.cell_type == "code" and a.source.strip():
            found += cell_defects(built.name, b)
    return found


def cell_defects(name, cell):
    """Sentences that say what is wrong with a cell's outputs."""
    if cell.execution_count is None:
        return [f"{name}: cell {cell.id} was never run: nbval would skip it"]
    if any(x.output_type == "error" for x in cell.outputs):
        return [f"{name}: cell {cell.id} ended in an error"]
    return []


# %% [markdown]
# `pytest --nbval` runs each notebook again and compares the outputs with the
# stored ones. It has three blind spots. A cell that was never run has nothing
# to compare with and passes. It looks at the .ipynb only: if someone edits
# the .py and forgets to build, the old page goes on passing. `defects` looks
# for both. The third stays: pictures are not compared. Where what a figure
# shows matters, a verdict beside it has to say so.

# %% how a stale notebook shows
path = folder / "02_small.py"
path.write_text(HEAD + "# %% six by seven\nprint(6 * 7)\n")
small = from_source(path)
nbformat.write(small, path.with_suffix(".ipynb"))
print(defects(path))

# %% built, then edited
build(path)
print(defects(path))
path.write_text(path.read_text().replace("6 * 7", "6 * 8"))
print(defects(path))


# %% the command tags=["export"] module="book.notebook"
def main(argv=None):
    """Write and run the notebooks, or with --check say what differs."""
    parser = argparse.ArgumentParser("python -m llmnb.book.notebook")
    parser.add_argument("--check", action="store_true", help="run nothing")
    parser.add_argument("chapters", nargs="*", help="such as 1.6; default all")
    args = parser.parse_args(argv)
    every = {chapter_label(path): path for path in sources(ROOT / "notebooks")}
    for label in {*args.chapters} - {*every}:
        sys.exit(f"there is no chapter {label}: {', '.join(every)}")
    paths = [every[label] for label in args.chapters or every]
    if args.check:
        found = [line for p in paths for line in defects(p)]
        sys.exit("\n".join([*found, "run `make notebooks`"]) if found else 0)
    for path in paths:
        print(chapter_label(path), path.stem, flush=True)
        build(path)


# %% [markdown]
# ## The front door
#
# `import llmnb` should take no time and load nothing that is not needed: numba
# alone takes longer to import than many scripts to run. Python asks a module's
# `__getattr__` for names that it does not find, and ours imports them then.

# %% imports of the package tags=["export"] module="__init__"
import importlib
import importlib.util

# %% the package's front door tags=["exporti"] module="__init__"
__version__ = "0.2.0"
_CONFIGS = (
    "LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config",
    "GemmaConfig", "Gemma2Config", "Gemma3Config", "PRESETS",
)  # fmt: skip
_HOME = {
    "GPT2": "llmnb.model.gpt2",
    "GPT2Config": "llmnb.config",
    "load": "llmnb.train.loading",
    **dict.fromkeys(_CONFIGS, "llmnb.model.architectures"),
}


def __getattr__(name):
    """Import a room, GPT2, GPT2Config or tokenizer when it is asked for."""
    if name == "Model":  # of any architecture; GPT2 is its first name
        name = "GPT2"
    if name == "tokenizer":
        return importlib.import_module("llmnb.text.tokenizer")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if importlib.util.find_spec(f"llmnb.{name}"):
        return importlib.import_module(f"llmnb.{name}")
    raise AttributeError(f"llmnb has no {name!r}")


def __dir__():
    """What a prompt completes."""
    return [*globals(), *_HOME, "Model", "tokenizer"]


# %% [markdown]
# ## What a chapter gained
#
# The table at the end of every chapter comes from the index, so it cannot
# promise what the package does not hold.

# %% what a chapter gained tags=["export"] module="book.index"
import json
from importlib.resources import files

from IPython.display import Markdown, display


def gained(chapter):
    """Show what `llmnb` gained in a chapter, linked to the API pages.

    `chapter` is its number, such as "1.6". Raises KeyError when no such
    chapter exports anything.
    """
    index = json.loads(files("llmnb").joinpath("index.json").read_text())
    rows = ["| module | name | what it does |", "|---|---|---|"]
    for x in index[chapter]:
        module, name = f"llmnb.{x['module']}", x["name"]
        page = f"../../book/api/{module}.md"
        doc = x["doc"].replace("|", "\\|")
        rows.append(
            f"| [{module}]({page}#module-{module}) "
            f"| [`{name}`]({page}#{module}.{name}) | {doc} |"
        )
    display(Markdown("\n".join(rows)))


# %% [markdown]
# ## Take away
#
# - One source. The package and the pages are products, and a check says when
#   a product is not what the source makes.
# - A syntax tree tells what a cell does; a linter tells what it lacks.
# - Products that are the same on every machine can be compared byte by byte.

# %% [markdown]
# ## Design note
#
# nbdev, which inspired the tags, exports from .ipynb files. We export from
# .py files, because a line in a .py file has a number that an error message
# can name, and because two people's changes to a .py file can be merged.
#
# A larger exporter could resolve dependencies between cells and order them
# itself, as Knuth's tools did: WEB let one present a program in any order. We
# kept Python's order. A cell uses what stands above it, on the page and in the
# module, and the reader never has to search forward.

# %% [markdown]
# ## Exercises
#
# **1** (★). Add a cell with a function of your own to a chapter, tag it
# `export`, and run `make export`. Which files change?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The module that the chapter's header names, and `index.json`. The `__init__.py`
# of the module's room takes what `__all__` lists, and stays as it is. `make check`
# then asks for `make notebooks`, because the .ipynb lacks the new cell.
# :::

# %% exercise 1, on a copy tags=["hide-cell"]
copies = Path(tempfile.mkdtemp())
mine = '\n# %% mine tags=["export"]\ndef mine():\n    return 4\n'
for source in sources(ROOT / "notebooks"):
    text = source.read_text("utf-8")
    if chapter_label(source) == "1.6":
        text += mine
    write_text(copies / source.parent.name / source.name, text)

# %% exercise 1, checked
files = render(read_chapters(copies))
changed, extra = out_of_step(files)
print(changed)
verdict("one cell", len(changed) == 2 and not extra, "changes two files")

# %% [markdown]
# **2** (★★★). An import that nothing uses does no harm, and stays in the
# package for ever. Write a function that lists such names of a `Module`.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The linter has a rule for it, F401. It does not know which names a module
# means to export, so an import that is there for others would be listed too.
# :::


# %% exercise 2 tags=["hide-cell"]
def unused(module):
    text = "".join(f"{cell.source}\n" for cell, _ in module.cells)
    return [x for _, _, x in findings({module.name: text}, "F401")]


# %% exercise 2, checked
path.write_text(
    HEAD + CELL + "import json\nimport math\n\nroot = math.sqrt(2)\n"
)
found = unused(collect([read_chapter(path)])["thing"])
verdict("unused", found == ["json"], "is found, used is not")

# %% [markdown]
# ## Further reading
#
# - Knuth (1984),
#   [Literate Programming](https://doi.org/10.1093/comjnl/27.2.97): the idea,
#   with a program as its own example.
# - The documentation of [jupytext](https://jupytext.readthedocs.io): the
#   percent format and its metadata.
# - The documentation of [nbval](https://nbval.readthedocs.io): what it
#   compares, and how to tell it what not to.
# - Python's manual on [ast](https://docs.python.org/3/library/ast.html), the
#   library that reads a program as a tree.
# - The rules of [ruff](https://docs.astral.sh/ruff/rules/): F821 is the one
#   used here; read what its neighbours find.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.10")
