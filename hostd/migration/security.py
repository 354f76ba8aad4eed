# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may connect to whom: TLS with certificates at both ends, or plain TCP within one machine.

Hosts trust one CA.  Each shows a certificate of it, the one that calls as well as the one that is called, and
the caller checks that the name it called is in it.  So whoever is not of the CA gets no further than the TLS
handshake, whose time is bounded (hostd/migration/links.py).
"""

from __future__ import annotations

import ssl
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from hostd.errors import ConfigError, Failed, Invalid

if TYPE_CHECKING:
    from hostd.config import TlsSection


class Untrusted(Failed):
    """The TLS handshake failed: one of the two hosts does not accept the other."""


class Tls(NamedTuple):
    """A host's certificate at work: for those who connect to it, and where it connects to."""

    server: ssl.SSLContext
    client: ssl.SSLContext


#: what OpenSSL says of a failed handshake, and what that means of the peer
_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept this host's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this host's certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept this host's certificate",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not speak TLS 1.3",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the CA of this host's certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate, and this host has shown none",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
}


def load(section: TlsSection) -> Tls | None:
    """The certificate that the configuration names; None: it names none.  Raises ConfigError by key."""
    files = msgspec.structs.asdict(section)
    if not any(files.values()):
        return None
    for name, file in files.items():
        if not file:
            raise ConfigError(f"migration.tls.{name}: is missing; certificate, key and ca go together")
        if not file.startswith("/"):
            raise ConfigError(f"migration.tls.{name}: must be an absolute path, got {file!r}")
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise ConfigError(f"migration.tls.{name}: cannot read {file}: {error.strerror}") from None
    for name in "certificate", "ca":
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(files[name])
        except ssl.SSLError:
            raise ConfigError(f"migration.tls.{name}: no certificate in PEM in {files[name]}") from None
    server = _context(ssl.PROTOCOL_TLS_SERVER, section)
    server.verify_mode = ssl.CERT_REQUIRED
    # no session is resumed: every connection shows its certificates
    server.num_tickets = 0
    # this protocol's contexts require certificates and check names
    return Tls(server, _context(ssl.PROTOCOL_TLS_CLIENT, section))


def _context(protocol: int, section: TlsSection) -> ssl.SSLContext:
    """No CA but the configured one counts: neither protocol's context has any of its own."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(section.ca)
    try:
        # an encrypted key is refused: OpenSSL would ask for its password on the terminal
        context.load_cert_chain(section.certificate, section.key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError("migration.tls.key: it is not the key of migration.tls.certificate") from None
        raise ConfigError(f"migration.tls.key: there is no unencrypted key in PEM in {section.key}") from None
    return context


def is_loopback(host: str) -> bool:
    """Whether it is on this machine for certain: names other than localhost may be anywhere."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_plain(address: str) -> None:
    """Raise Invalid, if nothing may go there unencrypted.  `address` is an IP address."""
    if not is_loopback(address):
        raise Invalid(f"{address} is another machine, and this host has no certificate: set [migration.tls] "
                      "at both ends, or allow_plain for a network that only hosts are on")


def reason(error: ssl.SSLError) -> str:
    """Half a sentence about the peer that says why TLS failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message.rstrip('.')}"
    name = error.reason or "UNKNOWN"
    return _REASONS.get(name, "TLS failed: " + name.replace("_", " ").lower())
