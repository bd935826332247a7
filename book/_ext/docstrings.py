"""Read the docstrings of this book as the lists that they are.

    out, inp: (B, T, C). weight: (C,). All of one float dtype.
    Returns the loss. Raises ValueError where a shape is wrong.

names arrays with their shapes; some docstrings set the same as columns. Both
become definition lists in the API pages, and so do "Returns" and "Raises".
What is none of these stays a paragraph.
"""

import re

NAME = r"\*{0,2}[A-Za-z_]\w*(?: \([^)]*\))?"
NAMES = rf"{NAME}(?:,? (?:and )?{NAME})*"
FIELD = re.compile(rf"({NAMES}): (.+)")
RESULT = re.compile(r"(Returns|Raises|Yields) (.+)")
# a sentence ends where another begins: a capital, or a list of names
END = re.compile(rf"(?<=\.) (?=[A-Z`]|\w*_\w* |{NAMES}: )")
COLUMNS = re.compile(r"(\w+(?:, \w+)*) {2,}(\S.*)")


def escape(text):
    """Plain text as reStructuredText; `name` becomes a literal."""
    parts = re.split(r"`([^`]+)`", text)
    plain = [re.sub(r"([\\*|_`:<>\[\]])", r"\\\1", p) for p in parts[::2]]
    # an escaped space parts a literal from what stands beside it, unseen
    code = [f"\\ ``{p}``\\ " for p in parts[1::2]]
    return "".join(p + c for p, c in zip(plain, [*code, ""], strict=True))


def parts_of(names):
    """The names of a clause: "out, inp (read only) and mean"."""
    return re.split(r",? and |, (?![^(]*\))", names)


def literals(names):
    """Each name of a clause as a literal, with what stands behind it."""
    parts = [x.partition(" ") for x in parts_of(names)]
    return ", ".join(f"``{x}`` {escape(note)}".strip() for x, _, note in parts)


def is_field(match):
    """Whether a clause names things and is no sentence with a colon."""
    parts = [x.partition(" (")[0] for x in parts_of(match[1])]
    return all(" " not in x for x in parts)


def split(text):
    """Cut a paragraph into pairs: a term or None, and what is said."""
    for sentence in END.split(text):
        field = FIELD.fullmatch(sentence)
        result = RESULT.fullmatch(sentence)
        if result:
            yield result[1], result[2]
        elif field and is_field(field):
            yield literals(field[1]), field[2]
        else:
            yield None, sentence


def columns(block):
    """The pairs of a block that is set in columns, or None."""
    lines = block.split("\n")
    found = [COLUMNS.fullmatch(x) for x in lines]
    if len(lines) < 2 or not all(found):
        return None
    return [(literals(x[1]), re.sub(r" {2,}", ", ", x[2])) for x in found]


def render(pairs):
    """Lines of reStructuredText: definition lists and paragraphs."""
    lines, before = [], None
    for term, text in pairs:
        if term is not None:
            if before != "list":
                lines.append("")
            lines += [term, f"    {escape(text)}"]
        elif before == "text":
            lines[-1] += " " + escape(text)
        else:
            lines += ["", escape(text)]
        before = "text" if term is None else "list"
    return [*lines, ""]


def block_lines(block):
    """A paragraph of a docstring as lines of reStructuredText."""
    pairs = columns(block) or split(" ".join(block.split()))
    return render(pairs)
