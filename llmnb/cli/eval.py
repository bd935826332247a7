# Written by `make export` from notebooks/4_practice/25_use.py: edit that file.

"""`llmnb eval`: measure a model on a text or on HellaSwag."""

__all__ = ["EvalOptions", "OPTIONS", "run"]


# its options
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
    """What `llmnb eval` is told.

    Derived in chapter 4.25.
    """

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


# measure a model
def run(args):
    """Print what a model pays for a text, and how it answers HellaSwag.

    Perplexity and bits a byte of a text; accuracy on HellaSwag, from
    llm.c's .bin or from JSON lines. Processes that mpirun or srun has
    started share the work.

    Derived in chapter 4.25.
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


# are all alike
def _check_group(args, group, model, **facts):
    """Raise ValueError unless a group has the same model and the same text."""
    if group.size > 1:
        from llmnb.cli.together import check_command  # Part 6

        facts["model"] = crc32(model.memory.flat("params"))
        check_command(args, group, **facts)


# perplexity
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


# multiple choice
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
