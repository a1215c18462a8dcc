# SPDX-License-Identifier: Apache-2.0
"""Keys, signing requests and signatures; all of them need the extra ``identity``.

The key of a device is made here and never leaves the store. Everything else about TLS is grpcio's
own, so a device without certificates needs none of this.
"""

from __future__ import annotations

from types import ModuleType

from lorikit.proto.limits import PACKAGE_SIGNATURE_CONTEXT
from lorikit.sdk._errors import IdentityError, PackageSignatureError

_RENEWED_BELOW = 1 / 3
"""Share of a certificate's life that is left when it is renewed."""


def new_key() -> bytes:
    """A private key on P-256, PEM.

    Raises:
        IdentityError: The extra is not installed.
    """
    parts = _cryptography()
    key = parts.ec.generate_private_key(parts.ec.SECP256R1())
    pem: bytes = key.private_bytes(
        parts.serialization.Encoding.PEM,
        parts.serialization.PrivateFormat.PKCS8,
        parts.serialization.NoEncryption(),
    )
    return pem


def signing_request(key: bytes) -> bytes:
    """A request, PEM, that proves that its sender has the key; the server adds the names."""
    parts = _cryptography()
    private = parts.serialization.load_pem_private_key(key, password=None)
    builder = parts.x509.CertificateSigningRequestBuilder()
    request = builder.subject_name(parts.x509.Name([])).sign(private, parts.hashes.SHA256())
    pem: bytes = request.public_bytes(parts.serialization.Encoding.PEM)
    return pem


def validity(certificate: bytes) -> tuple[float, float]:
    """From when until when the certificate is good, in seconds since the epoch."""
    read = _cryptography().x509.load_pem_x509_certificate(certificate)
    return read.not_valid_before_utc.timestamp(), read.not_valid_after_utc.timestamp()


def is_renewal_due(certificate: bytes, now: float) -> bool:
    """Whether little is left of the certificate; ``now`` is seconds since the epoch."""
    begin, end = validity(certificate)
    return end - now < (end - begin) * _RENEWED_BELOW


def check_package(digest: str, signature: bytes, package_key: bytes) -> None:
    """Nothing, when the key that was learnt at enrolment has signed the package.

    Raises:
        PackageSignatureError: Not signed, or by somebody else.
    """
    if not signature:
        raise PackageSignatureError(
            f"package {digest} is not signed; this device wants signed ones"
        )
    parts = _cryptography()
    try:
        public = parts.ed25519.Ed25519PublicKey.from_public_bytes(package_key)
        public.verify(signature, PACKAGE_SIGNATURE_CONTEXT + digest.encode())
    except (ValueError, parts.InvalidSignature) as error:
        raise PackageSignatureError(
            f"package {digest} is not signed by the server that this device enrolled with"
        ) from error


def _cryptography() -> ModuleType:
    """What is used of ``cryptography``, loaded when it is first needed."""
    try:
        from lorikit.sdk import _cryptography as parts
    except ModuleNotFoundError as error:
        raise IdentityError(
            'certificates need the package cryptography: pip install "lorikit[identity]"'
        ) from error
    return parts
