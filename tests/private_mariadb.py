"""A MariaDB of the tests' own: the server that the system has installed (Debian: mariadb-server), on a free loopback
port and a data folder of its own, ended by the process that started it. As root it is started for the user `nobody`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from mortal_server import Server, free_port
from private_tls import made_certificates

USER = "market"
PASSWORD = "p@ss/w:rd"
START_SECONDS = 120
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"  # where Debian puts the server


def installed() -> bool:
    """Tell whether this machine has the programs that a private server needs."""
    return None not in map(_program, ("mariadbd", "mariadb-install-db", "my_print_defaults"))


@contextmanager
def private_mariadb() -> Iterator[str]:
    """Start a server and yield a URL of it without a database, for a user who may make databases."""
    with mortal_mariadb() as server:
        yield server.url


@contextmanager
def mortal_mariadb(*options: str) -> Iterator[Server]:
    """Start a server that can be killed and started again; `options` are further ones of its command line."""
    folder = Path(tempfile.mkdtemp(prefix="mariadb-"))
    other = "nobody" if os.geteuid() == 0 else None
    try:
        if other is not None:
            os.chown(folder, pwd.getpwnam(other).pw_uid, -1)
        data, log = folder / "data", folder / "log"
        users = folder / "users.sql"
        users.write_text(
            f"CREATE USER IF NOT EXISTS '{USER}'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';\n"
            f"GRANT ALL PRIVILEGES ON *.* TO '{USER}'@'127.0.0.1' WITH GRANT OPTION;\n"
        )
        users.chmod(0o644)
        certificates = made_certificates(folder)
        with log.open("wb") as said:
            made = subprocess.run(
                [
                    _program("mariadb-install-db"),
                    "--no-defaults",
                    f"--datadir={data}",
                    # a server that starts removes what looks like its temporary tables, those of others among them
                    f"--tmpdir={folder}",
                    "--auth-root-authentication-method=normal",
                    "--skip-test-db",
                    "--skip-name-resolve",
                ],
                user=other,
                stdout=said,
                stderr=said,
                cwd="/",
                check=False,
            )
        assert made.returncode == 0, log.read_text(errors="replace")
        port = free_port()
        command = [
            _program("mariadbd"),
            "--no-defaults",
            f"--datadir={data}",
            f"--socket={folder / 'socket'}",
            f"--pid-file={folder / 'pid'}",
            f"--tmpdir={folder}",
            f"--init-file={users}",
            "--bind-address=127.0.0.1",
            f"--port={port}",
            "--skip-name-resolve",
            f"--ssl-ca={certificates / 'ca.pem'}",
            f"--ssl-cert={certificates / 'server.pem'}",
            f"--ssl-key={certificates / 'server.key'}",
            # what a server has that nobody has set up: the store must not depend on it
            "--character-set-server=latin1",
            "--default-time-zone=+05:30",
            *options,
        ]
        running: list[subprocess.Popen] = []

        def start() -> None:
            with log.open("ab") as said:
                running.append(subprocess.Popen(command, user=other, stdout=said, stderr=said, cwd="/"))
            _wait(running[-1], port, log)

        def kill() -> None:
            running[-1].kill()
            running[-1].wait()

        try:
            start()
            yield Server(f"mysql://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}", start, kill)
        finally:
            if running:
                kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def asked(url: str, sql: str) -> list[tuple]:
    """Send one statement as any client could, and return what it answers."""
    import pymysql

    parts = urlsplit(url)
    connection = pymysql.connect(
        host=parts.hostname,
        port=parts.port or 3306,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or "").encode(),
        database=unquote(parts.path[1:]) or None,
        charset="utf8mb4",
        autocommit=True,
    )
    with connection, connection.cursor() as cursor:
        cursor.execute(sql, None)
        return list(cursor.fetchall())


def _program(name: str) -> str | None:
    return shutil.which(name, path=_PATH)


def _wait(server: subprocess.Popen, port: int, log: Path) -> None:
    import pymysql

    until = time.monotonic() + START_SECONDS
    while True:
        assert server.poll() is None, log.read_text(errors="replace")
        try:
            pymysql.connect(host="127.0.0.1", port=port, user=USER, password=PASSWORD).close()
        except pymysql.err.OperationalError:
            assert time.monotonic() < until, log.read_text(errors="replace")
            time.sleep(0.05)
        else:
            return
