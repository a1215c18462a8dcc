# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.sdk.test_client import Federation
from tests.sdk.tiny_tasks import WORDS, adapter, language_package, local_model

from lorikit.sdk import Client
from lorikit.sdk import __main__ as runner

pytest.importorskip("onnxruntime", reason="the example trains on the onnx engine")

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_example_of_the_page_runs_as_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example, *_ = _examples()
    folder = tmp_path / "server"
    folder.mkdir()
    with Federation(folder) as server:
        server.offer_task()
        server.offer_end()
        code = example.replace("localhost:50051", server.address)
        code = code.replace("~/.myapp/lorikit", str(tmp_path / "device"))

        exec(compile(code, str(PAGE), "exec"), {})

    out = capsys.readouterr().out
    assert "step 12 of 12, loss" in out
    assert "round 1 done, peak memory" in out
    assert re.search(r"\[Prediction\(label='(ask|book|cancel)', probability=0\.\d+\)\]", out)
    assert "'examples': 3.0" in out


def test_texts_are_continued_as_the_page_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, example, _ = _examples()
    manifest, _ = language_package(tmp_path)
    local_model(tmp_path, manifest, adapter(len(WORDS)))

    with Client("localhost:9", [], store=tmp_path / "store", insecure=True) as client:
        exec(compile(example, str(PAGE), "exec"), {"client": client})

    assert re.search(r"( w\d+)+", capsys.readouterr().out)


def test_client_that_is_to_get_a_certificate_is_made_as_the_page_says(tmp_path: Path) -> None:
    *_, example = _examples()
    authority = tmp_path / "authority.pem"
    authority.write_bytes(b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
    code = example.replace("~/.myapp/lorikit", str(tmp_path / "device"))
    names: dict[str, Any] = {"Client": Client, "Path": Path, "rows": [], "token": "t" * 32}

    exec(compile(code.replace("authority.pem", str(authority)), str(PAGE), "exec"), names)

    with names["client"] as client:
        assert isinstance(client, Client)


def test_page_and_help_name_every_exit_code() -> None:
    page = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.MULTILINE)}
    shown = {int(code) for code in re.findall(r"\b(\d+) (?=[a-z])", runner._EPILOG)}

    assert page == shown == {int(code) for code in runner.ExitCode}
