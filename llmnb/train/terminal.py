# Written by `make export` from notebooks/4_practice/17_watching.py: edit that file.

"""What a terminal is told, whatever it is."""

__all__ = ["Screen", "progress_bar", "screens"]


# imports of the terminal
import os
import sys
from contextlib import contextmanager, suppress


# what a terminal is not sent
CONTROLS = {*range(32), *range(127, 160)} - {*map(ord, "\n\t")}
HALVES = range(0xD800, 0xE000)  # what stands for a byte that is not UTF-8
ESCAPES = {x: f"\\x{x:02x}" for x in CONTROLS} | {
    x: f"\\u{x:04x}" for x in HALVES
}


# a stream and its reader
class Screen:
    """A text stream that is safe to write to, for what people read.

    stream: what is written to. result: whether it takes a command's result,
    as standard output does. Losing such a stream ends the command: with
    exit code 141 (128 + SIGPIPE) and no word when its reader went away,
    else with 1 and one line on standard error. A command that goes on all
    the same sets ends to False. Everything else is the stream's.

    On a terminal, control characters but newline and tab appear as escapes
    such as \\x1b; so do, anywhere, characters that the stream cannot encode.
    A progress bar, which begins with a carriage return, keeps that.

    Derived in chapter 4.17.
    """

    def __init__(self, stream, result=False):
        self.ends = self._result = result
        self._stream, self._lost = stream, False
        self._terminal = stream.isatty()

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        """Write a str; returns its length, as files do."""
        if self._terminal:
            bar = not self._result and text[:1] == "\r"
            text = "\r" * bar + text[bar:].translate(ESCAPES)
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError:
            raw = text.encode(self.encoding, "backslashreplace")
            self._try(self._stream.write, raw.decode(self.encoding))
        return len(text)

    def flush(self):
        """Hand on what is written."""
        self._try(self._stream.flush)

    def _try(self, function, *args):
        if self._lost:
            return
        try:
            function(*args)
        except OSError as error:
            self._lose(error)

    def _lose(self, error):
        self._lost = True
        with suppress(OSError):  # Python, ending, writes out what is left
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        gone = isinstance(error, ConnectionError)  # a broken pipe is one
        if self._result and not gone:
            kind = "error" if self.ends else "warning"
            why = error.strerror or error
            print(f"llmnb: {kind}: standard output: {why}", file=sys.stderr)
        if self.ends:
            sys.exit(141 if gone else 1)


# both streams
@contextmanager
def screens():
    """Within, sys.stdout and sys.stderr are `Screen`s; a closed one is mute.

    Losing standard output ends the command, losing standard error does not.

    Derived in chapter 4.17.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    old = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout = Screen(old[0] or nowhere, result=True)
        sys.stderr = Screen(old[1] or nowhere)
        try:
            yield
        finally:
            try:
                sys.stdout.flush()
            finally:
                sys.stdout, sys.stderr = old


# a bar, or lines
_QUIET = 60  # seconds between two lines
_LINE = (
    "{percentage:3.0f}% {n_fmt}/{total_fmt} "
    "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)


class _Lines:
    """Takes what tqdm draws, and writes it as lines to standard error."""

    encoding = "utf-8"

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self):
        pass


def progress_bar(work=None, **how):
    """A tqdm over work, on standard error: a bar, or lines in a file.

    how: more of tqdm's arguments. Where standard error is no terminal, a
    line comes each minute, and whenever the bar is asked to refresh.

    Derived in chapter 4.17.
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(work, dynamic_ncols=True, **how)
    how |= {"leave": False, "delay": _QUIET, "bar_format": _LINE}
    times = {"mininterval": _QUIET, "maxinterval": _QUIET}
    return tqdm(work, file=_Lines(), **times, **how)
