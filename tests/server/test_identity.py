# SPDX-License-Identifier: Apache-2.0
"""The authority, the audit log and the rate limiter, apart from any server."""

from __future__ import annotations

import asyncio
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from lorikit.proto.limits import PACKAGE_SIGNATURE_CONTEXT
from lorikit.proto.status import ErrorCode
from lorikit.sdk._errors import PackageSignatureError
from lorikit.sdk._keys import check_package, is_renewal_due, new_key, signing_request
from lorikit.server.config import ServerConfig
from lorikit.server.errors import RequestError
from lorikit.server.identity.audit import AuditLog, verify
from lorikit.server.identity.authority import Authority, requested_key, subject_of
from lorikit.server.identity.errors import AuthorityError
from lorikit.server.identity.rates import RateLimiter
from lorikit.server.identity.setup import open_identity
from lorikit.server.identity.subjects import OPERATOR_ROLES, Role, from_uri, is_subject, to_uri
from lorikit.server.offload import Offload
from lorikit.server.store.identity import AuditLine, CertificateFacts
from lorikit.server.store.sql import SqlStore

DIGEST = "a" * 64


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "identity", hosts=["localhost", "127.0.0.1"])


@pytest.fixture
def store(tmp_path):
    store = SqlStore(f"sqlite:///{tmp_path / 'test.sqlite'}")
    yield store
    store.close()


def line(number: int) -> AuditLine:
    return AuditLine(actor="device:ab", action="fetch", subject=f"blob:{number}")


class TestAuthority:
    def test_keys_are_for_their_owner_alone(self, authority):
        keys = sorted(authority.folder.glob("*.key"))

        assert [key.name for key in keys] == ["authority.key", "package.key", "server.key"]
        assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
        assert stat.S_IMODE(authority.folder.stat().st_mode) == 0o700

    def test_second_authority_in_a_folder_is_refused(self, authority):
        with pytest.raises(AuthorityError, match="authority already"):
            Authority.create(authority.folder, hosts=["localhost"])

    def test_certificate_of_a_device_cannot_pose_as_the_server(self, authority):
        key = requested_key(signing_request(new_key()))
        pem, _ = authority.issue_client("device:ab", key, role="device", days=1)
        certificate = x509.load_pem_x509_certificate(pem)

        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
        assert subject_of(certificate) == "device:ab"
        assert authority.has_issued(certificate)

    @pytest.mark.parametrize("pem", [b"", b"not a request", b"\xff" * 100, b"x" * (17 << 10)])
    def test_signing_request_that_is_none_is_refused(self, pem):
        with pytest.raises(RequestError) as caught:
            requested_key(pem)
        assert caught.value.code is ErrorCode.REQUEST_INVALID

    def test_signing_request_of_another_kind_of_key_is_refused(self):
        key = rsa.generate_private_key(65537, 2048)
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

        with pytest.raises(RequestError, match="P-256"):
            requested_key(pem)

    def test_signing_request_signed_by_another_key_is_refused(self):
        request = bytearray(
            x509.load_pem_x509_csr(signing_request(new_key())).public_bytes(
                serialization.Encoding.DER
            )
        )
        request[-1] ^= 1
        try:
            pem = x509.load_der_x509_csr(bytes(request)).public_bytes(serialization.Encoding.PEM)
        except ValueError:
            pem = b""

        with pytest.raises(RequestError) as caught:
            requested_key(pem)
        assert caught.value.code is ErrorCode.REQUEST_INVALID

    def test_server_that_issued_certificates_does_not_start_without_its_authority(
        self, store, tmp_path
    ):
        facts = CertificateFacts(
            serial="1", subject="device:ab", role="device", key_digest="", not_before=0, not_after=1
        )
        store.add_certificate(facts)
        config = ServerConfig(folder=tmp_path)

        with pytest.raises(AuthorityError, match="restore it from a backup"):
            open_identity(config, store=store, board=None, offload=None)

    def test_authority_is_not_left_aside_by_insecure(self, store, tmp_path):
        config = ServerConfig(folder=tmp_path, insecure=True)
        Authority.create(config.identity_folder, hosts=["localhost"])

        with pytest.raises(AuthorityError, match="leave out --insecure"):
            open_identity(config, store=store, board=None, offload=None)


class TestSubjects:
    @given(st.text())
    def test_only_subjects_pass(self, text):
        assert from_uri(text) is None or is_subject(from_uri(text))
        assert not is_subject(text) or from_uri(to_uri(text)) == text

    @pytest.mark.parametrize("text", ["device:../x", "operator:", "operator:a b", "device:AB", ""])
    def test_what_could_be_a_path_is_none(self, text):
        assert not is_subject(text)

    def test_roles_include_the_ones_before(self):
        for wanted in OPERATOR_ROLES:
            assert [r for r in OPERATOR_ROLES if r.includes(wanted)] == list(
                OPERATOR_ROLES[OPERATOR_ROLES.index(wanted) :]
            )
            assert not wanted.includes(Role.DEVICE)
            assert not Role.DEVICE.includes(wanted)


class TestPackages:
    def test_signature_is_the_authoritys_over_the_digest(self, authority):
        check_package(DIGEST, authority.sign_package(DIGEST), authority.package_key)

    def test_package_that_is_tampered_with_is_refused(self, authority, tmp_path):
        other = Authority.create(tmp_path / "other", hosts=["localhost"])
        signature = authority.sign_package(DIGEST)
        plain = ed25519.Ed25519PrivateKey.generate().sign(PACKAGE_SIGNATURE_CONTEXT)

        for digest, given_, key in [
            ("b" * 64, signature, authority.package_key),
            (DIGEST, signature, other.package_key),
            (DIGEST, b"", authority.package_key),
            (DIGEST, signature[:-1], authority.package_key),
            (DIGEST, plain, authority.package_key),
            (DIGEST, signature, b"short"),
        ]:
            with pytest.raises(PackageSignatureError):
                check_package(digest, given_, key)

    def test_certificate_is_renewed_when_a_third_is_left(self, authority):
        key = requested_key(signing_request(new_key()))
        pem, facts = authority.issue_client("device:ab", key, role="device", days=90)
        length = facts.not_after - facts.not_before

        assert not is_renewal_due(pem, facts.not_after - length * 0.34)
        assert is_renewal_due(pem, facts.not_after - length * 0.33)
        assert is_renewal_due(pem, facts.not_after + 1)


class TestAudit:
    def test_lines_at_the_same_time_are_all_written_in_order(self, store):
        async def note_many():
            offload = Offload()
            log = AuditLog(store, offload)
            await asyncio.gather(*(log.note(line(n)) for n in range(50)))
            offload.close()

        asyncio.run(note_many())
        rows = list(store.audit())
        assert [row.subject for row in rows] == [f"blob:{n}" for n in range(50)]
        assert verify(rows).broken is None

    def test_line_from_outside_is_short_and_plain(self, store):
        async def note():
            offload = Offload()
            text = "a\x1b[2J\n" + "x" * 10_000
            await AuditLog(store, offload).note(AuditLine(actor=text, action="t", detail=text))
            offload.close()

        asyncio.run(note())
        (row,) = store.audit()
        assert row.detail.isprintable()
        assert len(row.detail) == 300

    def test_refusals_without_end_fill_no_disk(self, store):
        async def refuse(count):
            offload = Offload()
            log = AuditLog(store, offload)
            for _ in range(count):
                await log.refused(AuditLine(actor="unknown:x", action="NextTask", outcome="NO"))
            offload.close()

        asyncio.run(refuse(5_000))
        assert 200 <= len(list(store.audit())) < 1_000

    @pytest.mark.parametrize("column", ["actor", "subject", "outcome", "detail", "time", "digest"])
    def test_change_of_a_line_shows(self, store, tmp_path, column):
        store.append_audit([line(n) for n in range(3)])
        tamper(tmp_path, f"UPDATE audit SET {column} = '1' WHERE sequence = 2")

        assert verify(store.audit()).broken == 2

    def test_lines_that_are_gone_show(self, store, tmp_path):
        store.append_audit([line(n) for n in range(3)])
        tamper(tmp_path, "DELETE FROM audit WHERE sequence = 2")

        assert verify(store.audit()).broken == 2

    def test_lines_cut_off_at_the_end_show_in_the_head(self, store, tmp_path):
        store.append_audit([line(n) for n in range(3)])
        before = verify(store.audit()).head
        tamper(tmp_path, "DELETE FROM audit WHERE sequence = 3")

        after = verify(store.audit())
        assert (after.broken, after.head.lines) == (None, 2)
        assert after.head != before


def tamper(folder, statement):
    """Change the log as somebody who owns the file can: without the triggers."""
    engine = create_engine(f"sqlite:///{folder / 'test.sqlite'}")
    with engine.begin() as connection:
        for change in ("update", "delete"):
            connection.execute(text(f"DROP TRIGGER audit_no_{change}"))
        connection.execute(text(statement))
    engine.dispose()


def test_rate_limiter_refills_and_keeps_callers_apart():
    now = [0.0]
    limiter = RateLimiter(rate=2.0, burst=3.0, clock=lambda: now[0])

    assert [limiter.wait_seconds("a") for _ in range(3)] == [0, 0, 0]
    assert limiter.wait_seconds("a") == 0.5
    assert limiter.wait_seconds("b") == 0
    now[0] = 0.5
    assert limiter.wait_seconds("a") == 0
    assert limiter.wait_seconds("a") == 0.5
