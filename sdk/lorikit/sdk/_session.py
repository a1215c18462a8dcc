# SPDX-License-Identifier: Apache-2.0
"""One stretch of taking part: enrol, ask for work, do it, until there is none."""

from __future__ import annotations

import logging

from lorikit.proto.device import Profile
from lorikit.proto.status import ErrorCode
from lorikit.sdk._config import ClientConfig
from lorikit.sdk._connection import Connection
from lorikit.sdk._credentials import Credentials
from lorikit.sdk._errors import (
    CancelledError,
    ConnectionLostError,
    DataError,
    EnrolmentRefusedError,
    IdentityError,
    LorikitError,
    OutOfMemoryError,
    PlanRefusedError,
    ProtocolVersionError,
    RefusedError,
    RoundClosedError,
    ServerRefusedError,
)
from lorikit.sdk._events import AdapterReady, Failed, Refused, State
from lorikit.sdk._feed import Feed
from lorikit.sdk._memory import lacks_memory
from lorikit.sdk._store import LastAdapter, Store
from lorikit.sdk._transport import (
    Finished,
    Offer,
    Refusal,
    RetryWindow,
    Task,
    Transport,
    UnreadableTask,
)
from lorikit.sdk._worker import Worker

logger = logging.getLogger(__name__)

_ENDING = (ConnectionLostError, IdentityError, ProtocolVersionError)
"""Errors of a task that concern more than the task."""

_MESSAGE_LENGTH = 500


class Stop:
    """What an app may ask of a session from another thread."""

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self.session = False
        """End soon, and keep what was done."""
        self.task = False
        """Drop the task in progress."""

    def asked(self) -> bool:
        """Whether the task in progress is to end."""
        return self.session or self.task


class Session:
    """From enrolment to the end of a run, or until the app stops it."""

    def __init__(
        self,
        own: Profile,
        worker: Worker,
        *,
        enrolment_token: str,
        store: Store,
        transport: Transport,
        connection: Connection,
        feed: Feed,
        config: ClientConfig,
        stop: Stop,
    ) -> None:
        """Wire the parts."""
        self._credentials = Credentials(
            own,
            enrolment_token=enrolment_token,
            store=store,
            transport=transport,
            connection=connection,
        )
        self._worker = worker
        self._store = store
        self._transport = transport
        self._connection = connection
        self._feed = feed
        self._config = config
        self._stop = stop
        self._unsent_profile: Profile | None = own
        self._rounds = 0
        self._failures = 0

    def take_part(self, max_rounds: int | None) -> State:
        """Do task after task.

        Returns:
            ``FINISHED``, or ``STOPPED`` after that many rounds.

        Raises:
            CancelledError: The app stopped the session.
            LorikitError: What no further task could mend, see ``Client``.
        """
        self._feed.enter(State.CONNECTING)
        enrolled_anew = self._credentials.enrol()
        while max_rounds is None or self._rounds < max_rounds:
            try:
                offer = self._next_task()
                enrolled_anew = False
                if isinstance(offer, Finished):
                    self._finish(offer)
                    return State.FINISHED
                self._take(offer)
            except IdentityError as error:
                if enrolled_anew or not self._credentials.may_enrol_again():
                    raise
                logger.info("the server does not know this device any more; it enrols again")
                try:
                    enrolled_anew = self._credentials.enrol(anew=True)
                except EnrolmentRefusedError as refusal:
                    raise error from refusal
        return State.STOPPED

    def _next_task(self) -> Offer:
        if self._failures:
            self._connection.pause(self._failures)
        self._credentials.keep_fresh()
        self._feed.enter(State.WAITING)
        offer = self._connection.call(self._ask)
        self._unsent_profile = None
        return offer

    def _ask(self) -> Offer:
        try:
            return self._transport.next_task(self._config.wait_seconds, self._unsent_profile)
        except ServerRefusedError as error:
            if error.code is not ErrorCode.INTERNAL:
                raise
            # No task of ours is at stake, and the server's fault may be mended while we wait.
            raise ConnectionLostError(str(error)) from error

    def _take(self, offer: Task | UnreadableTask | RetryWindow | Refusal) -> None:
        match offer:
            case Task():
                self._failures = 0 if self._work(offer) else self._failures + 1
            case UnreadableTask():
                self._failures += 1
                self._failed(offer.task_id, PlanRefusedError(offer.reason))
            case RetryWindow():
                self._connection.sleep_between(offer.min_seconds, offer.max_seconds)
            case Refusal():
                self._feed.emit(Refused(reason=offer.reason, remedy=offer.remedy))
                raise RefusedError(offer.reason, offer.remedy)

    def _work(self, task: Task) -> bool:
        """Do a task; returns whether the server has its result."""
        self._stop.task = False
        try:
            self._worker.do(task)
        except _ENDING:
            raise
        except CancelledError as error:
            if self._stop.session:
                raise
            self._give_up(task, error)
        except LorikitError as error:
            self._give_up(task, error)
        except Exception as error:
            if lacks_memory(error):
                self._give_up(task, OutOfMemoryError(f"no memory for the task: {error!r}"))
                return False
            # A fault of the SDK or the app: the app shall see it, the server shall not wait.
            self._tell(task.task_id, type(error).__name__, "unexpected; see the app's log")
            raise
        else:
            self._rounds += task.kind == "train"
            return True
        return False

    def _give_up(self, task: Task, error: LorikitError) -> None:
        if isinstance(error, OutOfMemoryError):
            self._worker.release()
        self._worker.abandon(task)
        self._failed(task.task_id, error)

    def _failed(self, task_id: str, error: LorikitError) -> None:
        logger.warning("task ended without an update (task=%s): %s", task_id, error)
        name = type(error).__name__
        self._feed.emit(Failed(task_id=task_id, error=name, message=str(error)))
        if not isinstance(error, RoundClosedError):
            self._tell(task_id, name, self._public(error))

    def _tell(self, task_id: str, error: str, message: str) -> None:
        """Report the failure; whether the server still knows the task does not matter."""
        try:
            self._connection.call(lambda: self._transport.report_failure(task_id, error, message))
        except (RoundClosedError, ServerRefusedError) as refusal:
            logger.info("failure was not taken (task=%s): %s", task_id, refusal)

    def _public(self, error: LorikitError) -> str:
        """What the server may know of an error: nothing of local rows or folders."""
        if isinstance(error, DataError):
            return "local rows do not fit the task"
        return str(error).replace(str(self._store.folder), "the store")[:_MESSAGE_LENGTH]

    def _finish(self, offer: Finished) -> None:
        self._store.keep_only(task_id=None, update_id=None)
        if offer.package is None or offer.adapter is None:
            return
        self._worker.take_final(
            LastAdapter(
                run_id=offer.run_id,
                package=offer.package,
                adapter=offer.adapter,
                inputs=offer.inputs,
                max_length=offer.max_length,
                blobs=(),
            ),
            offer.package_signature,
        )
        self._feed.emit(AdapterReady(run_id=offer.run_id, digest=offer.adapter.digest))
