# Written by `make export` from notebooks/4_practice/25_use.py: edit that file.

"""`llmnb generate`: continue a prompt."""

__all__ = ["GenerateOptions", "OPTIONS", "run"]


# its options
import re
import sys
import time
from dataclasses import dataclass, fields

from llmnb.cli.models import model_of, with_tokenizer
from llmnb.cli.options import ThreadOptions, check_backend, remark
from llmnb.cli.options import set_threads, some_of, tell_compiling
from llmnb.model.decode import Decoder
from llmnb.model.generate import check_sampling, decoded
from llmnb.model.generate import generate_samples, window_start
from llmnb.model.gpt2 import GPT2
from llmnb.text.bpe import EOT
from llmnb.text.tokenizer import encode_text, text_start
from llmnb.train.options import DataOptions, check_range, option


@dataclass
class GenerateOptions:
    """What `llmnb generate` is told.

    Derived in chapter 4.25.
    """

    model: str = option(
        None,
        "a run folder, a model file or a model folder (default: the newest "
        "in runs/)",
        positional=True, nargs="?", metavar="RUN",
    )  # fmt: skip
    prompt: str = option(
        "", "the beginning of the text; - reads standard input"
    )
    tokens: int = option(200, "tokens to write at most")
    samples: int = option(1, "texts to write, each with the next seed")
    temperature: float = option(
        0.8, "0: the likeliest token; 1: as the model says"
    )
    top_k: int = option(None, "draw among the k likeliest tokens only")
    top_p: float = option(None, "draw among the likeliest that make up p only")
    seed: int = option(42, "another seed, another text")
    tokenizer: str = option(
        None,
        "gpt2, byte, a rank file, vocab.json, tokenizer.json, "
        "tokenizer.model or a .gguf, instead of what lies beside the model",
    )
    backend: str = option(
        "cpu",
        "cpu keeps keys and values; cuda and reference compute the whole "
        "window for every token",
    )
    stats: bool = option(False, "print tokens a second at the end")


OPTIONS = {
    "": fields(GenerateOptions)
    + some_of(DataOptions, "endoftext")
    + fields(ThreadOptions)
}


# write to the terminal
def run(args):
    """Continue a prompt, on standard output.

    The model is that of a run folder, of a .bin or .safetensors file, or
    of a Hugging Face model folder.

    Derived in chapter 4.25.
    """
    settings = args.temperature, args.top_k, args.top_p
    check_sampling(*settings)
    check_backend(args.backend)
    check_range("tokens", args.tokens, 0)
    check_range("samples", args.samples, 1)
    set_threads(args)
    prompt = _prompt(args.prompt)
    decoder, encoding, ids = _load_model(args, prompt)
    steps = generate_samples(
        decoder, ids, args.tokens, args.samples, *settings,
        seed=args.seed, stop=encoding.eot_token,
    )  # fmt: skip
    texts, times = [[] for _ in range(args.samples)], [time.perf_counter()]
    _heading(args, 0)
    print(prompt, end="", flush=True)
    for piece in decoded(encoding, _first_text(steps, texts, times)):
        print(piece, end="", flush=True)
    print()
    for i in range(1, args.samples):
        _heading(args, i)
        print(prompt + "".join(decoded(encoding, texts[i])))
    if args.stats:
        _stats(len(ids), texts, times)


# the prompt
def _prompt(text):
    """The prompt, from standard input for -; what is no text becomes U+FFFD.

    Standard input is read as UTF-8, as files are, whatever the system's
    encoding; Python reads a byte that is not UTF-8 as half of a character.
    """
    if text == "-":
        if sys.stdin is None:
            why = "reads standard input, which is closed"
            raise ValueError(f"--prompt - {why}")
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        text = sys.stdin.read()
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# several texts, one terminal
def _first_text(steps, texts, times):
    """The first text's tokens as they come; the others are gathered."""
    for step in steps:
        times.append(time.perf_counter())
        for text, token in zip(texts, step, strict=True):
            if token is not None:
                text.append(token)
        if step[0] is not None:
            yield step[0]


def _heading(args, i):
    if args.samples > 1:
        seed = (args.seed + i) % 2**32  # as `generate_samples` counts
        print(f"--- {i + 1} of {args.samples}, seed {seed}")


def _stats(length, texts, times):
    """How fast it was, on standard error: the first token apart."""
    seconds = [b - a for a, b in zip(times, times[1:], strict=False)]
    lines = [f"prompt: {length:,} tokens, the first token after {s:.3f} s"
             for s in seconds[:1]]  # fmt: skip
    rest, count = sum(seconds[1:]), sum(len(text) - 1 for text in texts)
    if rest and count > 0:
        lines.append(
            f"then: {count:,} tokens in {rest:.3f} s, {count / rest:,.1f} "
            f"tokens/s, {rest / len(seconds[1:]) * 1e3:.1f} ms a step"
        )
    remark(*lines)


# how a text begins
def _start(encoding):
    """The tokens before a prompt: another model's tokenizer may want none."""
    if hasattr(encoding, "bos_token") and encoding.bos_token is None:
        return []
    return [text_start(encoding)]


# the model, ready
def _load_model(args, prompt):
    """A model with room for the prompt and the text; the tokenizer; ids."""
    named, path = model_of(args)
    if not args.model or (path != named and path.stem != "model"):
        remark(f"model: {path}")
    cfg, encoding = with_tokenizer(path, args)
    ids = encode_text(encoding, prompt, args.endoftext)
    ids = [*_start(encoding), *ids.tolist()] or [encoding.eot_token]
    length = min(len(ids) + args.tokens, cfg.max_seq_len)
    if EOT in prompt and not args.endoftext:
        remark(
            f"{EOT} in the prompt is ordinary text (--endoftext takes it as "
            "the token)"
        )
    if len(ids) > length:
        seen = len(ids) - window_start(len(ids), length)
        remark(
            f"the prompt has {len(ids):,} tokens; the model sees the last "
            f"{seen:,} of them"
        )
    how, tokens = (path, args.samples, length), cfg.vocab_size
    tell_compiling(args.backend)
    if args.backend == "cpu":
        model = Decoder.from_checkpoint(*how, tokens)
    else:
        model = GPT2.from_checkpoint(*how, args.backend, tokens=tokens)
    return model, encoding, ids
