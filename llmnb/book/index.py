# Written by `make export` from notebooks/appendix/10_book.py: edit that file.

"""What a chapter adds to the package."""

__all__ = ["gained"]


# what a chapter gained
import json
from importlib.resources import files

from IPython.display import Markdown, display


def gained(chapter):
    """Show what `llmnb` gained in a chapter, linked to the API pages.

    `chapter` is its number, such as "1.6". Raises KeyError when no such
    chapter exports anything.

    Derived in chapter A.10.
    """
    index = json.loads(files("llmnb").joinpath("index.json").read_text())
    rows = ["| module | name | what it does |", "|---|---|---|"]
    for x in index[chapter]:
        module, name = f"llmnb.{x['module']}", x["name"]
        page = f"../../book/api/{module}.md"
        doc = x["doc"].replace("|", "\\|")
        rows.append(
            f"| [{module}]({page}#module-{module}) "
            f"| [`{name}`]({page}#{module}.{name}) | {doc} |"
        )
    display(Markdown("\n".join(rows)))
