# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       book.practice: "Chapters as plain notebooks, and as notebooks to fill in."
# ---

# %% [markdown]
# # Practice: the chapters with their functions left to you
#
# > A chapter without its functions' bodies, but with its checks: whoever fills it in
# > is proved right by the chapter itself.
#
# *Reading time: 14 minutes. You need: [chapter A.10](10_book.ipynb).*

# %% [markdown]
# ## Where we are
#
# Reading a derivation is not doing one. The chapters hold all that an exercise needs:
# the text that derives a function, its signature, its docstring, and below it checks
# that say `ok` or `FAIL`. Only the body has to go. At the end of this chapter you can
#
# - take the bodies out of Python code without touching a line around them;
# - say why a check might test the package in place of your function, and prevent it;
# - turn a chapter into a notebook that any tool shows, without the book's markup.

# %% [markdown]
# ## Setup

# %% setup
from llmnb.book.verify import verdict

# %% imports tags=["export"]
import ast
import importlib
import os
import re
import symtable
import sys

import nbformat
from IPython import get_ipython

from llmnb.book.export import ROOT, read_chapter, sources, write_text

# %% [markdown]
# ## Code without bodies
#
# The syntax tree knows where a body begins: behind the docstring, or behind the
# signature. The lines from there to the function's end give way to one. Comments
# between two statements go with them, decorators and default values stay. A class
# keeps its fields and loses the bodies of its methods.

# %% take bodies out tags=["exporti"]
TODO = 'raise NotImplementedError("your code here")'


def functions(tree):
    """The functions of a module's tree, and the methods of its classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node)


def blank(source):
    """Code with the bodies of its functions taken out, for you to write."""
    lines = source.splitlines()
    for node in reversed([*functions(ast.parse(source))]):
        documented = ast.get_docstring(node) is not None
        body = node.body[documented:]
        if not body:
            continue
        marks = getattr(body[0], "decorator_list", [])
        first = min(x.lineno for x in [body[0], *marks])
        if documented:
            first = node.body[0].end_lineno + 1
        indent = " " * body[0].col_offset
        lines[first - 1 : node.end_lineno] = [indent + TODO]
    return "\n".join(lines)


# %% a function without its body
full = '''SCALE = 2

def double(x):
    """Twice x."""
    # a sum is not enough
    return SCALE * x'''
print(blank(full))
verdict("the constant", blank(full).startswith("SCALE = 2\n"), "stays")
verdict("the body", "return" not in blank(full), "is gone")

# %% [markdown]
# ## Checks that test you
#
# A chapter's checks often call the package, as `cpu.layernorm_forward` or through a
# whole model, and a chapter that writes two modules imports the one in the other.
# There the package's function would stand in for yours, and every check would pass.
# So the notebook watches its cells: after one that is exported, what it has defined
# takes the places of the package's, wherever a module has that under its name. This
# lasts as long as the notebook's process. Kernels compiled meanwhile may have a wrong
# function of yours in them, so none is kept on disk.


# %% yours in the package's place tags=["exporti"]
MARK = "# exported to llmnb."


def begin():
    """From now on the package has the functions that this notebook exports."""
    os.environ["LLMNB_CACHE"] = os.devnull
    shell = get_ipython()
    shell.events.register(
        "post_run_cell", lambda x: put(x.info.raw_cell, shell.user_ns)
    )


def put(source, names):
    """Put what a cell exports in the place of the package's.

    source: the cell's. names: the notebook's.
    """
    if not source.startswith(MARK):
        return
    module = source.partition("\n")[0].removeprefix(MARK)
    package = vars(importlib.import_module(f"llmnb.{module}"))
    for symbol in symtable.symtable(source, module, "exec").get_symbols():
        name = symbol.get_name()
        made = symbol.is_assigned() and not symbol.is_imported()
        if not (made and name in package and name in names):
            continue
        old, places = package[name], [*sys.modules.items()]
        for place in [vars(x) for key, x in places if key[:6] == "llmnb."]:
            if name in place and place[name] is old:
                place[name] = names[name]


# %% another gelu
from llmnb import cpu
from llmnb.cpu import gelu

mine = f"{MARK}cpu.gelu\ndef gelu_forward(out, inp):\n    pass"
kept, names = gelu.gelu_forward, {"gelu_forward": print}
put(mine, names)
verdict("the module", gelu.gelu_forward is print, "has yours")
verdict("the room", cpu.gelu_forward is print, "too")
put(mine, {"gelu_forward": kept})

# %% [markdown]
# ## Plain text
#
# The book's markup is little: boxes that fold, links into pages that are not
# notebooks, and roles. A fold becomes HTML's own, which notebooks know; such a link
# becomes its words.

# %% plain Markdown tags=["exporti"]
FOLD = re.compile(
    r"^:::+\{[\w-]+\} *(.*)\n((?::[\w-]+:.*\n)*)((?:.*\n)*?):::+ *$", re.M
)
AWAY = re.compile(r"\[([^\]]*)\]\((?!https?:)[^)\s]*\.(?:md|html)[^)\s]*\)")
ROLE = re.compile(r"\{[\w:-]+\}`([^`]*)`")
LABEL = re.compile(r"^\([\w.:-]+\)=\n", re.M)


def plain_text(text):
    """Markdown without the book's markup."""
    fold = "<details>\n<summary>{}</summary>\n\n{}\n</details>"
    text = FOLD.sub(lambda x: fold.format(x[1], x[3].rstrip() + "\n"), text)
    text = AWAY.sub(r"\1", text)
    text = ROLE.sub(lambda x: f"`{x[1].partition(' <')[0]}`", text)
    return LABEL.sub("", text)


# %% a fold and two links
text = """See [chapter 1.1](../1_by_hand/01_learns.ipynb), for a
[token](../../book/glossary.md#term-token).

:::{admonition} Solution
:class: dropdown
It is 3.
:::
"""
print(plain_text(text))

# %% [markdown]
# ## A chapter, twice
#
# An exported cell says in a comment which module it is part of. The tags, which the
# book reads, go. Of an exercise's solution that is one assignment the names stay.
# Chapter 1.1 exports nothing: there the functions in sight lose their bodies. Some
# chapters read files of the repository, by their place beside the chapter: those go
# there first.

# %% a notebook of a chapter tags=["export"]
EXPORTED = {"export", "exporti"}
ANSWER = re.compile(r"\A([\w, ]+ = )(?!.*^\w).*", re.M | re.S)
HOW = """\
> **To fill in.** The bodies of this chapter's functions are yours to write:
> each raises `NotImplementedError` until you do. The chapter's checks are left
> in, and they test your functions: run them; they say `ok`, or `FAIL` and
> stop. What a cell defines below `# exported to` stands in the package too, in
> the place of its own, until the notebook is restarted. What else the cells
> print in the book, the plain edition shows. Solutions are folded."""
BEGIN = "import llmnb.book.practice\n\nllmnb.book.practice.begin()"
GO = """\
# this chapter reads files of the repository
import os

if not os.path.exists("../../notebooks"):  # or this cell has run before
    os.chdir("../../../notebooks/{}")"""


def plain_cell(cell, chapter, practice):
    """Rewrite a cell in place: its text or code, its tags, its outputs."""
    tags = {*cell.metadata.get("tags", [])}
    module = cell.metadata.get("module", next(iter(chapter.modules), ""))
    title = cell.metadata.get("title", "")
    cell.metadata = nbformat.NotebookNode()
    solves = "hide-cell" in tags and title.startswith("exercise")
    if cell.cell_type != "code":
        cell.source = plain_text(cell.source)
        return
    if practice:
        cell.outputs, cell.execution_count = [], None
        if tags & EXPORTED or solves or not (chapter.cells or tags):
            cell.source = blank(cell.source)
        if solves:
            cell.source = ANSWER.sub(rf"\1...\n{TODO}", cell.source)
    if solves and TODO not in cell.source:  # JupyterLab folds it
        cell.metadata.jupyter = {"source_hidden": True}
    for output in cell.outputs:
        data = output.get("data", {})
        if "text/markdown" in data:
            data["text/markdown"] = plain_text(data["text/markdown"])
    if tags & EXPORTED:
        cell.source = f"{MARK}{module}\n{cell.source}"


def plain(path, practice=False):
    """A chapter's notebook without the book's markup.

    path: of its source. practice: also without its functions' bodies and its
    outputs, for you to fill in.
    """
    book = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    chapter = read_chapter(path)
    for cell in book.cells:
        plain_cell(cell, chapter, practice)
    first = []
    if practice:
        first += [nbformat.v4.new_markdown_cell(HOW)]
        first += [nbformat.v4.new_code_cell(BEGIN)]
    if any("../" in x.source for x in book.cells if x.cell_type == "code"):
        first += [nbformat.v4.new_code_cell(GO.format(path.parent.name))]
    for number, cell in enumerate(first):
        cell.id = f"first-{number}"
    book.cells[1:1] = first
    book.metadata.pop("llmnb", None)
    return book


# %% the command tags=["export"]
def main(argv=None):
    """Write all chapters to build/plain/ and to build/practice/."""
    for path in sources(ROOT / "notebooks"):
        place = f"{path.parent.name}/{path.stem}.ipynb"
        for name in ("plain", "practice"):
            book = plain(path, practice=name == "practice")
            text = nbformat.writes(book) + "\n"
            write_text(ROOT / "build" / name / place, text)
    print(ROOT / "build" / "plain", ROOT / "build" / "practice")


# %% LayerNorm, to fill in
from pathlib import Path

path = Path("../1_by_hand/06_layernorm.py")
book = plain(path, practice=True)
code = [x.source for x in book.cells if x.cell_type == "code"]
print(next(x for x in code if "def layernorm_forward" in x))

# %% [markdown]
# ## Proof
#
# Filled in with the chapter's own bodies, the notebook must be the chapter again.
# Here the first function is filled in and called; the tests run a whole notebook, and
# others with a body that is wrong, which must end in `FAIL`.

# %% empty, then filled in
full = next(
    x.source for x in read_chapter(path).cells if "_forward" in x.source
)
names = {}
exec("\n".join(x for x in code if "exported to" in x), names)
empty = names["layernorm_forward"]
exec(full, names)
filled = names["layernorm_forward"]
np = names["np"]
out, mean, rstd = np.empty((1, 1, 3)), np.empty((1, 1)), np.empty((1, 1))
arrays = (
    out,
    mean,
    rstd,
    np.array([[[1.0, 2.0, 3.0]]]),
    np.ones(3),
    np.zeros(3),
)
try:
    empty(*arrays)
except NotImplementedError as error:
    verdict("empty", str(error) == "your code here", "asks for your code")
filled(*arrays)
verdict("filled in", mean[0, 0] == 2.0, "computes the mean")

# %% [markdown]
# ## Take away
#
# - A check beside each function is an exercise already; take the body out.
# - A check is worth what it tests: look at where its names come from.
#
# ## Exercises
#
# **1** (★). Which lines of a function does `blank` keep if it has no docstring?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The decorators, the signature, and comments between it and the first statement.
# :::

# %% exercise 1, checked
code = "def f(x):\n    # twice\n    return 2 * x"
kept = blank(code).splitlines()[:2]
verdict(
    "exercise 1", kept == ["def f(x):", "    # twice"], "signature, comment"
)

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.16")
