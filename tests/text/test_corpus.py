"""Corpora: where they come from, and how they become tokens."""

import ast
import gzip
import hashlib
import json
import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from fuzz import packed, refused
from processes import served

from llmnb.text import corpus, data, reader, tokenizer
from llmnb.text.documents import sources
from llmnb.text.reader import LINE, Tally, open_stream
from llmnb.text.shards import pieces_from

# the standard library


@pytest.fixture(scope="module")
def library():
    return corpus.load_corpus("stdlib")


LEFT_OUT = (  # of tests, of packages, and tables
    "class Test_TestCase", "class ArrayPrintingOptions", "def get_include",
    "build_time_vars = {", "decoding_table = (", "\0", "\r",
)  # fmt: skip


def test_stdlib_is_source_and_manual(library):
    text = "\n".join(library)
    assert len(text) > 2_000_000
    assert "class JSONDecoder" in text and 'The "for" statement' in text
    assert all(isinstance(x, str) and x for x in library)
    assert not [x for x in LEFT_OUT if x in text]
    assert corpus.load_corpus() == library, "the default, always the same"


def test_stdlib_starts_with_a_fair_sample(library):
    """Source and manual pages are mixed, so that a prefix has both."""

    def is_source(text):
        try:
            return bool(ast.parse(text).body)
        except SyntaxError:
            return False

    kinds = [is_source(text) for text in library[:60]]
    assert {True, False} == set(kinds)


@pytest.mark.parametrize(("source", "limit", "error", "says"), [
    ("stdlib", 0, ValueError, "at least 1, got 0"),
    ("stdlib", -5, ValueError, "at least 1, got -5"),
    ("wikipedia", None, FileNotFoundError, "no file called wikipedia;"),
    ([], None, ValueError, "no text in"),
])  # fmt: skip
def test_a_corpus_that_is_none(source, limit, error, says):
    with pytest.raises(error, match=says):
        corpus.load_corpus(source, limit)


def test_corpora_with_names_go_with_files(tmp_path, library):
    (tmp_path / "a.txt").write_text("one")
    both = [tmp_path / "a.txt", "stdlib"]
    assert corpus.load_corpus(both, 99) == ["one", library[0][:96]]
    assert [x.name for x in sources(both)] == [str(both[0]), "stdlib"]


def test_no_source_to_be_found(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: tmp_path)
    monkeypatch.setitem(corpus.sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="no text in stdlib"):
        corpus.load_corpus("stdlib")


# own files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second\r\nline\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("first \u00e9", "utf-8")
    (tmp_path / "c.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "zero.dat").write_bytes(b"a\0b")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    return tmp_path


WANT = ["first é", "second\nline\n", "# coding: latin-1\nx = 'é'\n", "marked"]


def test_folder_in_order_of_names(folder):
    said = "; passed over: not text 2"
    assert read(folder) == read(str(folder)) == (WANT, said)
    paths = [folder / "d.txt", folder / "a", folder / "b.txt"]
    assert read(paths) == ([WANT[3], WANT[0], WANT[1]], "")


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 10**6])
def test_limit_cuts_the_last_document(folder, limit):
    texts, _ = read(folder, limit=limit)
    assert "".join(texts) == "".join(WANT)[:limit]
    assert texts[:-1] == WANT[: len(texts) - 1]


def test_a_named_file_that_has_no_text(folder):
    for name in ("image.png", "zero.dat"):
        refused(f"{name} must be UTF-8", corpus.load_corpus, folder / name)
    refused("no text in", corpus.load_corpus, folder / "empty.txt")


# what lies in folders

UNIX = pytest.mark.skipif(os.name == "nt", reason="Windows has none of these")


def read(source, **options):
    """The documents of a corpus, and what is said about the rest.

    Read in pieces, as shards are made, they must be the same.
    """
    tallies = Tally(), Tally()
    texts = corpus.load_corpus(source, tally=tallies[0], **options)
    limit = options.pop("limit", 0)
    paths = source if isinstance(source, list) else [source]
    pieces, joined = sources(paths, tally=tallies[1], **options), []
    for _, first, text, _ in pieces_from(pieces, limit=limit):
        joined += [""] * first
        joined[-1] += text
    assert joined == texts
    assert tallies[0].words() == tallies[1].words()
    return texts, tallies[0].words()


def test_what_lies_behind_a_limit_is_not_counted(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>" * 9)
    assert "as ordinary text: 2 (" in read(tmp_path / "a.txt", limit=40)[1]


@UNIX
def test_only_files_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    (tmp_path / "d.txt").symlink_to("nowhere")
    (tmp_path / "e.txt").symlink_to("e.txt")
    (tmp_path / "f.txt").symlink_to("a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        place = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket must be short
        listening.bind("g.txt")
        os.chdir(place)
        said = "; passed over: links to folders 1, not files 5"
        assert read(tmp_path) == (["one", "one"], said)
    says = "must be a regular file"
    for path in (tmp_path / "b.txt", Path("/dev/null")):
        refused(f"{path.name} {says}", read, path)
    with pytest.raises(FileNotFoundError, match=r"no file called .*d\.txt"):
        read(tmp_path / "d.txt")
    for path in (tmp_path / "b.txt", tmp_path / "c.txt"):
        with pytest.raises(ValueError, match=says), open_stream(path):
            pass


def test_a_file_that_vanishes_or_may_not_be_read(tmp_path, monkeypatch):
    for name in ("a", "b.jsonl", "c", "d.txt.gz", "e.py"):
        (tmp_path / name).write_text("text")

    def refuse(path, *args):
        if Path(path).name in ("b.jsonl", "d.txt.gz"):
            raise PermissionError(13, "Permission denied", path)
        if Path(path).name == "e.py":
            raise FileNotFoundError(2, "No such file or directory", path)
        return open(path, *args)

    monkeypatch.setattr(reader, "open", refuse, raising=False)
    want = ["text", "text"], "; passed over: not readable 3"
    assert read(tmp_path) == want
    with pytest.raises(PermissionError):
        read(tmp_path / "b.jsonl")


@UNIX
def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("text")
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert read(tmp_path) == (["text"], "; passed over: not readable 1")


@UNIX
def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        (tmp_path / name).write_text("one")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    (tmp_path / os.fsdecode(b"\xff") / "b.jsonl").write_text('{"text": "two"}')
    assert read(tmp_path) == (["one", "two"], "")
    assert read([tmp_path / name]) == (["one"], "")


NOT_CODECS = "rot13 undefined punycode idna utf-7 unicode_escape cp037 hex zip"
WIDE = ["utf-16", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("codec", NOT_CODECS.split() + WIDE)
def test_an_encoding_that_is_none_of_text_files(tmp_path, codec):
    """One that a file declares, or a wide one."""
    raw = f"# coding: {codec}\n".encode() + b"x = 'abc'\n" * 100_000
    raw = "many words".encode(codec) if codec in WIDE else raw
    (tmp_path / "a.py").write_bytes(raw)
    (tmp_path / "b.py").write_text("x = 1\n")
    assert read(tmp_path) == (["x = 1\n"], "; passed over: not text 1")
    refused(r"a\.py must be UTF-8 text", read, tmp_path / "a.py")


CODECS = {
    "latin-1": "é", "iso-8859-15": "€", "cp1252": "€", "koi8-r": "ж",
    "shift_jis": "日", "euc_jp": "日", "gbk": "中", "big5": "中", "ascii": "x",
    "utf-8": "🙂",
}  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
def test_a_declared_encoding_of_text_files(tmp_path, codec):
    text = f"# coding: {codec}\nx = '{CODECS[codec]}'\n"
    (tmp_path / "a.py").write_bytes(text.encode(codec))
    assert read(tmp_path / "a.py") == ([text], "")


@pytest.mark.parametrize("start", ["x = '", "#"])
def test_a_source_whose_first_line_is_long(tmp_path, start):
    """Its beginning is looked at, and ends within a character."""
    text = start + "é" * 9999 + "'\n"
    (tmp_path / "a.py").write_text(text, "utf-8", newline="")
    assert read(tmp_path) == ([text], "")
    assert reader.read_text(str(tmp_path / "a.py")) == text


def test_runs_and_shards_are_no_text(tmp_path):
    for name in (
        "runs/a/tokenizer.tiktoken", "runs/a/log.csv", "runs/a/deep/b.txt",
        "runs/b/state_00000010.safetensors", "runs/b/sample.txt",
        "shards/unfinished.json", "begun/tokenizer.tiktoken.1.new",
        "mine/config.json", "mine/unfinished.json.txt/a.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    texts, said = read(tmp_path)
    assert texts == ["mine/config.json", "mine/unfinished.json.txt/a.txt"]
    assert said == "; passed over: runs or shards 4"
    refused("no text in .*: runs or shards 1", read, tmp_path / "runs" / "a")


# every kind of file


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_packed_files_and_json_lines_are_read(tmp_path, ending):
    lines = '\ufeff{"text": "one\\r\\n é"}\n\n{"body": "x", "text": "two"}\n'
    lines += '{"text": ""}'
    (tmp_path / f"a.jsonl{ending}").write_bytes(packed(ending, lines.encode()))
    raw = b"\xef\xbb\xbfthree\r\nfour\rfive\n"
    (tmp_path / f"b.txt{ending}").write_bytes(packed(ending, raw))
    texts = ["one\r\n é", "two", "three\nfour\nfive\n"]
    assert read(tmp_path) == (texts, "")
    lines = tmp_path / f"a.jsonl{ending}"
    assert read(lines, limit=8)[0] == [texts[0], "t"]
    refused(r":1: must have a field 'body'", read, lines, field="body")
    lines.write_bytes(packed(ending, b'{"body": "x", "text": 3}\n'))
    assert read(lines, field="body")[0] == ["x"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_several_frames_are_one_file(tmp_path, ending):
    skipped = {".gz": b"", ".zst": b"\x50\x2a\x4d\x18\4\0\0\0abcd"}[ending]
    raw = packed(ending, b"a ") + skipped + packed(ending, b"b")
    (tmp_path / f"a.txt{ending}").write_bytes(raw)
    assert read(tmp_path) == (["a b"], "")


BAD = [
    (b'{"text": null}', "'text' must be text, got NoneType"),
    (b'{"text": 3}', "'text' must be text, got int"),
    (b'{"text": "\\ud800"}', "half a character"),
    (b'{"text": "\xff"}', "must be UTF-8, got 0xff"),
    (b'{"a": 1}', "must have a field 'text'"),
    (b"[1]", "must be a JSON object, got list"),
    (b'{"text": ', "must be JSON"),
    (b"[" * 99_999, "must be JSON"),
    (b"9" * 9999, "must be (JSON|a JSON object)"),
    (b'{"text": "' + b"x" * LINE + b'"}', "a line must have at most"),
    (b" " * (2 * LINE + 9), "a line must have at most"),
]


@pytest.mark.parametrize("bad, says", BAD, ids=range(len(BAD)))
def test_bad_records_are_counted_or_refused(tmp_path, bad, says):
    good = [b'{"text": "%d"}' % n for n in range(3)]
    raw = b"\n".join([good[0], bad, good[1], bad, bad, good[2]])
    (tmp_path / "a.jsonl").write_bytes(raw)
    says = rf"a\.jsonl:2: .*{says}.*\(--skip-bad passes over"
    refused(says, read, tmp_path)
    got = read(tmp_path, skip_bad=True)
    assert got == (["0", "1", "2"], "; passed over: bad records 3")


@pytest.mark.parametrize("more", [-2, -1, 0, 1, 2, 9])
def test_a_long_first_line_behind_a_mark_is_one_line(tmp_path, more):
    text = "x" * (LINE - len(b'{"text": ""}\n') + more)
    raw = b'\xef\xbb\xbf{"text": "%s"}\n{"text": "two"}\n' % text.encode()
    (tmp_path / "a.jsonl").write_bytes(raw)
    if more > 0:
        refused("jsonl:1: a line must have at most", read, tmp_path)
    got = read(tmp_path, skip_bad=True)
    said = "; passed over: bad records 1" if more > 0 else ""
    assert got == ([text, "two"][more > 0 :], said)


def test_bad_records_are_passed_over_without_a_tally(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"text": "one"}\n')
    with open_stream(path) as (stream, _):
        found = reader.read_documents(path, stream, "text", skip_bad=True)
        assert ["".join(blocks) for _, blocks in found] == ["one"]


def test_a_bomb_of_newlines_is_counted_in_seconds(tmp_path):
    raw = gzip.compress(b"\n" * 200_000_000 + b'{"text": 1}\n', 1)
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    start = time.process_time()
    refused(r"gz:200000001: 'text' must be text", read, tmp_path)
    assert time.process_time() - start < 20  # line by line it takes 40


@pytest.mark.parametrize("blank", [b" \n", b"\r\n", b"\n \n\t\n", b" " * 9999])
def test_blank_lines_are_counted(tmp_path, blank):
    many, long = blank * 30_000, len(blank) > 999  # a line too long
    many = blank * 2_000 if long else many
    raw = many + b'\n{"text": "x"}\n' + blank + b"\n  [3]"
    (tmp_path / "a.jsonl").write_bytes(raw)
    number = 1 if long else raw.count(b"\n") + 1
    says = "a line must have" if long else "must be a JSON"
    refused(f"jsonl:{number}: {says}", read, tmp_path)


def test_a_window_that_is_too_large_is_said(tmp_path):
    zstandard = pytest.importorskip("zstandard")

    def with_window(log):
        how = zstandard.ZstdCompressionParameters(window_log=log)
        made = zstandard.ZstdCompressor(compression_params=how).compressobj()
        return made.compress(b"text " * 99) + made.flush()

    wide = with_window(28)
    (tmp_path / "a.zst").write_bytes(wide)
    told = r"a\.zst has a zstd window of 268,435,456 bytes, .*--long=31.*=27"
    refused(told, read, tmp_path)
    # behind other frames, with a header that two reads bring
    skip = b"\x50\x2a\x4d\x18" + (1010).to_bytes(4, "little") + bytes(1010)
    (tmp_path / "a.zst").write_bytes(skip + wide)
    refused(told, read, tmp_path)
    (tmp_path / "a.zst").write_bytes(with_window(27))
    assert read(tmp_path) == (["text " * 99], "")


EOT = "<|endoftext|>"


def test_the_special_token_in_texts_is_said(tmp_path):
    (tmp_path / "a.txt").write_text(f"one{EOT}two{EOT}")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": EOT}))
    texts, said = read(tmp_path)
    told = "as ordinary text: 3 (--endoftext takes it as the token)"
    assert said == f"; {EOT} {told}"
    encoding = tokenizer.byte()
    tokens = corpus.encode_documents(encoding, texts, endoftext=True)
    assert tokens.tolist() == [256, *b"one", 256, *b"two", 256, 256, 256]
    assert len(corpus.encode_documents(encoding, texts)) == 2 + 6 + 3 * 13


# tinyshakespeare

PLAY = "First:\nWho's there?\n\nSecond:\nNay, answer me.\n\n\nBoth:\nRain.\n"
SPEECHES = [
    "First:\nWho's there?\n\n", "Second:\nNay, answer me.\n\n",
    "\nBoth:\nRain.\n",
]  # fmt: skip


@pytest.fixture
def play(monkeypatch, tmp_path):
    """A small file in place of the real one; no folder, an empty cache."""
    sha256 = hashlib.sha256(PLAY.encode()).hexdigest()
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", sha256)
    monkeypatch.setattr(corpus, "downloads_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("LLMNB_DATA", raising=False)
    return tmp_path / "cache" / "tinyshakespeare.txt"


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine that answers with `reply`."""

    class Handler(BaseHTTPRequestHandler):
        reply, status, asked, lost = PLAY.encode(), 200, 0, 0

        def do_GET(self):
            Handler.asked += 1
            self.send_response(self.status)
            size = len(self.reply) + self.lost
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(self.reply)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with served(Handler) as address:
        monkeypatch.setattr(corpus, "SHAKESPEARE_URL", f"{address}/input.txt")
        yield Handler


@pytest.mark.parametrize("terminal", [True, False])
def test_downloaded_once(play, server, capfd, monkeypatch, terminal):
    """On a terminal there is a bar, in a log there is none."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for _ in range(2):
        assert corpus.load_corpus("tinyshakespeare") == SPEECHES
        assert play.read_text() == PLAY
    assert server.asked == 1
    assert os.listdir(play.parent) == ["tinyshakespeare.txt"]
    out, err = capfd.readouterr()
    assert (out, err != "") == ("", terminal)
    if terminal:
        assert "tinyshakespeare.txt" in err and "100%" in err


@pytest.mark.parametrize(("reply", "status", "error", "says"), [
    (b"other", 200, ValueError, "input.txt must have the SHA-256"),
    (b"", 404, ConnectionError, "404.*; put it as .*LLMNB_DATA"),
])  # fmt: skip
def test_a_download_that_is_none(play, server, reply, status, error, says):
    server.reply, server.status = reply, status
    with pytest.raises(error, match=says):
        corpus.load_corpus("tinyshakespeare")
    assert os.listdir(play.parent) == []


def test_a_download_that_breaks_off(play, server):
    server.lost = 9
    with pytest.raises(ConnectionError, match="9 more expected.*LLMNB_DATA"):
        corpus.load_corpus("tinyshakespeare")
    assert os.listdir(play.parent) == []
    server.lost = 0
    assert corpus.load_corpus("tinyshakespeare") == SPEECHES


@pytest.mark.parametrize("there", [True, False])
def test_a_named_folder_is_first(play, server, monkeypatch, tmp_path, there):
    """The environment's comes before the cache and the web."""
    if there:
        (tmp_path / "tinyshakespeare.txt").write_text(PLAY)
    monkeypatch.setenv("LLMNB_DATA", str(tmp_path))
    assert corpus.load_corpus("tinyshakespeare") == SPEECHES
    assert (server.asked, play.exists()) == (1 - there, not there)


def test_damaged_file(play, server):
    play.parent.mkdir()
    play.write_text(PLAY[:-1])
    with pytest.raises(ValueError, match="must have the SHA-256 .*, got"):
        corpus.load_corpus("tinyshakespeare")
    assert server.asked == 0


@pytest.mark.parametrize("system, name, variable, want", [
    ("nt", "win32", "LOCALAPPDATA", "here/llmnb"),
    ("posix", "linux", "XDG_CACHE_HOME", "here/llmnb"),
    ("posix", "darwin", "HOME", "here/Library/Caches/llmnb"),
    ("posix", "linux", "HOME", "here/.cache/llmnb"),
])  # fmt: skip
def test_cache_folder(monkeypatch, system, name, variable, want):
    if os.name != system:
        pytest.skip(f"os.name is {os.name}, not {system}")
    for x in ("LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(x, raising=False)
    monkeypatch.setattr(corpus.sys, "platform", name)
    monkeypatch.setenv(variable, "here")
    assert corpus.downloads_folder().as_posix() == want


def test_without_a_home_tinyshakespeare_says_where_to_put_it(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LLMNB_DATA", raising=False)
    monkeypatch.setattr(corpus, "downloads_folder", home)
    with pytest.raises(ConnectionError, match="determine home.*LLMNB_DATA"):
        corpus.load_corpus("tinyshakespeare")


# tokens


def test_documents_become_tokens():
    encoding = tokenizer.byte()
    tokens = corpus.encode_documents(encoding, iter(["ab", "", "é"]))
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [256, 97, 98, 256, 256, 195, 169]
    one = corpus.encode_documents(encoding, EOT)
    assert one.tolist() == [256, *EOT.encode()]
    with pytest.raises(ValueError, match="there are no documents"):
        corpus.encode_documents(encoding, [])


def test_tinyshakespeare_is_llm_c_s(gpt2):
    """Checks llm.c's counts where the data is at hand."""
    if not os.environ.get("LLMNB_DATA"):
        pytest.skip("LLMNB_DATA names no folder with tinyshakespeare.txt")
    try:
        documents = corpus.load_corpus("tinyshakespeare")
    except ConnectionError as error:
        pytest.skip(str(error))
    tokens = corpus.encode_documents(gpt2, documents)
    train, val = data.split(tokens)
    assert (len(tokens), len(val), len(train)) == (338_028, 32_768, 305_260)
    whole = gpt2.decode(tokens).replace("<|endoftext|>", "")
    assert "".join(documents) == whole
