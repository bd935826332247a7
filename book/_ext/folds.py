"""What a chapter's page shows at first, and what it folds away.

A reader comes for the text, the figures and the results. So a cell that only
imports, sets up, draws or checks is folded to one line with its name, and a
long function to its signature; a cell's outputs stay in sight. In Part 1 the
functions are what a reader came for: a cell of them is folded only where it is
longer than a cell of the book should be. An exercise's
solution, its code and its check go into one fold, and so does the closing
table of the names that the package gained. What a fold holds follows
from the cell alone, so that hardly a notebook needs a tag for it: `fold-input`
where the text has said what the code does. A long function then has no
signature in sight either; that is for one whose signature the reader knows, as
that of a layer's second backend. `reading.js` opens the folds for the readers
who want the code.
"""

import ast
import re
from pathlib import Path

from docutils import nodes

LONG = 12  # lines; exported code longer than this is folded to its outline
LONG_BY_HAND = 26  # the same in Part 1
BY_HAND = "1_by_hand"  # the folder of Part 1
AUTHORS = {"hide-input", "hide-cell"}
TOLD = "fold-input"  # a tag: what the code does, the text has said
EXPORTED = {"export", "exporti"}
VERDICT = re.compile(r".{16} .+ (ok|FAIL)")
DRAWS = re.compile(r"\bplt\.|\bgpt2_diagram\(|\.savefig\(")
SOLUTION = re.compile(r"Solutions? to (exercises? .+)")


class Fold(nodes.General, nodes.Element):
    """Something folded behind one line, its `title`: a <details> element."""


def visit_fold(self, node):
    title = self.encode(node["title"])
    size = self.encode(node.get("size", ""))
    self.body.append(self.starttag(node, "details", CLASS="fold"))
    self.body.append(f"<summary>{title}")
    self.body.append(f' <span class="size">{size}</span>' if size else "")
    self.body.append("</summary>\n")


def depart_fold(self, node):
    self.body.append("</details>\n")


# ---- What a cell is -------------------------------------------------------


def statements(source):
    """The statements of a cell; none if it is not plain Python."""
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


def is_definition(statement):
    return isinstance(statement, ast.FunctionDef | ast.ClassDef)


def only_imports(body):
    """Whether a cell imports, and beside that names constants at most."""
    imports = [isinstance(x, ast.Import | ast.ImportFrom) for x in body]
    names = [isinstance(x, ast.Assign) for x in body]
    return any(imports) and sum(imports) + sum(names) == len(body)


def only_verdicts(text):
    """Whether a cell's output is nothing but lines of a verdict."""
    lines = text.strip("\n").split("\n")
    return bool(text) and all(VERDICT.fullmatch(x.rstrip()) for x in lines)


def kind_of(source, text, shown, exported, long=LONG):
    """What a cell is to a reader: the name of its fold, or None.

    source: its code. text: what it prints; shown: whether it puts out
    anything at all. exported: whether its code is part of the package. long:
    the lines that defined code may have before it is folded.
    """
    body, lines = statements(source), source.count("\n") + 1
    if only_imports(body) and not shown:
        return "imports"
    if exported:
        return "exported" if lines > long else None
    if DRAWS.search(source):
        return "drawing"
    if "gained(" in source:
        return "gained"
    if only_verdicts(text):
        return "check"
    if not shown:
        defines = any(map(is_definition, body))
        if defines and long == LONG_BY_HAND and lines <= long:
            return None
        return "helper" if defines else "setup"
    return "long" if lines > LONG else None


# ---- The outline of a long cell -------------------------------------------


def head(statement, lines):
    """The lines of a definition up to its body, with its decorators."""
    first = min([statement, *statement.decorator_list], key=lambda x: x.lineno)
    return lines[first.lineno - 1 : statement.body[0].lineno - 1]


def says(statement, indent):
    """The first line of a docstring, as a docstring."""
    text = ast.get_docstring(statement)
    return [f'{indent}"""{text.splitlines()[0]}"""'] if text else []


def outline(source):
    """The signatures of a cell, each with its docstring's first line."""
    lines, parts = source.split("\n"), []
    for x in filter(is_definition, statements(source)):
        part = head(x, lines) + says(x, "    ")
        if isinstance(x, ast.ClassDef):
            inner = [y for y in x.body if isinstance(y, ast.FunctionDef)]
            for y in inner:
                if not y.name.startswith("_"):
                    part += ["", *head(y, lines), *says(y, "        ")]
        parts.append("\n".join(part).rstrip())
    return "\n\n".join(parts)


# ---- Folding --------------------------------------------------------------


def is_cell(node):
    return node.get("nb_element") == "cell_code"


def code_cells(doctree):
    return list(filter(is_cell, doctree.findall(nodes.container)))


def part_of(cell, name):
    """The code or the output of a cell."""
    found = (x for x in cell.children if x.get("nb_element") == name)
    return next(found, None)


def tags_of(cell):
    return set(cell["cell_metadata"].get("tags", []))


def lines_of(source):
    count = source.count("\n") + 1
    return f"{count} lines" if count > 1 else "1 line"


def printed(output):
    """What a cell printed, as text; a figure or a table prints nothing."""
    if output is None:
        return ""
    blocks = output.findall(nodes.literal_block)
    return "\n".join(x.astext() for x in blocks if "stream" in x["classes"])


def fold_cell(cell, long):
    """Fold a cell's code if its kind or its author asks for that."""
    code = part_of(cell, "cell_code_source")
    output = part_of(cell, "cell_code_output")
    if code is None:
        return
    source = code.astext()
    tags, text = tags_of(cell), printed(output)
    exported = bool(EXPORTED & tags)
    kind = kind_of(source, text, output is not None, exported, long)
    if kind is None and TOLD in tags:
        kind = "told"
    if kind is None and not AUTHORS & tags:
        return
    name = cell["cell_metadata"].get("title") or "code"
    heading = cell.parent.next_node(nodes.title)
    if heading is not None and heading.astext().lower() == name:
        name = "the code"  # the heading has just said it
    classes = [kind] if kind else []
    # what an author folded stays folded where the code is open
    classes += ["authors"] if AUTHORS & tags else []
    fold = Fold(title=name, size=lines_of(source), classes=classes)
    known = kind != "exported" or TOLD in tags
    brief = "" if known else outline(source)
    cell["classes"].append("folded")
    label = cell[0]
    if not brief and "export-label" in label["classes"]:
        label["classes"].append("beside")
        del label[2:]  # the fold says the cell's name
    cell.replace(code, fold)
    fold += code
    if brief:
        cell.insert(cell.index(fold), outlined(brief, code))
        fold["title"] = "the whole code"
    if kind == "gained":
        rows = len(list(output.findall(nodes.row))) - 1
        fold["title"] = f"{rows} name{'s' * (rows > 1)} in the package"
        fold["size"] = ""
        cell.remove(output)
        fold += output


def outlined(text, code):
    """A block of code that stands for a longer one while that is folded."""
    language = next(code.findall(nodes.literal_block))["language"]
    block = nodes.literal_block(text, text, language=language)
    return nodes.container("", block, classes=["cell_input", "brief"])


def fold_exercises(doctree):
    """Put a solution, its code and what that prints into one fold.

    A solution is an admonition with the class dropdown; the cells that
    follow it up to the next text belong to it.
    """
    found = doctree.findall(nodes.admonition)
    for note in [x for x in found if "dropdown" in x["classes"]]:
        title = note.next_node(nodes.title).astext()
        match = SOLUTION.fullmatch(title)
        name = match[1] if match else ""
        fold = Fold(title=title, classes=["exercise"])
        fold["ids"] = [nodes.make_id(f"solution-{name}")] if name else []
        parent, place = note.parent, note.parent.index(note)
        fold += note.children[1:]
        parent.replace(note, fold)
        while len(parent) > place + 1 and is_cell(parent[place + 1]):
            fold += parent.pop(place + 1)


def fold(doctree):
    """Fold a chapter's exercises, then the cells outside of them."""
    fold_exercises(doctree)
    long = LONG_BY_HAND if BY_HAND in doctree["source"] else LONG
    for cell in code_cells(doctree):
        cell.attributes.pop("hide_mode", None)  # or MyST-NB folds it once more
        if not isinstance(cell.parent, Fold):
            fold_cell(cell, long)


def setup(app):
    first = Path(__file__).parents[1] / "_static" / "first.js"
    app.add_js_file(None, body=first.read_text("utf-8"), priority=1)
    app.add_node(Fold, html=(visit_fold, depart_fold))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
