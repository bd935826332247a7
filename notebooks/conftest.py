"""What nbval does otherwise here than by default.

It gives a cell 5 s for its output after it has run: too few for ours. And of
pictures it skips PNG only: yours may be PNG where an SVG is stored. It runs a
notebook with the Python that runs it, not with a kernel that the file names;
said here and not in pyproject.toml, so that pytest runs without nbval too.
Its kernel imports the package beside the notebooks, whichever is installed.
"""

import os
from pathlib import Path

PICTURES = ("image/svg+xml",)


def pytest_configure(config):
    paths = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if hasattr(config.option, "nbval_current_env"):
        config.option.nbval_current_env = True


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = 60
            book = item.parent
            book.skip_compare = tuple({*book.skip_compare, *PICTURES})
