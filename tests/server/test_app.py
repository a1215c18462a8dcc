# SPDX-License-Identifier: Apache-2.0
"""The server as a whole: as a context, as a process, over TLS."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.server.federation import run_config, server_config, start_server

from lorikit.server.app import Server, ServerError
from lorikit.server.config import ConfigError
from lorikit.server.errors import RequestError


def is_healthy(channel):
    answer = health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(), timeout=20, wait_for_ready=True
    )
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def test_server_is_a_context(tmp_path):
    with Server(folder=tmp_path, address="localhost:0") as server:
        with grpc.insecure_channel(server.address) as channel:
            assert is_healthy(channel)
        with pytest.raises(ServerError, match="running already"):
            server.start()
    with pytest.raises(ServerError, match="not running"):
        _ = server.address


def test_wrong_setting_is_named(tmp_path):
    with pytest.raises(ConfigError, match="port is not a setting"):
        Server(folder=tmp_path, port=5)


def test_address_that_is_taken_is_named(tmp_path):
    with start_server(server_config(tmp_path / "a")) as server:
        second = Server(server_config(tmp_path / "b", address=server.address))
        with pytest.raises(ServerError, match="is another server running there"):
            second.start()


def test_run_that_cannot_work_is_refused_at_once(tmp_path):
    with (
        Server(folder=tmp_path, address="localhost:0") as server,
        pytest.raises(RequestError, match=r"holds no config\.json"),
    ):
        server.create_run(run_config(tmp_path))


def test_wait_gives_up_after_its_time(tmp_path):
    with start_server(server_config(tmp_path / "runs")) as server:
        server.create_run(run_config(tmp_path))
        with pytest.raises(TimeoutError):
            server.wait("test", timeout=0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_serves_until_a_signal_comes(tmp_path, number):
    settings = tmp_path / "server.toml"
    settings.write_text('folder = "runs"\naddress = "localhost:0"\nstop_seconds = 0.1\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "lorikit.server", str(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    with grpc.insecure_channel(address) as channel:
        assert is_healthy(channel)
    process.send_signal(number)
    _, log = process.communicate(timeout=30)

    assert process.returncode == 0, log
    assert "stopped" in log
    assert "Traceback" not in log
    assert (tmp_path / "runs" / ".server" / "lorikit.sqlite").exists()


def test_process_says_what_is_wrong_with_its_settings(tmp_path):
    settings = tmp_path / "server.toml"
    settings.write_text('address = "0.0.0.0:1"\n')
    command = [sys.executable, "-m", "lorikit.server", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "lorikit certs init" in done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_server_speaks_tls(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 "
        f"-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout {key} "
        f"-out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    config = server_config(tmp_path / "runs", tls_certificate=certificate, tls_key=key)
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())

    with start_server(config) as server:
        with grpc.secure_channel(server.address, credentials) as channel:
            assert is_healthy(channel)
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)


def test_certificate_that_is_missing_is_named(tmp_path):
    config = server_config(
        tmp_path, tls_certificate=tmp_path / "none.pem", tls_key=tmp_path / "none.key"
    )

    with pytest.raises(ServerError, match=r"none\.key"):
        start_server(config)
