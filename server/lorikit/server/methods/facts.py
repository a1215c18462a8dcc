# SPDX-License-Identifier: Apache-2.0
"""What a method trains, sends and accepts, and what a round of it costs in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.server.methods.adapters import every_layer, is_in
from lorikit.server.methods.base import (
    ADAPTER_ROLES,
    AdapterSpace,
    Contribution,
    Participant,
)
from lorikit.server.methods.base_delta import DELTA_ROLES

Difference = Literal["ranks", "depths", "layers"]
"""In what the devices of one round may differ: LoRA rank, number of trained layers from the output,
or which layers they hold at all."""

ALTERNATIVES: Mapping[Difference, tuple[str, ...]] = {
    "ranks": ("flexlora", "hetlora"),
    "depths": ("legend",),
    "layers": ("fedra",),
}
"""Methods that accept a difference and need nothing special of the package."""

LORA_AND_HEAD = ("lora_A", "lora_B", "head")

_BYTES = 4
"""Of a float32."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of one device in one round, values only, in float32."""

    up: int
    """Of its update."""
    down: int
    """Of the adapter it starts from; the package is fetched once and not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodFacts:
    """What to know of a method before choosing it."""

    title: str
    """Name as the paper writes it."""
    trains: str
    """What a device trains, in words."""
    sends: str
    """What it sends, in words."""
    exact: str
    """Whether the mean is that of the updates, in words."""
    upload: str
    """Parameters up in a formula: sums over adapted modules m, h is the head."""
    download: str
    """Parameters down."""
    source: str
    """Where the method comes from."""
    accepts: tuple[Difference, ...] = ()
    """In what the devices of one round may differ."""
    sent_roles: tuple[tuple[str, ...], ...] = (LORA_AND_HEAD,)
    """Roles of the tensors sent, round by round, starting over after the last."""
    needs: tuple[str, ...] = ()
    """Roles that the model's adapter tensors must have beside LoRA and head."""
    start: Literal["random", "principal"] = "random"
    """Start values of LoRA: A random and B zero, or the principal part of the frozen weight."""
    keeps_coordinates: bool = True
    """Whether an element of a tensor means the same from round to round on a device, so that what
    an update left out may be added to a later one. Not so where the adapter is factored anew, or
    where a device gets other ranks each round."""

    @property
    def changes_base(self) -> bool:
        """Whether devices read base deltas beside LoRA."""
        return set(DELTA_ROLES) <= set(self.needs)

    def roles(self) -> tuple[str, ...]:
        """Every role that the method trains or reads, sorted."""
        return tuple(sorted({*self.needs, *(role for sent in self.sent_roles for role in sent)}))

    def usual_roles(self, round_number: int) -> tuple[str, ...]:
        """Roles that train in a round.

        Where both factors of LoRA and the head do, all roles do, so that an adapter of another kind
        trains as well.
        """
        usual = self.sent_roles[round_number % len(self.sent_roles)]
        return (*ADAPTER_ROLES, "head") if usual == LORA_AND_HEAD else usual

    def cost(
        self,
        space: AdapterSpace,
        ranks: Mapping[str, int],
        *,
        trained_layers: Sequence[int] | None = None,
        kept_layers: Sequence[int] | None = None,
        roles: Sequence[str] | None = None,
        round_number: int = 0,
    ) -> Cost:
        """Bytes of one device in a round; multiply ``up`` for a wire codec other than ``fp32``.

        Args:
            space: The model's adapter tensors.
            ranks: Rank by module, that of the base deltas included (``<module>.base_delta``).
            trained_layers: Layers that train; None for all.
            kept_layers: Layers of the device's sub-model; None for all.
            roles: Roles that train; None for those the method usually trains in that round.
            round_number: From 0; methods that alternate send something else each round.
        """
        trained = every_layer(space) if trained_layers is None else trained_layers
        kept = every_layer(space) if kept_layers is None else kept_layers
        sent = space.named(*(self.usual_roles(round_number) if roles is None else roles))
        up = (tensor for tensor in sent if is_in(tensor, trained))
        down = (tensor for tensor in space.tensors if is_in(tensor, kept))
        return Cost(up=_bytes_of(up, ranks), down=_bytes_of(down, ranks))

    def check_kind(self, kind: str) -> None:
        """Nothing, where an adapter of that kind can have what the method needs beside it.

        Raises:
            ValueError: It cannot; says what to use instead.
        """
        if self.changes_base and kind != "lora":
            raise ValueError(
                f"adapter: {self.title} changes the base beside LoRA, and {kind!r} has no LoRA "
                "modules; set lora, or use fedit, which takes every kind"
            )

    def check(self, space: AdapterSpace) -> None:
        """Nothing, where the model offers what the method needs.

        Raises:
            ValueError: It does not; says what is missing and what to use instead.
        """
        missing = [role for role in self.needs if not space.named(role)]
        if not missing:
            return
        instead = " or ".join(ALTERNATIVES["ranks"] if "ranks" in self.accepts else ("fedit",))
        raise ValueError(
            f"{self.title} needs adapter tensors of the roles {', '.join(self.needs)}, this "
            f"package has none of {', '.join(missing)}; compile the model with them, or use "
            f"{instead}"
        )

    def refusal(self, difference: Difference, found: str) -> str:
        """The sentence that refuses a difference and names methods that accept it.

        Args:
            difference: What differs.
            found: What was seen, for example ``device a sent rank 2, the adapter has rank 8``.
        """
        return (
            f"{self.title} takes no devices that differ in {difference}: {found}; use "
            f"{' or '.join(ALTERNATIVES[difference])}, which do"
        )

    def alike(
        self, contributions: Iterable[Contribution], adapter: Tensors
    ) -> Iterator[Contribution]:
        """The contributions one by one, each checked to differ only in what the method accepts.

        Raises:
            ValueError: One differs from the adapter or from the first in another way.
        """
        first: Contribution | None = None
        for contribution in contributions:
            first = contribution if first is None else first
            for difference, found in _differences(contribution, first, adapter):
                if not self.takes(difference):
                    found = f"device {contribution.device_id} {found}"
                    raise ValueError(self.refusal(difference, found))
            yield contribution

    def takes(self, difference: Difference) -> bool:
        """Whether the method accepts a difference; other layers mean another depth, too."""
        return difference in self.accepts or (difference == "depths" and "layers" in self.accepts)

    def unmet(
        self, cohort: Sequence[Participant], *, rank: int, depth: int, layers: int
    ) -> dict[str, str]:
        """By device id, why a device cannot do the method's common work and what would suit it.

        Args:
            cohort: Devices that want to take part.
            rank: Rank every device gets, where they may not differ.
            depth: Trained layers every device gets.
            layers: Layers every device holds.
        """
        return {
            device.device_id: sentence
            for device in cohort
            if (sentence := self._unmet(device, rank, depth, layers))
        }

    def _unmet(self, device: Participant, rank: int, depth: int, layers: int) -> str:
        needs: tuple[tuple[Difference, int, int], ...] = (
            ("layers", device.max_layers, layers),
            ("depths", device.max_depth, depth),
            ("ranks", device.max_rank, rank),
        )
        for difference, fits, wanted in needs:
            if fits < wanted and not self.takes(difference):
                unit = {"layers": "layers", "depths": "trained layers", "ranks": "ranks"}
                found = (
                    f"device {device.device_id} fits {fits} {unit[difference]}, all get {wanted}"
                )
                return self.refusal(difference, found)
        return ""


def _differences(
    contribution: Contribution, first: Contribution, adapter: Tensors
) -> Iterator[tuple[Difference, str]]:
    """In what an update differs from the adapter and from the first one, and how, in words."""
    for name, values in contribution.tensors.items():
        if name in adapter and values.shape != adapter[name].shape:
            yield "ranks", f"sent {name} of shape {values.shape}, not {adapter[name].shape}"
    own, other = contribution.assignment, first.assignment
    if own.kept_layers != other.kept_layers:
        yield "layers", f"held the layers {own.kept_layers}, {first.device_id} {other.kept_layers}"
    if own.trained_layers != other.trained_layers:
        counts = len(own.trained_layers), len(other.trained_layers)
        yield "depths", f"trained {counts[0]} layers, {first.device_id} {counts[1]}"


def _bytes_of(tensors: Iterable[AdapterTensor], ranks: Mapping[str, int]) -> int:
    return sum(
        _BYTES * math.prod(ranks[t.module] if n == "rank" else int(n) for n in t.shape)
        for t in tensors
    )
