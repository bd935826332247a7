"""Published models, fetched from a server on this machine."""

import hashlib
import json
import os
import re
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from commands import raising
from fuzz import flip
from processes import python, served
from spelling import vocab_of

from llmnb.config import GPT2Config
from llmnb.formats.checkpoint import read_config, write_folder
from llmnb.formats.hub import SOURCES, fetch
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

    def do_GET(self):
        self.state["asked"].append(self.path)
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
        if self.command == "GET":
            self.send(name, raw, start)

    do_HEAD = do_GET

    def hash_of(self, name, raw):
        """SHA-256 of what is large, git's hash of what is small."""
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
    state["commit"] = COMMIT
    with served(partial(Handler, state)) as state["url"]:
        yield state


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


GONE = "HF_", "HUGGING", "LLMNB_TRACEBACK", "HTTP_PROXY", "http_proxy"


@pytest.fixture
def command(server, tmp_path):
    """Run it in a process of its own: the library reads its variables when
    it is imported."""
    pytest.importorskip("huggingface_hub")
    where = {"HF_ENDPOINT": server["url"], "HF_HOME": str(tmp_path)}
    for off in "XET", "TELEMETRY", "IMPLICIT_TOKEN":
        where[f"HF_HUB_DISABLE_{off}"] = "1"
    where |= {"NO_PROXY": "127.0.0.1"}

    def run(name="gpt2", offline=False, **hashes):
        here = where | {"HASHES": json.dumps(hashes)}
        here |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        how = {"without": GONE, "timeout": 120}
        return python(PROGRAM, "fetch", name, **how, **here)

    return run


@pytest.fixture
def fetched(command):
    """Fetch a model from the server; gives the folder."""

    def run(*args, **how):
        run = command(*args, **how)
        assert run.returncode == 0, run.stderr
        return Path(run.stdout.strip())

    return run


def test_fetch_then_offline(server, files, fetched):
    folder = fetched()
    for name in SOURCES["gpt2"][3]:
        assert (folder / name).read_bytes() == files[name]
    assert read_config(folder) == CFG
    pinned = f"/openai-community/gpt2/resolve/{SOURCES['gpt2'][2]}/"
    assert any(x.startswith(pinned) for x in server["asked"])
    assert not any("/main/" in x for x in server["asked"])
    # again: nothing is sent twice; then without any server
    sent = len(server["sent"])
    assert fetched() == folder and len(server["sent"]) == sent
    assert fetched(offline=True) == folder


def test_a_broken_download_goes_on(server, command, fetched):
    # longer than the library reads at once, so that half of it arrives
    big = np.random.default_rng(0).bytes(24 << 20)
    server["files"]["model.safetensors"] = big
    server["breaks"] = ["model.safetensors"]
    run = command()
    if run.returncode:  # an old library leaves going on to the next call
        one_line(run, "cannot get gpt2")
    folder = fetched()
    starts = [at for name, at in server["sent"] if name == "model.safetensors"]
    assert starts[0] == 0 and starts[-1] > 0  # the rest, and not all again
    assert (folder / "model.safetensors").read_bytes() == big


def test_the_starter_pack_is_a_dataset(server, fetched):
    server["files"] = {x: x.encode() for x in SOURCES["starter-pack"][3]}
    names = sorted(os.listdir(fetched("starter-pack")))
    assert names == sorted(SOURCES["starter-pack"][3])
    asked = {*server["asked"]}
    start = "/datasets/karpathy/llmc-starter-pack/resolve/"
    assert all(x.startswith(start) for x in asked)
    # the first answer's commit is asked for the others, not main again
    assert sum(x.startswith(start + "main/") for x in asked) == 1
    assert sum(x.startswith(start + COMMIT) for x in asked) >= 5


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.json"])
def test_a_flipped_bit_in_the_cache_is_seen(command, fetched, name):
    folder = fetched()
    flip(folder / name, 19)
    for offline in False, True:
        again = command(offline=offline)
        one_line(again, "is not what was published", "fetch again")
    os.remove(os.path.realpath(folder / name))
    assert fetched() == folder


def test_a_file_that_is_not_the_published_one(server, command, fetched):
    """Whatever hash the hub gives for it: ours is the one that counts."""
    raw = server["files"]["vocab.json"]
    right = {"vocab.json": hashlib.sha256(raw).hexdigest()}
    fetched(**right)
    wrong = {"vocab.json": SOURCES["gpt2"][3]["vocab.json"]}
    one_line(command(**wrong), wrong["vocab.json"], right["vocab.json"])


def test_what_is_fetched_is_pinned():
    for name, (_, repo, revision, files) in SOURCES.items():
        pinned = re.fullmatch("[0-9a-f]{40}", revision)
        hashed = all(re.fullmatch("[0-9a-f]{64}", x) for x in files.values())
        assert repo and files and (pinned or hashed), name


def one_line(run, *says):
    assert run.returncode == 1 and not run.stdout
    last = run.stderr.splitlines()[-1]
    assert last.startswith("llmnb: error: fetch")
    assert "Traceback" not in run.stderr
    for text in says:
        assert text in last


def test_a_file_that_the_hub_lacks(server, command):
    del server["files"]["vocab.json"]
    one_line(command(), "gpt2", "404")


def test_offline_without_a_cache(server, command):
    run = command("gpt2-xl", offline=True)
    one_line(run, "cannot get gpt2-xl from openai-community/gpt2-xl")
    assert not server["asked"]


def test_any_error_of_the_library_is_one_sentence(monkeypatch):
    library = pytest.importorskip("huggingface_hub")

    failing = raising(RuntimeError, "a\nb")
    monkeypatch.setattr(library, "hf_hub_download", failing)
    with pytest.raises(OSError, match="cannot get gpt2 from .*: a$"):
        fetch("gpt2")
