"""The house: which room may use which, and how long a chapter may be."""

import ast
import re

import pytest

from llmnb.book.export import APPENDIX, PARTS, ROOMS, ROOT, chapter_label
from llmnb.book.export import sources as find

# a room uses those of earlier rows, and those of its own
LEVELS = [
    {""},
    {"book", "gpu"},
    {"reference", "cpu", "cuda"},
    {"model", "formats", "text"},
    {"train", "bench"},
    {"cli"},
]
CHAPTERS = find(ROOT / "notebooks")
NAMES = [chapter_label(path) for path in CHAPTERS]


def level(module):
    room = module.partition(".")[0] if "." in module else ""
    return next(i for i, rooms in enumerate(LEVELS) if room in rooms)


def imports(path, known):
    """The package's modules, and backends, that a module imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        first, _, source = node.module.partition(".")
        if first != "llmnb":
            continue
        for name in node.names:
            inner = f"{source}.{name.name}".strip(".")
            yield inner if inner in known else source or name.name


PACKAGE = ROOT / "llmnb"
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}
GRAPH = {name: set(imports(path, PATHS)) for name, path in PATHS.items()}


def test_every_room_has_its_level():
    assert set().union(*LEVELS) == {"", *ROOMS}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert set(ROOMS) == folders - {"__pycache__"}
    assert len(list(PACKAGE.glob("*.py"))) <= 8  # on the ground floor


def test_imports_go_down_only():
    for name, all_used in GRAPH.items():
        for used in all_used:
            there = used if "." in used or used in GRAPH else f"{used}."
            assert level(there) <= level(name), f"{name} imports {used}"


def test_no_module_imports_itself_by_a_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        path.append(name)
        for used in sorted(GRAPH.get(name, ())):
            visit(used)
        done.add(path.pop())

    for name in GRAPH:
        visit(name)


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_a_chapter_is_read_in_one_sitting(path):
    text = path.read_text("utf-8")
    most = 1200 if path.parent.name == APPENDIX else 900
    assert text.count("\n") <= most
    minutes = int(re.search(r"\*Reading time: (\d+) minutes?\.", text)[1])
    assert minutes <= 30 or path.parent.name == APPENDIX


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_a_chapters_lines_fit_a_page(path):
    code = re.sub(r"^#.*$", "", path.read_text("utf-8"), flags=re.M)
    assert max(map(len, code.splitlines())) <= 79


@pytest.mark.parametrize("part", PARTS)
def test_the_chapters_of_a_part_are_numbered_without_a_gap(part):
    numbers = [int(p.name[:2]) for p in CHAPTERS if p.parent.name == part]
    assert numbers == list(range(1, len(numbers) + 1))


def test_text_in_gzip_is_read_alike_on_every_system():
    for path in CHAPTERS:  # without "rt", or with an encoding
        source = path.read_text("utf-8")
        assert not re.findall(r'gzip\.open\([^)]*"rt"\)', source), path


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_equations_and_figures_carry_the_chapters_number(path):
    text, label = path.read_text("utf-8"), re.escape(chapter_label(path))
    tags = re.findall(r"\\tag\{([^}]*)\}", text)
    figures = re.findall(r"\*Figure ([\dA]+\.\d+\.\d+)\.", text)
    for found in (tags, figures):
        assert all(re.fullmatch(rf"{label}\.\d+", x) for x in found)
        assert len(found) == len(set(found))


def test_what_a_reference_names_is_there():
    """An equation, a figure and a chapter that a text speaks of exist."""
    texts = {path.name: path.read_text("utf-8") for path in CHAPTERS}
    whole, number = "\n".join(texts.values()), r"[\dA]\.\d+\.\d+"
    tags = re.findall(r"\\tag\{([^}]*)\}", whole)
    figures = re.findall(rf"\*Figure ({number})\.", whole)
    label, then, count = r"[\dA]\.\d+\b(?!\.\d)", r"\s+(?:# )?", 0
    more = rf"(?:(?:,| and| or| to|, and){then}%s)*"  # as in "1.5 to 1.7"
    for there, one, pattern in (
        (tags, number, rf"\({number}\)"),
        (figures, number, rf"[Ff]igures?{then}{number}{more % number}"),
        (NAMES, label, rf"[Cc]hapters?{then}{label}{more % label}"),
    ):
        for name, text in texts.items():
            named = re.findall(one, " ".join(re.findall(pattern, text)))
            assert set(named) <= set(there), name
            count += len(named)
    assert count > 500


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_a_link_to_a_chapter_says_its_number(path):
    text = path.read_text("utf-8")
    links = re.findall(
        r"\[([^\]]*)\]\(((?:\.\./)?[\w/]*\d\d_\w+)\.ipynb", text
    )
    for words, link in links:
        target = (path.parent / f"{link}.py").resolve()
        assert target.exists(), link
        number = re.search(r"[\dA]\.\d+", words)
        assert not number or number[0] == chapter_label(target), (words, link)


@pytest.mark.parametrize("name", [".ci/run", "Makefile", "book/intro.md"])
def test_a_notebook_that_a_command_names_is_there(name):
    text = (ROOT / name).read_text("utf-8")
    named = re.findall(r"notebooks/\w+/\w+\.(?:ipynb|py)", text)
    assert not [x for x in named if not (ROOT / x).exists()]


# Letters: what stands in an equation stands in book/notation.md

GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|eta|theta|kappa|lambda|mu|nu|xi"
    "|rho|sigma|tau|phi|varphi|omega|Phi|ell"
)
SYMBOL = re.compile(
    r"\\(?:text|mathrm|operatorname|texttt|tag|begin|end)\s*\{[^}]*\}"
    rf"|\\math(?:cal|bb)\s?\{{?[A-Z]|\\(?:{GREEK})(?![a-zA-Z])"
    r"|\\[a-zA-Z]+|\\.|V_p|OC|NH|hs|max|SE|PPL|[a-zA-Z]|\S"
)
LETTER = re.compile(rf"[a-zA-Z]|\\math(?:cal|bb) [A-Z]|\\(?:{GREEK})")


def letters(equation):
    """The letters of an equation, each with "index" or "letter".

    An index stands low. An index outside, as in $u \\le t$, is still one
    where the equation has it low too. A `d` before a letter is the gradient's,
    an `e` with an exponent is the number.
    """
    symbols = SYMBOL.findall(equation) + [""]
    found, depth, low = set(), 0, []
    for before, x, after in zip(
        ["", *symbols[:-2]], symbols[:-1], symbols[1:], strict=True
    ):
        depth += (x == "{") - (before == "}")
        low = [at for at in low if at <= depth]
        if x == "{" and before == "_":
            low.append(depth)
        gone = x in ("d", "\\delta") or (x == "e" and after == "^")
        if LETTER.fullmatch(x) and not gone:
            index = (low or before == "_") and after != "_" and x.islower()
            found.add((x, "index" if index and len(x) == 1 else "letter"))
    return {
        (x, role)
        for x, role in found
        if role == "index" or (x, "index") not in found
    }


def table(text, heading):
    """The rows of the table under a heading of the notation page, as cells."""
    body = re.search(rf"## {heading}\n(.*?)(?=\n## |\Z)", text, re.S)[1]
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    return [[c.strip() for c in row.strip("|").split("|")] for row in rows[1:]]


def where(cell):
    """The chapters that a row of the notation page speaks for."""
    if cell in ("everywhere", "Part 1"):
        return {x for x in NAMES if cell == "everywhere" or x[0] == "1"}
    return set(re.findall(r"\[([\dA]\.\d+)\]", cell))


def notation():
    """The page, its rows (letter, role, chapters), letters of one chapter."""
    text = (ROOT / "book" / "notation.md").read_text("utf-8")
    rows, own = [], set()
    for heading, role in (
        ("Sizes", "letter"), ("Indices", "index"), ("Letters", "letter"),
    ):  # fmt: skip
        for cells in table(text, heading):
            scope = "everywhere" if heading == "Sizes" else cells[-1]
            found = re.findall(r"\$([^$]+)\$", cells[0])
            rows += [(x, role, where(scope)) for x in found]
    for chapter, cell in table(text, "Letters of one chapter"):
        (name,) = where(chapter)
        for names in re.findall(r"(?:^|; )([^:;]*):", cell):
            own |= {(name, x) for x in re.findall(r"\$([^$]+)\$", names)}
    return text, rows, own


TEXT, ROWS, OWN = notation()


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_a_letter_of_an_equation_means_what_the_notation_page_says(path):
    name = chapter_label(path)
    text = re.sub(r"^# ?", "", path.read_text("utf-8"), flags=re.M)
    equations = re.findall(r"\$\$(.+?)\$\$", text, re.S)
    used = {x for equation in equations for x in letters(equation)}
    for x, role in sorted(used):
        meanings = [r for r in ROWS if r[:2] == (x, role) and name in r[2]]
        mine = (name, x) in OWN
        assert mine or len(meanings) == 1, (
            f"{x} ({role}): {len(meanings)} rows"
        )
        assert not (mine and name[0] == "1"), f"{x}: Part 1 has one table"
    known = {x for x, _ in used}
    assert {x for chapter, x in OWN if chapter == name} <= known


def test_the_letters_of_part_1_have_one_meaning():
    """But for those that the notation page names, and in other chapters."""
    many = set()
    for i, (x, role, chapters) in enumerate(ROWS):
        for y, other, more in ROWS[:i]:
            if (x, role) == (y, other):
                assert not chapters & more, x
                many |= (
                    {x} if "1" in {n[0] for n in chapters | more} else set()
                )
    said = re.search(r"Two meanings, in different .*?: (.*)\.\n", TEXT)[1]
    assert many == set(re.findall(r"\$([^$]+)\$", said))


def test_indices_and_letters_are_told_apart():
    assert letters(r"s_{tu} = \sum_i q_{ti}\, k_{ui} , \qquad u \le t") == {
        *{(x, "letter") for x in "sqk"},
        *{(x, "index") for x in "tui"},
    }
    assert letters(r"dE_{x_t} = e^{w} \hat m / \mathcal L_0") == {
        *{(x, "letter") for x in ("E", "x", "w", "m", r"\mathcal L")},
        ("t", "index"),
    }
