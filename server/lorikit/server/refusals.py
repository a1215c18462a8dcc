# SPDX-License-Identifier: Apache-2.0
"""Why a device gets no work, in sentences with a way out."""

from __future__ import annotations

from lorikit.proto.device import Profile
from lorikit.proto.plan import Plan
from lorikit.server.methods import FACTS
from lorikit.server.methods.base import Assignment, Participant
from lorikit.server.planner.choice import DoesNotFitError
from lorikit.server.plans import missing_operations


def instead(
    error: DoesNotFitError, method: str, device: Participant, work: Assignment
) -> DoesNotFitError:
    """A refusal that also names methods which take devices like this one, where there are such."""
    facts = FACTS.get(method)
    if facts is None:
        return error
    unmet = facts.unmet(
        [device],
        rank=max(work.ranks.values(), default=1),
        depth=len(work.trained_layers),
        layers=len(work.kept_layers),
    )
    sentence = unmet.get(device.device_id)
    return DoesNotFitError(error.reason, f"{error.remedy} {sentence}.") if sentence else error


def check_operations(plan: Plan, profile: Profile) -> None:
    """Nothing, where the device's SDK can carry out the plan; else ``DoesNotFitError``."""
    if missing := missing_operations(plan, profile):
        raise DoesNotFitError(
            f"The SDK ({profile.sdk_version or 'unknown version'}) cannot carry out "
            f"{', '.join(missing)}, which method {plan.method} needs.",
            "Update the SDK in the app.",
        )
