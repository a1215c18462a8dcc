# SPDX-License-Identifier: Apache-2.0
"""Runs, devices, who takes part in what, and events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from lorikit.proto.status import ErrorCode
from lorikit.server.errors import RequestError
from lorikit.server.states import RUN_TRANSITIONS, RunState, check
from lorikit.server.store.database import Database, document
from lorikit.server.store.tables import DeviceRow, EventRow, MemberRow, RunRow

_ACTIVE = tuple(state for state in RunState if state.is_active)


class RunStore(Database):
    """The part of the store that outlives rounds."""

    def create_run(self, run_id: str, name: str, config: str) -> RunRow:
        """A new run, or the one that has that name and the same settings.

        Raises:
            RequestError: RUN_EXISTS when the name is taken by a run with other settings.
        """
        with self._begin() as session:
            known = session.scalar(select(RunRow).where(RunRow.name == name))
            if known is None:
                run = RunRow(id=run_id, name=name, config=config, created=self._clock())
                session.add(run)
                session.flush()
                self._tell(session, run_id, "state", state=run.state, name=name)
                return run
            if known.config != config:
                raise RequestError(ErrorCode.RUN_EXISTS, f"run {name!r} has other settings")
            return known

    def run(self, name_or_id: str) -> RunRow:
        """One run; raises ``RequestError`` RUN_UNKNOWN."""
        with self._begin() as session:
            return find_run(session, name_or_id)

    def runs(self, *, active_only: bool = False) -> Sequence[RunRow]:
        """Runs in the order of their creation."""
        query = select(RunRow).order_by(RunRow.created, RunRow.id)
        if active_only:
            query = query.where(RunRow.state.in_(_ACTIVE))
        with self._begin() as session:
            return session.scalars(query).all()

    def start_run(self, run_id: str, *, initial_digest: str) -> None:
        """From preparing to running, with the method's first state."""
        with self._begin() as session:
            run = find_run(session, run_id)
            run.initial_digest = initial_digest
            self._move_run(session, run, RunState.RUNNING)

    def request_stop(self, name_or_id: str, *, at_once: bool) -> RunRow:
        """Note that the run is to end; nothing for a run that has ended."""
        with self._begin() as session:
            run = find_run(session, name_or_id)
            if run.state.is_active and run.stop != "at-once":
                run.stop = "at-once" if at_once else "after-round"
                self._tell(session, run.id, "state", state=run.state, stop=run.stop)
            return run

    def enrol(
        self,
        device_id: str,
        *,
        installation_id: str,
        token_hash: str,
        profile: str,
        max_devices: int,
    ) -> DeviceRow:
        """The device of that installation, made where it is new, with a new secret.

        Raises:
            RequestError: SERVER_BUSY when ``max_devices`` are enrolled already.
        """
        with self._begin() as session:
            query = select(DeviceRow).where(DeviceRow.installation_id == installation_id)
            device = session.scalar(query)
            if device is None:
                if (session.scalar(select(func.count(DeviceRow.id))) or 0) >= max_devices:
                    raise RequestError(ErrorCode.SERVER_BUSY, f"{max_devices} devices enrolled")
                device = DeviceRow(
                    id=device_id,
                    installation_id=installation_id,
                    token_hash=token_hash,
                    profile=profile,
                    enrolled=self._clock(),
                )
                session.add(device)
                return device
            device.token_hash = token_hash
            self._set_profile(session, device, profile)
            return device

    def device(self, device_id: str) -> DeviceRow | None:
        """One device, or None."""
        with self._begin() as session:
            return session.get(DeviceRow, device_id)

    def set_profile(self, device_id: str, profile: str) -> bool:
        """Note a fresh profile; whether it differs. A refused device is considered again."""
        with self._begin() as session:
            return self._set_profile(session, session.get_one(DeviceRow, device_id), profile)

    def join(self, run_id: str, device_id: str) -> bool:
        """Note that the device takes part in the run; False when it did already."""
        with self._begin() as session:
            if session.get(MemberRow, (run_id, device_id)) is not None:
                return False
            session.add(MemberRow(run_id=run_id, device_id=device_id, joined=self._clock()))
            device = session.get_one(DeviceRow, device_id)
            device_class = json.loads(device.profile).get("device_class", "")
            facts = {"device": device_id, "class": device_class, "state": "joined"}
            self._tell(session, run_id, "device", **facts)
            return True

    def members(self, run_id: str) -> Sequence[tuple[MemberRow, DeviceRow]]:
        """Who takes part in a run, by device id."""
        query = (
            select(MemberRow, DeviceRow)
            .join(DeviceRow, DeviceRow.id == MemberRow.device_id)
            .where(MemberRow.run_id == run_id)
            .order_by(MemberRow.device_id)
        )
        with self._begin() as session:
            return [(row[0], row[1]) for row in session.execute(query)]

    def memberships(self, device_id: str) -> Sequence[tuple[MemberRow, RunRow]]:
        """The runs a device takes or took part in, the newest first."""
        query = (
            select(MemberRow, RunRow)
            .join(RunRow, RunRow.id == MemberRow.run_id)
            .where(MemberRow.device_id == device_id)
            .order_by(RunRow.created.desc(), RunRow.id)
        )
        with self._begin() as session:
            return [(row[0], row[1]) for row in session.execute(query)]

    def refuse(self, run_id: str, device_id: str, *, reason: str, remedy: str) -> None:
        """Note that the device cannot take part as it is."""
        with self._begin() as session:
            member = session.get_one(MemberRow, (run_id, device_id))
            member.refused_reason, member.refused_remedy = reason, remedy
            facts = {"device": device_id, "state": "refused", "reason": reason, "remedy": remedy}
            self._tell(session, run_id, "device", **facts)

    def set_result(
        self,
        run_id: str,
        device_id: str,
        *,
        package: tuple[str, int],
        adapter: tuple[str, int],
        inputs: Mapping[str, float],
        max_length: int,
    ) -> None:
        """Note what the device gets at the end: digest and size of package and adapter."""
        with self._begin() as session:
            member = session.get_one(MemberRow, (run_id, device_id))
            member.package_digest, member.package_size = package
            member.adapter_digest, member.adapter_size = adapter
            member.inputs, member.max_length = document(inputs), max_length

    def add_event(self, run_id: str, kind: str, **facts: object) -> None:
        """Note something that is no change of state."""
        with self._begin() as session:
            self._tell(session, run_id, kind, **facts)

    def events(self, run_id: str, *, from_sequence: int = 0, limit: int = 500) -> list[EventRow]:
        """Events of a run in order, at most ``limit``."""
        query = (
            select(EventRow)
            .where(EventRow.run_id == run_id, EventRow.sequence >= from_sequence)
            .order_by(EventRow.sequence)
            .limit(limit)
        )
        with self._begin() as session:
            return list(session.scalars(query))

    def _set_profile(self, session: Session, device: DeviceRow, profile: str) -> bool:
        if device.profile == profile:
            return False
        device.profile = profile
        refused = select(MemberRow).where(
            MemberRow.device_id == device.id, MemberRow.refused_reason.is_not(None)
        )
        for member in session.scalars(refused):
            member.refused_reason = member.refused_remedy = None
        return True

    def _move_run(self, session: Session, run: RunRow, after: RunState, **facts: object) -> None:
        check(RUN_TRANSITIONS, run.state, after)
        run.state = after
        self._tell(session, run.id, "state", state=after, **facts)


def find_run(session: Session, name_or_id: str) -> RunRow:
    """The run of that name or id; raises ``RequestError`` RUN_UNKNOWN."""
    query = select(RunRow).where(or_(RunRow.id == name_or_id, RunRow.name == name_or_id))
    run = session.scalar(query)
    if run is None:
        raise RequestError(ErrorCode.RUN_UNKNOWN, f"no run {name_or_id[:80]!r}")
    return run
