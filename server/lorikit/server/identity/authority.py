# SPDX-License-Identifier: Apache-2.0
"""A small certificate authority: one folder, keys that only their owner can read.

| file | what |
|---|---|
| ``authority.pem``, ``authority.key`` | the root that clients trust, and its key |
| ``server.pem``, ``server.key`` | what the server shows |
| ``package.key`` | Ed25519 key that signs packages |

Keys of certificates are ECDSA on P-256. Certificates for clients may be used by clients alone
(extended key usage), so that a stolen one cannot pose as the server.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lorikit.proto.limits import MAX_CERTIFICATE_BYTES, PACKAGE_SIGNATURE_CONTEXT
from lorikit.proto.status import ErrorCode
from lorikit.server.errors import RequestError
from lorikit.server.identity.errors import AuthorityError
from lorikit.server.identity.subjects import from_uri, to_uri
from lorikit.server.store.identity import CertificateFacts

ROOT_DAYS = 3650.0
"""How long the authority's own certificate is good."""

SERVER_DAYS = 397.0
"""How long a server's certificate is good."""

_BACKDATED = datetime.timedelta(minutes=5)
"""Certificates begin a little earlier, for devices whose clocks are behind."""

_CURVE = ec.SECP256R1


class Authority:
    """Issues certificates and signs packages."""

    def __init__(self, folder: Path) -> None:
        """Open the folder that ``create`` made.

        Raises:
            AuthorityError: A file is missing or cannot be read.
        """
        self.folder = folder
        try:
            self.root_pem = (folder / "authority.pem").read_bytes()
            self._root = x509.load_pem_x509_certificate(self.root_pem)
            self._key = _load_key(folder / "authority.key")
            signing = serialization.load_pem_private_key(
                (folder / "package.key").read_bytes(), password=None
            )
        except (OSError, ValueError, TypeError) as error:
            raise AuthorityError(
                f"{folder} holds no usable authority ({error}); make one with `lorikit certs init`"
            ) from error
        if not isinstance(signing, Ed25519PrivateKey):
            raise AuthorityError(f"{folder / 'package.key'} is no Ed25519 key")
        self._signing = signing

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether there is an authority in the folder."""
        return (folder / "authority.pem").is_file()

    @classmethod
    def create(cls, folder: Path, *, hosts: Sequence[str]) -> Authority:
        """Make an authority, and a certificate of the server for these names and addresses.

        Raises:
            AuthorityError: There is one already; certificates of the old one would end with it.
        """
        if cls.exists(folder):
            raise AuthorityError(
                f"{folder} holds an authority already; `lorikit certs server` renews the server's "
                "certificate"
            )
        folder.mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        key, name = ec.generate_private_key(_CURVE()), _name("Lorikit authority")
        builder = _builder(name, key.public_key(), days=ROOT_DAYS).issuer_name(name)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), True)
        root = builder.sign(key, hashes.SHA256())
        write_secret(folder / "package.key", _private_pem(Ed25519PrivateKey.generate()))
        write_secret(folder / "authority.key", _private_pem(key))
        _write(folder / "authority.pem", root.public_bytes(serialization.Encoding.PEM))
        authority = cls(folder)
        authority.issue_server(hosts)
        return authority

    @property
    def package_key(self) -> bytes:
        """Public key of the packages' signatures, 32 raw bytes."""
        return self._signing.public_key().public_bytes_raw()

    def sign_package(self, digest: str) -> bytes:
        """Signature that says that the package of that digest is ours."""
        return self._signing.sign(PACKAGE_SIGNATURE_CONTEXT + digest.encode())

    def issue_server(self, hosts: Sequence[str]) -> x509.Certificate:
        """A fresh key and certificate of the server, in place of the old ones."""
        key = ec.generate_private_key(_CURVE())
        names = [_general_name(host) for host in hosts]
        builder = _builder(_name(hosts[0]), key.public_key(), days=SERVER_DAYS)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        certificate = self._sign(builder, ExtendedKeyUsageOID.SERVER_AUTH)
        write_secret(self.folder / "server.key", _private_pem(key))
        _write(self.folder / "server.pem", certificate.public_bytes(serialization.Encoding.PEM))
        return certificate

    def server_hosts(self) -> list[str]:
        """Names and addresses that the server's certificate is for."""
        certificate = x509.load_pem_x509_certificate((self.folder / "server.pem").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [str(name.value) for name in names]

    def issue_client(
        self, subject: str, key: ec.EllipticCurvePublicKey, *, role: str, days: float
    ) -> tuple[bytes, CertificateFacts]:
        """A certificate for a device or operator, PEM, and what the store has to note of it."""
        builder = _builder(_name(subject), key, days=days)
        name = x509.UniformResourceIdentifier(to_uri(subject))
        builder = builder.add_extension(x509.SubjectAlternativeName([name]), False)
        certificate = self._sign(builder, ExtendedKeyUsageOID.CLIENT_AUTH)
        facts = CertificateFacts(
            serial=serial_of(certificate),
            subject=subject,
            role=role,
            key_digest=key_digest(key),
            not_before=certificate.not_valid_before_utc.timestamp(),
            not_after=certificate.not_valid_after_utc.timestamp(),
        )
        return certificate.public_bytes(serialization.Encoding.PEM), facts

    def has_issued(self, certificate: x509.Certificate) -> bool:
        """Whether the certificate bears this authority's signature."""
        try:
            certificate.verify_directly_issued_by(self._root)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            return False
        return True

    def _sign(
        self, builder: x509.CertificateBuilder, usage: x509.ObjectIdentifier
    ) -> x509.Certificate:
        builder = builder.issuer_name(self._root.subject)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), True)
        return builder.sign(self._key, hashes.SHA256())


def new_key() -> tuple[ec.EllipticCurvePublicKey, bytes]:
    """A fresh key on P-256: its public half, and the private one as PEM."""
    key = ec.generate_private_key(_CURVE())
    return key.public_key(), _private_pem(key)


def requested_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a signing request, whose owner has the private half.

    The names in the request are not looked at: the server says who its devices are.

    Raises:
        RequestError: REQUEST_INVALID when it is too long, no request, unsigned or of another kind.
    """
    if len(pem) > MAX_CERTIFICATE_BYTES:
        raise _invalid(f"signing request of {len(pem)} bytes, {MAX_CERTIFICATE_BYTES} allowed")
    try:
        request = x509.load_pem_x509_csr(pem)
        is_signed, key = request.is_signature_valid, request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _invalid("the signing request cannot be read") from error
    if not is_signed:
        raise _invalid("the signing request is not signed by its key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVE):
        raise _invalid("the key of a signing request is on P-256")
    return key


def read_certificate(pem: bytes) -> x509.Certificate | None:
    """A certificate from PEM; None for anything else."""
    if len(pem) > MAX_CERTIFICATE_BYTES:
        return None
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        return None


def subject_of(certificate: x509.Certificate) -> str | None:
    """The device or operator that the certificate stands for; None where it names none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
        ValueError,
    ):
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return from_uri(uris[0]) if len(uris) == 1 else None


def serial_of(certificate: x509.Certificate) -> str:
    """The certificate's number as the store writes it."""
    return f"{certificate.serial_number:x}"


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key."""
    data = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(data).hexdigest()


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    _write(path, data, mode=0o600)


def _write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} is no key on P-256")
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _builder(
    name: x509.Name, key: ec.EllipticCurvePublicKey, *, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _invalid(detail: str) -> RequestError:
    return RequestError(ErrorCode.REQUEST_INVALID, detail)
