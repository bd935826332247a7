"""The package as a user meets it: light, documented, one list of packages."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib

import chapter
import pytest

from llmnb.book.export import PARTS, ROOMS, ROOT

MODULES = sorted(
    p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for p in (ROOT / "llmnb").rglob("*.py")
    if p.stem != "__init__"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import llmnb;"
        "t = time.perf_counter() - t;"
        "heavy = {'numba', 'matplotlib', 'tiktoken'} & set(sys.modules);"
        "assert not heavy, heavy; assert t < 0.5, t"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_front_door():
    import llmnb

    assert llmnb.GPT2Config().num_layers == 12
    assert llmnb.GPT2.__module__ == "llmnb.model.gpt2"
    assert llmnb.tokenizer.byte().n_vocab == 257
    with pytest.raises(AttributeError, match="llmnb has no 'nothing'"):
        _ = llmnb.nothing
    assert not hasattr(llmnb, "conf")  # the beginning of a module's name


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        thing = getattr(module, public)
        if not callable(thing) or thing.__module__ != name:
            continue
        doc = thing.__doc__ or ""
        assert re.search(r"Derived in chapter [\dA]\.\d+\.\s*$", doc), public


@pytest.mark.parametrize("name", MODULES)
def test_every_function_is_short(name):
    tree = ast.parse(
        (ROOT / (name.replace(".", "/") + ".py")).read_text("utf-8")
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno - doc.count("\n")
            assert lines <= 50, f"{name}.{node.name}: {lines} lines"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_backends_have_the_same_layers(backend):
    from llmnb import reference

    there = importlib.import_module(f"llmnb.{backend}")
    ends = ("_forward", "_backward", "_update", "_norm", "_gradients")
    layers = [n for n in reference.__all__ if n.endswith(ends)]
    assert len(layers) == 17, layers
    extra = {"work", "bf16", "version"}  # what only compiled layers take
    for name in layers:
        want = inspect.signature(getattr(reference, name))
        got = inspect.signature(getattr(there, name))
        shared = [p for n, p in got.parameters.items() if n not in extra]
        assert shared == list(want.parameters.values()), name


def count_lines(*patterns):
    files = [path for p in patterns for path in (ROOT / "llmnb").glob(p)]
    return sum(code_lines(path.read_text("utf-8")) for path in files)


def test_gpt2_in_numpy_takes_less_than_a_thousand_lines():
    names = "config", "checks", "arena", "model/layout", "model/init"
    names += ("model/gpt2",)
    code = count_lines(*(f"{name}.py" for name in names), "reference/*.py")
    assert 400 < code < 1000, code


def test_the_compiled_backend_stays_small():
    writing = count_lines("cpu/decode.py")  # inference: chapter 16
    assert 100 < writing < 300
    assert 400 < count_lines("cpu/*.py") - writing < 1600


def test_importing_the_gpu_kernels_compiles_nothing():
    """And without a GPU, numba's CUDA is not even imported."""
    code = (
        "import sys, llmnb.cuda; heavy = {'numba.cuda', 'nvmath', 'torch', "
        "'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def code_lines(text):
    """Lines of a file that are neither blank, comment nor docstring."""
    lines = {
        i
        for i, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    }
    kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds) and ast.get_docstring(node):
            doc = node.body[0]
            lines -= set(range(doc.lineno, doc.end_lineno + 1))
    return len(lines)


def test_one_list_of_packages():
    """environment.yml installs the extras that the Makefile installs."""
    text = (ROOT / "environment.yml").read_text()
    extras = re.search(r"- -e \.\[([a-z,]+)\]", text)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    make = (ROOT / "Makefile").read_text()
    for wanted in re.findall(r'-e "\.\[([a-z,]+)\]"', make):
        assert set(wanted.split(",")) <= set(extras)
    names = re.findall(r"^ +- ([a-z]+)", text, re.M)
    assert [n for n in names if n not in ("python", "pip")] == ["conda"]
    low = PROJECT["requires-python"].removeprefix(">=")
    assert f"python>={low}" in text


def test_runtime_packages_are_few():
    names = {re.match(r"[a-z]+", d)[0] for d in PROJECT["dependencies"]}
    assert names == {
        "numpy",
        "numba",
        "tiktoken",
        "matplotlib",
        "tqdm",
        "safetensors",
        "regex",
    }


README = (ROOT / "README.md").read_text("utf-8")
HERE = [p for name in PARTS if (p := ROOT / "notebooks" / name).exists()]


def test_the_readmes_program_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    short = code.replace("range(1, 101)", "range(1, 3)")
    assert short != code
    short += "assert 0 < loss < 6, loss\n"
    subprocess.run([sys.executable, "-c", short], cwd=tmp_path, check=True)
    wrote = {p.name for p in tmp_path.iterdir()}
    assert wrote == {"model.bin", "model.safetensors"}


@pytest.mark.parametrize("link", re.findall(r"\]\(([^):]+)\)", README))
def test_the_readmes_links_lead_somewhere(link):
    assert (ROOT / link).exists(), link


@pytest.mark.parametrize("room", ROOMS)
def test_the_readme_shows_every_room(room):
    assert re.search(rf"^\| \[`{room}/`\]\(llmnb/{room}\) \|", README, re.M)


@pytest.mark.parametrize("part", [p.name for p in HERE])
def test_the_readme_and_the_first_page_lead_into_every_part(part):
    intro = (ROOT / "book" / "intro.md").read_text("utf-8")
    for text in (README, intro):
        assert re.search(rf"\]\([./]*notebooks/{part}\b", text)


NAMED = re.findall(r"`(\w+)` in \[(llmnb/[\w/.]+)\]", README)


@pytest.mark.parametrize(("name", "path"), NAMED)
def test_a_function_is_where_the_readme_says(name, path):
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.M)


def test_a_chapters_tests_are_found():
    """What `make test CHAPTER=...` runs: the notebook, its modules' tests."""
    found = chapter.chapter_files("2.4")
    names = [path.relative_to(ROOT).as_posix() for path in found]
    assert names == [
        "notebooks/2_cpu/04_matmul.ipynb",
        "tests/reference/test_matmul.py",
    ]
    with pytest.raises(SystemExit, match="no chapter 9.9"):
        chapter.chapter_files("9.9")
