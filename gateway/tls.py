"""The certificate that a gateway shows its clients: read at the start, and again when its files have changed.

Rule: a connection keeps what it began with, new ones see the new certificate. A pair that cannot be used is told of
once, and the one before holds: who renews replaces two files, one after the other.
"""

import ssl
from pathlib import Path

import structlog

log = structlog.get_logger("gateway")


class Certificate:
    """One pair of PEM files. `context` is for all connections."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Raises ValueError for files that are no certificate and its key."""
        self._cert, self._key = cert, key
        self._stamp = self._stamped()
        _check(cert, key)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self.context.load_cert_chain(cert, key)

    @classmethod
    def of(cls, cert: str, key: str) -> "Certificate | None":
        """The one that settings name; None where they name none. Raises ValueError."""
        if bool(cert) != bool(key):
            raise ValueError("tls_cert and tls_key belong together: name both PEM files, or neither")
        return cls(Path(cert), Path(key)) if cert else None

    def follow(self) -> None:
        """Take in files that have changed. Blocks."""
        stamp = self._stamped()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            _check(self._cert, self._key)
            self.context.load_cert_chain(self._cert, self._key)
        except (ValueError, OSError) as error:
            log.warning("certificate_refused", reason=str(error))
        else:
            log.info("certificate_read", path=str(self._cert))

    def _stamped(self) -> list[tuple[int, int, int]]:
        found = []
        for path in (self._cert, self._key):
            try:
                stat = path.stat()
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
            except OSError:
                found.append((0, 0, 0))
        return found


def _check(cert: Path, key: Path) -> None:
    """In a context of its own: one that has taken half of a pair would serve nobody."""
    try:
        # without a password of ours a terminal would be asked for one
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"tls_cert {cert} and tls_key {key} are no certificate and its key, in PEM and without a "
                         f"password ({error})") from None
