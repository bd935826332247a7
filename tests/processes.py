"""Python in processes of its own; a web server."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys
from llmnb.files import Lock
lock = Lock(sys.argv[1])
print("locked", flush=True)
{then}
sys.stdin.read()
"""


def python(
    code, *args, program=sys.executable, options=(), without=(), cwd=None,
    timeout=600, **environment,
):  # fmt: skip
    """Run a program, and give its code, and what it wrote as text.

    without: how the names of variables begin that it is not to find.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(without)}
    paths = str(ROOT), os.environ.get("PYTHONPATH", "")
    env["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run(
        [program, *options, "-c", code, *map(str, args)],
        cwd=cwd, env=env | environment, timeout=timeout,
        capture_output=True, text=True,
    )  # fmt: skip


def output(code, *args, **how):
    """What a program writes that must not fail."""
    done = python(code, *args, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def held(folder, then=""):
    """Another process that has the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(then=then), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"locked\n"
    try:
        yield process
    finally:
        process.communicate(timeout=60)


@contextlib.contextmanager
def served(handler):
    """A web server on this machine, in a thread; gives its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def wait_for(condition, seconds=60):
    """Until a function says that it is so; fails when it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
