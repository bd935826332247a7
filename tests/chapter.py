"""Run everything, or a chapter's notebook and the tests of its modules.

    python tests/chapter.py                    all tests and notebooks, by
                                               as many workers as cores, 4 at
                                               most: each takes up to 1 GB
    python tests/chapter.py 2.4 -- ARGS        pytest with ARGS, for 2.4 alone

A module is tested by the files in the folder of its room that bear its name,
or else by those that import it. A layer that is compiled is tested by the file
that tests it in NumPy; the tests of all layers are run for its own alone.
"""

import ast
import json
import os
import sys

import pytest

import llmnb
from llmnb.book.export import ROOT, chapter_label, sources

TESTS = ROOT / "tests"
# the folders that test a room, where they are not those of its name
FOLDERS = {
    "": ["floor"],
    "book": ["."],
    "cpu": ["cpu", "reference"],
    "bench": ["bench", "cuda"],
}
# what tests all layers of a room, by their names
LAYERS = {
    "reference": "reference/test_layers.py",
    "cpu": "reference/test_layers.py",
    "cuda": "cuda/test_cuda_layers.py",
}
# modules that are tested through the model that runs on them
ALSO = {
    "backend": ["model/test_model.py"],
    "cpu.backend": ["model/test_model.py"],
}


def imported(path):
    """The names, with dots, that a file of tests imports from the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
            found.add(node.module)
    names = {name.removeprefix("llmnb.") for name in found if name}
    return names | {
        home.removeprefix("llmnb.")
        for name, home in llmnb._HOME.items()
        if name in names
    }


def test_files(module):
    """The files of tests for a module, such as "cpu.matmul"."""
    room, _, name = module.rpartition(".")
    folders = [TESTS / folder for folder in FOLDERS.get(room, [room])]
    names = {f"test_{name}", f"test_{room}_{name}"}
    files = [path for folder in folders for path in folder.glob("test_*.py")]
    named = {path for path in files if path.stem in names}
    found = named or {path for path in files if module in imported(path)}
    return found | {TESTS / name for name in ALSO.get(module, [])}


def chapter_files(label):
    """A chapter's notebook, what tests its exports, and its layers."""
    paths = {chapter_label(p): p for p in sources(ROOT / "notebooks")}
    if label not in paths:
        sys.exit(f"there is no chapter {label}: {', '.join(paths)}")
    index = json.loads((ROOT / "llmnb" / "index.json").read_text("utf-8"))
    exported = index.get(label, [])
    tests = set().union(*(test_files(x["module"]) for x in exported))
    layers = set()
    for x in exported:
        room, name = x["module"].split(".")[0], x["name"]
        if room in LAYERS and name.endswith("_forward"):
            tests.add(TESTS / LAYERS[room])
            layers.add(name.removesuffix("_forward"))
    return [paths[label].with_suffix(".ipynb"), *sorted(tests)], layers


def main(args):
    at = args.index("--") if "--" in args else len(args)
    files, layers, how = [], ["not layers.py"], ["--nbval"]
    for label in args[:at]:
        found = chapter_files(label)
        files += found[0]
        layers += found[1]
    how += ["-k", " or ".join(layers)] if files else []
    if not files:
        # threads that wait must not keep the other workers' from running
        for name, value in (
            ("GOMP_SPINCOUNT", "0"),
            ("OPENBLAS_NUM_THREADS", "1"),
        ):
            os.environ.setdefault(name, value)
        how += ["-n", str(min(4, os.cpu_count())), "--dist", "loadfile"]
    return pytest.main([*how, *args[at + 1 :], *map(str, files)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
