"""A MariaDB of the tests' own: the server that the system has installed (Debian: mariadb-server), on a free loopback
port and a data folder of its own, ended by the process that started it. As root it is started for the user `nobody`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

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
    folder = Path(tempfile.mkdtemp(prefix="mariadb-"))
    other = "nobody" if os.geteuid() == 0 else None
    try:
        if other is not None:
            os.chown(folder, pwd.getpwnam(other).pw_uid, -1)
        data, log = folder / "data", folder / "log"
        start = folder / "start.sql"
        start.write_text(
            f"CREATE USER '{USER}'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';\n"
            f"GRANT ALL PRIVILEGES ON *.* TO '{USER}'@'127.0.0.1' WITH GRANT OPTION;\n"
        )
        start.chmod(0o644)
        certificates = _certificates(folder)
        with log.open("wb") as said:
            subprocess.run(
                [
                    _program("mariadb-install-db"),
                    "--no-defaults",
                    f"--datadir={data}",
                    "--auth-root-authentication-method=normal",
                    "--skip-test-db",
                    "--skip-name-resolve",
                ],
                user=other,
                stdout=said,
                stderr=said,
                cwd="/",
                check=True,
            )
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            server = subprocess.Popen(
                [
                    _program("mariadbd"),
                    "--no-defaults",
                    f"--datadir={data}",
                    f"--socket={folder / 'socket'}",
                    f"--pid-file={folder / 'pid'}",
                    f"--tmpdir={folder}",
                    f"--init-file={start}",
                    "--bind-address=127.0.0.1",
                    f"--port={port}",
                    "--skip-name-resolve",
                    f"--ssl-ca={certificates / 'ca.pem'}",
                    f"--ssl-cert={certificates / 'server.pem'}",
                    f"--ssl-key={certificates / 'server.key'}",
                    # what a server has that nobody has set up: the store must not depend on it
                    "--character-set-server=latin1",
                    "--default-time-zone=+05:30",
                ],
                user=other,
                stdout=said,
                stderr=said,
                cwd="/",
            )
        try:
            _wait(server, port, log)
            yield f"mysql://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()
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


def _certificates(folder: Path) -> Path:
    """Make an authority of our own, and a certificate of it for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    made = folder / "certificates"
    made.mkdir()
    now = datetime.now(UTC)
    ours = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of the tests")])
    for name, is_authority in (("ca", True), ("server", False)):
        key = ours if is_authority else ec.generate_private_key(ec.SECP256R1())
        subject = issuer if is_authority else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .sign(ours, hashes.SHA256())
        )
        (made / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (made / f"{name}.key").write_bytes(private)
    return made


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
