"""Make a Python for 64-bit ARM that an emulator runs on this machine.

    python tests/arm.py FOLDER

On Debian, from its packages and PyPI's wheels, into FOLDER alone: nothing is
installed. LLMNB_ARM=FOLDER/python then has tests/cpu/test_neon.py run.
"""

import argparse
import os
import subprocess
import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

SAME = "numpy", "numba", "llvmlite"  # of the versions that are installed here
APT = """APT::Architecture "arm64";
APT::Architectures {{"arm64";}};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
"""
PYTHON = """#!/bin/sh
export PYTHONHOME=/usr PYTHONPATH="$PYTHONPATH:{folder}/site"
exec {folder}/host/usr/bin/qemu-aarch64-static -L {folder}/root \\
    {folder}/root{python} "$@"
"""
# a process that Python starts must be emulated, too
SITE = "import sys\nsys.executable = {python!r}\n"


def call(*command, **how):
    subprocess.run(list(map(str, command)), check=True, **how)


def debian(folder):
    """The emulator, and the files of ARM's Python; returns its version."""
    host = folder / "host"
    host.mkdir(parents=True)
    call("apt-get", "download", "qemu-user-static", cwd=host)
    for package in host.glob("*.deb"):
        call("dpkg-deb", "-x", package, host)
    for place in ("state/lists/partial", "cache/archives/partial"):
        (folder / place).mkdir(parents=True)
    (folder / "state/status").touch()
    (folder / "apt.conf").write_text(APT.format(folder=folder))
    env = os.environ | {"APT_CONFIG": str(folder / "apt.conf")}
    call("apt-get", "update", env=env)
    wanted = "python3", "libgomp1", "libstdc++6"
    call("apt-get", "-y", "--download-only", "install", *wanted, env=env)
    for package in (folder / "cache/archives").glob("*.deb"):
        call("dpkg-deb", "-x", package, folder / "root")
    (path,) = (folder / "root/usr/bin").glob("python3.??")
    return path.name.removeprefix("python")


def wheels(folder, python):
    """What llmnb and its tests import, for ARM."""
    names = [x for x in requires("llmnb") if "extra ==" not in x]
    names += ["pytest", "hypothesis", "greenlet"]
    names += [f"{x}=={version(x)}" for x in SAME]
    systems = "manylinux2014", "manylinux_2_27", "manylinux_2_28"
    how = [f"--platform={x}_aarch64" for x in systems]
    how += ["--only-binary=:all:", f"--python-version={python}"]
    pip = sys.executable, "-m", "pip", "download", "-q", "-d"
    call(*pip, folder / "wheels", *how, *names)
    for wheel in (folder / "wheels").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "site")


def main():
    parser = argparse.ArgumentParser("python tests/arm.py")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    python = debian(folder)
    wheels(folder, python)
    start, path = folder / "python", f"/usr/bin/python{python}"
    start.write_text(PYTHON.format(folder=folder, python=path))
    start.chmod(0o755)
    text = SITE.format(python=str(start))
    (folder / "site/sitecustomize.py").write_text(text)
    call(start, "-c", "import numba, platform; print(platform.machine())")
    print(f"LLMNB_ARM={start}")


if __name__ == "__main__":
    main()
