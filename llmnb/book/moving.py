# Written by `make export` from notebooks/appendix/11_proofs.py: edit that file.

"""Figures that move in the rendered book."""

__all__ = ["MIME", "moving"]


# imports of figures that move
import json

from IPython.display import display


# numbers for a figure that moves
MIME = "application/vnd.llmnb.figure+json"


def moving(kind, said, **data):
    """Hand a figure's numbers to the rendered book, below its still picture.

    kind: the script book/_static/move/<kind>.js that draws it. said: what a
    notebook shows in its place. data: numbers, texts, lists and mappings of
    these, as JSON has them. They must be the same on every machine, since
    the notebook's test compares them. A notebook keeps them in one line.

    Derived in chapter A.11.
    """
    facts = json.dumps({"kind": kind, **data}, separators=(",", ":"))
    display({"text/plain": said, MIME: facts}, raw=True)
