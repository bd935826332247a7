"""Published models, fetched from a server on this machine."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from fuzz import answer, mangled
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.book.export import ROOT
from llmnb.config import GPT2Config
from llmnb.formats import hub
from llmnb.formats.published import write_folder
from llmnb.formats.hub import SOURCES, fetch
from llmnb.formats.vocabulary import (
    open_encoding,
    read_tokenizer_json,
    read_vocab,
    tokenizer_of,
)
from llmnb.formats.vocabulary import write_tokenizer
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer

CFG = GPT2Config(8, 258, 1, 2, 32)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Serves files as the hub does: their hash first, then their bytes."""

    protocol_version = "HTTP/1.1"

    def __init__(self, state, *rest):
        self.state = state
        super().__init__(*rest)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.state["asked"].append((self.command, self.path))
        revision, _, name = self.path.partition("/resolve/")[2].partition("/")
        commit = self.state["commit"] if revision == "main" else revision
        raw = self.state["files"].get(name)
        if raw is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = self.range_start()
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{self.hash_of(name, raw)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(raw) - start))
        if start:
            whole = f"bytes {start}-{len(raw) - 1}/{len(raw)}"
            self.send_header("Content-Range", whole)
        self.end_headers()
        if body:
            self.send(name, raw, start)

    def hash_of(self, name, raw):
        """SHA-256 of what is large, git's hash of what is small."""
        if name in self.state["lies"]:
            return hashlib.sha256(b"another file").hexdigest()
        if name.endswith((".safetensors", ".bin")):
            return hashlib.sha256(raw).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()

    def range_start(self):
        asked = self.headers.get("Range", "")
        return int(asked.removeprefix("bytes=").split("-")[0] or 0)

    def send(self, name, raw, start):
        self.state["sent"].append((name, start))
        if name in self.state["breaks"]:  # the connection breaks off once
            self.state["breaks"].remove(name)
            self.wfile.write(raw[start : start + len(raw) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(raw[start:])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny gpt2, as the hub has them."""
    folder = tmp_path_factory.mktemp("files")
    model = GPT2(CFG, 1, 4, "reference")
    write_folder(folder, CFG, model.params)
    encoding = tokenizer.train("ab ab abc", 258)
    (folder / "vocab.json").write_text(json.dumps(vocab_of(encoding)))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return {x.name: x.read_bytes() for x in folder.iterdir()}


@pytest.fixture
def server(files):
    state = {"files": dict(files), "asked": [], "sent": [], "breaks": []}
    state |= {"lies": [], "commit": COMMIT}
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, state))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    state["url"] = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


# the command, for files that have other hashes than the published ones
PROGRAM = """
import json, os
from llmnb.cli.__main__ import main
from llmnb.formats import hub
hashes = json.loads(os.environ["HASHES"])
for name, (*rest, files) in hub.SOURCES.items():
    hub.SOURCES[name] = *rest, {file: hashes.get(file, "") for file in files}
main()
"""


def llmnb(url, cache, *args, **hashes):
    """Run the command in a process of its own: the library reads its
    variables when it is imported."""
    pytest.importorskip("huggingface_hub")
    gone = ("HF_", "HUGGING", "LLMNB_TRACEBACK", "HTTP_PROXY", "http_proxy")
    env = {k: v for k, v in os.environ.items() if not k.startswith(gone)}
    env |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        "HASHES": json.dumps(hashes),
    }
    if "offline" in args:
        env["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", PROGRAM, *args[:2]]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120
    )


def test_fetch_then_offline(server, files, tmp_path):
    first = llmnb(server["url"], tmp_path, "fetch", "gpt2")
    assert first.returncode == 0, first.stderr
    folder = first.stdout.strip()
    for name in SOURCES["gpt2"][3]:
        with open(os.path.join(folder, name), "rb") as file:
            assert file.read() == files[name]
    model = GPT2.from_checkpoint(folder, 1, 4, "reference")
    assert model.cfg == CFG
    asked = {path for _, path in server["asked"]}
    pinned = f"/openai-community/gpt2/resolve/{SOURCES['gpt2'][2]}/"
    assert any(x.startswith(pinned) for x in asked)
    assert not any("/main/" in x for x in asked)
    # again: nothing is sent twice; then without any server
    sent = len(server["sent"])
    again = llmnb(server["url"], tmp_path, "fetch", "gpt2")
    assert again.stdout == first.stdout
    assert len(server["sent"]) == sent
    offline = llmnb(server["url"], tmp_path, "fetch", "gpt2", "offline")
    assert offline.returncode == 0
    assert offline.stdout == first.stdout


def test_a_broken_download_goes_on(server, files, tmp_path):
    # longer than the library reads at once, so that half of it arrives
    big = np.random.default_rng(0).bytes(24 << 20)
    server["files"]["model.safetensors"] = big
    server["breaks"] = ["model.safetensors"]
    run = llmnb(server["url"], tmp_path, "fetch", "gpt2")
    if run.returncode:  # an old library leaves going on to the next call
        one_line(run, "cannot get gpt2")
        run = llmnb(server["url"], tmp_path, "fetch", "gpt2")
    assert run.returncode == 0, run.stderr
    starts = [at for name, at in server["sent"] if name == "model.safetensors"]
    assert starts[0] == 0 and starts[-1] > 0  # the rest, and not all again
    path = os.path.join(run.stdout.strip(), "model.safetensors")
    with open(path, "rb") as file:
        assert file.read() == big


def test_the_starter_pack_is_a_dataset(server, tmp_path):
    server["files"] = {x: x.encode() for x in SOURCES["starter-pack"][3]}
    run = llmnb(server["url"], tmp_path, "fetch", "starter-pack")
    assert run.returncode == 0, run.stderr
    names = sorted(os.listdir(run.stdout.strip()))
    assert names == sorted(SOURCES["starter-pack"][3])
    asked = {path for _, path in server["asked"]}
    start = "/datasets/karpathy/llmc-starter-pack/resolve/"
    assert all(x.startswith(start) for x in asked)
    # the first answer's commit is asked for the others, not main again
    assert sum(x.startswith(start + "main/") for x in asked) == 1
    assert sum(x.startswith(start + COMMIT) for x in asked) >= 5


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.json"])
def test_a_flipped_bit_in_the_cache_is_seen(server, tmp_path, name):
    first = llmnb(server["url"], tmp_path, "fetch", "gpt2")
    assert first.returncode == 0, first.stderr
    path = os.path.join(first.stdout.strip(), name)
    with open(path, "r+b") as file:
        byte = file.read(20)[-1]
        file.seek(19)
        file.write(bytes([byte ^ 1]))
    for how in ((), ("offline",)):
        again = llmnb(server["url"], tmp_path, "fetch", "gpt2", *how)
        one_line(again, "is not what was published", "fetch again")
    os.remove(os.path.realpath(path))
    again = llmnb(server["url"], tmp_path, "fetch", "gpt2")
    assert again.stdout == first.stdout, again.stderr


def test_a_file_that_is_not_the_published_one(server, tmp_path):
    """Whatever hash the hub gives for it: ours is the one that counts."""
    raw = server["files"]["vocab.json"]
    right = {"vocab.json": hashlib.sha256(raw).hexdigest()}
    run = llmnb(server["url"], tmp_path, "fetch", "gpt2", **right)
    assert run.returncode == 0, run.stderr
    wrong = {"vocab.json": SOURCES["gpt2"][3]["vocab.json"]}
    run = llmnb(server["url"], tmp_path, "fetch", "gpt2", **wrong)
    one_line(run, wrong["vocab.json"], right["vocab.json"])


def test_a_hub_that_gives_another_hash(server, tmp_path):
    server["lies"] = ["model.safetensors"]
    run = llmnb(server["url"], tmp_path, "fetch", "gpt2")
    one_line(run)


def test_what_is_fetched_is_pinned():
    for name, (_, repo, revision, files) in SOURCES.items():
        pinned = re.fullmatch("[0-9a-f]{40}", revision)
        hashed = all(re.fullmatch("[0-9a-f]{64}", x) for x in files.values())
        assert repo and files and (pinned or hashed), name


def one_line(run, *says):
    assert run.returncode == 1 and not run.stdout
    last = run.stderr.splitlines()[-1]
    assert last.startswith("llmnb: error: fetch") and "Traceback" not in (
        run.stderr
    )
    for text in says:
        assert text in last


def test_a_file_that_the_hub_lacks(server, tmp_path):
    del server["files"]["vocab.json"]
    one_line(llmnb(server["url"], tmp_path, "fetch", "gpt2"), "gpt2", "404")


def test_offline_without_a_cache(tmp_path):
    run = llmnb("http://127.0.0.1:9", tmp_path, "fetch", "gpt2-xl", "offline")
    one_line(run, "cannot get gpt2-xl from openai-community/gpt2-xl")


def test_an_unknown_name():
    with pytest.raises(ValueError, match="no 'gpt3': choose from gpt2, "):
        fetch("gpt3")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'llmnb\[hub\]'"):
        fetch("gpt2")


def test_any_error_of_the_library_is_one_sentence(monkeypatch):
    library = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise RuntimeError("a\nb")

    monkeypatch.setattr(library, "hf_hub_download", fail)
    with pytest.raises(OSError, match="cannot get gpt2 from .*: a$"):
        fetch("gpt2")


# the vocabulary


def vocab_of(encoding):
    """vocab.json of an encoding, by the letters of GPT-2's own table."""
    letters = {byte: letter for letter, byte in hub._letters().items()}
    tokens = [
        encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)
    ]
    return {"".join(letters[b] for b in x): i for i, x in enumerate(tokens)}


def test_the_letters_of_gpt2():
    letters = hub._letters()
    assert len(letters) == 256 and set(letters.values()) == set(range(256))
    # as every vocab.json of GPT-2 shows: a space is Ġ, a newline Ċ
    assert letters["Ġ"] == ord(" ") and letters["Ċ"] == ord("\n")
    assert letters["A"] == ord("A") and letters["Ń"] == 173


def test_a_vocabulary_comes_back(tmp_path):
    trained = tokenizer.train("low lower lowest, newer newest " * 3, 270)
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(vocab_of(trained)), "utf-8")
    again = read_vocab(path)
    for text in ("newer lowest\n", "é\x00ÿ", ""):
        assert again.encode_ordinary(text) == trained.encode_ordinary(text)
    assert again.eot_token == 269


def test_gpt2s_vocabulary(tmp_path):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's files")
    try:
        gpt2 = tokenizer.gpt2()
    except ConnectionError as error:
        pytest.skip(str(error))
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(vocab_of(gpt2)), "utf-8")
    text = "It's naïve: 東京 \U0001f600\r\n\t  x = 3.14"
    assert read_vocab(path).encode_ordinary(text) == gpt2.encode_ordinary(text)


@pytest.mark.parametrize(
    ("vocab", "says"),
    [
        ([], "must hold a JSON object"),
        ({}, "the last token must be"),
        ({"a": 1}, "must number its tokens 0, 1, 2"),
        ({"a": 0, "b": 0}, "must number its tokens 0, 1, 2"),
        ({"a": True, "b": 0}, "must number its tokens 0, 1, 2"),
        ({"a": 0.0}, "must number its tokens 0, 1, 2"),
        ({"a": "0"}, "must number its tokens 0, 1, 2"),
        ({"a b": 0}, "'a b' has letters of no byte"),
        ({"<|endoftext|>": 0}, "no token for the byte 0"),
    ],
)
def test_a_vocabulary_that_is_none(tmp_path, vocab, says):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=f"vocab.json: .*{says}"):
        read_vocab(path)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_vocabulary_is_an_answer_or_one_error(
    tmp_path_factory, data
):
    path = tmp_path_factory.mktemp("x") / "vocab.json"
    good = json.dumps(vocab_of(tokenizer.byte())).encode()
    answer(read_vocab, path, data.draw(mangled(good)))


# merges, and tokens that no text becomes

TEXTS = "It's naïve: 東京 \U0001f600\r\n\t  x = 3.14", "low lowest", ""


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train("low lower lowest, newer newest " * 3, 270)


def own_files(folder, encoding, before=(), behind=(), merges=True):
    """vocab.json and merges.txt: special tokens first, or EOT alone last."""
    *spelt, eot = vocab_of(encoding)
    tokens = [*before, *spelt] if before else [*spelt, eot]
    vocab = {x: i for i, x in enumerate([*tokens, *behind])}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    lines = ["#version: 0.2"] + [" ".join(x) for x in merges_of(encoding)]
    if merges:
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "vocab.json"


def merges_of(encoding):
    """The pairs, in letters, that were joined to the tokens, in order."""
    spelt = [x for x in vocab_of(encoding) if x != "<|endoftext|>"]
    rank, pairs = {}, []
    for number, token in enumerate(spelt):
        parts = list(token)
        while len(parts) > 2:
            found = [rank.get(a + b, 1 << 30) for a, b in
                     zip(parts, parts[1:], strict=False)]  # fmt: skip
            i = found.index(min(found))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        rank[token] = number
        if len(parts) == 2:
            pairs.append(parts)
    return pairs


SPECIAL = ["<s>", "<|endoftext|>", "<pad>"]


@pytest.mark.parametrize("before", [[], SPECIAL, ["<|endoftext|>"]])
@pytest.mark.parametrize("behind", [[], ["[PAD]"], ["[PAD]", "<|user|>"]])
def test_a_models_own_vocabulary(tmp_path, trained, before, behind):
    path = own_files(tmp_path, trained, before, behind)
    ours = read_vocab(path)
    for text in TEXTS:
        want = [len(before) + x for x in trained.encode_ordinary(text)]
        assert ours.encode_ordinary(text) == want
        assert ours.decode(want) == text
    eot = before.index("<|endoftext|>") if before else 269
    assert ours.eot_token == eot
    # what stands behind the last token of a text is padding
    assert ours.n_vocab == 270 - bool(before) + len(before)


@pytest.mark.parametrize("before", [[], ["<|endoftext|>"]])
def test_a_run_keeps_such_a_vocabulary(tmp_path, trained, before):
    ours = read_vocab(own_files(tmp_path, trained, before))
    tokenizer.save(ours, tmp_path / "tokenizer.tiktoken")
    again = tokenizer.load(tmp_path / "tokenizer.tiktoken")
    assert again.eot_token == ours.eot_token
    assert again.n_vocab == ours.n_vocab
    for text in TEXTS:
        assert again.encode_ordinary(text) == ours.encode_ordinary(text)


def test_special_tokens_that_a_run_cannot_keep(tmp_path, trained):
    ours = read_vocab(own_files(tmp_path, trained, SPECIAL))
    with pytest.raises(ValueError, match=r"one special token .*'<pad>'"):
        tokenizer.save(ours, tmp_path / "tokenizer.tiktoken")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("l o w", "merges.txt:2: a line must be two tokens, got 'l o w'"),
        ("low", "merges.txt:2: a line must be two tokens"),
        ("lo w", "vocab.json: the merge of 'lo' and 'w' must join earlier"),
        ("a b", "the merge of 'a' and 'b' must join earlier"),
        ("x" * 300_000 + " y", "the merge of 'xxx"),
    ],
)
def test_merges_that_are_none(tmp_path, trained, line, says):
    path = own_files(tmp_path, trained)
    lines = (tmp_path / "merges.txt").read_text("utf-8").split("\n")
    text = "\n".join([lines[0], line, *lines[1:]])
    (tmp_path / "merges.txt").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=says) as error:
        read_vocab(path)
    assert len(str(error.value)) < 400


def test_merges_that_are_cut_short(tmp_path, trained):
    for before in ([], ["<|endoftext|>"]):
        path = own_files(tmp_path, trained, before)
        lines = (tmp_path / "merges.txt").read_text("utf-8").split("\n")
        for count in (1, 2, len(lines) - 2):
            text = "\n".join(lines[:count]) + "\n"
            (tmp_path / "merges.txt").write_text(text, "utf-8")
            with pytest.raises(ValueError, match="vocab.json: no merge makes"):
                read_vocab(path)


def test_a_vocabulary_without_an_end_of_text(tmp_path, trained):
    path = own_files(tmp_path, trained, ["<s>", "</s>"])
    with pytest.raises(ValueError, match="vocab.json: has no <.endoftext.>"):
        read_vocab(path)


@pytest.mark.parametrize("merges", [False, True])
def test_a_token_of_300_kilobytes_takes_no_time(tmp_path, trained, merges):
    long = "<" + "Ġ" * 300_000 + ">"
    path = own_files(tmp_path, trained, [], [long], merges)
    vocab = json.loads(path.read_text("utf-8"))
    if not merges:  # then the last must be the end of a text
        vocab |= {long: 269, "<|endoftext|>": 270}
        path.write_text(json.dumps(vocab), "utf-8")
    start = time.perf_counter()
    if merges:
        assert read_vocab(path).n_vocab == 270
    else:
        with pytest.raises(ValueError, match="at most 255 bytes, number 269"):
            read_vocab(path)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vocab.json", 1 << 23),
        ("merges.txt", 1 << 23),
        ("tokenizer.tiktoken", 1 << 24),
        ("tokenizer.bin", (1 << 24) + 1024),
        ("tokenizer.json", 1 << 23),
    ],
)
def test_a_tokenizers_file_is_small(tmp_path, trained, name, size):
    own_files(tmp_path, trained)
    if name == "tokenizer.json":
        pytest.importorskip("tokenizers")
    path = tmp_path / name
    with open(path, "wb") as file:
        if name == "tokenizer.bin":  # as large as its header allows
            head = np.zeros(256, "<i4")
            head[:4] = 20240328, 2, 1 << 20, (1 << 20) - 1
            file.write(head.tobytes())
        file.truncate(size + 1)
    path = tmp_path / "vocab.json" if name == "merges.txt" else path
    with pytest.raises(ValueError, match=f"{name}: must have at most"):
        open_encoding(path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1961\n"


@pytest.mark.parametrize("raw", [POINTER, b"<!doctype html>\n<p>", b""])
@pytest.mark.parametrize(
    "name", ["vocab.json", "merges.txt", "tokenizer.tiktoken", "t.bin"]
)
def test_a_tokenizer_that_is_something_else(tmp_path, trained, name, raw):
    own_files(tmp_path, trained)
    (tmp_path / name).write_bytes(raw)
    path = "vocab.json" if name == "merges.txt" else name
    what = {POINTER: "Git LFS pointer", b"": "an empty file"}
    with pytest.raises(ValueError, match=name) as error:
        open_encoding(tmp_path / path)
    assert what.get(raw, "a web page") in str(error.value)


# tokenizer.json


def tokenizer_json(folder, encoding, before=(), behind=(), **changes):
    """tokenizer.json, as the library writes it."""
    library = pytest.importorskip("tokenizers")
    path = own_files(folder, encoding, before, behind)
    vocab = json.loads(path.read_text("utf-8"))
    merges = [tuple(x) for x in merges_of(encoding)]
    plain = {x: n for x, n in vocab.items() if x not in (*before, *behind)}
    made = library.Tokenizer(library.models.BPE(plain | vocab, merges))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(
        add_prefix_space=changes.get("prefix", False)
    )
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens([*before, *behind, "<|endoftext|>"])
    if changes.get("lower"):
        made.normalizer = library.normalizers.Lowercase()
    if changes.get("short"):
        made.enable_truncation(3)
        made.enable_padding(length=500)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("before", [[], SPECIAL, ["<|endoftext|>"]])
@pytest.mark.parametrize("behind", [[], ["[PAD]"]])
@pytest.mark.parametrize("short", [False, True])
def test_a_tokenizer_json(tmp_path, trained, before, behind, short):
    path = tokenizer_json(tmp_path, trained, before, behind, short=short)
    ours = read_tokenizer_json(path)
    for text in TEXTS:
        want = [len(before) + x for x in trained.encode_ordinary(text)]
        assert ours.encode_ordinary(text) == want
    assert ours.n_vocab == 270 - bool(before) + len(before)


@pytest.mark.parametrize("change", ["lower", "prefix"])
def test_a_tokenizer_json_that_cuts_otherwise(tmp_path, trained, change):
    path = tokenizer_json(tmp_path, trained, **{change: True})
    with pytest.raises(ValueError, match="tokenizer.json: cuts or merges"):
        read_tokenizer_json(path)


def test_a_number_without_a_token(tmp_path, trained):
    """Such a token could be drawn, and is no text."""
    path = tokenizer_json(tmp_path, trained)
    found = json.loads(path.read_text("utf-8"))
    vocab = found["model"]["vocab"]
    vocab["<|endoftext|>"] = found["added_tokens"][0]["id"] = 270
    path.write_text(json.dumps(found), "utf-8")
    with pytest.raises(ValueError, match="must number its tokens 0, 1, 2"):
        read_tokenizer_json(path)


def test_a_tokenizer_json_of_another_kind(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordPiece({"a": 0, "[UNK]": 1}))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="must be a BPE .*, is WordPiece"):
        open_encoding(tmp_path / "tokenizer.json")
    for raw in (b"{}", b'{"model": [[[]]]}', b"[" * 9000, b"[]", b"\xff"):
        (tmp_path / "tokenizer.json").write_bytes(raw)
        with pytest.raises(ValueError, match="tokenizer.json: "):
            open_encoding(tmp_path)


def test_a_tokenizer_json_that_is_something_else(tmp_path):
    pytest.importorskip("tokenizers")
    for raw, what in ((POINTER, "a Git LFS pointer"), (b"", "an empty file")):
        (tmp_path / "tokenizer.json").write_bytes(raw)
        with pytest.raises(
            ValueError, match=f"tokenizer.json: this is {what}"
        ):
            open_encoding(tmp_path)


def test_a_tokenizer_json_without_the_library(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'llmnb\[tokenizers\]"):
        open_encoding(tmp_path)


# which tokenizer


def test_what_lies_beside_the_weights_is_taken(tmp_path, trained):
    model = GPT2(CFG, 1, 4, "reference")
    write_folder(tmp_path, CFG, model.params)
    weights = tmp_path / "model.safetensors"
    for path in (tmp_path, weights):
        with pytest.raises(ValueError, match="which tokenizer.*--tokenizer g"):
            tokenizer_of(path, 258)
        # as many tokens as GPT-2's say nothing
        with pytest.raises(ValueError, match="which tokenizer"):
            tokenizer_of(path, 50257)
    write_tokenizer(tmp_path / "gpt2_tokenizer.bin", trained)
    order = ["gpt2_tokenizer.bin", "tokenizer.json", "vocab.json"]
    for name in [*order, "tokenizer.tiktoken"]:
        if name == "vocab.json":
            own_files(tmp_path, trained)
        elif name == "tokenizer.tiktoken":
            tokenizer.save(trained, tmp_path / name)
        elif name == "tokenizer.json":
            (tmp_path / name).write_text("{}")
        for path in (tmp_path, weights):
            assert tokenizer_of(path, 258) == str(tmp_path / name)
        if name != "tokenizer.json":
            got = open_encoding(str(tmp_path))
            assert got.encode_ordinary("low") == trained.encode_ordinary("low")


@pytest.mark.parametrize("rows", [50257, 50258, 50304])
def test_llm_cs_models_have_gpt2s_tokens(tmp_path, rows):
    path = tmp_path / "gpt2_124M.bin"
    path.write_bytes(b"")
    assert tokenizer_of(path, rows) == "gpt2"
    for other in (50256, 50305, 257):
        with pytest.raises(ValueError, match="gpt2_124M.bin: which tokenizer"):
            tokenizer_of(path, other)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(OSError, match="holds none of tokenizer"):
        open_encoding(tmp_path)
