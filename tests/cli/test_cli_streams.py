"""What every command does: mistakes, streams, terminals, help."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
from commands import FILES, OTHERS, ROOT, TINY, Terminal, broken, interrupt
from processes import output

from llmnb.cli.__main__ import COMMANDS
from llmnb.cli.options import Parser, add_options
from llmnb.train.options import TrainConfig, option
from llmnb.train.terminal import progress_bar


@pytest.mark.parametrize(("command", "code", "message"), [
    ("", 2, "the following arguments are required: COMMAND"),
    ("trian", 2, "invalid choice: 'trian'"),
    ("train --steps 0", 1, "steps must be at least 1, got 0"),
    ("train --init none.bin", 1, "none.bin: No such file"),
    ("train --resume", 1, "there is no run in runs/ here"),
    ("train --resume x --out y", 1, "needs neither --out nor --force"),
    ("info --depth 12 --channels 64", 1, "depth 12 makes channels 768"),
    ("train --shards no-such-folder", 1, "no-such-folder"),
    ("train --shards a --corpus b --skip-bad", 1,
     "--shards stands for a corpus: leave out --corpus, --skip-bad"),
    ("train --tokenizer none --limit 99", 1,
     "none: No such file or directory, and no tokenizer: these are"),
    (
        "train --limit 200 --tokenizer byte",
        1,
        "the text has 181 tokens to train on, a batch of 8 x 64 needs "
        "513: give more text, or a smaller batch_size or seq_len",
    ),
    ("train --limit 99 --tokenizer byte --out a/b/c", 1, "to train on"),
    ("train --threads 0", 1, "threads must lie in [1, "),
    ("train --threads 999", 1, "as many as there are cores, got 999"),
    ("train --backend quantum --limit 300000", 1, "quantum"),
    ("train --arch mamba", 1, "arch must be one of 'gpt2', 'llama'"),
    ("generate", 1, "there is no run in runs/ here"),
    ("generate . ", 1, ".: holds none of model.safetensors, "),
    ("generate x --temperature -1", 1, "temperature must be at least 0"),
    ("generate x --samples 0", 1, "samples must be at least 1, got 0"),
    ("generate x --tokens -1", 1, "tokens must be at least 0, got -1"),
    ("generate gpt2", 1, "no run gpt2; `llmnb fetch gpt2` prints"),
    ("eval x --text y --limit -1", 1, "limit must be at least 0, got -1"),
    ("data", 2, "the following arguments are required: FOLDER"),
    ("data out --vocab-size 3", 1, "3"),
    ("data out --shard-tokens 0 --tokenizer byte --limit 9", 1, "1, 2147"),
    ("data out --corpus nothing", 1, "no file called nothing"),
    ("data out --threads -3", 1, "threads must be at least 0, got -3"),
    ("data a/out --tokenizer byte --limit 99 --val-tokens 500", 1,
     "all of them for validation"),
    ("chat nowhere", 1, "there is no model nowhere"),
    # said before a model is looked for
    ("chat nowhere --tokens 0", 1, "tokens must be at least 1"),
    ("chat nowhere --context 1", 1, "context must be at least 2"),
    ("chat nowhere --temperature -1", 1, "temperature must be at least 0"),
    ("chat nowhere --seed -1", 1, "seed must be at least 0"),
    ("chat nowhere --transcript a/b", 1, "transcript: there is no folder"),
    ("verify nowhere", 1, "there is no folder nowhere"),
    ("bench --config big", 1, "no config 'big': choose from small, 124m"),
    ("bench --kernels", 1, "--kernels needs a GPU: add --backend cuda"),
    ("bench --backend cuda --kernels gelo", 1, "no layer 'gelo': choose"),
    ("bench --backend cuda --write", 1, "--write times the backend cpu"),
    ("bench --json no/folder/a.json", 1, "there is no folder no/folder"),
    ("bench --write --config small --turn 2", 1, "out --config, --turn\n"),
    ("bench --write --in-backward", 1, "no picture: leave out --in-backward"),
    ("bench --write --depth 3", 1, "no picture: leave out --depth\n"),
    ("bench --config small --arch llama --seq-len 7", 1,
     "shapes of their own: leave out --arch, --seq-len\n"),
    ("bench --write --precision bf16", 1, "in float32, and no picture: leave"),
])  # fmt: skip
def test_mistakes_get_one_line(llmnb, tmp_path, command, code, message):
    """Others are in chapter 4.23."""
    got, _, err = llmnb(*command.split())
    assert got == code
    assert message in err
    assert err.count("\n") == 1 and "rror: " in err
    assert not list(tmp_path.rglob("*")), "nothing is left"


def test_it_may_be_interrupted_while_it_starts(llmnb, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert llmnb("info") == (130, "", "")


def test_tracebacks_on_request(llmnb, monkeypatch):
    monkeypatch.setenv("LLMNB_TRACEBACK", "1")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        llmnb("train", "--steps", 0)


@pytest.mark.parametrize("kind", ["pipe", "terminal", "full"])
def test_it_trains_when_nobody_reads(llmnb, tmp_path, monkeypatch, kind):
    """Training goes on, and its folder is whole."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, broken(kind))
    ask = [*TINY.split(), "--sample-every", 2]
    assert llmnb("train", "--out", "run", *ask)[0] == 0
    assert sorted(x.name for x in (tmp_path / "run").iterdir()) == FILES


def test_a_signal_when_nobody_reads(llmnb, tmp_path, monkeypatch):
    """Standard error is the process's own here: os.write goes there."""
    old, lost = os.dup(2), broken("pipe")
    try:
        os.dup2(lost.fileno(), 2)
        interrupt(monkeypatch, 3)
        code = llmnb("train", "--out", "cut", *TINY.split())[0]
    finally:
        os.dup2(old, 2)
    assert code == 130 and (tmp_path / "cut" / "model.bin").exists()


def test_training_says_that_its_report_is_lost(llmnb, monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken("full"))
    code, _, err = llmnb("train", "--out", "run", *TINY.split())
    assert code == 0
    warning = "llmnb: warning: standard output: No space left on device\n"
    assert err.count("standard output") == 1 and warning in err


FULL = "llmnb: error: standard output: No space left on device\n"


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind, end", [("pipe", 141), ("full", 1)])
def test_a_lost_result_ends_it(llmnb, trained, monkeypatch, name, kind, end):
    """A command other than train, whose result cannot be written: quietly,
    if its reader went away, else with one error."""
    monkeypatch.setattr(sys, "stdout", broken(kind))
    args = OTHERS[name].format(run=trained).split()
    assert llmnb(*args) == (end, "", FULL if kind == "full" else "")


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [("pipe", 141, ""), ("full", 1, "No space left on device")],
)
def test_python_that_ends_has_nothing_to_add(kind, code, says):
    """Such as "Exception ignored", and a code of its own."""
    command = [sys.executable, "-m", "llmnb.cli", "info"]
    with broken(kind) as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == code
    assert says in done.stderr and done.stderr.count("\n") == bool(says)


@pytest.mark.skipif(os.name != "posix", reason="uses a shell")
def test_streams_that_are_closed_from_the_start():
    command = f"'{sys.executable}' -m llmnb.cli info"
    shell = f"{command} >&-; echo $?; {command} --num-heads 7 2>&-; echo $?"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n1\n", "")


@pytest.mark.skipif(os.name != "posix", reason="uses a shell")
def test_closed_streams_leave_no_place_for_files(trained, tmp_path):
    """No file of the run gets the number of a stream that was closed."""
    code = (
        "from llmnb.cli import __main__, train\n"
        "def opened(**how): raise ValueError(open('file', 'w').fileno())\n"
        "train.starting_from = opened\n"
        "__main__.main(['train', '--init', 'x'])"
    )
    shell = f"'{sys.executable}' -c \"{code}\" >&- <&- 2>err; cat err"
    done = subprocess.run(
        shell, shell=True, capture_output=True, text=True, cwd=tmp_path
    )
    number = re.fullmatch(r"llmnb: error: (\d+)\n", done.stdout)
    assert number and int(number[1]) > 2


def test_characters_are_escaped(llmnb, trained, tmp_path, monkeypatch):
    """Those that a stream lacks."""

    def bytes_of(*args):
        out = io.TextIOWrapper(io.BytesIO(), "cp1252", newline="\n")
        monkeypatch.setattr(sys, "stdout", out)
        return llmnb(*args)[0], out.buffer.getvalue()

    ask = "generate", trained, "--tokens", 0, "--prompt"
    assert bytes_of(*ask, "caf\xe9 \u4e2d") == (0, b"caf\xe9 \\u4e2d\n")
    assert bytes_of(*ask, "caf\udce9") == (0, b"caf\\ufffd\n")
    (tmp_path / "\u4e2d.txt").write_text(
        "spam \u4e2d\U0001f600 " * 2000, "utf-8"
    )
    ask = [*TINY.split(), "--sample-every", 2]
    code, raw = bytes_of("train", "--corpus", "\u4e2d.txt", *ask)
    assert code == 0
    assert b"corpus     \\u4e2d.txt: 1 document" in raw
    assert b"after 2 steps:" in raw and b"wrote      runs" in raw


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_a_name_that_is_not_text_is_said(llmnb, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    code, _, err = llmnb("generate", name)
    assert code == 1 and "there is no run caf\\udce9\n" in err
    code, out, err = llmnb("train", "--out", name, *TINY.split())
    assert code == 0 and "folder     caf\\udce9\n" in out
    assert (tmp_path / name / "model.bin").exists()


def test_a_prompt_that_is_not_text(llmnb, trained, monkeypatch):
    ask = ["generate", trained, "--tokens", 0, "--prompt", "-"]
    prompt = io.TextIOWrapper(io.BytesIO(b"caf\xe9!"), "utf-8")
    monkeypatch.setattr(sys, "stdin", prompt)
    assert llmnb(*ask) == (0, "caf\ufffd!\n", "")
    prompt = io.TextIOWrapper(io.BytesIO("café".encode()), "cp1252")
    monkeypatch.setattr(sys, "stdin", prompt)  # as Windows opens it
    assert llmnb(*ask) == (0, "café\n", "")
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = llmnb(*ask)
    assert code == 1 and "standard input, which is closed" in err


@pytest.fixture
def terminals(llmnb, monkeypatch):
    """Run a command on a terminal; gives its code and what it was sent."""

    def run(*args):
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return llmnb(*args)[0], out.getvalue(), err.getvalue()

    return run


NASTY = "a\tb\x1b[31m\x9b31m\r\x07"
TAME = "a\tb\\x1b[31m\\x9b31m\\x0d\\x07"


def test_a_terminal_gets_no_commands(llmnb, trained, terminals, tmp_path):
    """Files and pipes get the text as it is; an error is always one line."""
    ask = ["generate", trained, "--tokens", 0, "--prompt", NASTY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert llmnb(*ask)[::2] == (0, "")
        assert sys.stdout.getvalue() == NASTY + "\n"
        code, _, err = llmnb("plot", "two\nlines")
        assert code == 1 and err.count("\n") == 1 and "two lines: No " in err
    assert terminals(*ask) == (0, TAME + "\n", "")
    error = "llmnb: error: there is no run "
    code, _, err = terminals("generate", "x\x1b]0;title\x07")
    assert (code, err) == (1, error + "x\\x1b]0;title\\x07\n")
    row = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    raw = json.dumps({"\x1b[2J": row}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    code, _, err = terminals("generate", path)
    assert code == 1 and "\x1b" not in err
    code, _, err = terminals("train", "--schedule", "\x1b[2J")
    assert code == 1 and "\x1b" not in err and "[2J" in err
    code, _, err = terminals("info", "\x1b[2J")
    assert code == 2 and "\\x1b[2J" in err


def test_a_terminal_gets_a_bar(terminals):
    code, out, err = terminals("train", *TINY.split(), "--sample-every", 3)
    assert code == 0 and "after 3 steps:" in out
    last = err.rstrip().split("\r")[-1]
    assert "6/6" in last and "loss=" in last and "tok/s=" in last
    assert "\\x0d" not in err


def test_a_log_gets_no_bar(llmnb, trained):
    code, _, err = llmnb("train", *TINY.split())
    lines = err.splitlines()
    assert code == 0 and "\r" not in err
    shown = [x.split()[:2] for x in lines]
    assert shown == [["17%", "1/6"], ["83%", "5/6"], ["100%", "6/6"]]
    assert "loss=" in lines[-1] and "val=" in lines[0]
    for name in ("eval", "data", "bench"):
        args = OTHERS[name].format(run=trained).split()
        assert llmnb(*args)[::2] == (0, ""), name


def test_a_log_gets_a_line_a_minute(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for _ in progress_bar(range(10)):
        clock[0] += 25
    lines = [x.split()[:2] for x in capsys.readouterr()[1].splitlines()]
    assert lines == [["30%", "3/10"], ["60%", "6/10"], ["90%", "9/10"]]


def test_help_explains_every_option(llmnb):
    text = " ".join(llmnb("train", "--help")[1].split())
    for field in fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"] in text
        if field.default not in ("", ("stdlib",)):
            shown = f"{field.metadata['help']} (default: {field.default})"
            assert shown in text
    assert "(default: stdlib)" in text


def test_an_option_of_several_words_needs_no_default():
    @dataclass
    class Words:
        files: tuple = option(None, "text", positional=True)
        seen: tuple = option(None, "more text")

    parser = Parser()
    add_options(parser, {"": fields(Words)})
    asked = parser.parse_args(["ab", "c", "--seen", "de"])
    assert (asked.files, asked.seen) == (["ab", "c"], ["de"])


def test_every_command_has_help(llmnb):
    """And its line in the chapter's table."""
    path = ROOT / "notebooks" / "4_practice" / "23_commands.py"
    chapter = path.read_text("utf-8")
    for command in COMMANDS:
        code, out, _ = llmnb(command, "--help")
        assert code == 0 and len(out) > 200
        assert f"  {command} " in llmnb("--help")[1]
        assert f"| `llmnb {command}" in chapter
    assert re.fullmatch(r"llmnb \d+\.\d+\S*\n", llmnb("--version")[1])


def test_help_is_light():
    code = (
        "import sys, llmnb.train, llmnb.model.generate\n"
        "from llmnb.cli.__main__ import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numba', 'matplotlib', 'tiktoken'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    output(code)


def test_a_cold_start_says_what_it_waits_for(llmnb, tmp_path, monkeypatch):
    """Train, write and measure: once where kernels are kept, else always."""
    from llmnb import cpu
    from llmnb.cpu import compiled

    assert cpu  # has its own folder from here on
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    monkeypatch.setattr(compiled, "cache_folder", lambda: kernels)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 9)
    tiny = [*TINY.split()[:-1], "cpu"]
    commands = (
        ["train", "--out", "run", *tiny],
        ["train", "--resume", "run", "--steps", 7],
        ["generate", "run", "--tokens", 2],
        ["eval", "run", "--text", "text.txt"],
    )
    wait = "compiling kernels takes up to half a minute"
    for command in commands:
        code, _, err = llmnb(*command)
        assert (code, err.count(f"{wait}, once\n")) == (0, 1), err
    code, _, err = llmnb("generate", "run", "--backend", "reference")
    assert (code, wait in err) == (0, False)
    (kernels / "one.kernel").write_bytes(b"")
    for command in commands[1:]:
        code, _, err = llmnb(*command)
        assert (code, wait in err) == (0, False)
    monkeypatch.setattr(compiled, "cache_folder", lambda: None)
    _, _, err = llmnb(*commands[2])
    assert "each time, for want of a folder" in err
    assert "set LLMNB_CACHE" in err
