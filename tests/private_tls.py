"""TLS for the tests: certificates made on the spot, and a front that speaks TLS for a server that does not."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path


def made_certificates(folder: Path) -> Path:
    """Make an authority of our own, and a certificate of it for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    made = folder / "certificates"
    made.mkdir(parents=True)
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


_SSL_REQUEST = bytes.fromhex("0000000804d2162f")  # "Message Formats" of PostgreSQL's documentation


@contextmanager
def tls_front(port: int, certificates: Path) -> Iterator[int]:
    """Listen on another loopback port, and pass what comes over TLS to this one; yield that port. A client of
    PostgreSQL asks first whether it may speak TLS, and is told that it may."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")

    def serve(client: socket.socket) -> None:
        # a client that does not trust the certificate ends the handshake
        if client.recv(len(_SSL_REQUEST), socket.MSG_PEEK) == _SSL_REQUEST:
            client.recv(len(_SSL_REQUEST))
            client.sendall(b"S")
        with (
            suppress(OSError),
            context.wrap_socket(client, server_side=True) as near,
            socket.create_connection(("127.0.0.1", port)) as far,
        ):
            back = threading.Thread(target=_pass_on, args=(far, near), daemon=True)
            back.start()
            _pass_on(near, far)
            back.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield listening.getsockname()[1]


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(65_536):
            target.sendall(content)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
