# Written by `make export` from notebooks/appendix/15_editions.py: edit that file.

"""The built book's pages in order, and a browser to read them."""

__all__ = [
    "BUILT", "CHROMIUM", "Entry", "READY", "TITLE", "heading", "open_browser",
    "open_page", "read_contents",
]


# imports of the pages
import html
import re
import shutil
from contextlib import contextmanager
from typing import NamedTuple

import yaml

from llmnb.book.export import ROOT


# the pages in order
BUILT = ROOT / "book" / "_build" / "html"
TITLE = "llmnb: GPT-2 from its equations"


class Entry(NamedTuple):
    """A page of the book: its part, its title, and its path in the build.

    Derived in chapter A.15.
    """

    part: str
    title: str
    page: str


def heading(path):
    """The title of a built page, without the book's.

    Derived in chapter A.15.
    """
    found = re.search(r"<title>(.*?)</title>", path.read_text("utf-8"), re.S)
    return html.unescape(found[1]).partition(" — ")[0].strip()


def read_contents(built, part=""):
    """The entries of the book's contents that are built, in order.

    built: the folder of `make book`. part: only chapters of that part, such as
    "1", or "A" for the appendix. The package's reference is left out.

    Derived in chapter A.15.
    """
    contents = yaml.safe_load((ROOT / "book/_toc.yml").read_text("utf-8"))
    listed = [("", {"file": contents["root"], "title": "About this book"})]
    for x in contents["parts"]:
        listed += [(x["caption"], chapter) for chapter in x["chapters"]]
    found = []
    for caption, x in listed:
        path = built / f"{x['file']}.html"
        if path.exists() and not x["file"].startswith("book/api/"):
            title = x.get("title") or heading(path)
            found.append(Entry(caption, title, f"{x['file']}.html"))
    return [x for x in found if not part or x.title.startswith(f"{part}.")]


# a browser
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# a promise that is kept when the page is ready
READY = """async () => {
    await window.MathJax?.startup?.promise;
    for (const image of document.images) image.loading = "eager";
    const images = [...document.images].map(x => x.decode().catch(() => 0));
    await Promise.all([document.fonts.ready, ...images]);
}"""


@contextmanager
def open_browser():
    """A page of a headless Chromium: the machine's own, or playwright's.

    Derived in chapter A.15.
    """
    from playwright.sync_api import sync_playwright

    own = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as playwright:
        launch = playwright.chromium.launch
        browser = launch(executable_path=own, args=["--no-sandbox"])
        yield browser.new_page(color_scheme="light")
        browser.close()


def open_page(page, path):
    """Show a file in the browser's page; returns when all of it is there.

    Derived in chapter A.15.
    """
    page.goto(path.resolve().as_uri())
    page.evaluate(READY)
