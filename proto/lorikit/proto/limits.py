# SPDX-License-Identifier: Apache-2.0
"""Numbers that both ends hold each other to."""

from __future__ import annotations

PROTOCOL_VERSION = 1
"""Version of the wire protocol, sent in the metadata of every call."""

PROTOCOL_METADATA = "lorikit-protocol"
"""Metadata key of the protocol version, a decimal number."""

DEVICE_METADATA = "lorikit-device"
"""Metadata key of the device's identity."""

TOKEN_METADATA = "lorikit-token"
"""Metadata key of the device's secret."""

ERROR_METADATA = "lorikit-error"
"""Trailing metadata key of the error code (see ``status.ErrorCode``)."""

RETRY_METADATA = "lorikit-retry-seconds"
"""Trailing metadata key of the seconds to wait before trying again, where known."""

PACKAGE_SIGNATURE_CONTEXT = b"lorikit-package-1\n"
"""What stands before a package's digest (lower-case hexadecimal) in the signed bytes."""

MAX_CERTIFICATE_BYTES = 16 << 10
"""Longest certificate or signing request, PEM."""

CHUNK_BYTES = 1 << 20
"""Bytes of a chunk as we send it."""

MAX_CHUNK_BYTES = 2 << 20
"""Largest chunk either end accepts."""

MAX_MESSAGE_BYTES = 4 << 20
"""Largest single gRPC message either end accepts."""

MAX_TENSOR_NAME_BYTES = 512
"""Longest name of a tensor."""

MAX_TENSOR_RANK = 8
"""Most axes a tensor may have."""

MAX_BUNDLE_TENSORS = 100_000
"""Most tensors in one bundle."""

MAX_BUNDLE_SCALARS = 10_000
"""Most scalars in one bundle."""

MAX_TENSOR_PARTS = 16
"""Most arrays that a codec keeps for one tensor."""

MAX_TEXT = 200
"""Longest name or label in a message, in letters."""

MAX_SENTENCE = 2000
"""Longest sentence for people in a message, in letters."""

MAX_WINDOW_SECONDS = 86_400.0
"""Longest time that a server may ask a device to wait."""

MAX_PLAN_PHASES = 64
"""Most phases of a plan."""

MAX_PLAN_OPERATIONS = 256
"""Most operations of a plan, or of a phase."""

MAX_PLAN_LIST = 100_000
"""Most names or numbers in one list of a plan."""

MAX_PLAN_STEPS = 10_000_000
"""Most optimiser steps of a phase."""

MAX_BATCH = 65_536
"""Most examples of an optimiser step."""

MAX_LENGTH = 1 << 20
"""Longest input in tokens."""

MAX_BUNDLE_BYTES = 1 << 30
"""Largest bundle either end decodes, unless it sets a lower bound of its own."""
