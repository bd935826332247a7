# Written by `make export` from notebooks/appendix/10_book.py: edit that file.

"""Write the package from the notebooks' marked cells."""

__all__ = [
    "APPENDIX", "Cell", "Chapter", "ExportError", "MARKER", "ROOT",
    "cell_lines", "chapter_label", "collect", "main", "out_of_step",
    "read_chapter", "read_chapters", "read_heading", "render", "sources",
    "write_text",
]


# imports of the exporter
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


# one exported cell
MARKER = "# " + "%%"  # apart, so that no module holds a marker itself
ROOT = Path(__file__).parents[2] if "__file__" in globals() else Path("../..")
APPENDIX = "appendix"


class ExportError(Exception):
    """A notebook that cannot be exported; the message names file and line.

    Derived in chapter A.10.
    """


class Cell(NamedTuple):
    """A code cell that goes into the package.

    `line` is the line in the notebook `path` where its source begins;
    `module` the dotted name of the module it goes to, without `llmnb.`.

    Derived in chapter A.10.
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


# one chapter
class Chapter(NamedTuple):
    """A notebook source: its heading, the modules it writes and their cells.

    `modules` maps each module's dotted name to its docstring, a line.

    Derived in chapter A.10.
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
    """The number of the chapter that a source holds, such as "1.6".

    Derived in chapter A.10.
    """
    part = path.parent.name
    letter = "A" if part == APPENDIX else part.partition("_")[0]
    return f"{letter}.{int(path.name.partition('_')[0])}"


def cell_lines(path):
    """Line numbers of the first line of every cell in a percent file.

    Derived in chapter A.10.
    """
    text = Path(path).read_text("utf-8")
    markers = re.finditer(rf"^{MARKER}.*\n\s*", text, re.M)
    return [text.count("\n", 0, x.end()) + 1 for x in markers]


# read a chapter
def read_chapter(path):
    """Read a notebook source into a Chapter.

    Raises ExportError when the title, the summary or the module is missing.

    Derived in chapter A.10.
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
    """Title and summary from the text of a chapter's first cell.

    Derived in chapter A.10.
    """
    lines = source.splitlines()
    quoted = [x[1:].strip() for x in lines if x.startswith(">")]
    if not lines or not lines[0].startswith("# ") or not quoted:
        raise ExportError(
            f"{path}:1: the first cell must hold '# Title' and '> summary'"
        )
    return lines[0][2:].strip(), " ".join(quoted)


# what a cell may hold
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


# what the linter says
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


# names a cell defines
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


# one module
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


# undefined names
def check_undefined(modules):
    """Refuse a name that nothing in its module defines."""
    texts = dict.fromkeys(modules, "")
    for name, module in modules.items():
        for cell, _ in module.cells:
            texts[name] = cell.after(texts[name])
    for name, line, words in findings(texts, "F821"):
        text = f"{words} is not defined in llmnb.{name}"
        modules[name].cells[0][0].fail(line, text)


# the rooms of the package
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


# imports from other chapters
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


# collect all modules
def collect(chapters):
    """Build and check all modules of these chapters, by dotted name.

    Raises ExportError at the first defect.

    Derived in chapter A.10.
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


# the text of a module
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


# the file of a room
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


# the index
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


# the book's contents
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


# the pages of the package
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


# all that is written
def render(chapters):
    """All that the chapters write: a mapping from path to text.

    Raises ExportError at the first defect.

    Derived in chapter A.10.
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
    """Write a text file, and the folders it needs, whole or not at all.

    Derived in chapter A.10.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


# compare and write
def out_of_step(files, root=ROOT):
    """Paths whose text on the disk is missing, different or superfluous.

    Derived in chapter A.10.
    """
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
    """The chapters' sources in the order of the book.

    Derived in chapter A.10.
    """
    return sorted(folder.glob("*/[0-9]*.py"))


def read_chapters(folder):
    """Read every chapter of a folder in order.

    Derived in chapter A.10.
    """
    return [read_chapter(p) for p in sources(folder)]


def main(argv=None):
    """Regenerate the package, or with --check say what differs.

    Derived in chapter A.10.
    """
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


if __name__ == "__main__":
    main()
