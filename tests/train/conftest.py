"""Runs in the tests read a small text."""

import pytest
from runs import cut, small_data

from llmnb.train.folder import states


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    monkeypatch.setattr("llmnb.train.run.prepare", lambda _: small_data())


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The bytes of a good state, of step 5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmnb.train.run.prepare", lambda _: small_data())
        run = cut(tmp_path_factory.mktemp("state") / "a", 5)
    return states(run.folder)[0].read_bytes()


@pytest.fixture
def good(tmp_path, whole):
    """The path of such a state."""
    path = tmp_path / "state_00000005.safetensors"
    path.write_bytes(whole)
    return path
