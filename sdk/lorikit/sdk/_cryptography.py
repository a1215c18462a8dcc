# SPDX-License-Identifier: Apache-2.0
"""The parts of ``cryptography`` that a device uses; imported by ``_keys`` alone."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

__all__ = ["InvalidSignature", "ec", "ed25519", "hashes", "serialization", "x509"]
