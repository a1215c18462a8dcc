# SPDX-License-Identifier: Apache-2.0
"""The README's two examples, run against each other as they stand."""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the server's example compiles a model")
pytest.importorskip("onnxruntime", reason="the device's example trains on the onnx engine")

README = Path(__file__).parent.parent / "README.md"


def example(name: str) -> str:
    pattern = rf"<!-- executed by tests/test_readme\.py: {name} -->\n```python\n(.*?)```"
    (code,) = re.findall(pattern, README.read_text(), flags=re.DOTALL)
    return code


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_the_device_and_server_examples_finish_a_run_together(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = f"localhost:{unused_port()}"
    server = example("server").replace("localhost:50051", address)
    server = server.replace('"runs"', repr(str(tmp_path / "runs")))
    server = server.replace('"all-MiniLM-L6-v2"', repr(str(tiny_model)))
    device = example("device").replace("localhost:50051", address)
    device = device.replace("~/.myapp/lorikit", str(tmp_path / "device"))

    thread = threading.Thread(
        target=exec, args=(compile(server, "README server", "exec"), {}), daemon=True
    )
    thread.start()
    exec(compile(device, "README device", "exec"), {})
    thread.join(timeout=120)

    out = capsys.readouterr().out
    assert not thread.is_alive()
    assert "finished" in out
    assert re.search(r"\[Prediction\(label='(ask|book|cancel)', probability=0\.\d+\)\]", out)
    assert (tmp_path / "runs" / "intents" / "adapter" / "rank-8" / "adapter_config.json").is_file()


def test_the_examples_are_as_short_as_the_headings_say() -> None:
    lines = {name: len(example(name).strip().splitlines()) for name in ("device", "server")}

    assert lines["device"] <= 11
    assert lines["server"] <= 7


def test_every_link_of_the_readme_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text())

    missing = [target for target in targets if not (README.parent / target).exists()]

    assert missing == []
