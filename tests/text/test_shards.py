"""Text of any kind and size becomes shards, whatever interrupts it."""

import gzip
import json
import os
import random
import shutil
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from fuzz import altered, fuzzed, header, mangled, packed, refused
from large import TEXT, large_encoding
from measure import peak
from processes import held, python

from llmnb.formats.shard import find_shards, read_shard, write_shard
from llmnb.text import corpus, documents, shards, tokenizer
from llmnb.text.data import DataLoader
from llmnb.text.documents import sources
from llmnb.text.shards import shards_folder, write_shards

OPTIONS = {"limit": 0, "shard_tokens": 1000, "val_tokens": 0}


@cache
def ours():
    """The encoding of these tests, but where they name another."""
    return tokenizer.train("the cat sat on the mats, isn't it? " * 9, 270)


def text_of(path, field="text"):
    """The documents of a file, each in one piece."""
    out = []
    for source in sources([path], field):
        for first, text, _ in source.pieces():
            if first:
                out.append("")
            out[-1] += text
    return out


def written(folder):
    return {x.name: x.read_bytes() for x in sorted(folder.iterdir())}


def tokens_of(folder):
    train, val = find_shards(folder)
    return np.concatenate([read_shard(x) for x in val + train])


def make(folder, paths, encoding=None, workers=2, force=False, **options):
    folder, options = shards_folder(folder, force), OPTIONS | options
    how = encoding or ours(), options, force, workers
    return [*write_shards(folder, sources(paths), *how)][-1]


# where a text may be cut


def test_a_large_vocabulary_fills_shards_of_four_bytes(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    encoding, out = large_encoding(), tmp_path / "out"
    begun(out, tmp_path / "a.txt", encoding)  # stopped, and gone on with
    make(out, [tmp_path / "a.txt"], encoding)
    whole = corpus.encode_documents(encoding, [TEXT])
    assert whole.max() > 65_536
    got = tokens_of(out)
    assert got.dtype == np.uint32 and np.array_equal(got, whole)
    train, val = find_shards(out)
    sizes = [x.stat().st_size - 1024 for x in (*val, *train)]
    assert len(sizes) > 2 and sum(sizes) == 4 * len(whole)


def test_text_without_a_place_to_cut(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * (documents.UNCUT - 1))
    assert len(text_of(tmp_path / "a.txt")[0]) == documents.UNCUT - 1
    (tmp_path / "a.txt").write_bytes(b"x" * (documents.UNCUT + 1))
    refused(r"a\.txt: a blank must come within", text_of, tmp_path / "a.txt")


# every kind of file


gz = gzip.compress
BAD = [
    ("a.txt", b"ab\xffcd", r"a\.txt must be UTF-8 text, got 0xff at byte 2"),
    ("a.txt", b"ab\xc3", r"a\.txt must be UTF-8 text, got 0xc3 at byte 2"),
    ("a.txt", b"a\0b", r"a\.txt must be UTF-8 text, got a zero byte"),
    ("a.py", b"# coding: none\n", r"a\.py must be UTF-8 text"),
    ("a.gz", gz(b"abc" * 99)[:-9], r"a\.gz: damaged near byte"),
    ("a.gz", b"abc", r"a\.gz: damaged near byte 2: Not a gzipped file"),
    ("a.gz", gz(b"a" * 99) + b"x", r"a\.gz: damaged near byte"),
    ("a.jsonl.gz", gz(b"{}\n")[:-1], r"a\.jsonl\.gz"),
    ("a.zst", b"abc", r"a\.zst: damaged near byte 3"),
    ("a.zst", b"\x28\xb5\x2f\xfd\x04", r"a\.zst: damaged near byte 5"),
    ("a.zst", b"\x28\xb5\x2f\xfd\0\xff" + bytes(99), r"a\.zst: damaged"),
]


@pytest.mark.parametrize("name, raw, message", BAD, ids=range(len(BAD)))
def test_bad_files_are_named(tmp_path, name, raw, message):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(raw)
    refused(message, text_of, tmp_path / name)


def test_the_byte_that_is_wrong_in_a_large_file(tmp_path):
    raw = bytearray("aé " * 900_000, "utf-8")
    raw[3_000_001] = 0xFF
    (tmp_path / "a.txt").write_bytes(raw)
    refused("at byte 3,000,00[01]", text_of, tmp_path / "a.txt")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_bomb_takes_no_memory(tmp_path, ending, name):
    path = tmp_path / (name + ending)
    path.write_bytes(packed(path.name, bytes(300_000_000)))
    assert path.stat().st_size < 1_000_000

    def read():
        refused("at most|zero byte", text_of, path)

    assert peak(read) < 120_000_000


def begun(folder, path, encoding=None):
    """A folder whose work is left after four reports."""
    place = shards_folder(folder)
    work = write_shards(place, sources([path]), encoding or ours(), OPTIONS)
    for _ in range(4):
        next(work)
    work.close()
    return folder


# the fuzz: a result or one clear error

FUZZED = {
    "a.jsonl": b'{"text": "one \\u00e9"}\n{"text": "two", "n": [1, 2]}\n' * 3,
    "a.jsonl.gz": b'{"text": "one"}\n' * 9,
    "a.txt.gz": bytes(range(32, 127)) * 9,
    "a.jsonl.zst": b'{"text": "one"}\n' * 9,
    "a.txt.zst": bytes(range(32, 127)) * 9,
    "a.txt": "naïve text\r\n".encode() * 5,
}


@pytest.mark.parametrize("name", FUZZED)
@fuzzed(200, derandomize=True)
def test_fuzzed_text(tmp_path_factory, name, data):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data.draw(mangled(packed(name, FUZZED[name]))))
    try:
        for text in text_of(path):
            text.encode("utf-8")
    except ValueError as error:
        assert name in str(error) and len(str(error)) < 500


@fuzzed(200, derandomize=True)
def test_fuzzed_notes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    source = folder.parent / "fuzz-source.txt"
    if not source.exists():
        source.write_text("the cat sat. " * 400)
    out = begun(folder / "out", source)
    note = out / shards.NOTE
    note.write_bytes(data.draw(mangled(note.read_bytes())))
    try:
        make(out, [source])
    except ValueError as error:
        assert "start anew" in str(error) or "place to go" in str(error)
    except FileNotFoundError as error:
        assert "_0" in str(error)


def test_notes_that_are_none(tmp_path, texts):
    out = begun(tmp_path / "out", texts)
    said = json.loads((out / shards.NOTE).read_text())
    for change in (
        {"next": 3}, {"val_tokens": -1}, {"shards": [[3, 1]]},
        {"conditions": None}, {"conditions": {}},
        {"conditions": said["conditions"] | {"options": 3}},
    ):  # fmt: skip
        (out / shards.NOTE).write_text(json.dumps(altered(said, change)))
        refused("not the note of unfinished work", make, out, [texts])


# shards


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of text files and JSON lines, 60,000 characters."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(3)
    for k in range(12):
        words = ["".join(rng.choices("aehst", k=4)) for _ in range(600)]
        (folder / f"{k:02}.txt").write_text(" ".join(words))
        lines = [json.dumps({"text": " ".join(words[:k])}) for _ in range(20)]
        with gzip.open(folder / f"{k:02}.jsonl.gz", "wb") as file:
            file.write("\n".join(lines).encode())
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, texts):
    """What nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    make(folder, [texts], workers=1)
    return folder


def test_the_sizes_and_names_of_the_shards(tmp_path, texts):
    done = make(tmp_path / "a", [texts], val_tokens=2500)
    total = sum(count for _, count in done.shards)
    assert [x[0] for x in done.shards[:4]] == [
        "val_000000.bin", "val_000001.bin", "val_000002.bin",
        "train_000000.bin",
    ]  # fmt: skip
    counts = [count for _, count in done.shards]
    assert counts[:3] == [1000, 1000, 500]
    assert set(counts[3:-1]) == {1000} and counts[-1] == (total - 2500) % 1000
    out = tmp_path / "b"
    make(out, [texts], shard_tokens=10**6)
    assert [*written(out)] == ["tokenizer.tiktoken", "train.bin", "val.bin"]
    assert len(read_shard(out / "val.bin")) == total // 10
    assert np.array_equal(tokens_of(tmp_path / "a"), tokens_of(out))


def test_a_last_shard_that_is_full(tmp_path):
    (tmp_path / "a.txt").write_text("a " * 50)
    count = len(ours().encode_ordinary("a " * 50)) + 1
    options = {"val_tokens": count - 40, "shard_tokens": 20}
    done = make(tmp_path / "out", [tmp_path / "a.txt"], **options)
    assert done.shards[-1] == ["train_000001.bin", 20]
    options["shard_tokens"] = 40
    done = make(tmp_path / "two", [tmp_path / "a.txt"], **options)
    assert done.shards[-1] == ["train.bin", 40]


KILLED = """
import os, sys
from llmnb.text import shards, tokenizer
from llmnb.text.documents import sources
left, place, change = int(sys.argv[1]), sys.argv[2], os.replace
def replace(*names):
    global left
    left -= 1
    if left == 0 and place == "before": os._exit(9)
    change(*names)
    if left == 0: os._exit(9)
os.replace = replace
shards.BATCH = 3000
encoding = tokenizer.load({ranks!r})
folder = shards.shards_folder({out!r})
work = shards.write_shards(folder, sources([{texts!r}]), encoding, {options})
for _ in work: pass
"""


@pytest.mark.parametrize("place", ["before", "after"])
def test_killed_at_every_renaming(tmp_path, texts, place):
    options = OPTIONS | {"shard_tokens": 12_000}
    tokenizer.save(ours(), tmp_path / "ranks")
    make(tmp_path / "whole", [texts], **options)
    renames = 2 + 2 * (len(written(tmp_path / "whole")) - 1)
    for left in range(1, renames + 2):
        out = tmp_path / f"out{left}"
        paths = {"ranks": str(tmp_path / "ranks"), "texts": str(texts)}
        code = KILLED.format(**paths, out=str(out), options=options)
        got = python(code, left, place).returncode
        assert got == (9 if left <= renames else 0)
        if got:
            make(out, [texts], **options)
        assert written(out) == written(tmp_path / "whole")


def test_old_shards_half_removed_are_not_whole_work(
    tmp_path, texts, whole, monkeypatch
):
    """A kill among the removals of --force leaves a note; it goes on."""
    out, removed, unlink = tmp_path / "out", [], Path.unlink
    make(out, [texts], shard_tokens=400)

    def killed(path, *how, **more):
        unlink(path, *how, **more)
        removed.append(path)
        if len(removed) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        make(out, [texts], force=True)
    monkeypatch.undo()
    assert len(written(out)) > len(written(whole)) + 1
    make(out, [texts])
    assert written(out) == written(whole)


# what is refused


def test_a_place_behind_the_text_is_refused(tmp_path, texts):
    """It was taken for the end of work that is done."""
    out = begun(tmp_path / "out", texts)
    said = json.loads((out / shards.NOTE).read_text())
    for drop in (said["next"]["drop"], 0):
        place = said["next"] | {"piece": 10**6, "drop": drop}
        (out / shards.NOTE).write_text(json.dumps(said | {"next": place}))
        with pytest.raises(ValueError, match="place to go on from does not"):
            make(out, [texts])


def test_options_are_compared_as_the_note_holds_them(tmp_path, texts, whole):
    sizes = {"shard_tokens": np.int64(1000), "names": ("a", "b")}
    out, found = shards_folder(tmp_path / "out"), sources([texts])
    work = write_shards(out, found, ours(), OPTIONS | sizes)
    for _ in range(4):
        next(work)
    work.close()
    refused("names .'a', 'b'., not None", make, out, [texts])
    make(out, [texts], **sizes)
    assert written(out) == written(whole)


def test_a_restart_with_other_options_is_refused(tmp_path, texts):
    """Or with other shards than it has written."""
    out = begun(tmp_path / "out", texts)
    before = written(out)
    with pytest.raises(ValueError, match="shard_tokens 1000, not 2000"):
        make(out, [texts], shard_tokens=2000)
    refused("the tokenizer has changed", make, out, [texts], tokenizer.byte())
    assert written(out) == before
    write_shard(out / "val_000000.bin", [1, 2, 3])
    refused(r"val_000000\.bin must have 1000", make, out, [texts])
    (out / "val_000000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_000000\.bin"):
        make(out, [texts])


def test_another_corpus_on_restart_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the cat sat on the mat. " * 900)
    out = begun(tmp_path / "out", path)
    path.write_text("the cat sat on the hat. " * 900)
    os.utime(path, ns=(1, 1))
    refused("the corpus has changed", make, out, [path])
    make(out, [path], force=True)
    make(tmp_path / "anew", [path])
    assert written(out) == written(tmp_path / "anew")


def test_a_folder_of_another_process_is_refused(tmp_path, texts, whole):
    out, found = begun(tmp_path / "out", texts), sources([texts])
    before = written(out)
    with held(out) as process:
        says = f"is in use by process {process.pid} on "
        for force in (False, True):
            folder = shards_folder(out, force)
            with pytest.raises(BlockingIOError, match=says):
                next(write_shards(folder, found, ours(), OPTIONS, force))
        assert (written(out) | {".lock": b""}) == before | {".lock": b""}
    full = shutil.copytree(whole, tmp_path / "full")
    with held(full), pytest.raises(FileExistsError, match="is in use by proc"):
        shards_folder(full)


def test_the_newer_work_of_a_process_has_the_folder(tmp_path, texts, whole):
    folder, found = shards_folder(tmp_path / "out"), sources([texts])
    late = write_shards(folder, found, ours(), OPTIONS)
    older = write_shards(folder, found, ours(), OPTIONS)
    for _ in range(4):
        next(older)
    list(write_shards(folder, found, ours(), OPTIONS))
    with pytest.raises(BlockingIOError, match="taken up anew, by this proce"):
        list(older)
    # who has looked before, and takes it up when it is filled
    with pytest.raises(FileExistsError, match="is not empty"):
        next(late)
    assert written(folder) == written(whole)


def test_force_removes_the_old_shards_and_nothing_else(tmp_path, texts, whole):
    """An error leaves them."""
    out = shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        make(out, [tmp_path / "bad.jsonl"], force=True)
    assert written(out) == written(whole)
    (out / "notes.txt").write_text("mine")
    (out / "my_train_000001.bin").write_text("mine too")
    make(out, [texts], force=True, shard_tokens=10**6)
    assert sorted(written(out)) == [
        "my_train_000001.bin", "notes.txt", "tokenizer.tiktoken",
        "train.bin", "val.bin",
    ]  # fmt: skip


@pytest.mark.parametrize("options, message", [
    ({"shard_tokens": 0}, r"shard_tokens must lie in \[1, 2147483648\)"),
    ({"shard_tokens": 2**31}, "shard_tokens must lie in"),
    ({"val_tokens": -1}, "val_tokens must lie in"),
    ({"limit": -1}, "limit must lie in"),
    ({"val_tokens": 10**6}, "all of them for validation"),
    ({"limit": 3}, "validation must lie between 0 and"),
])  # fmt: skip
def test_bad_options(tmp_path, texts, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", [texts], **options)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="no text in the corpus"):
        make(tmp_path / "out", [tmp_path / "a.txt"])


def test_memory_does_not_grow_with_the_text(tmp_path, texts):
    words = (texts / "01.txt").read_text()
    (tmp_path / "a.txt").write_text(words * 20_000)
    size = (tmp_path / "a.txt").stat().st_size
    place = tmp_path / "out", [tmp_path / "a.txt"], tokenizer.byte()
    work = partial(make, *place, shard_tokens=1_000_000)
    assert peak(work) < 45_000_000 < size


# the loader over many shards


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="counts files in /proc"
)
def test_ten_thousand_shards(tmp_path):
    first = header(20240520, 1, 25)
    for k in range(10_000):
        tokens = (np.arange(25) + k).astype("<u2").tobytes()
        (tmp_path / f"train_{k:06}.bin").write_bytes(first + tokens)
    write_shard(tmp_path / "val.bin", np.arange(50))
    before = len(os.listdir("/proc/self/fd"))
    start = time.process_time()
    paths, _ = find_shards(tmp_path)
    loader = DataLoader(paths, 2, 6, seed=1)
    took = time.process_time() - start
    assert loader.batches_per_epoch == 20_000
    assert len(os.listdir("/proc/self/fd")) == before
    assert took < 5
    plain = [np.arange(25) + k for k in range(10_000)]
    other = DataLoader(plain, 2, 6, seed=1)
    for _ in range(300):
        assert np.array_equal(loader.next_batch(), other.next_batch())
        assert len(os.listdir("/proc/self/fd")) <= before + 1
