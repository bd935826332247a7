"""Corpora: where they come from, and how they become tokens."""

import ast
import hashlib
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from llmnb import corpus, tokenizer

# the standard library


@pytest.fixture(scope="module")
def library():
    return corpus.load("stdlib")


def test_stdlib_is_source_and_manual(library):
    text = "\n".join(library)
    assert len(text) > 2_000_000
    assert "class JSONDecoder" in text
    assert 'The "for" statement' in text
    assert all(isinstance(x, str) and x for x in library)
    assert "\0" not in text
    assert "\r" not in text


def test_stdlib_leaves_out_tests_and_packages(library):
    text = "\n".join(library)
    assert "class Test_TestCase" not in text
    assert "class ArrayPrintingOptions" not in text
    assert "def get_include" not in text
    assert "build_time_vars = {" not in text
    assert "decoding_table = (" not in text


def test_stdlib_is_the_default_and_always_the_same(library):
    assert corpus.load() == library


def test_stdlib_starts_with_a_fair_sample(library):
    """Source and manual pages are mixed, so that a prefix has both."""

    def is_source(text):
        try:
            return bool(ast.parse(text).body)
        except SyntaxError:
            return False

    kinds = [is_source(text) for text in library[:60]]
    assert {True, False} == set(kinds)


@pytest.mark.parametrize("limit", [1, 1000, 300_000])
def test_limit(library, limit):
    documents = corpus.load("stdlib", limit=limit)
    assert sum(map(len, documents)) == limit
    whole = "".join(library[: len(documents)])
    assert whole.startswith("".join(documents))


def test_limit_above_the_size_keeps_everything(library):
    assert corpus.load("stdlib", limit=10**12) == library


@pytest.mark.parametrize("limit", [0, -5])
def test_bad_limit(limit):
    with pytest.raises(ValueError, match=f"at least 1, got {limit}"):
        corpus.load("stdlib", limit=limit)


def test_no_source_to_be_found(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: tmp_path)
    monkeypatch.setitem(corpus.sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="no text in stdlib"):
        corpus.load("stdlib")


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
    assert corpus.load(folder) == WANT
    assert corpus.load(str(folder)) == WANT


def test_paths_in_the_order_given(folder):
    got = corpus.load([folder / "d.txt", folder / "a", folder / "b.txt"])
    assert got == [WANT[3], WANT[0], WANT[1]]


def test_limit_cuts_the_last_document(folder):
    assert corpus.load(folder, limit=9) == ["first é", "se"]
    assert corpus.load(folder, limit=7) == ["first é"]


@pytest.mark.parametrize("name", ["image.png", "zero.dat"])
def test_named_file_that_is_no_text(folder, name):
    with pytest.raises(ValueError, match=f"{name} must be UTF-8 text"):
        corpus.load(folder / name)


def test_no_text_at_all(folder):
    with pytest.raises(ValueError, match="no text in"):
        corpus.load([folder / "empty.txt"])
    with pytest.raises(ValueError, match="no text in"):
        corpus.load([])


def test_unknown_name():
    with pytest.raises(FileNotFoundError, match="no file called wikipedia;"):
        corpus.load("wikipedia")


# tinyshakespeare

PLAY = "First:\nWho's there?\n\nSecond:\nNay, answer me.\n\n\nBoth:\nRain.\n"
SPEECHES = [
    "First:\nWho's there?\n\n",
    "Second:\nNay, answer me.\n\n",
    "\nBoth:\nRain.\n",
]


@pytest.fixture
def play(monkeypatch, tmp_path):
    """A small file in place of the real one; no folder, an empty cache."""
    sha256 = hashlib.sha256(PLAY.encode()).hexdigest()
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", sha256)
    monkeypatch.setattr(corpus, "_cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("LLMNB_DATA", raising=False)
    return tmp_path / "cache" / "tinyshakespeare.txt"


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine that answers with `reply`."""

    class Handler(BaseHTTPRequestHandler):
        reply, status, asked = PLAY.encode(), 200, 0

        def do_GET(self):
            Handler.asked += 1
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(self.reply)))
            self.end_headers()
            self.wfile.write(self.reply)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{http.server_port}/input.txt"
        monkeypatch.setattr(corpus, "SHAKESPEARE_URL", address)
        yield Handler
        http.shutdown()
        thread.join()


def test_downloaded_once(play, server, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert corpus.load("tinyshakespeare") == SPEECHES
    assert play.read_text() == PLAY
    assert corpus.load("tinyshakespeare") == SPEECHES
    assert server.asked == 1
    assert os.listdir(play.parent) == ["tinyshakespeare.txt"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "tinyshakespeare.txt" in err and "100%" in err


def test_a_log_gets_no_bar_of_a_download(play, server, capfd):
    assert corpus.load("tinyshakespeare") == SPEECHES
    assert capfd.readouterr() == ("", "")


def test_download_with_another_hash(play, server):
    server.reply = b"something else"
    with pytest.raises(ValueError, match="input.txt must have the SHA-256"):
        corpus.load("tinyshakespeare")
    assert os.listdir(play.parent) == []


def test_download_refused(play, server):
    server.status = 404
    with pytest.raises(ConnectionError, match="404.*; put it as .*LLMNB_DATA"):
        corpus.load("tinyshakespeare")
    assert os.listdir(play.parent) == []


def test_no_network(play, monkeypatch):
    address = "http://127.0.0.1:9/input.txt"
    monkeypatch.setattr(corpus, "SHAKESPEARE_URL", address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ConnectionError, match="cannot fetch tinyshakespeare"):
        corpus.load("tinyshakespeare")


def test_folder_of_the_environment_comes_first(
    play, server, monkeypatch, tmp_path
):
    (tmp_path / "tinyshakespeare.txt").write_text(PLAY)
    monkeypatch.setenv("LLMNB_DATA", str(tmp_path))
    assert corpus.load("tinyshakespeare") == SPEECHES
    assert server.asked == 0
    assert not play.exists()


def test_folder_of_the_environment_without_the_file(
    play, server, monkeypatch, tmp_path
):
    monkeypatch.setenv("LLMNB_DATA", str(tmp_path))
    assert corpus.load("tinyshakespeare") == SPEECHES
    assert server.asked == 1


def test_damaged_file(play, server):
    play.parent.mkdir()
    play.write_text(PLAY[:-1])
    with pytest.raises(ValueError, match="must have the SHA-256 .*, got"):
        corpus.load("tinyshakespeare")
    assert server.asked == 0


@pytest.mark.parametrize(
    "system, name, variable, want",
    [
        ("nt", "win32", "LOCALAPPDATA", "here/llmnb"),
        ("posix", "linux", "XDG_CACHE_HOME", "here/llmnb"),
        ("posix", "darwin", "HOME", "here/Library/Caches/llmnb"),
        ("posix", "linux", "HOME", "here/.cache/llmnb"),
    ],
)
def test_cache_folder(monkeypatch, system, name, variable, want):
    if os.name != system:
        pytest.skip(f"os.name is {os.name}, not {system}")
    for x in ("LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(x, raising=False)
    monkeypatch.setattr(corpus.sys, "platform", name)
    monkeypatch.setenv(variable, "here")
    assert corpus._cache_folder().as_posix() == want


# tokens


def test_documents_become_tokens():
    encoding = tokenizer.byte()
    tokens = corpus.encode_documents(encoding, iter(["ab", "", "é"]))
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [256, 97, 98, 256, 256, 195, 169]
    one = corpus.encode_documents(encoding, "<|endoftext|>")
    assert one.tolist() == [256, *b"<|endoftext|>"]


def test_many_documents_keep_their_order():
    documents = [f"{n}, " for n in range(1000)]
    encoding = tokenizer.train("".join(documents), 300)
    tokens = corpus.encode_documents(encoding, documents)
    want = "".join("<|endoftext|>" + x for x in documents)
    assert encoding.decode(tokens) == want


def test_no_documents():
    with pytest.raises(ValueError, match="there are no documents"):
        corpus.encode_documents(tokenizer.byte(), [])


def test_encoding_too_large_for_uint16():
    class Large:
        n_vocab = 65537

    with pytest.raises(ValueError, match="at most 65536 tokens, got 65537"):
        corpus.encode_documents(Large(), ["text"])


@pytest.mark.parametrize(
    "count, validation, want",
    [(100, None, 10), (10, None, 1), (10**6, None, 32768), (5, 4, 4)],
)
def test_split(count, validation, want):
    tokens = np.arange(count)
    train, val = corpus.split(tokens, validation)
    assert val.tolist() == list(range(want))
    assert train[0] == want
    assert len(train) + len(val) == count
    assert train.base is tokens and val.base is tokens


@pytest.mark.parametrize("count, validation", [(9, None), (9, 9), (9, 0)])
def test_split_that_leaves_a_part_empty(count, validation):
    with pytest.raises(ValueError, match=f"number of tokens, {count}, got"):
        corpus.split(np.arange(count), validation)


def test_tinyshakespeare_is_llm_c_s():
    """Checks llm.c's counts where the data is at hand."""
    if not os.environ.get("LLMNB_DATA"):
        pytest.skip("LLMNB_DATA names no folder with tinyshakespeare.txt")
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's files")
    try:
        documents = corpus.load("tinyshakespeare")
        encoding = tokenizer.gpt2()
    except ConnectionError as error:
        pytest.skip(str(error))
    tokens = corpus.encode_documents(encoding, documents)
    train, val = corpus.split(tokens)
    assert (len(tokens), len(val), len(train)) == (338_028, 32_768, 305_260)
    assert "".join(documents) == encoding.decode(tokens).replace(
        "<|endoftext|>", ""
    )
