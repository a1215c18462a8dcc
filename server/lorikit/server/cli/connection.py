# SPDX-License-Identifier: Apache-2.0
"""The options that say how a command reaches a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorikit.server.cli.operator_client import Endpoint

AddressOption = Annotated[
    str, typer.Option("--address", envvar="LORIKIT_ADDRESS", help="Server, HOST:PORT.")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Speak without TLS, to a server on this machine.")
]
RootsOption = Annotated[
    Path | None,
    typer.Option(
        "--root-certificates",
        exists=True,
        envvar="LORIKIT_ROOT_CERTIFICATES",
        help="PEM file of the authority to trust.",
    ),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--certificate",
        exists=True,
        envvar="LORIKIT_CERTIFICATE",
        help="Your own certificate, PEM, as `lorikit certs operator` makes it.",
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        "--key",
        exists=True,
        envvar="LORIKIT_KEY",
        help="Its key, PEM; the certificate's name with .key where it is left out.",
    ),
]


def endpoint(
    address: str, insecure: bool, roots: Path | None, certificate: Path | None, key: Path | None
) -> Endpoint:
    """Where the server is, and what the two sides show each other."""
    if certificate is not None and key is None:
        key = certificate.with_suffix(".key")
    return Endpoint(
        address=address,
        insecure=insecure,
        root_certificates=roots,
        certificate=certificate,
        key=key,
    )
