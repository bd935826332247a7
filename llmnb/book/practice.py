# Written by `make export` from notebooks/appendix/16_practice.py: edit that file.

"""Chapters as plain notebooks, and as notebooks to fill in."""

__all__ = [
    "ANSWER", "BEGIN", "EXPORTED", "GO", "HOW", "main", "plain", "plain_cell",
]


# imports
import ast
import importlib
import os
import re
import symtable
import sys

import nbformat
from IPython import get_ipython

from llmnb.book.export import ROOT, read_chapter, sources, write_text


# take bodies out
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


# yours in the package's place
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


# plain Markdown
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


# a notebook of a chapter
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
    """Rewrite a cell in place: its text or code, its tags, its outputs.

    Derived in chapter A.16.
    """
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

    Derived in chapter A.16.
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


# the command
def main(argv=None):
    """Write all chapters to build/plain/ and to build/practice/.

    Derived in chapter A.16.
    """
    for path in sources(ROOT / "notebooks"):
        place = f"{path.parent.name}/{path.stem}.ipynb"
        for name in ("plain", "practice"):
            book = plain(path, practice=name == "practice")
            text = nbformat.writes(book) + "\n"
            write_text(ROOT / "build" / name / place, text)
    print(ROOT / "build" / "plain", ROOT / "build" / "practice")


if __name__ == "__main__":
    main()
