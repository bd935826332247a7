# Written by `make export` from notebooks/4_practice/24_train.py: edit that file.

"""The runs in runs/: a name for a new one, and which is the newest."""

__all__ = ["RUNS", "new_folder", "newest_run", "note_newest"]


# imports of the runs
import warnings
from contextlib import suppress
from itertools import chain
from pathlib import Path

from llmnb.files import make_folder, sync_folder


# a name for a run
RUNS = Path("runs")


def new_folder(config):
    """Make runs/NAME, or the first of runs/NAME-2, -3, ... that is free.

    Derived in chapter 4.24.
    """
    first = Path(config.shards or config.corpus[0]).resolve().stem or "run"
    folder, number = RUNS / first, 1
    make_folder(RUNS)
    while True:
        with suppress(FileExistsError):  # or made by another this instant
            folder.mkdir()
            sync_folder(RUNS)
            return folder
        number += 1
        folder = RUNS / f"{first}-{number}"


# the order of the runs
_ORDER = RUNS / ".order"


def _ordered():
    """Names of the runs in runs/, the last one worked on at the end."""
    with suppress(OSError):
        return _ORDER.read_text("utf-8", "surrogateescape").splitlines()
    return []


def note_newest(run):
    """Put a run in runs/ at the end of the list of runs.

    Derived in chapter 4.24.
    """
    folder = run.folder.resolve()
    if folder.parent == RUNS.resolve() and _ordered()[-1:] != [folder.name]:
        with suppress(OSError), open(_ORDER, "ab") as file:
            file.write(f"{folder.name}\n".encode("utf-8", "surrogateescape"))


_MODELS = "model.bin", "model.safetensors", "state_*.safetensors"


def newest_run(*files):
    """The run in runs/ that was worked on last.

    Derived in chapter 4.24.
    """
    ordered, found = _ordered(), {}
    for path in chain(*(RUNS.glob(f"*/{name}") for name in files or _MODELS)):
        with suppress(FileNotFoundError):  # a state that has just gone
            name, when = path.parent.name, path.stat().st_mtime
            found[name] = max(when, found.get(name, when))
    if not found:
        raise FileNotFoundError(
            f"there is no run in {RUNS}/ here: name a folder, or train one "
            "with `llmnb train`"
        )
    for name in reversed(ordered):
        if name in found:
            return RUNS / name
        if not (RUNS / name).exists() and found.keys() - {*ordered}:
            break  # it may have another name now
    return _newest_by_clock(found)


def _newest_by_clock(found):
    newest = max(found, key=found.get)
    if len(found) > 1:
        warnings.warn(
            f"which of the {len(found)} runs in {RUNS}/ is the newest is not "
            f"certain; taken is {RUNS / newest}: name one to be sure",
            stacklevel=3,
        )
    return RUNS / newest
