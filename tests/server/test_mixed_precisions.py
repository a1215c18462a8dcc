# SPDX-License-Identifier: Apache-2.0
"""A run whose devices may hold different bases, with the parts that a server makes for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorikit.server.app import correction_of, delta_rank_of, make_method, open_run_parts
from lorikit.server.config import RunConfig
from lorikit.server.methods.base import Assignment, Contribution
from lorikit.server.methods.corrected import Corrected, drift_of
from lorikit.server.store.blobs import FolderBlobs

RANK = 4


def config(model: Path, **fields: object) -> RunConfig:
    settings = {
        "name": "mixed",
        "model": model,
        "labels": ("a", "b", "c"),
        "rounds": 1,
        "max_rank": RANK,
        "precisions": ("int8", "nf4"),
        **fields,
    }
    return RunConfig.model_validate(settings)


def test_a_run_with_different_bases_gives_compensators_and_reports_drift(
    tiny_model: Path, tmp_path: Path
) -> None:
    parts = open_run_parts(config(tiny_model), FolderBlobs(tmp_path / "blobs"))
    space = parts.source.space(RANK)
    state = parts.method.start(space, parts.source.initial(RANK, 0))
    layers = tuple(range(space.layer_count))
    updates, given = [], {}
    for precision in ("int8", "nf4"):
        assignment = Assignment(
            device_id=precision,
            ranks={a.module: RANK for a, _ in space.pairs()},
            trained_layers=layers,
            kept_layers=layers,
            precision=precision,
        )
        given[precision] = adapter = parts.method.broadcast(state, space, assignment)
        package = parts.source.package(precision=precision, lowest_trained_layer=0)
        assert {t.name for t in package.manifest.adapter} == set(adapter)
        rng = np.random.default_rng(len(updates))
        updates.append(
            Contribution(
                device_id=precision,
                assignment=assignment,
                tensors={
                    t.name: adapter[t.name]
                    + rng.normal(0, 0.01, adapter[t.name].shape).astype(np.float32)
                    for t in package.manifest.adapter
                    if t.trained
                },
                scalars={},
                examples=10,
            )
        )

    after = parts.method.aggregate(state, space, updates)

    name = f"{space.pairs()[0][0].module}.base_delta_A"
    assert given["nf4"][name].shape[0] == 8
    assert not np.array_equal(given["nf4"][name], given["int8"][name])
    rows = {row["precision"]: row for row in drift_of(after)}
    assert set(rows) == {"int8", "nf4"}
    assert all(row["base_error_after"] < row["base_error"] for row in rows.values())
    whole = parts.method.global_adapter(after, space)
    logits = parts.source.logits(whole, ["w1 w2", "w3"], lora_scale=2.0, max_length=8)
    assert np.isfinite(logits).all()
    parts.export(tmp_path / "adapter", parts.method.global_adapter(after, space, RANK), RANK)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_one_precision_needs_no_correction(tmp_path: Path) -> None:
    same = config(tmp_path, precisions=("int8",))

    assert correction_of(same) is None
    assert delta_rank_of(same) is None


def test_precisions_of_a_class_make_a_run_mixed(tmp_path: Path) -> None:
    mixed = config(tmp_path, precisions=("int8",), class_precisions={"watch": ("nf4",)})

    chosen = correction_of(mixed)

    assert chosen is not None
    assert (chosen.name, delta_rank_of(mixed)) == ("compensator", 8)


@pytest.mark.parametrize(
    ("method", "options", "rank"),
    [("fedit", {}, 8), ("flora", {"delta_rank": 5}, 13), ("flora", {"delta_rank": 0}, 0)],
)
def test_packages_have_room_for_the_method_s_change_and_the_compensator(
    tmp_path: Path, method: str, options: dict[str, object], rank: int
) -> None:
    mixed = config(tmp_path, method=method, method_options=options)

    assert delta_rank_of(mixed) == rank


def test_a_correction_without_factors_leaves_packages_as_they_are(tmp_path: Path) -> None:
    assert delta_rank_of(config(tmp_path, base_correction="function-space")) is None


def test_other_adapters_than_lora_are_not_corrected_unless_asked(tmp_path: Path) -> None:
    chosen = correction_of(config(tmp_path, adapter="bitfit"))

    assert chosen is not None
    assert chosen.name == "none"
    with pytest.raises(ValueError, match="a compensator goes with LoRA"):
        correction_of(config(tmp_path, adapter="bitfit", base_correction="compensator"))


def test_a_method_without_bases_is_left_as_it_is(tmp_path: Path) -> None:
    assert not isinstance(make_method(config(tmp_path)), Corrected)


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_correction_options"):
        correction_of(config(tmp_path, base_correction_options={"depth": 3}))
