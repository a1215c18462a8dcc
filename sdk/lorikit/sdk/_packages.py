# SPDX-License-Identifier: Apache-2.0
"""Gets packages and adapters into the blob cache, and reads them from there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from lorikit.proto import manifest as manifests
from lorikit.proto.manifest import BlobPatch, BlobRef, Manifest, ManifestError
from lorikit.proto.tensors import Bundle, MalformedTensorError, Tensors, pack, raw, unpack
from lorikit.quantization import QuantizationError, changes, codec
from lorikit.quantization.patches import patched
from lorikit.quantization.wire import expanded
from lorikit.sdk._blobs import BlobCache
from lorikit.sdk._connection import Connection
from lorikit.sdk._errors import (
    CancelledError,
    DamagedBlobError,
    ForeignAdapterError,
    PackageError,
    UnsupportedPackageError,
)
from lorikit.sdk._events import Downloaded, Event
from lorikit.sdk._transport import AdapterChange, Transport

logger = logging.getLogger(__name__)

_MAX_MANIFEST_BYTES = 8 << 20
"""A manifest names its tensors in some hundred bytes each; parsed, it takes ten times its size."""


def needed_blobs(manifest: Manifest, engine: str) -> tuple[BlobRef, ...]:
    """The blobs that one engine opens: all but the graphs of other runtimes.

    Raises:
        UnsupportedPackageError: The package has a graph that the engine cannot run.
    """
    try:
        chosen = {manifest.graph(graph.name, engine).blob.digest for graph in manifest.graphs}
    except ManifestError as error:
        raise UnsupportedPackageError(f"{error}; update the SDK or install that engine") from error
    skipped = {graph.blob.digest for graph in manifest.graphs} - chosen
    return tuple(blob for blob in manifest.blobs() if blob.digest not in skipped)


def read_manifest(blobs: BlobCache, package: BlobRef) -> Manifest:
    """The manifest that lies in the cache.

    Raises:
        PackageError: Absent, damaged, or not a manifest that this SDK reads.
    """
    if package.size > _MAX_MANIFEST_BYTES:
        raise PackageError(f"manifest of {package.size} bytes exceeds {_MAX_MANIFEST_BYTES}")
    try:
        return manifests.load(blobs.read(package))
    except ManifestError as error:
        raise UnsupportedPackageError(f"the package cannot be read: {error}") from error


def read_adapter(blobs: BlobCache, adapter: BlobRef, manifest: Manifest) -> Tensors:
    """The adapter that lies in the cache, decoded.

    Raises:
        ForeignAdapterError: It has other tensors than the package: it is another model's.
        PackageError: Absent, damaged, or with numbers that are not finite.
    """
    try:
        tensors = _decoded(blobs.read(adapter))
    except (MalformedTensorError, QuantizationError) as error:
        raise PackageError(f"the adapter cannot be read: {error}") from error
    expected = {tensor.name for tensor in manifest.adapter}
    if expected != tensors.keys():
        name = min(expected ^ tensors.keys())
        has, lacks = ("adapter", "package") if name in tensors else ("package", "adapter")
        raise ForeignAdapterError(f"the {has} has a tensor {name!r:.120} that the {lacks} has not")
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise PackageError(f"the adapter's tensor {name} has numbers that are not finite")
    return tensors


def _decoded(data: bytes) -> Tensors:
    """The tensors of a serialised bundle."""
    bundle = unpack(data)
    return {name: codec(each.codec).decode(each) for name, each in bundle.tensors.items()}


class Packages:
    """Downloads what is lacking, resumed, verified and reported."""

    def __init__(
        self,
        blobs: BlobCache,
        transport: Transport,
        connection: Connection,
        *,
        emit: Callable[[Event], None],
    ) -> None:
        """Args are where to keep blobs, whom to ask, and who hears of progress."""
        self.received_bytes = 0
        """Bytes downloaded so far, repetitions included."""
        self._blobs = blobs
        self._transport = transport
        self._connection = connection
        self._emit = emit

    def fetch(self, blob: BlobRef, *, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Have the blob in the cache.

        Raises:
            CancelledError: ``cancelled`` turned true between two chunks.
            PackageError: The server does not have it, or sends it damaged again and again.
            StorageFullError: It does not fit.
        """

        def chunks(offset: int) -> Iterator[bytes]:
            for chunk in self._transport.download(blob, offset):
                if cancelled():
                    raise CancelledError("cancelled while downloading")
                self.received_bytes += len(chunk)
                yield chunk

        self._connection.transfer(
            lambda: self._blobs.fill(
                blob,
                chunks,
                on_bytes=lambda held: self._emit(
                    Downloaded(digest=blob.digest, received_bytes=held, total_bytes=blob.size)
                ),
            ),
            gained=lambda: self._blobs.held_bytes(blob),
        )

    def fetch_package(
        self,
        package: BlobRef,
        adapter: BlobRef,
        *,
        engine: str,
        change: AdapterChange | None = None,
        spared: tuple[str, ...] = (),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[Manifest, tuple[str, ...]]:
        """Have everything that an engine needs of a package, and an adapter.

        Args:
            package: The manifest.
            adapter: The adapter.
            engine: Name of the engine that will open it.
            change: How to get the adapter from another one, should that one be here.
            spared: Digests of other blobs that must not be evicted for it.
            cancelled: Asked between chunks.

        Returns:
            The manifest, and the digests of all the blobs, which are pinned from now on.
        """
        if change is not None:
            spared = (*spared, change.base.digest, change.blob.digest)
        self._blobs.pin({package.digest, adapter.digest, *spared})
        self.fetch(package, cancelled=cancelled)
        manifest = read_manifest(self._blobs, package)
        needed = needed_blobs(manifest, engine)
        digests = (package.digest, adapter.digest, *(blob.digest for blob in needed))
        ways = {way.target: way for way in manifest.patches if self._pays(way, needed)}
        bases = {way.base for way in ways.values()}
        self._blobs.pin({*digests, *spared, *bases})
        for blob in needed:
            if blob.digest not in ways or not self._derive(blob, ways[blob.digest], cancelled):
                self.fetch(blob, cancelled=cancelled)
        self._blobs.pin({*digests, *spared})
        names = [tensor.name for tensor in manifest.adapter]
        self.fetch_adapter(adapter, change, names, cancelled=cancelled)
        return manifest, digests

    def fetch_adapter(
        self,
        adapter: BlobRef,
        change: AdapterChange | None,
        names: Iterable[str],
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Have an adapter in the cache: rebuilt from one that is here, or else downloaded whole.

        What is rebuilt must have the adapter's digest, to the bit.

        Args:
            adapter: The adapter.
            change: How to get it from another one; None where there is no such way.
            names: Its tensors.
            cancelled: Asked between chunks.
        """
        if change is not None and not self._blobs.has(adapter) and self._blobs.has(change.base):
            data = self._rebuilt(adapter, change, names, cancelled)
            if data is not None:
                self._blobs.fill(adapter, lambda held: [data[held:]], on_bytes=lambda _: None)
                return
        self.fetch(adapter, cancelled=cancelled)

    def _rebuilt(
        self,
        adapter: BlobRef,
        change: AdapterChange,
        names: Iterable[str],
        cancelled: Callable[[], bool],
    ) -> bytes | None:
        """The adapter's bytes; None, with a warning, where they are not what they should be."""
        try:
            self.fetch(change.blob, cancelled=cancelled)
            base = _decoded(self._blobs.read(change.base))
            bundle = unpack(self._blobs.read(change.blob), max_bytes=adapter.size)
            bundle = expanded(bundle, max_bytes=adapter.size)
            tensors = changes.rebuilt(base, bundle, names, max_bytes=adapter.size)
        except (MalformedTensorError, PackageError, QuantizationError) as error:
            logger.warning("change of the adapter cannot be used, it is fetched whole: %s", error)
            return None
        data = pack(Bundle({name: raw(values) for name, values in tensors.items()}))
        if hashlib.sha256(data).hexdigest() != adapter.digest:
            logger.warning("change of the adapter gives another one, it is fetched whole")
            return None
        return data

    def _pays(self, way: BlobPatch, needed: Sequence[BlobRef]) -> bool:
        """Whether a blob is lacking, what it can be made of is here, and the patch is smaller."""
        return any(
            blob.digest == way.target
            and way.patch.size < blob.size - self._blobs.held_bytes(blob)
            and self._blobs.path(way.base).exists()
            for blob in needed
        )

    def _derive(self, blob: BlobRef, way: BlobPatch, cancelled: Callable[[], bool]) -> bool:
        """Make a blob of another one and a patch; whether that gave what its digest says."""
        self.fetch(way.patch, cancelled=cancelled)
        try:
            with (
                self._blobs.path(way.patch.digest).open("rb") as patch,
                self._blobs.path(way.base).open("rb") as base,
            ):
                self._blobs.make(blob, patched(patch, base))
        except (DamagedBlobError, QuantizationError, FileNotFoundError) as error:
            logger.warning("blob %s is fetched whole: %s", blob.digest, error)
            return False
        return True
