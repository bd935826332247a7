# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cli.generate: "`llmnb generate`: continue a prompt."
#       cli.models: "Which model a command means, and which tokenizer goes with it."
#       cli.data: "`llmnb data`: turn text into token shards."
#       cli.eval: "`llmnb eval`: measure a model on a text or on HellaSwag."
# ---

# %% [markdown]
# # Use: generate, data and eval from a terminal
#
# > Text written as it is drawn, text of any size turned into shards, and a
# > model measured, each by one command.
#
# *Reading time: 20 minutes. You need: [chapter 4.23](23_commands.ipynb).*

# %% [markdown]
# ## Where we are
#
# Three commands use what other chapters have built: the decoder of
# [chapter 4.20](20_decoder.ipynb), the shards of
# [chapter 4.11](11_anysize.ipynb), the measures of
# [chapter 4.21](21_evaluation.ipynb). At the end of this chapter you can
#
# - continue a prompt from a terminal, a file or a pipe;
# - say which tokenizer a command takes for a model, and how to name another;
# - turn a folder of text into shards, and measure a model on a text.

# %% [markdown]
# ## Setup

# %% setup
from pathlib import Path
from tempfile import TemporaryDirectory

from llmnb.book.verify import verdict

# %% [markdown]
# ## Which model, which tokenizer
#
# A model is named by its folder or its file; without a name it is the newest
# run's. Its tokenizer lies beside it, or is named.

# %% imports of the models tags=["export"] module="cli.models"
from pathlib import Path

from llmnb.cli.options import remark
from llmnb.formats.checkpoint import read_config, without_padding
from llmnb.formats.hub import SOURCES
from llmnb.formats.vocabulary import open_encoding, tokenizer_of
from llmnb.train.newest import newest_run
from llmnb.train.folder import weights_path


# %% which model tags=["export"] module="cli.models"
def model_of(args):
    """The model that was named, or the newest run's; and its weights."""
    named = Path(args.model) if args.model else newest_run()
    if not named.exists():
        hint = f"; `llmnb fetch {named}` prints the folder of that model"
        hint = hint if args.model in SOURCES else ""
        raise FileNotFoundError(f"there is no run {named}{hint}")
    return named, weights_path(named)


# %% which tokenizer tags=["export"] module="cli.models"
def with_tokenizer(path, args, aloud=True):
    """A model's configuration, for the tokenizer asked for or its own.

    aloud: whether to say which of its tokens are left out, if any.
    """
    cfg = read_config(path)
    name = args.tokenizer or tokenizer_of(path, cfg.vocab_size)
    encoding = open_encoding(name)
    few = without_padding(path, cfg, encoding.n_vocab, name)
    if aloud and few != cfg:
        remark(
            f"{path} has {cfg.vocab_size} tokens, the tokenizer {name} knows "
            f"{encoding.n_vocab}: the others are left out"
        )
    return few, encoding


# %% [markdown]
# ## Generate
#
# The options say how to draw ([chapter 1.19](../1_by_hand/19_writing.ipynb));
# the text appears as it is drawn, and of several texts the first.

# %% its options tags=["export"] module="cli.generate"
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
    """What `llmnb generate` is told."""

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


# %% write to the terminal tags=["export"] module="cli.generate"
def run(args):
    """Continue a prompt, on standard output.

    The model is that of a run folder, of a .bin or .safetensors file, or
    of a Hugging Face model folder.
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


# %% the prompt tags=["exporti"] module="cli.generate"
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


# %% several texts, one terminal tags=["exporti"] module="cli.generate"
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


# %% how a text begins tags=["exporti"] module="cli.generate"
def _start(encoding):
    """The tokens before a prompt: another model's tokenizer may want none."""
    if hasattr(encoding, "bos_token") and encoding.bos_token is None:
        return []
    return [text_start(encoding)]


# %% the model, ready tags=["exporti"] module="cli.generate"
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


# %% [markdown]
# ## Data
#
# The shards are written by [chapter 4.11](11_anysize.ipynb), which goes on where
# it was stopped. What the command adds is the choice of a tokenizer, a bar over
# the bytes read, and a report; where several processes share the work, the others
# encode for the first, which writes.

# %% its options tags=["export"] module="cli.data"
from dataclasses import dataclass, fields
from itertools import chain

from llmnb.cli.options import GroupOptions, fields_of, say, typed
from llmnb.cli.train import check_apart
from llmnb.files import unmade
from llmnb.text import shards
from llmnb.text.corpus import describe
from llmnb.text.documents import sources
from llmnb.text.reader import Tally
from llmnb.train.terminal import progress_bar
from llmnb.train.feed import make_encoding
from llmnb.train.options import DataOptions, TrainConfig, check_range, option


@dataclass
class ShardOptions:
    """What `llmnb data` is told beside what a run reads."""

    out: str = option(
        None, "where to write", positional=True, metavar="FOLDER"
    )
    force: bool = option(False, "start anew in a folder in use")
    shard_tokens: int = option(100_000_000, "tokens in a shard")
    val_tokens: int = option(
        0,
        "tokens to set aside for validation (default: a tenth, at most 32768)",
    )
    threads: int = option(
        0, "threads that encode (default: one for each core)"
    )


_READ = tuple(x for x in fields(DataOptions) if x.name != "shards")
OPTIONS = {"": fields(ShardOptions) + fields(GroupOptions) + _READ}


# %% write the shards tags=["export"] module="cli.data"
def run(args):
    """Write train and val shards and tokenizer.tiktoken.

    `llmnb train --shards FOLDER` reads them. The corpus is stdlib,
    tinyshakespeare, or files and folders of text and of JSON lines
    (.jsonl), plain or packed (.gz, .zst). The same command goes on where
    it was stopped. Under mpirun or srun all processes encode, and the first
    writes.
    """
    from llmnb.cli.together import in_group  # Part 6

    with unmade(args.out):
        in_group(args, _run)


def _run(args, group):
    """Write the shards, or encode for the process that does."""
    check_range("threads", args.threads, 0)
    names = [x.name for x in _READ] + ["shard_tokens", "val_tokens"]
    options = {name: getattr(args, name) for name in names}
    options["corpus"] = list(args.corpus)
    config = TrainConfig(**fields_of(options, DataOptions))
    check_apart(args.out, args.corpus)
    tally = Tally()
    if group.first:
        folder = shards.shards_folder(args.out, args.force)
    corpus = sources(args.corpus, args.field, args.skip_bad, tally)
    pieces = shards.pieces_from(corpus, limit=args.limit)
    encoding = make_encoding(config, (text for _, _, text, _ in pieces))
    work, blocks = (corpus, encoding, options), shards.encoded
    if group.size > 1:
        from llmnb.cli.together import check_command
        from llmnb.train.sharing import encoded_by

        check_command(args, group, **shards.conditions(*work))
        blocks = encoded_by(group)
    if not group.first:
        for _ in blocks(*work, workers=args.threads):
            pass
        return
    how = args.force, args.threads, blocks
    work = shards.write_shards(folder, *work, *how)
    done = _follow_data(work, sum(source.size for source in corpus))
    words = tally.words(args.endoftext)
    size = describe(args.corpus, done.documents, done.characters)
    say("corpus", size + words)
    for name, count in done.shards:
        say(name, f"{count:,} tokens in {folder / name}")
    say("go on", f"llmnb train --shards {typed(folder)}")


# %% follow the work tags=["exporti"] module="cli.data"
def _follow_data(work, size):
    """Draw a bar over the bytes read; returns the last `Encoded`."""
    first = next(work)  # what is wrong from the beginning gets no bar
    bar = progress_bar(total=size, unit="B", unit_scale=True)
    with bar:
        for done in chain([first], work):
            bar.update(done.read - bar.n)
            bar.set_postfix(tokens=f"{done.tokens:,}", refresh=False)
    return done


# %% [markdown]
# ## Eval
#
# A text is scored by [chapter 4.21](21_evaluation.ipynb), HellaSwag by
# [chapter 4.22](22_choices.ipynb). The command prints beside each number what
# belongs to it: the context and the stride, the examples that were cut, the
# standard error.

# %% its options tags=["export"] module="cli.eval"
from dataclasses import dataclass, fields
from functools import partial
from zlib import crc32

from llmnb.cli.models import model_of, with_tokenizer
from llmnb.cli.options import GroupOptions, ThreadOptions, say, set_threads
from llmnb.cli.options import some_of, tell_compiling
from llmnb.model.gpt2 import GPT2
from llmnb.text.documents import sources
from llmnb.text.reader import Tally
from llmnb.text.shards import pieces_from
from llmnb.train import choices, evaluation
from llmnb.train.terminal import progress_bar
from llmnb.train.options import DataOptions, check_range, option


@dataclass
class EvalOptions:
    """What `llmnb eval` is told."""

    model: str = option(
        None,
        "a run folder, a .bin or .safetensors file, or a Hugging Face model "
        "folder (default: the newest in runs/)",
        positional=True, nargs="?", metavar="MODEL",
    )  # fmt: skip
    text: tuple = option((), "text to score", metavar="FILE")
    hellaswag: str = option(None, "a .bin file, or JSON lines", metavar="FILE")
    limit: int = option(0, "characters or examples at most; 0 means all")
    seq_len: int = option(0, "context in tokens; 0: all the model has")
    stride: int = option(0, "tokens scored a window; 0: half the context")
    tokenizer: str = option(None, "as for generate")


OPTIONS = {
    "": fields(EvalOptions)
    + some_of(DataOptions, "field", "skip_bad", "endoftext")
    + fields(GroupOptions)
    + fields(ThreadOptions)
}


# %% measure a model tags=["export"] module="cli.eval"
def run(args):
    """Print what a model pays for a text, and how it answers HellaSwag.

    Perplexity and bits a byte of a text; accuracy on HellaSwag, from
    llm.c's .bin or from JSON lines. Processes that mpirun or srun has
    started share the work.
    """
    from llmnb.cli.together import in_group  # Part 6

    in_group(args, _run)


def _run(args, group):
    """Measure a model, as one of a group; the first reports."""
    if not (args.text or args.hellaswag):
        raise ValueError("name a file: --text FILE or --hellaswag FILE")
    for name in ("limit", "seq_len", "stride"):
        check_range(name, getattr(args, name), 0)
    named, path = model_of(args)
    set_threads(args)
    cfg, encoding = with_tokenizer(path, args, group.first)
    context = min(args.seq_len or cfg.max_seq_len, cfg.max_seq_len)
    say("model", path)
    if group.first:
        tell_compiling("cpu")
    if args.text:
        _eval_text(args, path, encoding, context, group)
    if args.hellaswag:
        _eval_hellaswag(args, path, encoding, context, group)


# %% are all alike tags=["exporti"] module="cli.eval"
def _check_group(args, group, model, **facts):
    """Raise ValueError unless a group has the same model and the same text."""
    if group.size > 1:
        from llmnb.cli.together import check_command  # Part 6

        facts["model"] = crc32(model.memory.flat("params"))
        check_command(args, group, **facts)


# %% perplexity tags=["exporti"] module="cli.eval"
def _eval_text(args, path, encoding, context, group):
    tally = Tally()
    texts = sources(args.text, args.field, args.skip_bad, tally)
    found = pieces_from(texts, limit=args.limit)
    pieces = ((first, text) for _, first, text, _ in found)
    model = GPT2.from_checkpoint(path, 1, context, tokens=encoding.n_vocab)
    _check_group(args, group, model, text=[x.mark for x in texts])
    stride = args.stride or max(1, context // 2)
    bar = partial(progress_bar, unit="window", leave=False)
    how = stride, bar if group.first else iter, args.endoftext, group
    score = evaluation.score_pieces(model, encoding, pieces, *how)
    size = f"{score.bytes:,} bytes{tally.words(args.endoftext)}"
    say("text", f"{' '.join(args.text)}: {size}")
    say("tokens", f"{score.tokens:,}, context {context}, stride {stride}")
    say("loss", f"{score.loss:.4f} nats a token")
    say("perplexity", f"{score.perplexity:.2f} a token")
    say("bits", f"{score.bits_per_byte:.4f} a byte")


# %% multiple choice tags=["exporti"] module="cli.eval"
def _eval_hellaswag(args, path, encoding, context, group):
    tally = Tally()
    if args.hellaswag.endswith(".bin"):
        examples = choices.read_examples(args.hellaswag)
    else:
        how = encoding, args.skip_bad, tally
        examples = choices.read_examples_json(args.hellaswag, *how)
    examples = examples[: args.limit or None]
    lengths = [choices.longest_row(x) - 1 for x in examples]
    how = path, 4, max(1, min(context, max(lengths)))
    model = GPT2.from_checkpoint(*how, tokens=encoding.n_vocab)
    cut = sum(length > context for length in lengths)
    _check_group(args, group, model, examples=crc32(repr(examples).encode()))
    found = _chosen(model, examples, group)
    size = f"{args.hellaswag}: {len(found):,} examples"
    size += f", {cut:,} cut on the left to {context} tokens" if cut else ""
    say("hellaswag", size + tally.words())
    hits_by_way = zip(*found, strict=True)
    for label, hits in zip(("acc_norm", "acc"), hits_by_way, strict=True):
        right = sum(hits) / len(hits)
        error = choices.standard_error(right, len(hits))
        say(label, f"{right:.4f} +- {error:.4f}")


def _chosen(model, examples, group):
    """Whether each example was met, by mean and by sum; over the group."""
    mine, found = group.share(len(examples)), []
    how = {"unit": "example", "leave": False, "disable": not group.first}
    with progress_bar(total=len(mine), **how) as bar:
        own = examples[mine.start : mine.stop]
        for x in choices.choices_of(model, own):
            found.append([x.by_mean == x.label, x.by_sum == x.label])
            bar.update()
    return sum(group.gather(found), [])


# %% [markdown]
# ## Try them

# %% a run, and its text
from llmnb.cli.cell import TINY, run_command

place = TemporaryDirectory()
folder, page = Path(place.name, "run"), Path(place.name, "a.txt")
run_command("train", "--out", folder, *TINY.split())
ask = ["generate", folder, "--prompt", "def ", "--tokens", 20]
text, _, code = run_command(*ask)
verdict("generate", code == 0 and text.startswith("def "), "goes on")
verdict("generate", run_command(*ask)[0] == text, "same seed, same text")
two, _, code = run_command(*ask, "--samples", 2)
verdict("generate", text in two, "the first of two is the same")

# %% its measure, and shards
page.write_text("def f(x):\n    return x\n" * 20)
score, _, code = run_command("eval", folder, "--text", page)
print(code, *[line.split()[0] for line in score.splitlines()])
out = Path(place.name, "shards")
_, _, code = run_command("data", out, "--corpus", page, "--tokenizer", "byte")
print(code, *sorted(x.name for x in out.iterdir()))

# %% [markdown]
# ## Take away
#
# - A model and its tokenizer travel together; a command that is given the
#   first finds the second, or says that it cannot.
# - What is written for a program goes to standard output; what is said to a
#   person, to standard error.
#
# ## Exercises
#
# **1** (★). Write the shell command that continues the first line of a file
# ten times, each time with another seed, and keeps the texts in a second file.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# `llmnb generate --prompt "$(head -n 1 a.txt)" --samples 10 > b.txt`: the texts go
# to the file, and what the command has to say besides still reaches the terminal.
# With `head -n 1 a.txt | llmnb generate --prompt -` the end of the line would be
# part of the prompt, and the model would write the second line.
# :::

# %% exercise 1, checked tags=["hide-cell"]
import re

line = page.read_text().splitlines()[0]
ask = ["generate", folder, "--prompt", line, "--samples", 10, "--tokens", 9]
text, _, code = run_command(*ask)
seeds = re.findall(rf"^--- .* seed (\d+)\n{re.escape(line)}", text, re.M)
verdict("exercise 1", len({*seeds}) == 10, "ten seeds go on with it")

# %% [markdown]
# **2** (★). Copy `model.bin` of a run, and nothing else, to another folder. What does
# `llmnb eval` say about it, and what must it be told to find the same numbers?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# That no tokenizer lies beside it. `--tokenizer byte` names the one of this run, and
# so does `--tokenizer run/tokenizer.tiktoken`, whatever it is.
# :::

# %% exercise 2, checked tags=["hide-cell"]
import shutil

alone = Path(place.name, "alone.bin")
shutil.copy(folder / "model.bin", alone)
ask = ["eval", alone, "--text", page]
_, said, code = run_command(*ask)
verdict("exercise 2", code == 1 and "which tokenizer?" in said, "asks for one")
for name in "byte", folder / "tokenizer.tiktoken":
    found, _, code = run_command(*ask, "--tokenizer", name)
    same = found.splitlines()[1:] == score.splitlines()[1:]
    verdict("exercise 2", code == 0 and same, "the same numbers")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

place.cleanup()
gained("4.25")
