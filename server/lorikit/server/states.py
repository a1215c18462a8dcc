# SPDX-License-Identifier: Apache-2.0
"""States of a run, a round and a task, and which may follow which.

Every change of state is one transaction of the store, and the store asks ``check`` first. What
follows a state can be repeated: a server killed in any state starts that state's work again and
comes to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from lorikit.server.errors import LorikitError


class TransitionError(LorikitError):
    """A state was to follow one that it may not follow; a fault of the program, not of a caller."""


class RunState(StrEnum):
    """Life of a run."""

    PREPARING = "preparing"
    """The base model is being compiled and the first adapter made."""
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_active(self) -> bool:
        """Whether devices may still get work from the run."""
        return self in (RunState.PREPARING, RunState.RUNNING)


class RoundState(StrEnum):
    """Life of a round."""

    ASSIGNING = "assigning"
    """Waits for devices, chooses the cohort, makes plans and packages."""
    TRAINING = "training"
    """Devices work; updates are accepted in this state only."""
    AGGREGATING = "aggregating"
    """The set of accepted updates is fixed; the method combines them."""
    EVALUATING = "evaluating"
    """The new state is stored; adapters are exported and measured."""
    CLOSED = "closed"
    ABANDONED = "abandoned"
    """The run was stopped at once, or failed, before the round closed."""

    @property
    def is_over(self) -> bool:
        """Whether nothing follows."""
        return self in (RoundState.CLOSED, RoundState.ABANDONED)


class TaskState(StrEnum):
    """Life of a task."""

    OPEN = "open"
    DONE = "done"
    """Its update has a receipt (or its evaluation was reported)."""
    FAILED = "failed"
    """The device said that it could not do it."""
    REJECTED = "rejected"
    """Its update broke a rule."""
    EXPIRED = "expired"
    """Nothing was heard of the device for the time of its lease, or the round went on without."""


_State = TypeVar("_State", RunState, RoundState, TaskState)

RUN_TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    RunState.PREPARING: frozenset({RunState.RUNNING, RunState.STOPPED, RunState.FAILED}),
    RunState.RUNNING: frozenset({RunState.FINISHED, RunState.STOPPED, RunState.FAILED}),
    RunState.FINISHED: frozenset(),
    RunState.STOPPED: frozenset(),
    RunState.FAILED: frozenset(),
}

ROUND_TRANSITIONS: Mapping[RoundState, frozenset[RoundState]] = {
    RoundState.ASSIGNING: frozenset({RoundState.TRAINING, RoundState.ABANDONED}),
    RoundState.TRAINING: frozenset(
        {RoundState.ASSIGNING, RoundState.AGGREGATING, RoundState.ABANDONED}
    ),
    RoundState.AGGREGATING: frozenset({RoundState.EVALUATING, RoundState.ABANDONED}),
    RoundState.EVALUATING: frozenset({RoundState.CLOSED, RoundState.ABANDONED}),
    RoundState.CLOSED: frozenset(),
    RoundState.ABANDONED: frozenset(),
}

TASK_TRANSITIONS: Mapping[TaskState, frozenset[TaskState]] = {
    TaskState.OPEN: frozenset(
        {TaskState.DONE, TaskState.FAILED, TaskState.REJECTED, TaskState.EXPIRED}
    ),
    # A device that was silent for long may still be in time for the round.
    TaskState.EXPIRED: frozenset(
        {TaskState.OPEN, TaskState.DONE, TaskState.FAILED, TaskState.REJECTED}
    ),
    TaskState.DONE: frozenset(),
    TaskState.FAILED: frozenset(),
    TaskState.REJECTED: frozenset(),
}


def check(table: Mapping[_State, frozenset[_State]], before: _State, after: _State) -> None:
    """Nothing, when ``after`` may follow ``before``.

    Raises:
        TransitionError: Otherwise.
    """
    if after not in table[before]:
        allowed = ", ".join(sorted(table[before])) or "nothing"
        raise TransitionError(f"{after} may not follow {before}; {allowed} may")
