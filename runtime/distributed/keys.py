"""Keys and certificates of a small cluster: one authority of its own, and a folder for each machine.

    DIR/authority.pem   the certificate that all trust          DIR/NAME/authority.pem   a copy of it
    DIR/authority.key   signs; it stays where it was made       DIR/NAME/machine.pem     the machine's certificate
                                                                DIR/NAME/machine.key     and its key

A machine's folder is all it needs. Everybody who has a certificate of this authority may use the workers that have one.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import H2OError, UsageError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

AUTHORITY, MACHINE = "authority", "machine"
AUTHORITY_DAYS, MACHINE_DAYS = 3650, 365
INSTALL = "in the project's folder: pip install '.[workers]'"
_NAME = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$")
_PRIVATE = 0o600


@dataclass(frozen=True)
class Keys:
    """What one machine shows and trusts, as PEM."""

    authority: bytes
    certificate: bytes
    key: bytes

    @classmethod
    def load(cls, folder: Path) -> Keys:
        """From a machine's folder. Raises UsageError when something is missing, expired, or readable by others."""
        names = (f"{AUTHORITY}.pem", f"{MACHINE}.pem", f"{MACHINE}.key")
        try:
            found = cls(*((folder / name).read_bytes() for name in names))
        except OSError as error:
            raise UsageError(
                f"{error.filename} cannot be read ({error.strerror})", "make it with `h2o keys DIR --host NAME`"
            ) from None
        if (folder / names[2]).stat().st_mode & 0o077:
            raise UsageError(f"{folder / names[2]} can be read by others", f"chmod 600 {folder / names[2]}")
        end = _end_of(found.certificate, folder / names[1])
        if end < _now():
            raise UsageError(
                f"{folder / names[1]} expired on {end:%Y-%m-%d}", "make new ones: h2o keys DIR --host NAME"
            )
        return found


def make_keys(folder: Path, hosts: Sequence[str], days: int = MACHINE_DAYS) -> list[Path]:
    """Keys for machines, each given as its names or addresses, separated by commas; the folders they are in.

    The authority is made where there is none in the folder. A machine that has keys gets new ones. Raises UsageError
    for a name that cannot be one, H2OError where files cannot be written.
    """
    machines = [names_of(host) for host in hosts]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority = _authority(folder)
        return [_machine(folder, names, authority, days) for names in machines]
    except OSError as error:
        raise H2OError(f"{error.filename} cannot be written: {error.strerror}", "choose another folder") from None


def names_of(host: str) -> list[str]:
    """The names and addresses of one machine."""
    names = [name.strip() for name in host.split(",") if name.strip()]
    for name in names:
        if not _is_address(name) and not _NAME.match(name):
            raise UsageError(f"{name!r} is no name of a machine", "give names or addresses, separated by commas")
    if not names:
        raise UsageError("a machine has no name", "give one with --host")
    return names


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _end_of(certificate: bytes, path: Path) -> datetime:
    x509 = _library()
    try:
        end: datetime = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    except ValueError:
        raise UsageError(f"{path} is no certificate", "make new ones: h2o keys DIR --host NAME") from None
    return end


def _library() -> Any:
    try:
        from cryptography import x509
    except ImportError:
        raise UsageError("the package `cryptography` is not installed", INSTALL) from None
    return x509


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The folder's authority, made where there is none."""
    x509 = _library()
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    paths = folder / f"{AUTHORITY}.pem", folder / f"{AUTHORITY}.key"
    if all(path.exists() for path in paths):
        key = serialization.load_pem_private_key(paths[1].read_bytes(), None)
        return x509.load_pem_x509_certificate(paths[0].read_bytes()), key  # type: ignore[return-value]
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "h2o authority")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(paths[1], _key_bytes(key))
    _write(paths[0], certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def _machine(
    folder: Path, names: list[str], authority: tuple[x509.Certificate, ec.EllipticCurvePrivateKey], days: int
) -> Path:
    x509 = _library()
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    issuer, signer = authority
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0][:64])])
    alternatives = [x509.IPAddress(ipaddress.ip_address(n)) if _is_address(n) else x509.DNSName(n) for n in names]
    purposes = [x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(name, issuer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    place = folder / names[0].replace(":", "_")
    place.mkdir(exist_ok=True, mode=0o700)
    _write(place / f"{MACHINE}.key", _key_bytes(key))
    _write(place / f"{MACHINE}.pem", certificate.public_bytes(serialization.Encoding.PEM))
    _write(place / f"{AUTHORITY}.pem", issuer.public_bytes(serialization.Encoding.PEM))
    return place


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> Any:
    x509, now = _library(), _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now - timedelta(days=1), now + timedelta(days=days - 1)))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it, for the user alone."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _PRIVATE)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    os.replace(partial, path)
