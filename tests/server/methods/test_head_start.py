# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.server.methods import METHODS, build_method
from lorikit.server.methods.base import (
    AdapterSpace,
    Assignment,
    Contribution,
    Participant,
    State,
)
from lorikit.server.methods.head_start import (
    HeadStart,
    HeadStartConfig,
    head_from_means,
    is_waiting,
    linear_head,
    scale_for,
)

Devices = Callable[..., Participant]
RNG = np.random.default_rng(0)


def sums_of(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one_hot = np.eye(3)[labels]
    return one_hot.T @ features, one_hot.sum(axis=0)


def update(assignment: Assignment, features: np.ndarray, labels: np.ndarray) -> Contribution:
    sums, counts = sums_of(features, labels)
    return Contribution(
        device_id=assignment.device_id,
        assignment=assignment,
        tensors={
            "statistics.class_sums": sums.astype(np.float32),
            "statistics.class_counts": counts.astype(np.float32),
        },
        scalars={},
        examples=len(labels),
    )


def clusters(rng: np.random.Generator, count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Three classes around means of different lengths, far from the origin."""
    means = np.array([[9, 0, 0, 0, 1], [9, 3, 0, 0, 0], [9, 0, 6, 0, 0]], float)
    labels = rng.integers(3, size=count)
    return means[labels] + 0.3 * rng.normal(size=(count, 5)), labels


def test_the_first_round_asks_for_class_sums_only(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = HeadStart(build_method("fedra"), HeadStartConfig(max_examples=100))
    state = method.start(space, initial)

    [work] = method.assign(state, space, 0, [device("a", max_layers=1)], RNG)

    assert is_waiting(state)
    assert not work.train
    assert not work.train_head
    assert work.trained_layers == ()
    assert work.kept_layers == (0, 1, 2, 3)  # features of the whole model, even for FedRA
    [operation] = work.operations
    assert (operation.name, dict(operation.arguments)) == ("class_sums", {"max_examples": 100})
    sent = method.broadcast(state, space, work)
    assert all(sent[a.name].shape[0] == 1 for a, _ in space.pairs())  # nothing lost: B is 0
    assert not any(sent[b.name].any() for _, b in space.pairs())


def test_an_adapter_that_was_trained_before_is_sent_in_full(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = HeadStart(build_method("fedit"))
    trained = {name: values + 1 for name, values in initial.items()}
    state = method.start(space, trained)
    [work] = method.assign(state, space, 0, [device("a")], RNG)

    sent = method.broadcast(state, space, work)

    assert all(np.array_equal(sent[name], trained[name]) for name in trained)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_later_rounds_are_those_of_the_method(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    inner = build_method(name)
    method = HeadStart(inner)
    state = method.start(space, initial)
    cohort = [device("a"), device("b", max_depth=2, max_layers=2, max_rank=3)]
    work = method.assign(state, space, 0, cohort, RNG)
    updates = [update(a, *clusters(np.random.default_rng(i))) for i, a in enumerate(work)]

    state = method.aggregate(state, space, updates)

    assert not is_waiting(state)
    expected = inner.assign(state, space, 0, cohort, np.random.default_rng(4))
    got = method.assign(state, space, 1, cohort, np.random.default_rng(4))
    assert got == expected
    received = method.broadcast(state, space, got[1])
    wanted = inner.broadcast(state, space, got[1])
    assert all(np.array_equal(received[n], wanted[n]) for n in wanted)
    assert np.array_equal(
        method.global_adapter(state, space)["classifier.weight"],
        state.tensors["classifier.weight"],
    )


@pytest.mark.parametrize("rule", ["cosine", "nearest-mean"])
def test_devices_with_one_class_each_give_the_head_of_pooled_data(
    rule: str, space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    config = HeadStartConfig(rule=rule)  # type: ignore[arg-type]  # parametrized
    method = HeadStart(build_method("fedit"), config)
    state = method.start(space, initial)
    features, labels = clusters(np.random.default_rng(1))
    work = method.assign(state, space, 0, [device(f"d{i}") for i in range(3)], RNG)

    state = method.aggregate(
        state,
        space,
        [update(a, features[labels == i], labels[labels == i]) for i, a in enumerate(work)],
    )

    pooled = head_from_means(*sums_of(features, labels), config)
    np.testing.assert_allclose(state.tensors["classifier.weight"], pooled[0], rtol=1e-4)
    np.testing.assert_allclose(state.tensors["classifier.bias"], pooled[1], rtol=1e-4)
    logits = features @ state.tensors["classifier.weight"].T + state.tensors["classifier.bias"]
    assert (logits.argmax(axis=1) == labels).mean() > 0.99


def test_sums_of_sub_models_count_only_without_sums_of_the_whole(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = HeadStart(build_method("fedra"))
    state = method.start(space, initial)
    cohort = [device("whole"), device("part", max_depth=0, max_layers=2)]
    work = method.assign(state, space, 0, cohort, RNG)
    whole, part = (update(a, *clusters(np.random.default_rng(i))) for i, a in enumerate(work))

    both = method.aggregate(state, space, [whole, part]).tensors["classifier.weight"]
    first = method.aggregate(state, space, [whole]).tensors["classifier.weight"]
    second = method.aggregate(state, space, [part]).tensors["classifier.weight"]

    assert part.assignment.kept_layers == (2, 3)
    sent = method.broadcast(state, space, part.assignment)
    assert {t.layer for t in space.tensors if t.name in sent} == {-1, 2, 3}
    assert np.array_equal(both, first)
    assert not np.array_equal(both, second)


def test_nearest_mean_is_nearest_mean() -> None:
    rng = np.random.default_rng(2)
    features, labels = clusters(rng)
    sums, counts = sums_of(features, labels)
    means = sums / counts[:, None]

    w, b = head_from_means(sums, counts, HeadStartConfig(rule="nearest-mean", scale=1.0))

    points = rng.normal(size=(50, 5)) * 5
    distances = -((points[:, None] - means[None]) ** 2).sum(axis=2) / 2
    logits = points @ w.T + b
    np.testing.assert_allclose(
        logits - logits.mean(axis=1, keepdims=True),
        distances - distances.mean(axis=1, keepdims=True),
        atol=1e-9,
    )


def test_cosine_gives_every_class_a_row_of_length_kappa_around_the_mean() -> None:
    features, labels = clusters(np.random.default_rng(2))
    sums, counts = sums_of(features, labels)
    centre = (sums / counts[:, None]).mean(axis=0)

    w, b = head_from_means(sums, counts, HeadStartConfig(scale=7.0))

    np.testing.assert_allclose(np.linalg.norm(w, axis=1), 7.0)
    np.testing.assert_allclose(w @ centre + b, 0, atol=1e-9)


@pytest.mark.parametrize("rule", ["cosine", "nearest-mean"])
@pytest.mark.parametrize("confidence", [0.4, 0.9])
def test_logits_are_as_sure_as_asked_at_the_class_means(rule: str, confidence: float) -> None:
    features, labels = clusters(np.random.default_rng(2))
    sums, counts = sums_of(features, labels)
    config = HeadStartConfig(rule=rule, confidence=confidence)  # type: ignore[arg-type]  # parametrized

    w, b = head_from_means(sums, counts, config)

    odds = np.exp(sums / counts[:, None] @ w.T + b)
    own = np.diag(odds) / odds.sum(axis=1)
    assert own.mean() == pytest.approx(confidence, rel=1e-6)


def test_a_class_nobody_has_stands_at_the_mean_of_all() -> None:
    features, labels = clusters(np.random.default_rng(3))
    sums, counts = sums_of(features[labels < 2], labels[labels < 2])

    w, b = head_from_means(sums, counts, HeadStartConfig())

    assert not w[2].any()
    assert b[2] == 0
    seen = features[labels < 2] @ w.T + b
    assert (seen.argmax(axis=1) == labels[labels < 2]).mean() > 0.99


def test_a_head_without_bias_uses_the_means_as_they_are() -> None:
    sums, counts = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([1.0, 2.0])

    w, b = head_from_means(sums, counts, HeadStartConfig(scale=10.0), with_bias=False)

    np.testing.assert_allclose(w, [[6, 8], [0, 10]])
    assert not b.any()


def test_one_class_or_equal_means_do_no_harm() -> None:
    one = head_from_means(np.array([[1.0, 2.0]]), np.array([3.0]), HeadStartConfig())
    same = head_from_means(np.ones((2, 2)), np.ones(2), HeadStartConfig())

    assert np.isfinite(one[0]).all()
    assert not same[0].any()
    assert scale_for(np.zeros((1, 1)), 0.9) == 1.0


def test_a_round_without_examples_is_asked_again(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = HeadStart(build_method("legend"))
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a")], RNG)
    nothing = update(work, np.zeros((0, 5)), np.zeros(0, int))

    state = method.aggregate(state, space, [nothing])

    assert is_waiting(state)
    assert np.array_equal(state.tensors["classifier.weight"], initial["classifier.weight"])
    [again] = method.assign(state, space, 1, [device("a")], RNG)
    assert not again.train


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("statistics.class_sums", np.zeros((1, 5))),
        ("statistics.class_counts", np.array([1.0, -1.0, 2.0])),
        ("statistics.class_counts", np.array([1.0, 2.0])),
    ],
)
def test_statistics_that_are_none_are_refused_by_device(
    name: str, values: np.ndarray, space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = HeadStart(build_method("fedit"))
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a")], RNG)
    good = update(work, *clusters(np.random.default_rng(0)))
    bad = replace(good, tensors={**good.tensors, name: values.astype(np.float32)})

    with pytest.raises(ValueError, match=rf"a: {name}"):
        method.aggregate(state, space, [bad])


def test_a_head_of_two_maps_is_refused(space: AdapterSpace, initial: Tensors) -> None:
    extra = AdapterTensor(
        name="classifier.dense.weight",
        role="head",
        module="classifier.dense",
        layer=-1,
        shape=(5, 5),
        trained=True,
    )
    wide = replace(space, tensors=(*space.tensors, extra))

    with pytest.raises(ValueError, match=r"classifier\.dense\.weight; run without"):
        HeadStart(build_method("fedit")).start(wide, initial)
    assert linear_head(space)[0].name == "classifier.weight"


@pytest.mark.parametrize(
    "options",
    [{"rule": "lda"}, {"confidence": 1.0}, {"scale": -1.0}, {"max_examples": -3}],
)
def test_bad_options_are_refused_with_their_value(options: dict[str, object]) -> None:
    [value] = options.values()
    with pytest.raises(ValueError, match=str(value)):
        HeadStartConfig(**options)  # type: ignore[arg-type]  # wrong on purpose


def test_a_state_without_a_head_start_is_just_a_state(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    inner = build_method("fedit")
    state: State = inner.start(space, initial)

    assert not is_waiting(state)
    assert HeadStart(inner).assign(state, space, 3, [device("a")], RNG)[0].train


def test_the_discriminant_rule_is_pooled_linear_discriminant_analysis(
    rng: np.random.Generator,
) -> None:
    features, labels = clusters(rng)
    features[:, 0] *= 20  # a direction that says nothing must not drown the others
    sums, counts = sums_of(features, labels)
    config = HeadStartConfig(rule="discriminant", scale=1.0, shrinkage=1e-6)

    weight, bias = head_from_means(sums, counts, config, moments=features.T @ features)

    means = sums / counts[:, None]
    spread = features - means[labels]
    inverse = np.linalg.inv(spread.T @ spread / len(labels))
    distances = np.stack(
        [np.einsum("nd,de,ne->n", features - m, inverse, features - m) for m in means]
    )
    logits = features @ weight.T + bias
    # Up to a term common to all classes a logit is minus half the squared Mahalanobis distance.
    differences = (logits[:, 1:] - logits[:, :1]) + (distances[1:] - distances[:1]).T / 2
    np.testing.assert_allclose(differences, 0, atol=1e-2 * np.abs(distances).max())
    assert (logits.argmax(axis=1) == labels).mean() > 0.99


def test_the_discriminant_rule_asks_for_second_moments(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = HeadStart(build_method("fedit"), HeadStartConfig(rule="discriminant"))
    state = method.start(space, initial)

    (assignment,) = method.assign(state, space, 0, [device("a")], RNG)

    assert assignment.operations[0].arguments["second_moments"] is True


def test_the_discriminant_rule_refuses_to_guess_without_moments() -> None:
    with pytest.raises(ValueError, match="second moments"):
        head_from_means(np.ones((2, 3)), np.ones(2), HeadStartConfig(rule="discriminant"))
