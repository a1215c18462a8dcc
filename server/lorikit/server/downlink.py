# SPDX-License-Identifier: Apache-2.0
"""The adapter on its way to devices: as a change against the one that a device holds.

Where changes are on, devices train from what they can rebuild, not from the method's exact values:
the version that a device holds, plus the decoded change. The next change is against that version,
so that what one change leaves out is part of the next and nothing is ever lost or added twice.
Devices that hold the same version and get the same values share one change and one version.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorikit.proto.manifest import BlobRef, digest_of
from lorikit.proto.plan import ADAPTIVE, WireScheme
from lorikit.proto.tensors import Bundle, Tensors, pack, raw
from lorikit.quantization import changes
from lorikit.quantization.wire import check_scheme, compressed
from lorikit.server.config import RunConfig
from lorikit.server.methods import FACTS
from lorikit.server.methods.base import Assignment
from lorikit.server.plans import PLAIN_CODECS, check_options, is_coarse, seed_of
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.updates import Update, read_adapter

_OPTIONS = ("budget_bytes", "compressed", "rotation_block", "stochastic", "top_share")
"""Options of the downlink's scheme that a run may set."""


@dataclass(frozen=True, slots=True)
class Change:
    """How a device gets from one version to another."""

    base: BlobRef
    """The version that it holds."""
    blob: BlobRef
    """What to add."""


@dataclass(frozen=True, slots=True)
class Version:
    """An adapter as devices get it."""

    adapter: BlobRef
    """All of it, float32; what the device trains from."""
    change: Change | None = None
    """The same in fewer bytes, for a device that holds the base."""


def change_to_json(change: Change | None) -> str:
    """Text for the store; empty for none."""
    return "" if change is None else json.dumps(dataclasses.asdict(change), sort_keys=True)


def change_from_json(text: str) -> Change | None:
    """What ``change_to_json`` was given."""
    if not text:
        return None
    return Change(**{name: BlobRef(**ref) for name, ref in json.loads(text).items()})


def downlink_scheme(config: RunConfig, *, round_number: int = 0) -> WireScheme | None:
    """How adapters travel to devices; None: whole, in float32.

    Raises:
        ValueError: Unknown codec or option, a value out of range, or a codec whose errors the
            method cannot carry on; names it.
    """
    check_scheme(config.downlink_codec)
    options: dict[str, Any] = dict(config.downlink_options)
    check_options("downlink_options", options, _OPTIONS)
    if config.downlink_codec == "fp32" and not options:
        return None
    if is_coarse(config.downlink_codec) and not FACTS[config.method].keeps_coordinates:
        raise ValueError(
            f"downlink_codec {config.downlink_codec} does not go with method {config.method}, "
            f"which gives the adapter other coordinates each round; use int8-block64 or one of "
            f"{', '.join(PLAIN_CODECS)}"
        )
    if config.downlink_codec == ADAPTIVE and "budget_bytes" not in options:
        raise ValueError(f"downlink_codec {ADAPTIVE} needs budget_bytes in downlink_options")
    return WireScheme(codec=config.downlink_codec, round=round_number, **options)


class Downlink:
    """Versions of one run's adapters."""

    def __init__(self, config: RunConfig, blobs: FolderBlobs) -> None:
        """Args are the run's settings and where devices download from."""
        self._config = config
        self._blobs = blobs
        self._made: dict[tuple[str, str, int], Version] = {}

    @property
    def is_exact(self) -> bool:
        """Whether devices get the method's own values."""
        return downlink_scheme(self._config) is None

    def version(self, exact: Tensors, held: str | None, *, round_number: int) -> Version:
        """The version of some values for devices that hold another one, encoded once a round.

        Equal arguments give the same blobs, so that a server that was killed gives out the same.

        Args:
            exact: The method's values.
            held: Digest of the version that the device holds; None where none is known.
            round_number: Of the round whose state the values are; joins the seed of rounding.
        """
        scheme = downlink_scheme(self._config, round_number=round_number)
        whole = _packed(exact)
        if scheme is None or held is None or not self._blobs.has(held):
            return Version(self._blobs.put(whole))
        key = (held, digest_of(whole), round_number)
        if key not in self._made:
            self._made = {k: v for k, v in self._made.items() if k[2] == round_number}
            self._made[key] = self._changed(exact, whole, held, scheme)
        return self._made[key]

    def _changed(self, exact: Tensors, whole: bytes, held: str, scheme: WireScheme) -> Version:
        """The version that devices rebuild; the whole where that saves nothing."""
        base = self._blobs.ref(held)
        received = read_adapter(self._blobs.read_whole(held))
        values = changes.difference(received, exact)
        if not values and received.keys() == exact.keys():
            return Version(base)
        header = changes.header_of(scheme, seed_of("downlink", self._config.seed, scheme.round))
        bundle = Bundle(changes.encode(values, scheme, header, {}), {}, header)
        packed = pack(compressed(bundle) if scheme.compressed else bundle)
        if len(packed) >= len(whole):
            return Version(self._blobs.put(whole))
        rebuilt = changes.rebuilt(received, bundle, exact, max_bytes=len(whole))
        change = Change(base, self._blobs.put(packed))
        return Version(self._blobs.put(_packed(rebuilt)), change)


def as_from_exact(update: Update, received: Tensors, exact: Tensors) -> Update:
    """The update as if the device had started from the method's values.

    What a device trained is the same; the values that its version left out stay with the server.
    """
    tensors = {
        name: values
        if name not in received
        else values + changes.fitted(exact[name] - received[name], values.shape)
        for name, values in update.tensors.items()
    }
    return dataclasses.replace(update, tensors=tensors)


def shared_bases(
    assignments: Iterable[Assignment], held: Mapping[str, str | None]
) -> dict[str, str | None]:
    """The version that each device's is made from, by device.

    A device that holds none gets what most of those with the same work get, as a whole, so that it
    goes on as one of them.

    Args:
        assignments: The round's work.
        held: Version that each device holds.
    """
    groups: dict[tuple[object, ...], Counter[str]] = {}
    listed = list(assignments)
    for each in listed:
        known = held.get(each.device_id)
        if known is not None:
            groups.setdefault(_work_of(each), Counter())[known] += 1
    common = {
        work: min(counts, key=lambda digest: (-counts[digest], digest))
        for work, counts in groups.items()
    }
    return {
        each.device_id: held.get(each.device_id) or common.get(_work_of(each)) for each in listed
    }


def _work_of(assignment: Assignment) -> tuple[object, ...]:
    """What the tensors that a device gets depend on."""
    return tuple(sorted(assignment.ranks.items())), assignment.kept_layers


def _packed(adapter: Tensors) -> bytes:
    return pack(Bundle({name: raw(values) for name, values in adapter.items()}))
