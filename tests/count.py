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
# where GPT-2's loss is drawn as it falls: chapters, and what begins it there
CURVES = ("1.14", "# ## It learns"), ("1.18", "# %% the loss curve")
EXERCISES = "# ## Exercises"  # the first of the sections that end a chapter


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


def lines_before(texts, label, mark):
    """How many lines stand before a mark in a chapter, and how many of them
    are exercises, with the reading and the list of names behind them."""
    before = [*texts.values()][: [*texts].index(label)]
    ends = [text[text.index(EXERCISES) :] for text in before]
    before.append(texts[label][: texts[label].index(mark)])
    return sum(x.count("\n") for x in before), sum(x.count("\n") for x in ends)


def print_chapters():
    """How long the longest is, and how much stands before a loss curve."""
    texts = {
        chapter_label(path): path.read_text("utf-8")
        for path in sources(ROOT / "notebooks")
    }
    lengths = {label: x.count("\n") for label, x in texts.items()}
    for kind, wanted in (("chapter", False), ("appendix", True)):
        some = [x for x in lengths if x.startswith("A") == wanted]
        longest = max(some, key=lengths.get)
        print(f"longest {kind}: {longest}, {lengths[longest]:,} source lines")
    for label, mark in CURVES:
        lines, ends = lines_before(texts, label, mark)
        print(f"before the loss curve of {label}: {lines:,} source lines")
        print(f"    without exercises and further reading: {lines - ends:,}")


def main():
    for folder in ("llmnb", "tests"):
        print_code(folder)
    print()
    print_chapters()


if __name__ == "__main__":
    main()
