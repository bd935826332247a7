# Written by `make export` from notebooks/4_practice/25_use.py: edit that file.

"""`llmnb data`: turn text into token shards."""

__all__ = ["OPTIONS", "ShardOptions", "run"]


# its options
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
    """What `llmnb data` is told beside what a run reads.

    Derived in chapter 4.25.
    """

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


# write the shards
def run(args):
    """Write train and val shards and tokenizer.tiktoken.

    `llmnb train --shards FOLDER` reads them. The corpus is stdlib,
    tinyshakespeare, or files and folders of text and of JSON lines
    (.jsonl), plain or packed (.gz, .zst). The same command goes on where
    it was stopped. Under mpirun or srun all processes encode, and the first
    writes.

    Derived in chapter 4.25.
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


# follow the work
def _follow_data(work, size):
    """Draw a bar over the bytes read; returns the last `Encoded`."""
    first = next(work)  # what is wrong from the beginning gets no bar
    bar = progress_bar(total=size, unit="B", unit_scale=True)
    with bar:
        for done in chain([first], work):
            bar.update(done.read - bar.n)
            bar.set_postfix(tokens=f"{done.tokens:,}", refresh=False)
    return done
