"""Published models, fetched from a server on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from fuzz import answer, mangled
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import hub, tokenizer
from llmnb.checkpoint import write_folder
from llmnb.config import GPT2Config
from llmnb.export import ROOT
from llmnb.gpt2 import GPT2
from llmnb.hub import SOURCES, fetch, read_vocab

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
        name = self.path.partition("/resolve/main/")[2]
        if not name:  # an asker with the commit has had its answer
            name = self.path.partition(f"/resolve/{COMMIT}/")[2]
        raw = self.state["files"].get(name)
        if raw is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = self.range_start()
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(raw) - start))
        if start:
            whole = f"bytes {start}-{len(raw) - 1}/{len(raw)}"
            self.send_header("Content-Range", whole)
        self.end_headers()
        if body:
            self.send(name, raw, start)

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
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, state))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    state["url"] = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def llmnb(url, cache, *args):
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
    }
    if "offline" in args:
        env["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-m", "llmnb.cli", *args[:2]]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120
    )


def test_fetch_then_offline(server, files, tmp_path):
    first = llmnb(server["url"], tmp_path, "fetch", "gpt2")
    assert first.returncode == 0, first.stderr
    folder = first.stdout.strip()
    for name in SOURCES["gpt2"][2]:
        with open(os.path.join(folder, name), "rb") as file:
            assert file.read() == files[name]
    model = GPT2.from_checkpoint(folder, 1, 4, "reference")
    assert model.cfg == CFG
    asked = {path for _, path in server["asked"]}
    assert any(x.startswith("/openai-community/gpt2/resolve") for x in asked)
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
    server["files"] = {x: x.encode() for x in SOURCES["starter-pack"][2]}
    run = llmnb(server["url"], tmp_path, "fetch", "starter-pack")
    assert run.returncode == 0, run.stderr
    names = sorted(os.listdir(run.stdout.strip()))
    assert names == sorted(SOURCES["starter-pack"][2])
    asked = {path for _, path in server["asked"]}
    start = "/datasets/karpathy/llmc-starter-pack/resolve/"
    assert all(x.startswith(start) for x in asked)


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
