# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorikit.server.compile import Compiler, calibration
from lorikit.server.compile.calibration import input_moments, synthetic_batches
from lorikit.server.methods.base_correction import CorrectionConfig
from lorikit.server.methods.corrections import build_correction

PRECISIONS = ("fp32", "fp16", "int8", "int4", "nf4")


def modules(compiler: Compiler) -> list[str]:
    return [a.module for a, _ in compiler.space(4).pairs()]


def test_errors_are_those_of_the_weights_that_devices_compute_with(compiler: Compiler) -> None:
    bases = compiler.bases(PRECISIONS)

    for module in modules(compiler)[:3]:
        assert not bases.error("fp32", module).any()
        size = np.linalg.norm(bases.weights(module))
        assert 0 < np.linalg.norm(bases.error("fp16", module)) < 1e-3 * size
        assert 1e-3 * size < np.linalg.norm(bases.error("int8", module)) < 2e-2 * size
        assert 5e-2 * size < np.linalg.norm(bases.error("nf4", module)) < 0.2 * size


def test_moments_are_those_of_what_torch_feeds_the_modules(compiler: Compiler) -> None:
    model = compiler._model
    batches = list(synthetic_batches(model))[:2]
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        model.module.get_submodule(module).register_forward_hook(
            lambda _, given, __, module=module: seen.setdefault(module, []).append(given[0])
        )
        for module in modules(compiler)
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model.forward({n: torch.from_numpy(np.asarray(v)) for n, v in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()

    moments = input_moments(
        compiler._forward,
        model,
        compiler._base("fp32"),
        iter(batches),
        adapter=compiler.initial(1, 0),
        folder=compiler.blobs.folder,
    )

    assert set(moments) == set(modules(compiler))
    # Of the last layer a classifier reads one row, so that the graph computes no other.
    below = [m for m in seen if compiler._model.architecture.layer_of(m) < compiler.layer_count - 1]
    assert below
    for module in below:
        given = seen[module]
        x = torch.cat([each.reshape(-1, each.shape[-1]) for each in given]).double().numpy()
        expected = x.T @ x
        np.testing.assert_allclose(
            moments[module], expected, atol=1e-4 * np.abs(expected).max(), err_msg=module
        )


def test_modules_that_read_one_value_share_its_moments(compiler: Compiler) -> None:
    bases = compiler.bases(PRECISIONS)
    query, key = (m for m in modules(compiler)[:2])

    assert bases.input_root(query) is bases.input_root(key)


def test_compensators_of_a_compiled_model_leave_less_at_the_outputs(compiler: Compiler) -> None:
    plain, aware = (
        build_correction(
            compiler.bases(PRECISIONS), CorrectionConfig(rank=4, activation_aware=is_aware)
        )
        for is_aware in (False, True)
    )
    chosen = modules(compiler)

    before = aware.relative_error("nf4", chosen)
    assert aware.relative_error("nf4", chosen, is_corrected=True) < 0.9 * before
    assert aware.relative_error("nf4", chosen, is_corrected=True) < plain.relative_error(
        "nf4", chosen, is_corrected=True
    )


def test_moments_that_are_too_large_are_not_kept(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOST_BYTES", 1000)

    assert compiler.bases(PRECISIONS).input_root(modules(compiler)[0]) is None


def test_nothing_of_the_calibration_stays_beside_the_blobs(compiler: Compiler) -> None:
    compiler.bases(PRECISIONS).input_root(modules(compiler)[0])

    assert [path for path in Path(compiler.blobs.folder).iterdir() if len(path.name) != 64] == []
