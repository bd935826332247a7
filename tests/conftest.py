"""What tests of several rooms want."""

import os
import stat

import pytest
import standin

from llmnb.cli.__main__ import main
from llmnb.text import tokenizer


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's encoding, where it can be had."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with GPT-2's files")
    try:
        return tokenizer.gpt2()
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def on_standin(tmp_path_factory):
    """Run a program on the stand-in driver; gives what it prints."""
    if standin.no_standin():
        pytest.skip(standin.no_standin())
    folder = tmp_path_factory.mktemp("driver")
    return standin.runner(standin.compiled(folder))


@pytest.fixture(scope="session")
def nccl_path(tmp_path_factory):
    """Where a stand-in for NCCL is, compiled."""
    if standin.no_compiler():
        pytest.skip(standin.no_compiler())
    return standin.compiled_nccl(tmp_path_factory.mktemp("nccl"))


@pytest.fixture
def calls(monkeypatch):
    """What the disk is asked for: (call, name), in order."""
    made = []

    def noted(name, call):
        def wrapped(first, *rest, **more):
            if name == "fsync":
                folder = stat.S_ISDIR(os.fstat(first).st_mode)
                made.append(("sync", "folder" if folder else "file"))
            else:
                made.append((name, os.path.basename([first, *rest][-1])))
            return call(first, *rest, **more)

        return wrapped

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    return made


@pytest.fixture
def llmnb(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; gives its code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMNB_TRACEBACK", raising=False)

    def run(*args):
        code = 0
        try:
            main([str(x) for x in args])
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run
