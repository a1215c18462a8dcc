# SPDX-License-Identifier: Apache-2.0
"""Connections to a server, and where a device enrols."""

from __future__ import annotations

import grpc

from lorikit.proto.limits import MAX_MESSAGE_BYTES

_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # No message is decompressed: bit 0 alone stands for plain ones.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Mobile networks drop idle connections silently after some minutes, and every ping wakes
    # the radio: ping once a minute, and only while a call is open.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # The client has its own backoff; gRPC's must not keep it from a server that is back.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(
    server: str,
    *,
    insecure: bool,
    root_certificates: bytes | None,
    key: bytes = b"",
    certificate: bytes = b"",
) -> grpc.Channel:
    """A connection; nothing is sent before the first call.

    Args:
        server: Address, ``host:port``.
        insecure: No encryption.
        root_certificates: PEM of the authorities to trust; None: the system's.
        key: Private key, PEM, of the certificate; empty: the connection says nothing of the device.
        certificate: What the device shows, PEM.
    """
    if insecure:
        return grpc.insecure_channel(server, _OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=root_certificates,
        private_key=key or None,
        certificate_chain=certificate or None,
    )
    return grpc.secure_channel(server, credentials, _OPTIONS)


def enrol_address(server: str) -> str:
    """Where devices enrol unless it is said otherwise: the next port."""
    host, _, port = server.rpartition(":")
    return f"{host}:{int(port) + 1}" if port.isdecimal() else server
