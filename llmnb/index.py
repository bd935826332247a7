# Written by `make export` from notebooks/22_colophon.py: edit that file.

"""Build the book from itself.

The exporter turns marked cells into the package; the builder runs the
notebooks and keeps what they print.
"""

__all__ = [
    "gained",
]


# what a chapter gained
import json
from importlib.resources import files

from IPython.display import Markdown, display


def gained(chapter):
    """Show what `llmnb` gained in a chapter, linked to the API pages.

    `chapter` is the stem of its file, such as "05_layernorm". Raises
    KeyError when no such chapter exports anything.

    Derived in chapter 22.
    """
    index = json.loads(files("llmnb").joinpath("index.json").read_text())
    rows = ["| module | name | what it does |", "|---|---|---|"]
    for x in index[chapter]:
        module, name = f"llmnb.{x['module']}", x["name"]
        folder, _, inner = x["module"].partition(".")
        page = f"../book/api/{folder if inner else 'llmnb'}.md"
        doc = x["doc"].replace("|", "\\|")
        rows.append(
            f"| [{module}]({page}#module-{module}) "
            f"| [`{name}`]({page}#{module}.{name}) | {doc} |"
        )
    display(Markdown("\n".join(rows)))
