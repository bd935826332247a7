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
from count import code_lines
from processes import output

from llmnb.book.export import PARTS, ROOMS, ROOT
from llmnb.formats.foreign import open_foreign
from llmnb.formats.gguf import open_gguf
from llmnb.formats.hub import fetch
from llmnb.formats.template import render_chat
from llmnb.formats.vocabulary import open_encoding
from llmnb.model import architectures
from llmnb.text.reader import read_text
from llmnb.train.watch import Board

MODULES = sorted(
    p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for p in (ROOT / "llmnb").rglob("*.py")
    if p.stem != "__init__"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("name", "heavy", "seconds"),
    [
        ("llmnb", "numba matplotlib tiktoken", 0.5),
        # the kernels: nothing is compiled, and without a GPU numba's CUDA is
        # not even imported
        ("llmnb.cuda", "numba.cuda nvmath torch matplotlib", 60),
    ],
)
def test_import_is_light(name, heavy, seconds):
    code = (
        f"import sys, time; t = time.perf_counter(); import {name};"
        "t = time.perf_counter() - t;"
        f"heavy = set({heavy.split()}) & set(sys.modules);"
        f"assert not heavy, heavy; assert t < {seconds}, t"
    )
    output(code)


def test_the_front_door():
    import llmnb

    assert llmnb.GPT2Config().num_layers == 12
    assert llmnb.GPT2.__module__ == "llmnb.model.gpt2"
    assert llmnb.tokenizer.byte().n_vocab == 257
    with pytest.raises(AttributeError, match="llmnb has no 'nothing'"):
        _ = llmnb.nothing
    shown = {*dir(llmnb)}
    assert {"GPT2", "Model", "load", "tokenizer"} < shown
    configs = {x for x in architectures.__all__ if x.endswith("Config")}
    assert configs < shown
    assert not hasattr(llmnb, "conf")  # the beginning of a module's name


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented_and_functions_are_short(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert isinstance(module.__all__, list)
    for public in module.__all__:
        thing = getattr(module, public)
        if not callable(thing) or thing.__module__ != name:
            continue
        doc = thing.__doc__ or ""
        assert re.search(r"Derived in chapter [\dA]\.\d+\.\s*$", doc), public
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno - doc.count("\n")
            assert lines <= 50, f"{name}.{node.name}: {lines} lines"


def test_modules_use_what_they_import():
    """The linter of the chapters sees only whether the chapter uses it."""
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "-q"]
    ruff += ["--select", "F401", "--exclude", "__init__.py"]
    found = subprocess.run([*ruff, ROOT / "llmnb"], capture_output=True)
    assert (found.returncode, found.stdout) == (0, b"")


NUMPY = "config.py checks.py arena.py model/layout.py model/init.py "
NUMPY += "model/gpt2.py reference/*.py"


@pytest.mark.parametrize(
    ("files", "least", "most"),
    [
        (NUMPY, 400, 1000),
        ("cpu/decode.py", 100, 300),
        ("cpu/[!d]*.py", 400, 1600),
    ],
)
def test_gpt2_and_its_compiled_backend_stay_small(files, least, most):
    paths = [p for x in files.split() for p in (ROOT / "llmnb").glob(x)]
    # the layers of Part 5 are other models'
    texts = [p.read_text("utf-8") for p in paths]
    counts = [code_lines(x)[0] for x in texts if "/5_modern/" not in x[:99]]
    assert least < sum(counts) < most


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
    want = "numpy numba tiktoken matplotlib tqdm safetensors regex"
    assert names == set(want.split())


# what needs a package that only an extra installs, given a file to read
NEEDS = [
    ("zstandard", "zstd", "a.zst", read_text),
    ("tokenizers", "tokenizers", "tokenizer.json", open_encoding),
    ("tokenizers", "tokenizers", "tokenizer.json", open_foreign),
    ("sentencepiece", "modern", "tokenizer.model", open_foreign),
    ("gguf", "modern", "a.gguf", open_gguf),
    ("jinja2.sandbox", "modern", "a chat", lambda _: render_chat("", [])),
    ("huggingface_hub", "hub", "fetch", lambda _: fetch("gpt2")),
    ("tensorboard.compat.proto.event_pb2", "tensorboard", "TensorBoard",
     lambda path: Board(path.parent)),
]  # fmt: skip


@pytest.mark.parametrize(("module", "extra", "user", "call"), NEEDS)
def test_a_missing_package_is_named(
    module, extra, user, call, tmp_path, monkeypatch
):
    """And so is the extra that installs it, which pyproject.toml has."""
    package = module.partition(".")[0]
    wanted = PROJECT["optional-dependencies"][extra]
    assert package in {re.match(r"\w+", x)[0] for x in wanted}
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / user).write_bytes(b"GGUF")
    says = rf"{user} needs the package {package}: .*'llmnb\[{extra}\]'"
    with pytest.raises(ImportError, match=says):
        call(tmp_path / user)


README = (ROOT / "README.md").read_text("utf-8")
HERE = [p for name in PARTS if (p := ROOT / "notebooks" / name).exists()]


def test_the_readmes_program_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    short = code.replace("range(1, 101)", "range(1, 3)")
    assert short != code
    short += "assert 0 < loss < 6, loss\n"
    output(short, cwd=tmp_path)
    wrote = {p.name for p in tmp_path.iterdir()}
    assert wrote == {"model.bin", "model.safetensors"}


def test_the_readme_leads_everywhere():
    """Its links; every room; every part, and from the first page too."""
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert len(links) > 20
    assert not [x for x in links if not (ROOT / x).exists()]
    for room in ROOMS:
        row = rf"^\| \[`{room}/`\]\(llmnb/{room}\) \|"
        assert re.search(row, README, re.M), room
    intro = (ROOT / "book" / "intro.md").read_text("utf-8")
    for part in (p.name for p in HERE):
        for text in (README, intro):
            assert re.search(rf"\]\([./]*notebooks/{part}\b", text), part
    named = re.findall(r"`(\w+)` in \[(llmnb/[\w/.]+)\]", README)
    assert named
    for name, path in named:
        text = (ROOT / path).read_text("utf-8")
        assert re.search(rf"^def {name}\(", text, re.M), name


def test_a_chapters_tests_are_found():
    """What `make test CHAPTER=...` runs: the notebook, its modules' tests."""
    found, layers = chapter.chapter_files("2.4")
    assert layers == {"matmul"}
    names = [path.relative_to(ROOT).as_posix() for path in found]
    assert names == [
        "notebooks/2_cpu/04_matmul.ipynb",
        "tests/reference/test_layers.py",
        "tests/reference/test_matmul.py",
    ]
    with pytest.raises(SystemExit, match="no chapter 9.9"):
        chapter.chapter_files("9.9")
