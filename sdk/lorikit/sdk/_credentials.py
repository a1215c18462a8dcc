# SPDX-License-Identifier: Apache-2.0
"""Becomes known to the server, and stays so: enrols, keeps the answer, renews the certificate."""

from __future__ import annotations

import dataclasses
import logging
import time

from lorikit.proto.device import Profile
from lorikit.sdk._connection import Connection
from lorikit.sdk._errors import EnrolmentRefusedError, ServerRefusedError
from lorikit.sdk._keys import is_renewal_due, new_key, signing_request
from lorikit.sdk._store import Identity, Store
from lorikit.sdk._transport import Transport

logger = logging.getLogger(__name__)

_RENEWAL_PAUSE_SECONDS = 3600.0
"""Shortest time between two renewals, so that a wrong clock does not ask for them without end."""


class Credentials:
    """Who this device is, in the store and on the connection."""

    def __init__(
        self,
        own: Profile,
        *,
        enrolment_token: str,
        store: Store,
        transport: Transport,
        connection: Connection,
    ) -> None:
        """Wire the parts."""
        self._own = own
        self._token = enrolment_token
        self._store = store
        self._transport = transport
        self._connection = connection
        self._next_renewal = 0.0

    def enrol(self, *, anew: bool = False) -> bool:
        """Take the identity from the store or ask for one; returns whether it was asked for.

        Raises:
            IdentityError: The server does not let this device in.
        """
        identity = self._store.identity()
        asks = anew or not identity.device_id
        if asks:
            identity = self._asked_for(identity)
            self._store.save_identity(identity)
        self._identify(identity)
        return asks

    def may_enrol_again(self) -> bool:
        """Whether enrolling may help a device that the server turned away."""
        return bool(self._token) or not self._store.identity().certificate

    def keep_fresh(self) -> None:
        """Renew the certificate where little is left of it; the old one serves until it is used."""
        identity = self._store.identity()
        if not identity.certificate or time.monotonic() < self._next_renewal:
            return
        if not is_renewal_due(identity.certificate.encode(), time.time()):
            return
        self._next_renewal = time.monotonic() + _RENEWAL_PAUSE_SECONDS
        key = new_key()
        try:
            request = signing_request(key)
            certificate = self._connection.call(lambda: self._transport.renew(request))
        except ServerRefusedError as error:
            logger.warning("certificate was not renewed: %s", error)
            return
        identity = dataclasses.replace(identity, key=key.decode(), certificate=certificate.decode())
        self._store.save_identity(identity)
        self._identify(identity)
        logger.info("certificate renewed")

    def _asked_for(self, identity: Identity) -> Identity:
        """The identity that the server gives for a token, or without one."""
        request = b""
        if self._token:
            if not identity.key:
                # Kept before it is used: an answer that gets lost can be asked for again.
                identity = dataclasses.replace(identity, key=new_key().decode())
                self._store.save_identity(identity)
            request = signing_request(identity.key.encode())
        given = self._connection.call(
            lambda: self._transport.enrol(identity.installation_id, self._own, self._token, request)
        )
        if request and not (given.certificate and given.package_key):
            raise EnrolmentRefusedError(
                "the server gave no certificate for the token; it has no authority, or is another "
                "server than the one that made the token"
            )
        return dataclasses.replace(
            identity,
            device_id=given.device_id,
            token=given.token,
            certificate=given.certificate.decode(),
            package_key=given.package_key.hex(),
        )

    def _identify(self, identity: Identity) -> None:
        certificate = identity.certificate.encode()
        self._transport.identify(
            identity.device_id,
            identity.token,
            key=identity.key.encode() if certificate else b"",
            certificate=certificate,
        )
