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


def modules():
    """Every module of the package but the rooms' own, and its tree."""
    package = ROOT / "llmnb"
    for path in sorted(package.rglob("*.py")):
        if path.stem != "__init__":
            name = ".".join(path.relative_to(package).with_suffix("").parts)
            yield name, ast.parse(path.read_text("utf-8"))


def imports(tree, known):
    """The package's modules, and backends, that a module imports anywhere."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        first, _, source = node.module.partition(".")
        if first != "llmnb":
            continue
        for name in node.names:
            inner = f"{source}.{name.name}".strip(".")
            yield inner if inner in known else source or name.name


GRAPH = dict(modules())
GRAPH = {name: set(imports(tree, GRAPH)) for name, tree in GRAPH.items()}


def test_every_room_has_its_level():
    assert set().union(*LEVELS) == {"", *ROOMS}
    folders = {path.name for path in (ROOT / "llmnb").iterdir()}
    assert set(ROOMS) == folders - {"__pycache__"} - {
        name for name in folders if "." in name
    }


def test_imports_go_down_only():
    wrong = [
        f"{name} imports {used}"
        for name, all_used in GRAPH.items()
        for used in all_used
        if level(used if "." in used or used in GRAPH else f"{used}.")
        > level(name)
    ]
    assert not wrong


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


def test_few_files_stand_on_the_ground_floor():
    assert len(list((ROOT / "llmnb").glob("*.py"))) <= 8


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_a_chapter_is_read_in_one_sitting(path):
    text = path.read_text("utf-8")
    most = 1200 if path.parent.name == APPENDIX else 900
    assert text.count("\n") <= most
    minutes = int(re.search(r"\*Reading time: (\d+) minutes?\.", text)[1])
    assert minutes <= 30 or path.parent.name == APPENDIX


@pytest.mark.parametrize("part", PARTS)
def test_the_chapters_of_a_part_are_numbered_without_a_gap(part):
    numbers = [int(p.name[:2]) for p in CHAPTERS if p.parent.name == part]
    assert numbers == list(range(1, len(numbers) + 1))


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
    texts = {path: path.read_text("utf-8") for path in CHAPTERS}
    there = {
        kind: {x for text in texts.values() for x in re.findall(pattern, text)}
        for kind, pattern in {
            "equation": r"\\tag\{([^}]*)\}",
            "figure": r"\*Figure ([\dA]+\.\d+\.\d+)\.",
        }.items()
    }
    there["chapter"] = set(NAMES)
    number = r"([\dA]\.\d+\.\d+)"
    wrong = []
    for path, text in texts.items():
        for kind, pattern in {
            "equation": rf"\({number}\)",
            "figure": rf"[Ff]igures?\s+(?:# )?{number}",
            "chapter": r"[Cc]hapters?\s+(?:# )?([\dA]\.\d+)\b(?!\.\d)",
        }.items():
            gone = set(re.findall(pattern, text)) - there[kind]
            wrong += [f"{path.name}: {kind} {x}" for x in sorted(gone)]
    assert not wrong


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
