# SPDX-License-Identifier: Apache-2.0
"""Deals one data set out to devices so that no two see the same mix of groups."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

_ATTEMPTS = 1000


def dirichlet_split(
    groups: Sequence[Hashable],
    *,
    devices: int,
    concentration: float,
    seed: int,
    smallest: int = 1,
) -> tuple[tuple[int, ...], ...]:
    """Give every example to exactly one device, each group in its own random proportions.

    Args:
        groups: Group of each example (its domain, or its label).
        devices: Number of devices; at least 1.
        concentration: Dirichlet parameter, above zero; the smaller, the more devices differ.
        seed: Seed of the proportions and of the dealing.
        smallest: Fewest examples any device may get; proportions are redrawn until it holds.

    Returns:
        Ascending example indices, one tuple a device.

    Raises:
        ValueError: More examples are promised than there are, or no draw kept the promise.

    Source:
        Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for
        Federated Visual Classification", https://arxiv.org/abs/1909.06335; proportions are drawn
        per group over devices, as in Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022.
    """
    if devices < 1 or not concentration > 0:
        raise ValueError(
            f"devices must be at least 1 and concentration above 0, got {devices}, {concentration}"
        )
    if devices * smallest > len(groups):
        raise ValueError(
            f"{len(groups)} examples cannot give {devices} devices {smallest} each; "
            "use fewer devices"
        )
    rng = np.random.default_rng(seed)
    for _ in range(_ATTEMPTS):
        parts = _draw(groups, devices, concentration, rng)
        if min(len(part) for part in parts) >= smallest:
            return tuple(tuple(sorted(part)) for part in parts)
    raise ValueError(
        f"no draw of {_ATTEMPTS} gave every device {smallest} examples; raise concentration "
        f"(now {concentration}) or use fewer devices (now {devices})"
    )


def _draw(
    groups: Sequence[Hashable], devices: int, concentration: float, rng: np.random.Generator
) -> list[list[int]]:
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    parts: list[list[int]] = [[] for _ in range(devices)]
    for indices in members.values():
        shares = rng.dirichlet(np.full(devices, concentration))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(int)
        for part, piece in zip(parts, np.split(rng.permutation(indices), cuts), strict=True):
            part.extend(int(index) for index in piece)
    return parts
