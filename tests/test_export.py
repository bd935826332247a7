"""The exporter: what it writes, and what it refuses with file and line."""

import json
import subprocess
import sys

import pytest

from llmnb.book import export

HEADER = """# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   llmnb:
#     modules:
#       {module}: "A thing: what it is."
# ---

# %% [markdown]
# # Do a thing
#
# > One summary line.

"""
CELL = '# %% one tags=["export"]\n'


def chapter(folder, name, cells, module="thing", part="1_by_hand"):
    """Write a notebook source with these cells and read it."""
    path = folder / part / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEADER.format(module=module) + cells)
    return export.read_chapter(path)


def refused(tmp_path, cells, *, line, says):
    """Assert that these cells are refused, naming this line."""
    marker = HEADER.count("\n") + line
    with pytest.raises(export.ExportError) as error:
        export.collect([chapter(tmp_path, "01_a.py", cells)])
    place = f"{tmp_path}/1_by_hand/01_a.py:{marker}: "
    assert str(error.value).startswith(place)
    assert says in str(error.value)


def test_a_module_is_written_in_order(tmp_path):
    cells = '''# %% imports tags=["export"]
import math
from pathlib import (
    Path,
    PurePath as Pure,
)

# %% not exported
print(math.pi)

# %% the thing tags=["export"]
def thing(x):
    """Do it."""
    return helper(x) + math.pi

def other(x):
    """Do

    more.
    """

# %% its helper tags=["exporti"]
def helper(x):
    return x
'''
    files = export.render([chapter(tmp_path, "01_a.py", cells)])
    text = files["llmnb/thing.py"]
    banner = "# Written by `make export` from notebooks/1_by_hand/01_a.py"
    assert text.startswith(banner)
    assert '"""A thing: what it is."""' in text
    assert '"""Do it.\n\n    Derived in chapter 1.1.\n    """' in text
    assert '"""Do\n\n    more.\n\n    Derived in chapter 1.1.\n    """' in text
    assert '__all__ = ["other", "thing"]' in text
    assert "# its helper\ndef helper" in text
    assert "import math\nfrom pathlib import Path, PurePath as Pure\n" in text
    assert "print" not in text
    assert "# %%" not in text
    assert text.index("def thing") < text.index("def helper")
    compile(text, "thing.py", "exec")
    rows = json.loads(files["llmnb/index.json"])["1.1"]
    found = [(x["module"], x["name"], x["doc"]) for x in rows]
    assert found == [("thing", "thing", "Do it."), ("thing", "other", "Do")]


NAMES = [f"name{i}" for i in range(40)]


@pytest.mark.parametrize(
    "names",  # the last are 75 columns, with no room for a comma
    [NAMES[:n] for n in (0, 1, 9, 10, 11, 12, 40)] + [["a123456"] * 7],
)
def test_lists_of_names_fill_their_lines(names):
    for start, marks in (("__all__ = ", "[]"), ("from a import ", "()")):
        words = [f'"{x}"' for x in names] if marks == "[]" else names
        text = export.packed(start, words or ["*"] * (marks == "()"), marks)
        lines = text.splitlines()
        assert max(map(len, lines)) <= 79
        assert len(lines) == 1 or lines[-1] == marks[1]
        assert all(len(x) > 64 for x in lines[1:-2])  # no more would fit
        if marks == "[]":
            found = {}
            exec(text, found)
            assert found["__all__"] == names
        else:
            compile(text, "a.py", "exec")


def test_a_cell_can_go_elsewhere(tmp_path):
    cells = """# %% here tags=["export"]
def here():
    return 1

# %% there tags=["export"] module="cpu.there"
def there():
    return 2
"""
    two = "thing: One.\n#       cpu.there"
    files = export.render([chapter(tmp_path, "01_a.py", cells, two)])
    assert "def here" in files["llmnb/thing.py"]
    assert "def there" in files["llmnb/cpu/there.py"]
    room = files["llmnb/cpu/__init__.py"]
    assert "from llmnb.cpu.there import *\n" in room


def test_a_main_runs_as_a_program(tmp_path):
    cells = CELL + 'def main():\n    print("ran")\n'
    files = export.render([chapter(tmp_path, "01_a.py", cells)])
    command = [sys.executable, "-c", files["llmnb/thing.py"]]
    assert subprocess.check_output(command).strip() == b"ran"


LOADS = "import numpy as np\nx = np.load('a')"
TWICE = f"def f():\n    return 1\n\n{CELL}x = 1\ndef f():\n    return 2"
UNEXPORTED = (
    f"# %% a\nimport numpy as np\n\n{CELL}def f(x):\n    return np.sum"
)


@pytest.mark.parametrize(
    ("code", "line", "says"),
    [
        (TWICE, 7, "f is exported twice, first at 01_a.py:18"),
        (
            "def f(x):\n    y = x\n    return y + gone",
            4,
            "gone is not defined",
        ),
        (f"x = 1\n{UNEXPORTED}", 8, "np is not defined in llmnb.thing"),
        ("x = 1\ntype A = int", 3, "not Python"),  # the package is for 3.11
        ("def f(:\n    pass", 2, "not Python"),
        ("# %timeit 1\nx = 1", 2, "a magic in an export cell"),
        ("# !ls\nx = 1", 2, "a magic in an export cell"),
        ("print(1)", 2, "runs code in an export cell: print(1)"),
        ("for i in range(3):\n    x = i", 2, "runs code in an export cell"),
        (LOADS, 3, "load() in an export cell"),
        ("x = open('a').read()", 2, "open() in an export cell"),
        ("x: str = input()", 2, "input() in an export cell"),
        ("from llmnb.nowhere import g", 2, "no chapter exports g to llmnb.no"),
        ("from llmnb import nowhere", 2, "no chapter exports nowhere to llmn"),
        # these would get round the check of the chapters' order
        ("import llmnb.late", 2, "write `from llmnb.module import`: import"),
        ("from .late import g", 2, "write `from llmnb.module import`"),
        ("from . import late", 2, "write `from llmnb.module import`"),
    ],
)
def test_what_has_no_place_in_a_module_is_refused(tmp_path, code, line, says):
    refused(tmp_path, f"{CELL}{code}\n", line=line, says=says)


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("x = [k for k in range(3)]", None),
        ("x = {k: v for k, v in zip('ab', 'cd') if k != v}", None),
        ("class A:\n    x = [k for k in range(3)]", None),
        ("f = lambda a: sum(k for k in a)", None),
        ("def f(a):\n    return [[i * j for i in a] for j in a]", None),
        ("def f(a):\n    [k for k in a]\n    return k", "k"),
        ("x = [k for k in 'ab' if k != other]", "other"),
        ("def f(a):\n    return (k for k in a if later(k))", "later"),
    ],
)
def test_a_comprehension_binds_its_variable_alone(tmp_path, code, missing):
    """Python's own tables of names say this differently since 3.12."""
    cells = f"{CELL}{code}\n"
    if missing:
        line = 2 + code.count("\n")
        refused(tmp_path, cells, line=line, says=f"{missing} is not defined")
    else:
        export.collect([chapter(tmp_path, "01_a.py", cells)])


CALLS = CELL + "from llmnb.late import g\n\ndef f():\n    return g()\n"
INSIDE = CELL + "def f():\n    from llmnb.late import g\n    return g()\n"
LATE = CELL + "def g():\n    return 1\n"


def test_a_later_chapters_name_is_refused(tmp_path):
    """Unless it is imported inside a function, or from the appendix."""
    first = chapter(tmp_path, "01_a.py", CALLS)
    later = chapter(tmp_path, "02_b.py", LATE, "late")
    message = r"01_a.py:\d+: g belongs to a later chapter, 1_by_hand/02_b.py"
    with pytest.raises(export.ExportError, match=message):
        export.collect([first, later])
    turned = chapter(tmp_path, "03_c.py", CALLS)
    inside = chapter(tmp_path, "01_a.py", INSIDE)
    beside = chapter(tmp_path, "01_b.py", LATE, "late", "appendix")
    assert (later.label, beside.label) == ("1.2", "A.1")
    for pair in ([later, turned], [inside, later], [first, beside]):
        assert set(export.collect(pair)) == {"late", "thing"}


def test_headings_and_headers_must_be_whole(tmp_path):
    cells = '# %% tags=["export"] module="other"\nx = 1\n'
    with pytest.raises(export.ExportError, match="no line for module other"):
        chapter(tmp_path, "01_a.py", cells)
    cells = CELL + "x = 1\n"
    with pytest.raises(export.ExportError, match="no cell goes to module"):
        chapter(tmp_path, "01_a.py", cells, "thing: One.\n#       other")
    one, two = (chapter(tmp_path, f"0{n}_a.py", cells) for n in (1, 2))
    message = "02_a.py:.* already belongs to 1_by_hand/01_a"
    with pytest.raises(export.ExportError, match=message):
        export.collect([one, two])
    path = tmp_path / "01_a.py"
    path.write_text("# %% [markdown]\n# # Title only\n")
    with pytest.raises(export.ExportError, match="01_a.py:1: .*summary"):
        export.read_chapter(path)


def test_the_contents_follow_the_chapters(tmp_path):
    files = export.render([chapter(tmp_path, "01_a.py", CELL + "x = 1\n")])
    assert "- file: notebooks/1_by_hand/01_a" in files["book/_toc.yml"]
    assert 'title: "1.1 Do a thing"' in files["book/_toc.yml"]
    row = "| 1.1 | [Do a thing](../notebooks/1_by_hand/01_a.ipynb) |"
    assert f"{row} One summary line. |" in files["book/contents.md"]
    page = files["book/api/llmnb.thing.md"]
    assert ".. automodule:: llmnb.thing" in page
    row = "| [`llmnb.thing`](llmnb.thing.md) | A thing: what it is. |"
    assert row in files["book/api/index.md"]


def test_differences_are_found(tmp_path):
    package = tmp_path / "llmnb"
    package.mkdir()
    (package / "a.py").write_text("one")
    (package / "old.py").write_text("two")
    files = {"llmnb/a.py": "one", "llmnb/b.py": "new"}
    found = export.out_of_step(files, tmp_path)
    assert found == (["llmnb/b.py"], ["llmnb/old.py"])
    files["llmnb/a.py"] = "changed"
    changed, _ = export.out_of_step(files, tmp_path)
    assert changed == ["llmnb/a.py", "llmnb/b.py"]


def test_the_package_is_what_the_notebooks_export():
    files = export.render(export.read_chapters(export.ROOT / "notebooks"))
    assert export.out_of_step(files) == ([], []), "run `make export`"
    assert not any("# %%" in text for text in files.values())
