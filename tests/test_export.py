"""The exporter: what it writes, and what it refuses with file and line."""

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


def chapter(folder, name, cells, module="thing"):
    """Write a notebook source with these cells and read it."""
    path = folder / "1_by_hand" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEADER.format(module=module) + cells)
    return export.read_chapter(path)


def refused(tmp_path, cells, *, line, says):
    """Assert that these cells are refused, naming this line."""
    marker = HEADER.count("\n") + line
    with pytest.raises(export.ExportError) as error:
        export.collect([chapter(tmp_path, "01_a.py", cells)])
    assert str(error.value).startswith(
        f"{tmp_path}/1_by_hand/01_a.py:{marker}: "
    )
    assert says in str(error.value)


def test_a_module_is_written_in_order(tmp_path):
    cells = '''# %% imports tags=["export"]
import math

# %% not exported
print(math.pi)

# %% the thing tags=["export"]
def thing(x):
    """Do it."""
    return helper(x) + math.pi

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
    assert '__all__ = [\n    "thing",\n]' in text
    assert "# its helper\ndef helper" in text
    assert "print" not in text
    assert "# %%" not in text
    assert text.index("def thing") < text.index("def helper")
    compile(text, "thing.py", "exec")


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
    assert (
        "from llmnb.cpu.there import (\n    there,\n)"
        in (files["llmnb/cpu/__init__.py"])
    )


def test_a_main_runs_as_a_program(tmp_path):
    cells = '# %% tags=["export"]\ndef main():\n    print("ran")\n'
    files = export.render([chapter(tmp_path, "01_a.py", cells)])
    got = subprocess.check_output(
        [sys.executable, "-c", files["llmnb/thing.py"]]
    )
    assert got.strip() == b"ran"


def test_a_name_exported_twice_is_refused(tmp_path):
    cells = """# %% one tags=["export"]
def f():
    return 1

# %% two tags=["export"]
x = 1
def f():
    return 2
"""
    refused(tmp_path, cells, line=7, says="f is exported twice, first at 01_a")


def test_an_undefined_name_is_refused(tmp_path):
    cells = """# %% one tags=["export"]
def f(x):
    y = x
    return y + missing
"""
    refused(tmp_path, cells, line=4, says="missing is not defined")


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
    cells = f'# %% one tags=["export"]\n{code}\n'
    if missing:
        line = 2 + code.count("\n")
        refused(tmp_path, cells, line=line, says=f"{missing} is not defined")
    else:
        export.collect([chapter(tmp_path, "01_a.py", cells)])


def test_a_newer_pythons_syntax_is_refused(tmp_path):
    """The package is for 3.11, on whatever Python it is exported."""
    cells = '# %% one tags=["export"]\nx = 1\ntype A = int\n'
    refused(tmp_path, cells, line=3, says="not Python")


def test_a_name_defined_in_an_unexported_cell_is_undefined(tmp_path):
    cells = """# %% a
import numpy as np

# %% b tags=["export"]
def f(x):
    return np.sum(x)
"""
    refused(tmp_path, cells, line=6, says="np is not defined")


def test_a_magic_is_refused(tmp_path):
    cells = '# %% one tags=["export"]\n# %timeit 1\nx = 1\n'
    refused(tmp_path, cells, line=2, says="a magic in an export cell")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("print(1)", "runs code in an export cell: print(1)"),
        ("for i in range(3):\n    x = i", "runs code in an export cell"),
        ("import numpy as np\nx = np.load('a')", "load() in an export cell"),
        ("x = open('a').read()", "in an export cell"),
        ("def f(:\n    pass", "not Python"),
    ],
)
def test_code_that_runs_is_refused(tmp_path, code, says):
    cells = f'# %% one tags=["export"]\n{code}\n'
    with pytest.raises(export.ExportError, match="01_a.py:") as error:
        export.collect([chapter(tmp_path, "01_a.py", cells)])
    assert says in str(error.value)


CALLS = '# %% tags=["export"]\nfrom llmnb.late import g\n\n'
CALLS += "def f():\n    return g()\n"
LATE = '# %% tags=["export"]\ndef g():\n    return 1\n'


def test_a_later_chapters_name_is_refused(tmp_path):
    first = chapter(tmp_path, "01_a.py", CALLS)
    later = chapter(tmp_path, "02_b.py", LATE, module="late")
    line = HEADER.count("\n") + 2
    with pytest.raises(export.ExportError) as error:
        export.collect([first, later])
    assert f"01_a.py:{line}: g belongs to a later chapter" in str(error.value)
    turned = chapter(tmp_path, "03_c.py", CALLS)
    assert set(export.collect([later, turned])) == {"late", "thing"}


def test_a_later_chapter_may_be_reached_from_inside_a_function(tmp_path):
    cells = '# %% tags=["export"]\ndef f():\n    from llmnb.late import g\n'
    first = chapter(tmp_path, "01_a.py", cells + "    return g()\n")
    later = chapter(tmp_path, "02_b.py", LATE, module="late")
    assert set(export.collect([first, later])) == {"late", "thing"}


def test_the_appendix_stands_beside_all_chapters(tmp_path):
    first = chapter(tmp_path, "01_a.py", CALLS)
    path = tmp_path / "appendix" / "01_b.py"
    path.parent.mkdir()
    path.write_text(HEADER.format(module="late") + LATE)
    beside = export.read_chapter(path)
    assert beside.label == "A.1"
    assert set(export.collect([first, beside])) == {"late", "thing"}


def test_a_module_without_a_docstring_is_refused(tmp_path):
    cells = '# %% tags=["export"] module="other"\nx = 1\n'
    with pytest.raises(export.ExportError, match="no line for module other"):
        chapter(tmp_path, "01_a.py", cells)
    cells = '# %% tags=["export"]\nx = 1\n'
    with pytest.raises(export.ExportError, match="no cell goes to module"):
        chapter(tmp_path, "01_a.py", cells, "thing: One.\n#       other")


def test_the_contents_follow_the_chapters(tmp_path):
    one = chapter(tmp_path, "01_a.py", '# %% tags=["export"]\nx = 1\n')
    files = export.render([one])
    assert "- file: notebooks/1_by_hand/01_a" in files["book/_toc.yml"]
    assert 'title: "1.1 Do a thing"' in files["book/_toc.yml"]
    row = "| 1.1 | [Do a thing](../notebooks/1_by_hand/01_a.ipynb) |"
    assert f"{row} One summary line. |" in files["book/contents.md"]
    page = files["book/api/llmnb.thing.md"]
    assert ".. automodule:: llmnb.thing" in page


def test_a_name_nobody_exports_is_refused(tmp_path):
    cells = '# %% one tags=["export"]\nfrom llmnb.nowhere import g\n'
    refused(tmp_path, cells, line=2, says="no chapter exports g")


@pytest.mark.parametrize(
    "code", ["import llmnb.late", "from .late import g", "from . import late"]
)
def test_another_form_of_import_is_refused(tmp_path, code):
    """These would get round the check of the chapters' order."""
    cells = f'# %% one tags=["export"]\n{code}\n'
    refused(tmp_path, cells, line=2, says="write `from llmnb.module import`")


def test_a_module_of_two_chapters_is_refused(tmp_path):
    cells = '# %% tags=["export"]\nx = 1\n'
    one = chapter(tmp_path, "01_a.py", cells)
    two = chapter(tmp_path, "02_b.py", cells)
    with pytest.raises(
        export.ExportError, match="already belongs to 1_by_hand/01_a"
    ):
        export.collect([one, two])


def test_a_chapter_without_summary_is_refused(tmp_path):
    path = tmp_path / "01_a.py"
    path.write_text("# %% [markdown]\n# # Title only\n")
    with pytest.raises(export.ExportError, match="01_a.py:1: .*summary"):
        export.read_chapter(path)


def test_differences_are_found(tmp_path):
    package = tmp_path / "llmnb"
    package.mkdir()
    (package / "a.py").write_text("one")
    (package / "old.py").write_text("two")
    files = {"llmnb/a.py": "one", "llmnb/b.py": "new"}
    found = export.differences(files, tmp_path)
    assert found == (["llmnb/b.py"], ["llmnb/old.py"])
    files["llmnb/a.py"] = "changed"
    changed, _ = export.differences(files, tmp_path)
    assert changed == ["llmnb/a.py", "llmnb/b.py"]


def test_the_package_is_what_the_notebooks_export():
    files = export.render(export.read_chapters(export.ROOT / "notebooks"))
    assert export.differences(files) == ([], []), "run `make export`"
    assert not any("# %%" in text for text in files.values())
