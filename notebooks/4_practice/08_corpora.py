# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       text.corpus: "Texts to train on, found, downloaded and kept."
# ---

# %% [markdown]
# # Corpora: texts to train on
#
# > Megabytes of text without a network, a download that is kept only if it is
# > the right one, and your own files, in an order that never changes.
#
# *Reading time: 19 minutes. You need: [chapter 4.7](07_reading.ipynb) for the
# reader, [chapter 1.3](../1_by_hand/03_batches.ipynb) for what becomes of the
# text.*

# %% [markdown]
# ## Where we are
#
# A **corpus** is a text to train on, cut into documents. Two are built in, so
# that the book can be worked through on a train, and the third is your own. At
# the end of this chapter you can
#
# - name a corpus that every Python brings along;
# - say why a corpus is sorted by a hash, and why folders of runs are left out;
# - fetch a text so that nothing but the right text is ever kept;
# - turn documents into one row of tokens on all cores.

# %% [markdown]
# ## Setup

# %% imports of the corpora tags=["export"]
import hashlib
import os
import re
import sys
import sysconfig
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from http.client import HTTPException
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llmnb.files import write_whole
from llmnb.text.reader import (
    NotText,
    Tally,
    open_stream,
    passing_over,
    read_documents,
    read_text,
)
from llmnb.text.bpe import EOT
from llmnb.text.tokenizer import document_start, encode_text, token_dtype


# %% setup
import tempfile

from llmnb.book.verify import verdict
from llmnb.text import tokenizer

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The library of Python
#
# We need megabytes of text, preferably without a network. Your Python has
# them: the source of its standard library and the manual pages that `help()`
# shows. We leave out tests, installed packages, and tables that a program has
# written.

# %% where the text is tags=["exporti"]
SKIPPED = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data",
    "site-packages", "test", "tests",
}  # fmt: skip

# %% [markdown]
# A corpus may be the folder in which we work, and then the last run lies in
# it, with its log and its sample, and so do shards. Read as text they would
# change the corpus from one command to the next. Both hold the tokenizer's
# file, a run its states: folders with such files are left out, and counted.
# Links to folders are not followed, as they may lead back to where we are.

# %% files below a folder tags=["export"]
_OUTPUT = re.compile(
    r"(tokenizer\.tiktoken|unfinished\.json|state_\d+\.safetensors)(\..*)?"
)


def files_below(folder, skipped=(), tally=None):
    """Paths of all files below a folder, sorted by name.

    Hidden files and folders are left out, and folders named in `skipped`.
    What is noted in `tally`, a `Tally`: runs and folders of shards, links to
    folders, folders that cannot be read, and pipes, devices, and links that
    lead nowhere.
    """
    found, tally = [], tally or Tally()

    def unreadable(error):
        tally.note("not readable", error.filename)

    for here, folders, names in os.walk(folder, onerror=unreadable):
        if any(map(_OUTPUT.fullmatch, names)):
            tally.note("runs or shards", here)
            folders.clear()
            continue
        folders[:] = [x for x in folders if x not in skipped and x[0] != "."]
        for link in filter(os.path.islink, (Path(here, x) for x in folders)):
            tally.note("links to folders", link)
        for path in (Path(here, x) for x in names if x[0] != "."):
            if os.path.isfile(path):
                found.append(path)
            else:
                tally.note("not files", path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


# %% [markdown]
# In which order? By name, the part that we set aside for validation would be
# all of one letter, and a limit would keep only the modules from *a* to *c*.
# We sort by the hash of the name: as good as shuffled, and the same each time.


# %% the standard library tags=["exporti"]
def _standard_library():
    """Yield the source and the manual pages of the running Python."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in files_below(root, SKIPPED):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and not name.startswith("_sysconfigdata"):
            found[name] = path
    with suppress(ImportError):
        from pydoc_data.topics import topics

        found |= {f"topic {name}": text for name, text in topics.items()}
    for name in sorted(found, key=_hash):
        with suppress(NotText):
            x = found[name]
            yield read_text(x) if isinstance(x, Path) else x


def _hash(text):
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# %% what a corpus is called tags=["export"]
def describe(names, documents, characters):
    """A line on a corpus: its names, with Python's version, and its size."""
    where = " ".join(map(str, names))
    if where == "stdlib":
        where += f" (Python {'.'.join(map(str, sys.version_info[:3]))})"
    many = "document" if documents == 1 else "documents"
    return f"{where}: {documents:,} {many}, {characters:,} characters"


# %% [markdown]
# ## A download
#
# The second corpus is `tinyshakespeare`, a megabyte of Shakespeare's plays
# that Andrej Karpathy collected and that many small language models are tried
# on. It is downloaded once. What arrives is kept only if its SHA-256 hash is
# the right one, which also tells that it is whole.


# %% keep a download tags=["export"]
def downloads_folder():
    """The folder of this user in which downloads are kept."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llmnb"


# %% fetch a file tags=["exporti"]
def _download(url, path):
    """Fetch a file of a megabyte into place; progress goes to stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=30) as reply:
        how = {"total": reply.length, "desc": path.name}
        how["disable"] = None  # no bar in a file
        with tqdm.wrapattr(reply, "read", **how) as body:
            raw = body.read()
    _check_hash(raw, url)
    write_whole(path, raw)


# %% check a download tags=["exporti"]
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = (
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
)


def _check_hash(raw, name):
    """Raise ValueError unless these bytes are tinyshakespeare."""
    got = hashlib.sha256(raw).hexdigest()
    if got != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{name} must have the SHA-256 {SHAKESPEARE_SHA256} to be "
            f"tinyshakespeare, got {got}"
        )


# %% find tinyshakespeare tags=["exporti"]
def _tinyshakespeare():
    """The text of tinyshakespeare, from LLMNB_DATA, the cache or the web."""
    name = "tinyshakespeare.txt"
    folder = os.environ.get("LLMNB_DATA")
    path = Path(folder, name) if folder else None
    if path is None or not path.exists():
        try:
            path = downloads_folder() / name
            if not path.exists():
                _download(SHAKESPEARE_URL, path)
        # RuntimeError: no home; HTTPException: broken off
        except (OSError, RuntimeError, HTTPException) as error:
            raise ConnectionError(
                f"cannot fetch tinyshakespeare from {SHAKESPEARE_URL} "
                f"({error}); put it as {name} into a folder and name "
                f"the folder in LLMNB_DATA"
            ) from error
    raw = path.read_bytes()
    _check_hash(raw, path)
    return raw.decode("utf-8")


# %% [markdown]
# ## Documents
#
# A **document** is a stretch of text that belongs together: a module, a
# manual page, a file. In tinyshakespeare it is one speech: the speeches are
# parted by blank lines, and the blank line stays at the end of the speech.
# The third kind of corpus is your own: files of text or of JSON lines, packed
# or not, and folders of them.


# %% documents of a play tags=["exporti"]
def _speeches(text):
    """The sections of a text, each with the blank line that ends it."""
    return re.findall(r".*?\n\n|.+", text, re.DOTALL)


# %% files of a corpus tags=["export"]
def files_of(path, tally):
    """Yield (path, whether it was named) for a file, or a folder's files.

    path: a Path. tally: as for `files_below`. Raises FileNotFoundError, or
    ValueError for a pipe or a device.
    """
    if path.is_dir():
        for inner in files_below(path, (), tally):
            yield inner, False
    elif path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a regular file or a folder")
    elif path.exists():
        yield path, True
    else:
        raise FileNotFoundError(
            f"there is no corpus and no file called {path}; the corpora are "
            "stdlib and tinyshakespeare"
        )


# %% documents of own files tags=["exporti"]
def _own_files(path, field, skip_bad, tally):
    """Yield the documents of a file, or of all files in a folder."""
    for inner, named in files_of(Path(path), tally):
        errors = nullcontext() if named else passing_over(inner, tally)
        with errors, open_stream(inner) as (stream, _):
            how = field, skip_bad, tally
            for _, blocks in read_documents(inner, stream, *how):
                yield "".join(blocks)


def _texts(name, *how):
    """The documents of a corpus, or of the files that have this name."""
    if name == "stdlib":
        return _standard_library()
    if name == "tinyshakespeare":
        return _speeches(_tinyshakespeare())
    return _own_files(name, *how)


# %% load a corpus tags=["export"]
def load_corpus(
    source="stdlib", limit=None, field="text", skip_bad=False, tally=None
):
    """The documents of a corpus, a list of str.

    source: "stdlib", the source and manual pages of the running Python;
    "tinyshakespeare", downloaded once unless the folder that LLMNB_DATA
    names has it; a path of a file or a folder; or a list of these. Files
    that end in .jsonl, .jsonl.gz or .jsonl.zst have a document a line, in
    the field `field`; any other file, unpacked when it ends in .gz or .zst,
    is a document. Of folders, files that are no text are passed over, and
    noted in `tally`, a `Tally`; with skip_bad, bad lines too. limit: keep at
    most that many characters; the last document is cut to fit. The order is
    the same on every call. Raises FileNotFoundError, ConnectionError, or
    ValueError for a bad limit, a bad line, a file that is no text, or an
    empty corpus.
    """
    tally = tally or Tally()
    if limit is not None and limit < 1:
        raise ValueError(f"load_corpus: limit must be at least 1, got {limit}")
    names = [source] if isinstance(source, (str, os.PathLike)) else source
    found = (_texts(name, field, skip_bad, tally) for name in names)
    texts = chain.from_iterable(found)
    documents = list(_take(filter(None, texts), limit or sys.maxsize))
    if not documents:
        raise ValueError(f"load_corpus: no text in {source}{tally.words()}")
    if times := sum(text.count(EOT) for text in documents):
        tally.note(EOT, source, times)
    return documents


# %% keep to a limit tags=["exporti"]
def _take(texts, limit):
    """Yield texts until they hold `limit` characters, the last one cut."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


# %% a folder of many kinds
many = folder / "many"
(many / "run").mkdir(parents=True)
(many / "a.txt").write_text("A text.")
(many / "b.jsonl").write_text('{"text": "A line."}\n{"text": null}\n')
(many / "c.py").write_text("# coding: rot13\n")
(many / "d.png").write_bytes(b"\x89PNG")
(many / "run" / "tokenizer.tiktoken").touch()
tally = Tally()
print(load_corpus(many, skip_bad=True, tally=tally), tally.words(), sep="\n")

# %% the standard library, loaded tags=["nbval-ignore-output"]
documents = load_corpus("stdlib")
print(describe(["stdlib"], len(documents), sum(map(len, documents))))

# %% [markdown]
# Your Python may be another version, so these numbers may be others, and
# nothing that the book verifies depends on them.

# %% [markdown]
# ## From documents to one row
#
# The documents become one long array of tokens, with `<|endoftext|>` before
# each, as in [chapter 1.3](../1_by_hand/03_batches.ipynb). Python runs one
# thread at a time, unless the work is done in compiled code that lets go of
# the lock; `tiktoken`'s encoder does, so threads share the work.


# %% tokens of documents tags=["export"]
def encode_documents(encoding, documents, endoftext=False):
    """Encode documents into one array, `<|endoftext|>` before each.

    encoding: as for `encode_text`; before each stands its `document_start`.
    documents: an iterable of str. Returns an array of shape (N,), of
    `token_dtype`. Text that reads `<|endoftext|>` is encoded as ordinary
    text, or with `endoftext` as a document's start. Raises ValueError when
    there are no documents.
    """
    if isinstance(documents, str):
        documents = [documents]
    kind = token_dtype(encoding.n_vocab)
    parts, before = [], np.array(document_start(encoding), kind)
    encode = partial(encode_text, encoding, endoftext=endoftext)
    with ThreadPoolExecutor(8) as pool:  # tiktoken lets go of the lock
        for ids in pool.map(encode, documents):
            parts += [before, ids.astype(kind)]
    if not parts:
        raise ValueError("encode_documents: there are no documents")
    return np.concatenate(parts)


# %% as in chapter 1.3
text = "\n\n".join(["One document.", "Another, with more to say."])
encoding = tokenizer.train(text * 3, 270)
row = encode_documents(encoding, text.split("\n\n"))
plain = []
for document in text.split("\n\n"):
    plain += [encoding.eot_token, *encoding.encode_ordinary(document)]
print(row.dtype, row.shape)
verdict("in threads", row.tolist() == plain, "the tokens of one thread")

# %% [markdown]
# ## Take away
#
# - Your Python holds a corpus of ten megabytes. It differs from version to
#   version, so nothing that must be repeated exactly should be learnt from it.
# - An order by hash is as good as shuffled and the same each time.
# - A download is kept when its hash is right, and then it is the text and
#   whole.
# - The output of a run is not text to train on, though it may lie among it.
#
# ## Design note
#
# Why is there no list of corpora to choose from, as in other packages? Each
# would have to be hosted, versioned, licensed and hashed, and would be gone in
# some years. Two are enough to try everything, and `curl` fetches the rest.
#
# ## Exercises
#
# **1** (★★). A corpus is limited to a million characters. Someone adds a file
# to the folder. How much of the old corpus can be lost from the new one, by
# name and by hash?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# In both orders what lies behind the new file moves on, and as many characters as
# it has fall off the end. By name that is always the text of the last letters; by
# hash it is any text. Nothing else changes its order, which is the point of both.
# :::


# %% exercise 1, checked tags=["hide-cell"]
def lost(order, added, limit=20):
    before = sorted(names, key=order)[:limit]
    after = sorted([*names, added], key=order)[:limit]
    return [name for name in before if name not in after], before[-1:]


names = [f"{letter}.txt" for letter in "abcdefghijklmnopqrstuvwxyz"]
for label, order in (("by name", str), ("by hash", _hash)):
    first = min((f"a{i}.txt" for i in range(100)), key=order)
    gone, last = lost(order, first)
    print(label, "loses", *gone)
    verdict(label, gone == last, "nothing but the last")

# %% [markdown]
# ## Further reading
#
# - Leo Gao and others, [The Pile](https://arxiv.org/abs/2101.00027), 2020:
#   read what a corpus is made of when it is made on purpose.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.8")
