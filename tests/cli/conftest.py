"""Commands run in an empty folder, and what they run on."""

import pytest
from commands import LIBRARY, TINY
from spelling import own_files

from llmnb.cli.__main__ import main
from llmnb.config import GPT2Config
from llmnb.formats.checkpoint import write_folder
from llmnb.model.gpt2 import GPT2
from llmnb.text import tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a fixed text: what it writes depends on no other."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    text = ["--corpus", str(LIBRARY)]
    main(["train", "--out", str(folder), *TINY.split(), *text])
    return folder


@pytest.fixture
def done(llmnb):
    """Run a command that must succeed; gives its stdout."""

    def run(*args):
        code, out, err = llmnb(*args)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def failed(llmnb):
    """Run a command that must end with code 1; gives its stderr."""

    def run(*args):
        code, _, err = llmnb(*args)
        assert code == 1, err
        return err

    return run


@pytest.fixture
def hub(tmp_path):
    """A model folder whose 270 tokens are its own."""
    encoding = tokenizer.train("low lower lowest, newer newest " * 3, 270)
    cfg = GPT2Config(32, 270, 1, 2, 16)
    model = GPT2(cfg, 1, 8, "reference")
    write_folder(tmp_path / "hub", cfg, model.params)
    own_files(tmp_path / "hub", encoding)
    tokenizer.save(encoding, tmp_path / "own.tiktoken")
    (tmp_path / "a.txt").write_text("the newest of the low " * 20)
    return tmp_path / "hub"


@pytest.fixture
def free(monkeypatch):
    """Set how many bytes the machine has left."""

    def set_free(nbytes):
        monkeypatch.setattr("llmnb.checks.free_memory", lambda: nbytes)

    return set_free
