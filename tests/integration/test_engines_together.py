# SPDX-License-Identifier: Apache-2.0
"""Devices with different runtimes in one round."""

from __future__ import annotations

import contextlib
import os

import pytest
from tests.integration.processes import ROOT, Server, make_devices

pytest.importorskip("torch", reason="the packages are compiled with torch")

pytestmark = pytest.mark.slow


@pytest.mark.skipif(
    "LORIKIT_TRAINING_PYTHON" not in os.environ,
    reason="LORIKIT_TRAINING_PYTHON names no interpreter with onnxruntime-training",
)
def test_onnx_training_takes_part_beside_onnx(survival, undisturbed, compiled, tmp_path):
    config = survival.model_copy(update={"rounds": 1})
    with contextlib.ExitStack() as running:
        server = running.enter_context(Server(tmp_path / "server", compiled=compiled).start())
        server.create(config)
        devices = make_devices(tmp_path, server.address)
        devices[0].python = os.environ["LORIKIT_TRAINING_PYTHON"]
        devices[0].engine = "onnx-training"
        parts = os.pathsep.join(str(ROOT / part) for part in ("proto", "quantization", "sdk"))
        devices[0].environment = {"PYTHONPATH": parts}
        for device in devices:
            running.enter_context(device.start())
        summary = server.ended(config.name)
        codes = [device.process.wait() for device in devices]

        assert (summary.state, codes) == ("finished", [0, 0, 0]), summary
        (entry,) = server.report(config.name)["rounds"]
        engines = {device["class"]: device["engine"] for device in entry["devices"]}
        assert engines == {"device-0": "onnx-training", "device-1": "onnx", "device-2": "onnx"}
        assert {device["status"] for device in entry["devices"]} == {"done"}
        # The two runtimes add in different orders; Adam makes much of the smallest gradients.
        assert entry["loss"] == pytest.approx(undisturbed.losses[0], rel=1e-2)
