"""Count the lines of the house: package, tests, chapters.

    python tests/count.py

Code lines are those with code on them: no comments, docstrings or blanks.
Lists of imported and of exported names stand a name or a few a line, and are
counted apart. Source lines are all lines of a chapter's .py file.
"""

import ast
import io
import tokenize
from collections import Counter

from llmnb.book.export import ROOT, chapter_label, sources

NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
    tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
WITH_DOCSTRING = ast.Module, ast.ClassDef, ast.FunctionDef
CURVE = "1.18", "# %% the loss curve"  # a chapter, and a cell of it


def spans(nodes):
    """The numbers of all lines on which nodes of a syntax tree stand."""
    return {n for x in nodes for n in range(x.lineno, x.end_lineno + 1)}


def code_lines(text):
    """How many code lines a module has, and how many of them list names."""
    tree, lines = ast.parse(text), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    nodes = [*ast.walk(tree)]
    documented = [x for x in nodes if isinstance(x, WITH_DOCSTRING)]
    lines -= spans(x.body[0] for x in documented if ast.get_docstring(x))
    names = spans(
        x for x in nodes if isinstance(x, ast.Import | ast.ImportFrom)
    )
    names |= spans(
        x for x in tree.body
        if isinstance(x, ast.Assign) and ast.unparse(x.targets) == "__all__"
    )  # fmt: skip
    return len(lines), len(lines & names)


def print_code(folder):
    """A table of the folders below a folder, and their sum."""
    code, names = Counter(), Counter()
    for path in sorted((ROOT / folder).rglob("*.py")):
        room = f"{path.parent.relative_to(ROOT)}/"
        for count, lines in zip(
            (code, names), code_lines(path.read_text("utf-8")), strict=True
        ):
            count[room] += lines
            count["all of it"] += lines
    print(f"\n{folder:<20}{'code lines':>12}{'lists of names':>16}")
    for room, lines in code.most_common()[1:] + code.most_common(1):
        print(f"{room:<20}{lines:>12,}{names[room]:>16,}")


def print_chapters():
    """How long the longest is, and how much stands before the loss curve."""
    texts = {
        chapter_label(path): path.read_text("utf-8")
        for path in sources(ROOT / "notebooks")
    }
    lengths = {label: x.count("\n") for label, x in texts.items()}
    label, cell = CURVE
    before = [*texts][: [*texts].index(label)]
    last = texts[label][: texts[label].index(cell)].count("\n")
    for kind, wanted in (("chapter", False), ("appendix", True)):
        some = [x for x in lengths if x.startswith("A") == wanted]
        longest = max(some, key=lengths.get)
        print(f"longest {kind}: {longest}, {lengths[longest]:,} source lines")
    total = sum(map(lengths.get, before)) + last
    print(f"before the loss curve of {label}: {total:,} source lines")


def main():
    for folder in ("llmnb", "tests"):
        print_code(folder)
    print()
    print_chapters()


if __name__ == "__main__":
    main()
