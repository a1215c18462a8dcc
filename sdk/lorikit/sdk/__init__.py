# SPDX-License-Identifier: Apache-2.0
"""The device: takes part in rounds, trains on its own data, keeps it."""

from __future__ import annotations

from lorikit.proto.device import EngineInfo, Profile
from lorikit.sdk._client import Client
from lorikit.sdk._config import ClientConfig, RetryConfig, parse_bytes
from lorikit.sdk._errors import (
    CancelledError,
    ConnectionLostError,
    DamagedBlobError,
    DataError,
    EngineDisagreesError,
    EngineUnavailableError,
    ForeignAdapterError,
    IdentityError,
    InvalidGraphError,
    LorikitError,
    MissingBlobError,
    NonFiniteError,
    OutOfMemoryError,
    PackageError,
    PlanRefusedError,
    ProtocolVersionError,
    RefusedError,
    RoundClosedError,
    ServerRefusedError,
    StorageFullError,
    StoreBusyError,
    UnsupportedPackageError,
)
from lorikit.sdk._events import (
    AdapterReady,
    Disconnected,
    Downloaded,
    Event,
    Failed,
    Metrics,
    Progress,
    Refused,
    RoundDone,
    State,
    StateChanged,
    TaskStarted,
    Uploaded,
)
from lorikit.sdk._generation import Generation
from lorikit.sdk._memory import MemoryUse, MemoryWatch, limit_memory, memory_use
from lorikit.sdk._model import Prediction
from lorikit.sdk._profile import profile
from lorikit.sdk._transport import GrpcTransport, Transport
from lorikit.sdk.engines import available_engines

__all__ = [
    "AdapterReady",
    "CancelledError",
    "Client",
    "ClientConfig",
    "ConnectionLostError",
    "DamagedBlobError",
    "DataError",
    "Disconnected",
    "Downloaded",
    "EngineDisagreesError",
    "EngineInfo",
    "EngineUnavailableError",
    "Event",
    "Failed",
    "ForeignAdapterError",
    "Generation",
    "GrpcTransport",
    "IdentityError",
    "InvalidGraphError",
    "LorikitError",
    "MemoryUse",
    "MemoryWatch",
    "Metrics",
    "MissingBlobError",
    "NonFiniteError",
    "OutOfMemoryError",
    "PackageError",
    "PlanRefusedError",
    "Prediction",
    "Profile",
    "Progress",
    "ProtocolVersionError",
    "Refused",
    "RefusedError",
    "RetryConfig",
    "RoundClosedError",
    "RoundDone",
    "ServerRefusedError",
    "State",
    "StateChanged",
    "StorageFullError",
    "StoreBusyError",
    "TaskStarted",
    "Transport",
    "UnsupportedPackageError",
    "Uploaded",
    "available_engines",
    "limit_memory",
    "memory_use",
    "parse_bytes",
    "profile",
]
