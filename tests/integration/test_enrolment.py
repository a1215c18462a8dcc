# SPDX-License-Identifier: Apache-2.0
"""The SDK and a real server with an authority: enrolment, renewal, and no way back."""

from __future__ import annotations

import builtins
import sys
import time

import pytest
from tests.server.federation import profile
from tests.server.secured import SecuredServer

from lorikit.sdk import (
    CertificateExpiredError,
    CertificateForeignError,
    CertificateRevokedError,
    Client,
    ClientConfig,
    ConnectionLostError,
    EnrolmentRefusedError,
    GrpcTransport,
    IdentityError,
    RetryConfig,
    RoleRequiredError,
)
from lorikit.sdk import _credentials as credentials_module
from lorikit.sdk._connection import Connection
from lorikit.sdk._credentials import Credentials
from lorikit.sdk._keys import new_key, signing_request
from lorikit.sdk._store import Store
from lorikit.sdk._transport import RetryWindow
from lorikit.server.identity.authority import Authority, requested_key
from lorikit.server.identity.subjects import Role, device_subject

CONFIG = ClientConfig(retry=RetryConfig(first_seconds=0.01, max_seconds=0.02, max_attempts=3))


class LosesAnswers(GrpcTransport):
    """A transport whose first answer to each enrolment never arrives."""

    lost = False

    def enrol(self, *args, **kwargs):
        answer = super().enrol(*args, **kwargs)
        if not self.lost:
            self.lost = True
            raise ConnectionLostError("the answer was lost")
        return answer


class Installation:
    """A store, a transport and credentials, as a session wires them."""

    def __init__(self, secured, folder, *, token="", kind=GrpcTransport):
        self.store = Store(folder)
        self.transport = kind(
            secured.server.address,
            root_certificates=secured.roots,
            enrol_server=secured.server.enrol_address,
            config=CONFIG,
        )
        self.credentials = Credentials(
            profile(),
            enrolment_token=token,
            store=self.store,
            transport=self.transport,
            connection=Connection(CONFIG, emit=lambda event: None),
        )

    def asks(self):
        return self.transport.next_task(0.0, None)

    def close(self):
        self.transport.close()
        self.store.close()


@pytest.fixture
def secured(tmp_path):
    with SecuredServer(tmp_path / "runs") as secured:
        yield secured


@pytest.fixture
def install(secured, tmp_path):
    made = []

    def install(name="device", **changes):
        made.append(Installation(secured, tmp_path / name, **changes))
        return made[-1]

    yield install
    for installation in made:
        installation.close()


def test_device_enrols_once_and_shows_its_certificate_after_a_restart(secured, install):
    first = install(token=secured.token())
    assert first.credentials.enrol()
    assert isinstance(first.asks(), RetryWindow)
    kept = first.store.identity()
    first.close()

    again = install()
    assert not again.credentials.enrol()
    assert isinstance(again.asks(), RetryWindow)
    assert again.store.identity() == kept
    assert kept.token == ""
    assert "PRIVATE KEY" not in repr(kept)


def test_lost_answer_is_asked_for_again_with_the_same_key(secured, install):
    device = install(token=secured.token(), kind=LosesAnswers)
    device.credentials.enrol()

    assert isinstance(device.asks(), RetryWindow)
    assert len(secured.lines(action="enrol", outcome="ok")) == 2
    assert len({row.key_digest for row in secured.store.certificates()}) == 1


def test_certificate_is_renewed_and_the_old_one_ends(secured, install, monkeypatch):
    device = install(token=secured.token())
    device.credentials.enrol()
    device.asks()
    before = device.store.identity()
    device.credentials.keep_fresh()
    assert device.store.identity() == before  # nothing is due

    later = time.time() + 61 * 86_400
    monkeypatch.setattr(credentials_module.time, "time", lambda: later)
    device.credentials.keep_fresh()
    after = device.store.identity()
    assert isinstance(device.asks(), RetryWindow)
    assert (after.device_id, after.package_key) == (before.device_id, before.package_key)
    assert after.certificate != before.certificate
    assert after.key != before.key
    assert [row.reason for row in secured.store.certificates()] == ["renewed", ""]
    device.credentials.keep_fresh()  # due by this clock, and not asked for again at once
    assert device.store.identity() == after


def test_reasons_arrive_as_errors_of_their_own(secured, install, tmp_path):
    device = install(token=secured.token())
    device.credentials.enrol()
    identity = device.store.identity()
    subject = device_subject(identity.device_id)
    key = new_key()
    public = requested_key(signing_request(key))
    other = Authority.create(tmp_path / "other", hosts=["localhost"])
    foreign, _ = other.issue_client(subject, public, role="device", days=1)
    expired, facts = secured.authority.issue_client(subject, public, role="device", days=-0.001)
    secured.store.add_certificate(facts)
    badge = secured.operator("ann", Role.ADMIN)
    for shown, its_key, error in (
        (foreign, key, CertificateForeignError),
        (expired, key, CertificateExpiredError),
        (badge.certificate, badge.key, RoleRequiredError),
    ):
        device.transport.identify(identity.device_id, "", key=its_key, certificate=shown)
        with pytest.raises(error):
            device.asks()
    secured.registry.revoke(subject, reason="lost")
    device.transport.identify(
        identity.device_id,
        "",
        key=identity.key.encode(),
        certificate=identity.certificate.encode(),
    )
    with pytest.raises(CertificateRevokedError, match="lost"):
        device.asks()


def test_token_is_not_traded_for_a_secret(secured, install):
    """Where no certificate comes back, the server is not the one that made the token."""
    device = install(token=secured.token())
    enrol = device.transport.enrol

    def without_certificate(*args, **kwargs):
        given = enrol(*args, **kwargs)
        return type(given)(device_id=given.device_id, token="secret")

    device.transport.enrol = without_certificate
    with pytest.raises(EnrolmentRefusedError, match="no certificate for the token"):
        device.credentials.enrol()
    assert device.store.identity().token == ""


def test_device_with_a_certificate_does_not_go_back_to_plain_text(secured, install, tmp_path):
    device = install(token=secured.token())
    device.credentials.enrol()
    device.close()

    with pytest.raises(IdentityError, match="leave out insecure"):
        Client(secured.server.address, [], store=tmp_path / "device", insecure=True)
    Store(tmp_path / "device").close()  # and it holds on to nothing


def test_extra_that_is_missing_is_named(secured, install, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "cryptography":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "lorikit.sdk._cryptography", raising=False)
    monkeypatch.delattr("lorikit.sdk._cryptography", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(IdentityError, match=r'pip install "lorikit\[identity\]"'):
        install(token="any").credentials.enrol()
