# SPDX-License-Identifier: Apache-2.0
"""Settings are checked before anything starts, and say what is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from lorikit.proto.manifest import Task
from lorikit.proto.status import ErrorCode
from lorikit.server.app import check_run, make_method
from lorikit.server.config import (
    ConfigError,
    RunConfig,
    ServerConfig,
    explain,
    parse_run_config,
    read_evaluation_data,
    read_run_config,
    read_server_config,
)
from lorikit.server.errors import RequestError
from lorikit.server.identity.authority import Authority

FIELDS = {"name": "intents", "model": "models/mini", "labels": ["a", "b"], "rounds": 2}
TASK = Task(kind="sequence-classification", labels=("yes", "no"))


def config(**changes):
    return RunConfig.model_validate({**FIELDS, **changes})


def complaint(kind=RunConfig, **changes):
    fields = {**FIELDS, **changes} if kind is RunConfig else changes
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields)
    return explain(caught.value)


def test_equal_settings_have_equal_text():
    assert config().canonical() == config(seed=0).canonical()
    assert config().canonical() != config(seed=1).canonical()


def test_settings_survive_text():
    before = config(
        method="hetlora",
        method_options={"gamma": 0.9},
        optimizer={"learning_rate": 0.01, "schedule": "cosine"},
        evaluation_data="test.jsonl",
    )

    assert parse_run_config(before.canonical()) == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rounds": 0}, "rounds: Input should be greater than or equal to 1, got 0"),
        ({"epochs": 3}, "epochs is not a setting; remove it or correct its name"),
        ({"name": "../x"}, "name: "),
        ({"labels": ["a"]}, "labels: sequence-classification needs at least 2"),
        ({"task_kind": "causal-language-modeling"}, "has none, got 2; drop them"),
        (
            {"task_kind": "token-classification", "evaluation_data": "x.jsonl"},
            "does not measure token-classification; drop it and set evaluate_on_devices",
        ),
        ({"labels": ["a", "a"]}, "labels: lists 'a' more than once"),
        ({"adapter": "ia3", "lora_dropout": 0.1}, "lora_dropout: ia3 has none, got 0.1; set 0"),
        ({"min_rank": 9}, "min_rank 9 exceeds max_rank 8"),
        ({"min_updates": 3}, "min_updates 3 exceeds min_devices 2"),
        ({"optimizer": {"name": "lion"}}, "name must be adamw, sgd or mezo, got 'lion'"),
        ({"optimizer": {"rate": 1}}, "optimizer.rate is not a setting"),
        ({"precisions": ["int3"]}, "precisions.0: "),
        ({"deadline_seconds": float("inf")}, "deadline_seconds: "),
    ],
)
def test_wrong_value_is_named(changes, sentence):
    assert sentence in complaint(**changes)


def test_missing_value_is_named():
    with pytest.raises(RequestError, match="model is missing") as caught:
        parse_run_config('{"name": "x", "labels": ["a", "b"], "rounds": 1}')

    assert caught.value.code is ErrorCode.CONFIG_INVALID


def test_minimum_of_updates_follows_from_the_devices():
    assert [config(min_devices=n).needed_updates for n in (1, 2, 5)] == [1, 1, 3]
    assert config(min_devices=5, min_updates=4).needed_updates == 4


def test_paths_start_at_the_file(tmp_path):
    (tmp_path / "run.toml").write_text(
        'name = "x"\nmodel = "mini"\nlabels = ["a", "b"]\nrounds = 1\n'
        'evaluation_data = "/data/test.jsonl"\n[optimizer]\nlearning_rate = 0.01\n'
    )
    read = read_run_config(tmp_path / "run.toml", rounds=5)

    assert read.model == tmp_path / "mini"
    assert read.evaluation_data == Path("/data/test.jsonl")
    assert (read.rounds, read.optimizer.learning_rate) == (5, 0.01)


@pytest.mark.parametrize("text", [None, "rounds = = 1", "rounds = 0"])
def test_unusable_file_is_named(tmp_path, text):
    path = tmp_path / "run.toml"
    if text is not None:
        path.write_text(text)

    with pytest.raises(ConfigError, match=r"run\.toml"):
        read_run_config(path)


def test_server_settings_from_a_file(tmp_path):
    (tmp_path / "server.toml").write_text(
        'folder = "results"\nlease_seconds = 5\n[limits]\nmax_uploads = 3\n'
    )
    read = read_server_config(tmp_path / "server.toml", address="localhost:0")

    assert read.folder == tmp_path / "results"
    assert (read.lease_seconds, read.limits.max_uploads) == (5.0, 3)
    assert read.database_url == f"sqlite:///{tmp_path}/results/.server/lorikit.sqlite"


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/tmp/x"])
def test_plain_text_is_allowed_on_this_machine(address):
    assert ServerConfig(address=address).address == address


@pytest.mark.parametrize("address", ["0.0.0.0:1", "example.org:1", "[::]:1", "192.168.0.7:1"])
def test_plain_text_that_others_can_reach_is_refused(address):
    assert "lorikit certs init" in complaint(ServerConfig, address=address)
    assert "lorikit certs init" in complaint(ServerConfig, address=address, insecure=True)


def test_address_that_others_can_reach_is_taken_with_an_authority(tmp_path):
    Authority.create(ServerConfig(folder=tmp_path).identity_folder, hosts=["example.org"])

    assert ServerConfig(folder=tmp_path, address="0.0.0.0:1").has_authority


def test_certificate_needs_its_key():
    assert "set both or neither" in complaint(ServerConfig, tls_key="key.pem")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_rows_become_texts_and_class_numbers(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    text = '{"text": "ok", "label": "yes"}\n\n{"text": "never", "label": "no", "x": 1}\n'
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())

    data = read_evaluation_data(path, TASK)

    assert (data.texts, data.labels) == (["ok", "never"], [0, 1])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"text": "a", "label": "maybe"}', "line 1: 'maybe' in column 'label' is not one of"),
        ('{"label": "yes"}', "line 1: column 'text' holds no text"),
        ('{"text": "a", "label": "yes"}\n{"te', "line 2 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ("", "holds no rows"),
    ],
)
def test_unusable_rows_are_named(tmp_path, text, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)

    with pytest.raises(ConfigError, match=sentence.replace("[", r"\[")):
        read_evaluation_data(path, TASK)


@pytest.mark.parametrize("name", ["none.jsonl", "broken.jsonl.gz"])
def test_unreadable_rows_are_named(tmp_path, name):
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"x" * 100)[:20])

    with pytest.raises(ConfigError, match="cannot read evaluation_data"):
        read_evaluation_data(tmp_path / name, TASK)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_run_that_can_work_is_let_through(model):
    rows = model / "rows.jsonl"
    rows.write_text(json.dumps({"text": "x", "label": "a"}))

    check_run(config(model=model, evaluation_data=rows))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "/nowhere"}, "/nowhere holds no config.json"),
        ({"method": "fedmagic"}, "no method 'fedmagic'"),
        ({"method_options": {"magic": 1}}, "no option magic"),
        ({"codec": "int5"}, "unknown wire scheme 'int5'"),
        ({"codec": "int4", "codec_options": {"delt": 1}}, "codec_options: 'delt' is unknown"),
        ({"codec": "int4", "codec_options": {"rotation_block": 3}}, "a power of two"),
        (
            {"codec": "int4", "codec_options": {"delta": "no"}},
            "codec_options: delta must be of type bool, got 'no'",
        ),
        ({"codec": "int4", "codec_options": {"rotation_block": True}}, "must be of type int"),
        ({"codec": "adaptive"}, "adaptive needs budget_bytes"),
        (
            {"codec": "int4", "method": "flexlora", "codec_options": {"error_feedback": True}},
            "does not go with method flexlora",
        ),
        ({"evaluation_data": "/nowhere.jsonl"}, "cannot read evaluation_data"),
        (
            {"server_optimizer": "adam", "server_optimizer_options": {"momentum": 1}},
            "server_optimizer_options has no momentum",
        ),
        ({"method": "flexlora", "server_optimizer": "adam"}, "flexlora makes new factors"),
        (
            {"method": "flora", "adapter": "ia3"},
            "FLoRA changes the base beside LoRA, and 'ia3' has no LoRA modules; set lora, or use",
        ),
    ],
)
def test_run_that_cannot_work_is_refused(model, changes, sentence):
    with pytest.raises(RequestError) as caught:
        check_run(config(**{"model": model, **changes}))

    assert caught.value.code is ErrorCode.CONFIG_INVALID
    assert sentence in caught.value.detail


def test_wrappers_are_put_around_the_method():
    plain = make_method(config(method="hetlora"))
    wrapped = make_method(
        config(
            method="hetlora",
            server_optimizer="momentum",
            server_optimizer_options={"beta1": 0.5, "roles": ["head"]},
            head_start="class-means",
            head_start_options={"rule": "nearest-mean"},
        )
    )

    assert type(plain).__name__ == "HetLoRA"
    assert type(wrapped).__name__ == "HeadStart"
    assert wrapped.method.config.beta1 == 0.5
    assert wrapped.method.config.roles == ("head",)
