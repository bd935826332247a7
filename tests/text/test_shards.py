"""Text of any kind and size becomes shards, whatever interrupts it."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.formats.shard import find_shards, read_shard, write_shard
from llmnb.text import corpus, documents, shards, tokenizer
from llmnb.text.data import DataLoader
from llmnb.text.documents import sources
from llmnb.text.reader import Tally
from llmnb.text.shards import pieces_from, shards_folder, write_shards

QUICK = settings(max_examples=200, deadline=None, derandomize=True)
OPTIONS = {"limit": 0, "shard_tokens": 1000, "val_tokens": 0}


@pytest.fixture(scope="module")
def encoding():
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


def make(folder, paths, encoding, workers=2, **options):
    work = write_shards(
        shards_folder(folder), sources(paths), encoding, OPTIONS | options,
        workers=workers,
    )  # fmt: skip
    return [*work][-1]


# where a text may be cut

ALPHABET = "aest  \n\n\t\r'09.,é中🙂\u00a0\u2003\x1c\x85"


@QUICK
@given(text=st.text(ALPHABET, max_size=80) | st.text(max_size=80))
def test_safe_cuts_keep_the_tokens(encoding, text):
    encode = encoding.encode_ordinary
    for match in documents.SAFE.finditer(text):
        p = match.end()
        assert encode(text[:p]) + encode(text[p:]) == encode(text)


@pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"),
    reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's files",
)
@QUICK
@given(text=st.text(ALPHABET, max_size=80) | st.text(max_size=80))
def test_safe_cuts_keep_the_tokens_of_gpt2(text):
    encode = tokenizer.gpt2().encode_ordinary
    for match in documents.SAFE.finditer(text):
        p = match.end()
        assert encode(text[:p]) + encode(text[p:]) == encode(text)


@QUICK
@given(
    blocks=st.lists(st.text("ab \n", max_size=30), max_size=8),
    piece=st.integers(1, 20),
)
def test_a_cut_document_is_whole(blocks, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", piece)
        got = [*documents._cut("x", blocks)]
    assert "".join(text for _, text in got) == "".join(blocks)
    assert [first for first, _ in got] == [i == 0 for i in range(len(got))]
    for (_, left), (_, right) in zip(got, got[1:], strict=False):
        assert not left[-1].isspace() and right[0] in " \n"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_large_document_is_encoded_as_a_whole(tmp_path, encoding, name):
    rng = random.Random(1)
    text = "".join(rng.choices("abst é\n'", k=2_500_000))
    raw = text.encode()
    if name == "a.jsonl":
        raw = json.dumps({"text": text}).encode()
    packed = gzip.compress(raw) if name.endswith("gz") else raw
    (tmp_path / name).write_bytes(packed)
    pieces = [*sources([tmp_path / name])[0].pieces()]
    assert len(pieces) > 1
    make(tmp_path / "out", [tmp_path / name], encoding, shard_tokens=10**7)
    got = tokens_of(tmp_path / "out")
    whole = corpus.encode_documents(encoding, [text])
    assert np.array_equal(got, whole)


def test_text_without_a_place_to_cut(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * (documents.RUN - 1))
    assert len(text_of(tmp_path / "a.txt")[0]) == documents.RUN - 1
    (tmp_path / "a.txt").write_bytes(b"x" * (documents.RUN + 1))
    with pytest.raises(ValueError, match=r"a\.txt: a blank must come within"):
        text_of(tmp_path / "a.txt")


# every kind of file


def compress(name, raw):
    if name.endswith(".gz"):
        return gzip.compress(raw)
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        return zstandard.ZstdCompressor().compress(raw)
    return raw


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines(tmp_path, ending):
    lines = [
        {"text": "one\r\ntwo é", "n": 1},
        {"n": [2], "text": ""},
        {"text": "three \U0001f642"},
    ]
    raw = "\ufeff" + "\n\n".join(map(json.dumps, lines))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(path.name, raw.encode()))
    assert text_of(path) == ["one\r\ntwo é", "three \U0001f642"]
    path.write_bytes(compress(path.name, b'{"body": "x", "text": 3}\n'))
    assert text_of(path, "body") == ["x"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_text_files(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compress(path.name, b"\xef\xbb\xbfone\r\ntwo\rthree\n"))
    assert text_of(path) == ["one\ntwo\nthree\n"]


def test_several_frames_are_one_file(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    skipped = b"\x50\x2a\x4d\x18\4\0\0\0abcd"
    (tmp_path / "a.txt.zst").write_bytes(pack(b"a ") + skipped + pack(b"b"))
    (tmp_path / "b.txt.gz").write_bytes(
        gzip.compress(b"a ") + gzip.compress(b"b")
    )
    assert text_of(tmp_path / "a.txt.zst") == ["a b"]
    assert text_of(tmp_path / "b.txt.gz") == ["a b"]


def test_a_folder_is_read_as_chapter_1_does(tmp_path, encoding):
    (tmp_path / "in" / "a").mkdir(parents=True)
    inside = tmp_path / "in"
    (inside / "b.txt").write_bytes(b"second\r\nline\n")
    (inside / "a" / "z.md").write_text("first \u00e9", "utf-8")
    (inside / "c.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    (inside / "c2.py").write_bytes(b"# coding: nothing\nx = 1\n")
    (inside / "d.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (inside / "empty.txt").write_bytes(b"")
    (inside / "image.png").write_bytes(b"\x89PNG\r\n")
    (inside / "zero.dat").write_bytes(b"a\0b")
    (inside / ".hidden").write_text("no")
    assert text_of(inside) == corpus.load(inside)
    texts = [text for _, _, text, _ in pieces_from(sources([inside]))]
    assert texts == corpus.load(inside)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
def test_a_folder_of_everything_has_the_documents_of_chapter_1(
    tmp_path, encoding
):
    inside = tmp_path / "in"
    (inside / "runs" / "a").mkdir(parents=True)
    (inside / "runs" / "a" / "tokenizer.tiktoken").write_text("YQ== 0")
    os.mkfifo(inside / "pipe")
    (inside / "link").symlink_to("nowhere")
    (inside / "loop").symlink_to(inside)
    (inside / "a.py").write_bytes(b"# coding: rot13\nx = 1\n")
    (inside / "b.txt").write_bytes("wide".encode("utf-16"))
    (inside / "c.jsonl").write_text('{"text": "one"}\n{"text": null}\n' * 9)
    (inside / "d.txt.gz").write_bytes(gzip.compress(b"two <|endoftext|> "))
    (inside / os.fsdecode(b"\xffe.txt")).write_text("three " * 99)
    first, second = Tally(), Tally()
    want = corpus.load(inside, skip_bad=True, tally=first)
    assert want == ["one"] * 9 + ["two <|endoftext|> ", "three " * 99]
    with pytest.raises(ValueError, match=r"c\.jsonl:2: 'text' must be text"):
        make(tmp_path / "bad", [inside], encoding)
    found = sources([inside], "text", True, second)
    options = OPTIONS | {"endoftext": True}
    for endoftext in (False, True):
        options = OPTIONS | {"endoftext": endoftext}
        out = shards_folder(tmp_path / f"out{endoftext}")
        done = [*write_shards(out, found, encoding, options)][-1]
        assert done.documents == 11
        tokens = corpus.encode_documents(encoding, want, endoftext)
        assert np.array_equal(tokens_of(out), tokens)
    assert first.words() == second.words()
    assert first.words(endoftext=True) == (
        "; passed over: bad records 9, links to folders 1, not files 2, "
        "not text 2, runs or shards 1"
    )


def test_a_file_that_vanishes_after_the_walk(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"text": "x"}')
    tally = Tally()
    found = sources([tmp_path], tally=tally)
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).unlink()
    assert len([*pieces_from(found)]) == 1
    assert tally.words() == "; passed over: not readable 2"


@pytest.mark.parametrize("limit", [1, 7, 9, 10, 10**6])
def test_a_limit_cuts_as_chapter_1_does(tmp_path, limit):
    for name, text in (("a", "first é"), ("b", "second"), ("c", "x" * 50)):
        (tmp_path / name).write_text(text, "utf-8")
    found = pieces_from(sources([tmp_path]), limit=limit)
    texts = [text for _, _, text, _ in found]
    assert texts == corpus.load(tmp_path, limit=limit)


def test_the_built_in_corpora(encoding):
    found = pieces_from(sources(["stdlib"]), limit=300_000)
    texts = [text for _, _, text, _ in found]
    assert texts == corpus.load("stdlib", limit=300_000)


# bad files

BAD = [
    ("a.jsonl", b'{"text": "x"}\n{"body": 1}', r"a\.jsonl:2: must have a fi"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: must be JSON"),
    ("a.jsonl", b"[1]\n", r"a\.jsonl:1: must be a JSON object, got list"),
    ("a.jsonl", b'\n{"text": 3}', r"a\.jsonl:2: 'text' must be text, got int"),
    ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: .* half a character"),
    ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: must be UTF-8, got 0xff"),
    ("a.jsonl", b'{"text": ' + b"[" * 200_000, r"a\.jsonl:1: must be JSON"),
    ("a.jsonl", b"9" * 9999, r"a\.jsonl:1: must be (JSON|a JSON object)"),
    ("a.jsonl", b" " * (1 << 24) + b"x", r"a\.jsonl:1: a line must have at"),
    ("a.txt", b"ab\xffcd", r"a\.txt must be UTF-8 text, got 0xff at byte 2"),
    ("a.txt", b"ab\xc3", r"a\.txt must be UTF-8 text, got 0xc3 at byte 2"),
    ("a.txt", b"a\0b", r"a\.txt must be UTF-8 text, got a zero byte"),
    ("a.py", b"# coding: none\n", r"a\.py must be UTF-8 text"),
    ("a.gz", gzip.compress(b"abc" * 99)[:-9], r"a\.gz: damaged near byte"),
    ("a.gz", b"abc", r"a\.gz: damaged near byte 2: Not a gzipped file"),
    ("a.gz", gzip.compress(b"a" * 99) + b"x", r"a\.gz: damaged near byte"),
    ("a.jsonl.gz", gzip.compress(b"{}\n")[:-1], r"a\.jsonl\.gz"),
    ("a.zst", b"abc", r"a\.zst: damaged near byte 3"),
    ("a.zst", b"\x28\xb5\x2f\xfd\x04", r"a\.zst: damaged near byte 5"),
    ("a.zst", b"\x28\xb5\x2f\xfd\0\xff" + bytes(99), r"a\.zst: damaged"),
]


@pytest.mark.parametrize("name, raw, message", BAD)
def test_bad_files_are_named(tmp_path, name, raw, message):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        text_of(tmp_path / name)


def test_the_byte_that_is_wrong_in_a_large_file(tmp_path):
    raw = bytearray("aé " * 900_000, "utf-8")
    raw[3_000_001] = 0xFF
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(ValueError, match="at byte 3,000,00[01]"):
        text_of(tmp_path / "a.txt")


def test_a_missing_zstandard_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.zst").write_bytes(b"abc")
    with pytest.raises(ValueError, match="install the zstandard package"):
        text_of(tmp_path / "a.zst")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_bomb_takes_no_memory(tmp_path, ending, name):
    path = tmp_path / (name + ending)
    path.write_bytes(compress(path.name, bytes(300_000_000)))
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="at most|zero byte"):
        text_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120_000_000


def test_bad_names():
    with pytest.raises(FileNotFoundError, match="no file called wikipedia"):
        sources(["wikipedia"])


# the fuzz: a result or one clear error

FUZZED = {
    "a.jsonl": b'{"text": "one \\u00e9"}\n{"text": "two", "n": [1, 2]}\n' * 3,
    "a.jsonl.gz": gzip.compress(b'{"text": "one"}\n' * 9, mtime=0),
    "a.txt.gz": gzip.compress(bytes(range(32, 127)) * 9, mtime=0),
    "a.jsonl.zst": b'{"text": "one"}\n' * 9,
    "a.txt.zst": bytes(range(32, 127)) * 9,
    "a.txt": "naïve text\r\n".encode() * 5,
}


def flipped(data, raw):
    """Bytes of a file changed, taken out or cut off."""
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, len(raw)))
    return bytes(raw[:start] + raw[end:])


@pytest.mark.parametrize("name", FUZZED)
@QUICK
@given(data=st.data())
def test_fuzzed_text(tmp_path_factory, name, data):
    path = tmp_path_factory.getbasetemp() / name
    whole = FUZZED[name]
    raw = compress(name, whole) if name.endswith("zst") else whole
    path.write_bytes(flipped(data, raw))
    try:
        for text in text_of(path):
            text.encode("utf-8")
    except ValueError as error:
        assert name in str(error) and len(str(error)) < 500


@QUICK
@given(data=st.data())
def test_fuzzed_notes(tmp_path_factory, encoding, data):
    folder = tmp_path_factory.mktemp("fuzz")
    source = folder.parent / "fuzz-source.txt"
    if not source.exists():
        source.write_text("the cat sat. " * 400)
    out = folder / "out"
    found = sources([source])
    work = write_shards(shards_folder(out), found, encoding, OPTIONS)
    for _ in range(4):
        next(work)
    work.close()
    note = out / shards.NOTE
    note.write_bytes(flipped(data, note.read_bytes()))
    try:
        list(write_shards(shards_folder(out), found, encoding, OPTIONS))
    except ValueError as error:
        assert "start anew" in str(error) or "place to go" in str(error)
    except FileNotFoundError as error:
        assert "_0" in str(error)


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


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(shards, "BATCH", 3000)


def test_the_files_do_not_depend_on_the_workers(
    tmp_path, texts, encoding, small_batches
):
    make(tmp_path / "one", [texts], encoding, workers=1)
    make(tmp_path / "five", [texts], encoding, workers=5)
    assert written(tmp_path / "one") == written(tmp_path / "five")
    got = tokens_of(tmp_path / "one")
    want = corpus.encode_documents(encoding, text_of(texts))
    assert np.array_equal(got, want)


def test_the_sizes_and_names_of_the_shards(tmp_path, texts, encoding):
    done = make(tmp_path / "a", [texts], encoding, val_tokens=2500)
    total = sum(count for _, count in done.shards)
    assert [x[0] for x in done.shards[:4]] == [
        "val_000000.bin", "val_000001.bin", "val_000002.bin",
        "train_000000.bin",
    ]  # fmt: skip
    counts = [count for _, count in done.shards]
    assert counts[:3] == [1000, 1000, 500]
    assert set(counts[3:-1]) == {1000} and counts[-1] == (total - 2500) % 1000
    make(tmp_path / "b", [texts], encoding, shard_tokens=10**6)
    names = sorted(written(tmp_path / "b"))
    assert names == ["tokenizer.tiktoken", "train.bin", "val.bin"]
    assert len(read_shard(tmp_path / "b" / "val.bin")) == total // 10
    assert np.array_equal(tokens_of(tmp_path / "a"), tokens_of(tmp_path / "b"))


def test_a_last_shard_that_is_full(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("a " * 50)
    count = len(encoding.encode_ordinary("a " * 50)) + 1
    options = {"val_tokens": count - 40, "shard_tokens": 20}
    done = make(tmp_path / "out", [tmp_path / "a.txt"], encoding, **options)
    assert done.shards[-1] == ["train_000001.bin", 20]
    options["shard_tokens"] = 40
    done = make(tmp_path / "two", [tmp_path / "a.txt"], encoding, **options)
    assert done.shards[-1] == ["train.bin", 40]


def test_stopped_after_every_report(tmp_path, texts, encoding, small_batches):
    make(tmp_path / "whole", [texts], encoding)
    found, stops = sources([texts]), 0
    while True:
        folder = shards_folder(tmp_path / "parts")
        work = write_shards(folder, found, encoding, OPTIONS, workers=2)
        stops += 1
        reports = 0
        for reports, _ in enumerate(work, 1):
            if reports == 3 and stops < 40:
                break
        work.close()
        if not (folder / shards.NOTE).exists():
            break
    assert stops > 10
    assert written(tmp_path / "parts") == written(tmp_path / "whole")


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
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
def test_killed_at_every_renaming(tmp_path, texts, encoding, place):
    options = OPTIONS | {"shard_tokens": 12_000}
    tokenizer.save(encoding, tmp_path / "ranks")
    make(tmp_path / "whole", [texts], encoding, **options)
    renames = 2 + 2 * (len(written(tmp_path / "whole")) - 1)
    for left in range(1, renames + 2):
        out = tmp_path / f"out{left}"
        code = KILLED.format(
            root=str(Path(shards.__file__).parents[1]),
            ranks=str(tmp_path / "ranks"),
            out=str(out), texts=str(texts), options=options,
        )  # fmt: skip
        command = [sys.executable, "-c", code, str(left), place]
        got = subprocess.run(command, timeout=60).returncode
        assert got == (9 if left <= renames else 0)
        if got:
            make(out, [texts], encoding, **options)
        assert written(out) == written(tmp_path / "whole")


def test_killed_at_any_moment(tmp_path, texts):
    words = (texts / "01.txt").read_text()
    (tmp_path / "a.txt").write_text(words * 1500)
    command = [
        sys.executable, "-m", "llmnb.cli", "data", "out", "--corpus",
        "a.txt", "--tokenizer", "byte", "--shard-tokens", "150000",
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": root()}}
    whole = [x if x != "out" else "whole" for x in command]
    start = time.monotonic()
    subprocess.run(whole, check=True, timeout=60, **quiet, **where)
    took = time.monotonic() - start
    rng, killed = random.Random(5), 0
    while killed < 8:
        process = subprocess.Popen(command, **quiet, **where)
        time.sleep(rng.uniform(0.2, 0.7) * took)
        process.kill()
        killed += process.wait() != 0
        if process.returncode == 0:
            break
    # a kill may come when all is written: then the folder is in use
    left = written(tmp_path / "out") if (tmp_path / "out").exists() else {}
    left.pop(".lock", None)  # of the process that was killed
    finished = left == written(tmp_path / "whole")
    got = subprocess.run(command, timeout=60, **quiet, **where).returncode
    assert killed and got == (1 if finished else 0)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def root():
    return str(Path(shards.__file__).parents[1])


# what is refused


def begun(folder, texts, encoding):
    work = write_shards(
        shards_folder(folder), sources([texts]), encoding, OPTIONS
    )
    for _ in range(4):
        next(work)
    work.close()
    return folder


def test_another_option_on_restart_is_refused(tmp_path, texts, encoding):
    out = begun(tmp_path / "out", texts, encoding)
    before = written(out)
    with pytest.raises(ValueError, match="shard_tokens 1000, not 2000"):
        make(out, [texts], encoding, shard_tokens=2000)
    with pytest.raises(ValueError, match="the tokenizer has changed"):
        make(out, [texts], tokenizer.byte())
    assert written(out) == before


def test_another_corpus_on_restart_is_refused(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_text("the cat sat on the mat. " * 900)
    out = begun(tmp_path / "out", path, encoding)
    path.write_text("the cat sat on the hat. " * 900)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="the corpus has changed"):
        make(out, [path], encoding)
    folder = shards_folder(out, force=True)
    list(write_shards(folder, sources([path]), encoding, OPTIONS, force=True))
    make(tmp_path / "whole", [path], encoding)
    assert written(out) == written(tmp_path / "whole")


def test_a_lost_shard_on_restart_is_refused(tmp_path, texts, encoding):
    out = begun(tmp_path / "out", texts, encoding)
    write_shard(out / "val_000000.bin", [1, 2, 3])
    with pytest.raises(ValueError, match=r"val_000000\.bin must have 1000"):
        make(out, [texts], encoding)
    (out / "val_000000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_000000\.bin"):
        make(out, [texts], encoding)


def test_a_folder_in_use_is_refused(tmp_path, texts, encoding):
    make(tmp_path / "out", [texts], encoding)
    with pytest.raises(FileExistsError, match="is not empty"):
        shards_folder(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        shards_folder(tmp_path / "file")


HOLDER = """
import sys
from llmnb.files import Lock
lock = Lock(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_folder_of_another_process_is_refused(tmp_path, texts, encoding):
    make(tmp_path / "whole", [texts], encoding)
    out = begun(tmp_path / "out", texts, encoding)
    full = tmp_path / "full"
    make(full, [texts], encoding)
    before = written(out)
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": root()},
        )
        for folder in (out, full)
    ]  # fmt: skip
    for holder in holders:
        holder.stdout.readline()
    process = rf"is in use by process {holders[0].pid} on "
    for force in (False, True):
        folder, found = shards_folder(out, force), sources([texts])
        with pytest.raises(BlockingIOError, match=process):
            next(write_shards(folder, found, encoding, OPTIONS, force))
    with pytest.raises(FileExistsError, match="is in use by process"):
        shards_folder(full)
    assert (written(out) | {".lock": b""}) == before | {".lock": b""}
    for holder in holders:
        holder.kill()
        holder.communicate()
    assert (out / ".lock").exists()
    make(out, [texts], encoding)
    assert written(out) == written(tmp_path / "whole")


def test_a_folder_that_was_filled_meanwhile(tmp_path, texts, encoding):
    """Between the first look and the lock, another process did it all."""
    folder = shards_folder(tmp_path / "out")
    make(tmp_path / "out", [texts], encoding)
    before = written(folder)
    work = write_shards(
        folder, sources([texts]), encoding, OPTIONS | {"shard_tokens": 700}
    )
    with pytest.raises(FileExistsError, match="is not empty"):
        next(work)
    assert written(folder) == before


def test_the_newer_work_of_a_process_has_the_folder(tmp_path, texts, encoding):
    folder, found = shards_folder(tmp_path / "out"), sources([texts])
    older = write_shards(folder, found, encoding, OPTIONS)
    for _ in range(4):
        next(older)
    list(write_shards(folder, found, encoding, OPTIONS))
    before = written(folder)
    with pytest.raises(BlockingIOError, match="taken up anew, by this proce"):
        list(older)
    assert written(folder) == before
    make(tmp_path / "whole", [texts], encoding)
    assert before == written(tmp_path / "whole")


def test_force_removes_the_old_shards_and_nothing_else(
    tmp_path, texts, encoding
):
    out = tmp_path / "out"
    make(out, [texts], encoding)
    (out / "notes.txt").write_text("mine")
    (out / "my_train_000001.bin").write_text("mine too")
    folder = shards_folder(out, force=True)
    options = OPTIONS | {"shard_tokens": 10**6}
    list(write_shards(folder, sources([texts]), encoding, options, True))
    assert sorted(written(out)) == [
        "my_train_000001.bin", "notes.txt", "tokenizer.tiktoken",
        "train.bin", "val.bin",
    ]  # fmt: skip


def test_an_error_with_force_leaves_the_old_shards(tmp_path, texts, encoding):
    out = tmp_path / "out"
    make(out, [texts], encoding)
    before = written(out)
    (tmp_path / "bad.jsonl").write_text("{")
    bad = sources([tmp_path / "bad.jsonl"])
    with pytest.raises(ValueError, match="must be JSON"):
        list(write_shards(out, bad, encoding, OPTIONS, True))
    assert written(out) == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shard_tokens": 0}, r"shard_tokens must lie in \[1, 2147483648\)"),
        ({"shard_tokens": 2**31}, "shard_tokens must lie in"),
        ({"val_tokens": -1}, "val_tokens must lie in"),
        ({"limit": -1}, "limit must lie in"),
        ({"val_tokens": 10**6}, "all of them for validation"),
        ({"limit": 3}, "validation must lie between 0 and"),
    ],
)
def test_bad_options(tmp_path, texts, encoding, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", [texts], encoding, **options)


def test_no_text_at_all(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="no text in the corpus"):
        make(tmp_path / "out", [tmp_path / "a.txt"], encoding)


def test_memory_does_not_grow_with_the_text(tmp_path, texts):
    words = (texts / "01.txt").read_text()
    (tmp_path / "a.txt").write_text(words * 20_000)
    size = (tmp_path / "a.txt").stat().st_size
    tracemalloc.start()
    make(
        tmp_path / "out", [tmp_path / "a.txt"], tokenizer.byte(),
        shard_tokens=1_000_000,
    )  # fmt: skip
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 45_000_000 < size


# the loader over many shards


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="counts files in /proc"
)
def test_ten_thousand_shards(tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 25
    for k in range(10_000):
        tokens = (np.arange(25) + k).astype("<u2")
        (tmp_path / f"train_{k:06}.bin").write_bytes(
            header.tobytes() + tokens.tobytes()
        )
    write_shard(tmp_path / "val.bin", np.arange(50))
    before = len(os.listdir("/proc/self/fd"))
    start = time.perf_counter()
    paths, _ = find_shards(tmp_path)
    loader = DataLoader(paths, 2, 6, seed=1)
    took = time.perf_counter() - start
    assert loader.batches_per_epoch == 20_000
    assert len(os.listdir("/proc/self/fd")) == before
    assert took < 5
    plain = [np.arange(25) + k for k in range(10_000)]
    other = DataLoader(plain, 2, 6, seed=1)
    for _ in range(300):
        assert np.array_equal(loader.next_batch(), other.next_batch())
        assert len(os.listdir("/proc/self/fd")) <= before + 1
