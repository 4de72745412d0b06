"""Builds the virtual environment that every make target runs in: one lock, with hashes, and the project.

Only the standard library is used, and the first lines run under any Python, so that a machine with too old a Python is
told so in a sentence. What is locked, and why, is in requirements/ and pyproject.toml, not here.

    python3 scripts/environment.py [--venv .venv] [--no-project] quickstart|all|test

A lock that holds more also serves who asks for less, so `make quickstart` after `make test` installs nothing. An
environment whose lock has changed is brought to the new lock exactly; what was installed by hand goes.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (this file also runs under what it refuses)
    sys.exit(
        "MarketSync needs Python 3.11 or newer; %s is %d.%d. Install one and run: make PYTHON=/path/to/python3.11 ..."  # noqa: UP031
        % (sys.executable, sys.version_info[0], sys.version_info[1])
    )

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
LEVELS = ("quickstart", "all", "test")  # each holds the ones before it, at the same versions


def digest(*files: Path) -> str:
    """Tells whether any of these files has changed, as a short hexadecimal string."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def run(*command: str | Path) -> bool:
    """Runs a command with its output shown, and tells whether it succeeded."""
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode == 0


def create(venv: Path) -> Path:
    """Makes sure that the environment exists with a working Python and pip; returns its Python."""
    python = venv / "bin" / "python"
    recent = "import sys; sys.exit(sys.version_info < (3, 11))"
    works = python.exists() and subprocess.run([python, "-c", recent], check=False).returncode == 0
    if venv.exists() and not works:
        shutil.rmtree(venv)
    if not works:
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            shutil.rmtree(venv, ignore_errors=True)
            sys.exit(
                f"Cannot create a virtual environment with {sys.executable}: {(made.stdout + made.stderr).strip()}\n"
                "Install your system's venv package (python3-venv on Debian and Ubuntu), "
                "or run: make PYTHON=/path/to/python3 ..."
            )
    quiet = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
    if quiet.returncode != 0 and not run(python, "-m", "ensurepip", "--upgrade"):
        sys.exit(f"{venv} has no pip and ensurepip failed; remove the folder and try again.")
    return python


def install(python: Path, venv: Path, lock: Path) -> None:
    """Brings the environment to the lock exactly; by uv, and by pip alone where uv cannot reach the package index."""
    bootstrap = REQUIREMENTS / "bootstrap.txt"
    hashed = ["--quiet", "--require-hashes", "--only-binary", ":all:"]
    if not run(python, "-m", "pip", "install", *hashed, "-r", bootstrap):
        sys.exit("pip could not install requirements/bootstrap.txt: see its message above (network, proxy or index).")
    synced = run(venv / "bin" / "uv", "pip", "sync", "--python", python, *hashed, "--no-progress", bootstrap, lock)
    if synced:
        return
    print("uv did not get through; installing with pip, which takes longer.", file=sys.stderr)
    if not run(python, "-m", "pip", "install", *hashed, "-r", lock):
        sys.exit(f"pip could not install {lock.relative_to(ROOT)}: see its message above (network, proxy or index).")


def install_project(python: Path) -> None:
    """Installs the project itself, editable; its dependencies come from the lock."""
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT]
    if not run(*command):
        sys.exit("The project itself could not be installed: see the message above.")


def refresh(venv: Path, asked: str, *, project: bool) -> None:
    """Brings the environment to the level asked for, or keeps the higher one it has, and notes what it holds."""
    stamp = venv / "marketsync-environment.json"
    have = json.loads(stamp.read_text()) if stamp.exists() else {}
    level = max(asked, have.get("level", LEVELS[0]), key=LEVELS.index)
    lock = REQUIREMENTS / f"{level}.txt"
    locked = {"level": level, "lock": digest(lock, REQUIREMENTS / "bootstrap.txt")}
    installed = digest(ROOT / "pyproject.toml") + str(ROOT) if project else None
    if have == {**locked, "project": installed}:
        return
    python = create(venv)
    if {**have, **locked} != have:
        stamp.unlink(missing_ok=True)
        print(f"Installing requirements/{lock.name} into {os.path.relpath(venv)} ...", file=sys.stderr)
        install(python, venv, lock)
        stamp.write_text(json.dumps({**locked, "project": None}))
    if project:
        install_project(create(venv))  # out of an environment that uv made, uv has just taken pip
    stamp.write_text(json.dumps({**locked, "project": installed}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the virtual environment of MarketSync.")
    parser.add_argument("level", choices=LEVELS)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--no-project", action="store_true", help="install the lock only (an image layer)")
    options = parser.parse_args()
    venv: Path = options.venv.absolute()
    os.environ.setdefault("UV_PYTHON_DOWNLOADS", "never")

    guard = os.open(REQUIREMENTS, os.O_RDONLY)
    fcntl.flock(guard, fcntl.LOCK_EX)  # two makes at once: the second waits and finds the work done
    refresh(venv, options.level, project=not options.no_project)


if __name__ == "__main__":
    main()
