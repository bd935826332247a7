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
import re

import nbformat

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
# A chapter that writes two modules imports the one in the other, and its checks
# sometimes import from the package what the chapter has just derived. There your
# function would be replaced by the package's, and every check would pass. So such an
# import goes: the name is in the notebook already. Where the module itself is
# imported, the notebook takes its place, under its name.


# %% imports of the chapter's own names tags=["exporti"]
def own_imports(source, modules):
    """Code whose imports from a chapter's own modules lead to the notebook.

    modules: their names without `llmnb.`, such as "reference.layernorm".
    """
    lines = source.splitlines()
    nodes = [*ast.walk(ast.parse(source))]
    nodes = [x for x in nodes if isinstance(x, ast.ImportFrom)]
    for node in sorted(nodes, key=lambda x: -x.lineno):
        made = [here(node.module, x, modules) for x in node.names]
        if not any(made):
            continue
        rest = [
            x for x, mine in zip(node.names, made, strict=True) if not mine
        ]
        if rest:
            left = ast.ImportFrom(node.module, rest, node.level)
            made.append(ast.unparse(left))
        indent = " " * node.col_offset
        new = [indent + x for x in made if x and x != "pass"]
        lines[node.lineno - 1 : node.end_lineno] = new or [indent + "pass"]
    return "\n".join(lines)


def here(module, name, modules):
    """What takes the place of one imported name; None if it stays.

    "pass" for a name that is in the notebook.
    """
    source = (module or "").removeprefix("llmnb").lstrip(".")
    ours = (module or "").partition(".")[0] == "llmnb"
    if ours and source in modules:
        new = name.asname
        return f"{new} = {name.name}" if new else "pass"
    if ours and f"{source}.{name.name}".strip(".") in modules:
        return f"import __main__ as {name.asname or name.name}"
    return None


# %% three imports
code = """from llmnb.shapes import shapes
from llmnb.reference.layernorm import layernorm_forward
from llmnb.reference import layernorm"""
print(own_imports(code, ["reference.layernorm"]))

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
> stop."""
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
    if cell.cell_type != "code":
        cell.source = plain_text(cell.source)
        return
    if practice:
        cell.outputs, cell.execution_count = [], None
        solves = "hide-cell" in tags and title.startswith("exercise")
        if tags & EXPORTED or solves or not (chapter.cells or tags):
            cell.source = blank(cell.source)
        if solves:
            cell.source = ANSWER.sub(rf"\1...\n{TODO}", cell.source)
        cell.source = own_imports(cell.source, chapter.modules)
    for output in cell.outputs:
        data = output.get("data", {})
        if "text/markdown" in data:
            data["text/markdown"] = plain_text(data["text/markdown"])
    if tags & EXPORTED:
        cell.source = f"# exported to llmnb.{module}\n{cell.source}"


def plain(path, practice=False):
    """A chapter's notebook without the book's markup.

    path: of its source. practice: also without its functions' bodies and its
    outputs, for you to fill in.
    """
    book = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    chapter = read_chapter(path)
    for cell in book.cells:
        plain_cell(cell, chapter, practice)
    first = [nbformat.v4.new_markdown_cell(HOW)] if practice else []
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
