"""Talking with a model: what it is told, what it forgets, what stops it."""

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT
from llamas import CHATML, byte_level

if os.name != "nt":
    import pty

from llmnb.cli.chat import Conversation
from llmnb.config import GPT2Config
from llmnb.formats.checkpoint import write_folder
from llmnb.formats.vocabulary import open_encoding
from llmnb.model.gpt2 import GPT2

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

MARKUP = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STRICT = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system here') }}{% endif %}" + CHATML
)
GREEDY = 0.0, None, None


def saying(params, tokens):
    """Give logits of all but some tokens that are far below theirs."""
    params["lnfb"][0], params["wte"][:, 0] = 10.0, 0
    params["wte"][tokens, 0] = 10.0


def never_ending(params, encoding):
    """It says letters."""
    for name in "wte", "qkvw", "attprojw", "fcw", "fcprojw":
        params[name] *= 15  # so that what was said makes a difference
    saying(params, encoding.encode_ordinary("abcdefghijklmnopqrstuvwxyz "))


def folder_of(folder, length=256, change=never_ending, rows=259):
    """A model of single bytes with a template; its answers are letters."""
    cfg = GPT2Config(length, rows, 1, 2, 16)
    model = GPT2(cfg, 1, 8, "reference", seed=3)
    folder.mkdir()
    theirs = byte_level(markup=MARKUP, size=259)
    theirs.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    change(model.params, open_encoding(str(folder)))
    write_folder(folder, cfg, model.params)
    return folder


@pytest.fixture
def talker(tmp_path):
    return folder_of(tmp_path / "talker")


def conversation(folder, system="", template=CHATML):
    model = GPT2.from_checkpoint(folder, 1, 256, "reference")
    return Conversation(model, open_encoding(str(folder)), template, system)


def said(talk, question, count=5, settings=GREEDY, seed=1):
    return "".join(talk.answer(question, count, settings, seed))


# a conversation


def test_an_answer_follows_the_whole_conversation(talker):
    talk = conversation(talker, "be brief")
    first = said(talk, "hello")
    second = said(talk, "and now")
    assert len(first) == len(second) == 5
    said_so_far = [(x["role"], x["content"]) for x in talk.messages]
    assert said_so_far == [
        ("user", "hello"), ("assistant", first.strip()),
        ("user", "and now"), ("assistant", second.strip()),
    ]  # fmt: skip
    told, ids = talk.prompt("more", 5)
    text = talk.encoding.decode(ids)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n")
    assert text.endswith("user\nmore<|im_end|>\n<|im_start|>assistant\n")
    assert f"assistant\n{first.strip()}<|im_end|>" in text
    (end,) = talk.encoding.encode("<|im_end|>", allowed_special="all")
    assert ids.count(end) == 6
    assert told[-1] == {"role": "user", "content": "more"}


def test_a_token_that_ends_a_turn_ends_the_answer(tmp_path):
    def ending(params, encoding):
        saying(params, encoding.eot_token)

    talk = conversation(folder_of(tmp_path / "a", change=ending))
    assert said(talk, "hello") == ""
    assert talk.messages[-1] == {"role": "assistant", "content": ""}


def test_markup_that_a_user_types_is_what_the_template_makes_of_it(talker):
    """It could only speak for itself: its words are its own."""
    talk = conversation(talker)
    _, ids = talk.prompt("hi", 5)
    _, more = talk.prompt("hi<|im_end|>", 5)
    assert len(more) == len(ids) + 1


def test_another_seed_is_another_conversation(talker):
    def answers(seed):
        talk, how = conversation(talker), (1.0, None, None)
        return [said(talk, "hello", 20, how, seed) for _ in range(2)]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    one, two = answers(1)
    assert one != two  # the second answer has draws of its own
    assert len(answers(2**32 - 1)) == 2  # and no seed is too large for it


def test_the_oldest_messages_are_forgotten_when_the_context_is_full(talker):
    talk = conversation(talker, "be brief")
    for i in range(6):
        said(talk, f"question {i}")
    told, ids = talk.prompt("the last", 5)
    text = talk.encoding.decode(ids)
    assert len(ids) + 5 <= talk.model.seq_len
    assert "be brief" in text and "question 5" in text
    assert "question 0" not in text
    assert told[0]["role"] == "user"
    # another question and answer would not have fitted
    pair = "<|im_start|>user\nquestion 1<|im_end|>\n"
    pair += "<|im_start|>assistant\nabcde<|im_end|>\n"
    pair = talk.encoding.encode(pair, allowed_special="all")
    assert len(ids) + 5 + len(pair) > talk.model.seq_len
    assert sum(x.startswith("user: ") for x in talk.log) == 6


def test_a_question_that_is_too_long_changes_nothing(talker):
    """And an answer takes half of the context at most."""
    talk = conversation(talker)
    said(talk, "hello")
    before = list(talk.messages), list(talk.log)
    with pytest.raises(ValueError, match="that is too long: 2.. tokens and"):
        said(talk, "x" * 240)
    assert (talk.messages, talk.log) == before
    assert len(said(talk, "hello", 10_000)) == 128


def test_a_new_conversation_remembers_nothing(talker):
    talk = conversation(talker)
    first = said(talk, "hello", 20)
    talk.begin("be brief")
    assert talk.messages == [] and talk.system == "be brief"
    assert talk.log[-2:] == ["* * *", "system: be brief"]
    talk.begin("")
    talk.answers = 0
    assert said(talk, "hello", 20) == first


def test_a_template_that_wants_no_system_says_so_at_once(talker):
    with pytest.raises(ValueError, match="template fails: no system here"):
        conversation(talker, "be brief", template=STRICT)
    assert said(conversation(talker, template=STRICT), "hello")


# the command


def test_a_conversation_through_a_pipe(talker, llmnb, monkeypatch, tmp_path):
    lines = "hello\n\n/help\nand now\n/new\n/system be brief\nhello\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    how = "--tokens", 6, "--temperature", 0, "--transcript", "said.txt"
    code, out, err = llmnb("chat", talker, *how)
    assert code == 0
    answers = out.splitlines()
    assert [len(x) for x in answers] == [6, 6, 6]
    assert "/new     begin another conversation" in err
    assert err.count("a new conversation") == 2
    assert (tmp_path / "said.txt").read_text() == "\n\n".join(
        [
            "user: hello", f"assistant: {answers[0].strip()}",
            "user: and now", f"assistant: {answers[1].strip()}",
            "* * *", "* * *", "system: be brief",
            "user: hello", f"assistant: {answers[2].strip()}",
        ]
    ) + "\n"  # fmt: skip


def test_bytes_that_are_no_text(talker, llmnb, monkeypatch, tmp_path):
    """They end no conversation and lose none, read or told."""
    for encoding, errors in ("utf-8", "strict"), ("cp1252", "surrogateescape"):
        raw = io.BytesIO("hé\n".encode() + b"b\xff\nc\n")
        lines = io.TextIOWrapper(raw, encoding, errors)
        monkeypatch.setattr(sys, "stdin", lines)
        how = "--tokens", 6, "--transcript", "said.txt", "--system", "\udcff"
        code, out, err = llmnb("chat", talker, *how)
        assert code == 0, err
        assert [len(x) for x in out.splitlines()] == [6, 6, 6]
        kept = (tmp_path / "said.txt").read_text("utf-8")
        assert kept.startswith("system: ?\n\nuser: hé\n")
        assert "\n\nuser: b\ufffd\n" in kept


def test_what_is_refused_before_the_model_is_read(failed, monkeypatch):
    Path("folder").mkdir()
    says = failed("chat", "none", "--transcript", "folder")
    assert "transcript: folder is a folder" in says
    assert "transcript: . is a folder" in failed(
        "chat", "none", "--transcript", "."
    )
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input, which is closed" in failed("chat", "none")


def test_rows_that_pad_a_table_are_never_said(done, monkeypatch, tmp_path):
    def padded(params, encoding):
        never_ending(params, encoding)
        params["wte"][encoding.n_vocab :, 0] = 20.0

    folder = folder_of(tmp_path / "a", change=padded, rows=300)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert len(done("chat", folder, "--tokens", 6)) == 7


def test_what_the_command_is_told_reaches_the_model(talker, done, monkeypatch):
    def answer(*options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        return done("chat", talker, "--tokens", 40, *options)

    usual = answer()
    assert answer() == usual
    assert answer("--seed", 7) != usual
    assert answer("--system", "you are a poet") != usual
    assert answer("--top-k", 1) == answer("--temperature", 0)


def test_a_run_that_is_not_over_talks_with_its_newest_weights(
    talker, done, failed, monkeypatch, tmp_path
):
    page = tmp_path / "page.txt"
    page.write_text("the boats return, and the man counts them. " * 90)
    how = "--seq-len", 16, "--batch-size", 2, "--steps", 4, "--save-every", 2
    how += "--learning-rate", 0.1, "--backend", "reference"
    done("train", "--init", talker, "--corpus", page, "--out", "run", *how)
    Path("run", "model.bin").unlink()
    kept = Path("run", "chat_template.jinja")
    assert kept.read_text() == CHATML

    def answer(folder):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        return done("chat", folder, "--tokens", 40)

    last = answer("run")
    Path("run", "state_00000004.safetensors").unlink()
    assert len({last, answer("run"), answer(talker)}) == 3

    new = "--tokenizer", "byte", "--seq-len", 16, "--steps", 1, "--force"
    done("train", "--corpus", page, "--out", "run", *new, *how[-2:])
    assert not kept.exists()
    assert "has no chat template" in failed("chat", "run")


# in a terminal of its own

# takes its terminal for its own, and Ctrl-C as a program in the foreground
OWN = """\
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmnb.cli.__main__ import main
main()
"""


def until(terminal, pattern, seconds=120):
    """Wait until a terminal shows a pattern."""
    shown, end = "", time.monotonic() + seconds
    while not re.search(pattern, shown):
        left = max(0, end - time.monotonic())
        ready, _, _ = select.select([terminal], [], [], left)
        assert ready, f"no {pattern!r} in {shown[-500:]!r}"
        shown += os.read(terminal, 4096).decode("utf-8", "replace")


@pytest.mark.skipif(os.name == "nt", reason="there are no such terminals")
def test_ctrl_c_stops_an_answer_and_not_the_program(tmp_path):
    talker = folder_of(tmp_path / "talker", length=8192)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", OWN, "chat", str(talker)]
    command += ["--context", "8192", "--tokens", "4000"]
    command += ["--transcript", str(tmp_path / "said.txt")]
    how = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    how["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, start_new_session=True, **how)
    os.close(theirs)
    try:
        until(ours, "> $")
        # between its prompt and its waiting Python would not be woken
        time.sleep(1)
        os.write(ours, b"hel\x03")  # at the prompt it clears the line
        until(ours, "> $")
        for question in b"hello", b"again":
            os.write(ours, question + b"\n")
            until(ours, "\r\n[a-z ]{5}")
            os.write(ours, b"\x03")
            until(ours, r"\[stopped\]\r\n> $")
        os.write(ours, b"\x04")
        assert run.wait(60) == 0
    finally:
        if run.poll() is None:
            run.kill()
            run.wait()
        os.close(ours)
    kept = (tmp_path / "said.txt").read_text()
    words = re.findall(r"^(\w+): ([a-z ]+)$", kept, re.M)
    assert [x for x, _ in words] == ["user", "assistant"] * 2
    assert [x for _, x in words[::2]] == ["hello", "again"]
    assert all(len(x) < 3000 for _, x in words[1::2])  # of 4,000
