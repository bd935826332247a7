# Written by `make export` from notebooks/appendix/10_book.py: edit that file.

"""GPT-2 and its training, by hand, in Python.

Begin with a model and a batch of tokens:

    cfg = llmnb.GPT2Config(max_seq_len=64, vocab_size=257)
    model = llmnb.GPT2(cfg, batch_size=8, seq_len=64)
    loss = model.forward(tokens, targets)
    model.backward()
    model.update(learning_rate=1e-3, step=1)

llmnb.tokenizer turns text into tokens; the command `llmnb` trains on
your own text. The rooms, each documented by help(): llmnb.reference,
cpu and cuda hold the layers; model the model; formats, text and train
what it reads, writes and learns from; bench measures it. Each module
is written by a chapter of the book, which its first line names."""

__all__ = []


# imports of the package
import importlib
import importlib.util


# the package's front door
__version__ = "0.2.0"
_CONFIGS = (
    "LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config",
    "GemmaConfig", "Gemma2Config", "Gemma3Config", "PRESETS",
)  # fmt: skip
_HOME = {
    "GPT2": "llmnb.model.gpt2",
    "GPT2Config": "llmnb.config",
    "load": "llmnb.train.loading",
    **dict.fromkeys(_CONFIGS, "llmnb.model.architectures"),
}


def __getattr__(name):
    """Import a room, GPT2, GPT2Config or tokenizer when it is asked for."""
    if name == "Model":  # of any architecture; GPT2 is its first name
        name = "GPT2"
    if name == "tokenizer":
        return importlib.import_module("llmnb.text.tokenizer")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if importlib.util.find_spec(f"llmnb.{name}"):
        return importlib.import_module(f"llmnb.{name}")
    raise AttributeError(f"llmnb has no {name!r}")


def __dir__():
    """What a prompt completes."""
    return [*globals(), *_HOME, "Model", "tokenizer"]
