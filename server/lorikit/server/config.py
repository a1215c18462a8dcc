# SPDX-License-Identifier: Apache-2.0
"""Settings of a server and of a run, read from text and checked before anything else happens."""

from __future__ import annotations

import gzip
import ipaddress
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from lorikit.proto.manifest import Task
from lorikit.proto.plan import OptimizerConfig
from lorikit.proto.status import ErrorCode
from lorikit.server.errors import LorikitError, RequestError
from lorikit.server.methods.base_correction import CorrectionName

_MAX_EVALUATION_LINE = 1 << 20

_MEASURED_HERE = ("sequence-classification", "causal-language-modeling")
"""Tasks that the server can measure on rows of its own."""

TaskKind = Literal[
    "sequence-classification",
    "token-classification",
    "masked-language-modeling",
    "causal-language-modeling",
    "image-classification",
]
AdapterKind = Literal["lora", "dora", "ia3", "prompt", "bottleneck", "bitfit", "head"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Precision = Literal["int4", "nf4", "int8", "fp16", "fp32"]


class ConfigError(LorikitError):
    """Settings cannot be used; the message names field, value and remedy."""


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class RunConfig(_Settings):
    """One federated fine-tuning job: what is trained, by whom, for how long."""

    name: Name
    """Name of the run, unique on the server: letters, digits, dots, dashes, underscores."""

    model: Path
    """Folder of the base model, as Hugging Face writes it, on the server."""

    method: str = "fedit"
    """Federated method by name; ``lorikit methods`` lists them, ``docs/methods.md`` explains
    them."""

    method_options: dict[str, JsonValue] = {}
    """Options of the method by name; see the method's page."""

    task_kind: TaskKind = "sequence-classification"
    """What the model is trained to do."""

    adapter: AdapterKind = "lora"
    """What trains beside the head: ``lora``, ``dora``, ``ia3``, ``prompt`` (soft prompt),
    ``bottleneck`` (adapters), ``bitfit`` (biases), or ``head`` (nothing else)."""

    adapter_size: Annotated[int, Field(ge=1)] = 16
    """Tokens of a soft prompt, or width of a bottleneck."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that an input of a LoRA factor A is dropped while training."""

    targets: tuple[str, ...] = ()
    """Linear modules that get the adapter, by the last part of their names; empty for those that
    are usual for the architecture, for example ``query`` and ``value``."""

    labels: tuple[str, ...] = ()
    """Class names; a device's data names them, the model numbers them in this order. Empty for
    language modelling."""

    text_column: str = "text"
    """Column of a row that holds the text, or the words where tokens are classified."""

    label_column: str = "label"
    """Column of a row that holds the class name, or the tokens' class names."""

    image_column: str = "image"
    """Column of a row that holds the image."""

    rounds: Annotated[int, Field(ge=1, le=100_000)]
    """Rounds to run."""

    cohort_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the present devices that gets work in a round, never fewer than ``min_updates``."""

    min_devices: Annotated[int, Field(ge=1)] = 2
    """Devices that must be present and able before the first round starts."""

    min_updates: Annotated[int, Field(ge=1)] | None = None
    """Fewest updates a round may close with, and fewest present devices a later round starts with;
    null means half of ``min_devices``, rounded up."""

    deadline_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest time a round waits for updates once it has its minimum."""

    max_attempts: Annotated[int, Field(ge=1)] = 10
    """How often work of one round is handed out anew before the run fails."""

    local_steps: Annotated[int, Field(ge=1)] = 10
    """Optimiser steps of a device in a round."""

    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per optimiser step; the planner splits it into micro-batches."""

    max_length: Annotated[int, Field(ge=1)] = 64
    """Longest input in tokens; longer ones are cut."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser on the device."""

    learning_rate_factors: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Learning-rate factor by tensor role (``lora_A``, ``lora_B``, ``head``); 1 where absent."""

    max_rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank of the global adapter, and the largest a device gets."""

    min_rank: Annotated[int, Field(ge=1)] = 2
    """Smallest rank a method may give a device; at most ``max_rank``."""

    lora_scale: Annotated[float, Field(gt=0)] = 2.0
    """LoRA scale s = alpha / r, the same at every rank."""

    use_rslora: bool = False
    """Whether adapters are written as rank-stabilised LoRA, alpha / sqrt(r); the scale stays
    ``lora_scale``."""

    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = (
        "fp32",
        "fp16",
        "int8",
        "nf4",
    )
    """Precisions of the base model that devices may get, the best quality first; ``int4`` too,
    which needs onnxruntime 1.22 on the devices."""

    class_precisions: dict[str, Annotated[tuple[Precision, ...], Field(min_length=1)]] = {}
    """Precisions that devices of a class may get instead, by the class that they report."""

    progressive_base: bool = False
    """Whether ``int4`` and ``int8`` come from the same integers: a device that changes from one to
    the other downloads half of an int8 base, or nothing, at up to 0.7 dB of either's quality."""

    base_correction: CorrectionName | Literal["auto"] = "auto"
    """What is done where devices hold bases of different precisions: ``compensator``,
    ``effective-weight``, ``function-space``, ``precision-weight`` or ``none``; ``auto`` is
    ``compensator`` where the precisions above allow different ones and the adapter is LoRA."""

    base_correction_options: dict[str, JsonValue] = {}
    """Its options by name: ``rank`` of a compensator, ``activation_aware``, ``share`` of
    ``effective-weight``, ``floor`` of ``precision-weight``."""

    codec: str = "fp32"
    """Wire codec of updates: ``fp32``, ``fp16``, ``bf16`` as plain values; ``int8-block64``,
    ``int6``, ``int4``, ``int3``, ``int2``, ``int1``, ``topk`` or ``adaptive`` as changes against
    the adapter a device received."""

    codec_options: dict[str, JsonValue] = {}
    """Options of the wire codec by name: ``delta``, ``stochastic``, ``rotation_block``,
    ``error_feedback``, ``compressed``, ``top_share`` of ``topk``, ``budget_bytes`` and
    ``importance`` of ``adaptive``."""

    downlink_codec: str = "fp32"
    """Wire codec of adapters on their way to devices: ``fp32`` sends them whole; any other of
    ``codec`` as changes against the adapter that a device holds, and whole where it holds none."""

    downlink_options: dict[str, JsonValue] = {}
    """Options of the downlink's codec by name: ``stochastic``, ``rotation_block``, ``compressed``,
    ``top_share`` of ``topk``, ``budget_bytes`` of ``adaptive``."""

    sensitivity_every: Annotated[int, Field(ge=1)] = 5
    """Rounds between two measurements of the tensors' sensitivity, where ``codec_options`` has
    ``importance = "server"``."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of everything random in the run."""

    evaluation_data: Path | None = None
    """Rows to measure the adapter with after a round: JSON lines, ``.jsonl`` or ``.jsonl.gz``."""

    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Rounds between two measurements; the last round is always measured."""

    evaluate_rows: Annotated[int, Field(ge=0)] = 0
    """Rows used for a measurement, drawn once by the seed; 0 means all."""

    evaluate_on_devices: bool = False
    """Whether the devices of the cohort measure the new adapter on their own data, too."""

    head_start: Literal["none", "class-means"] = "none"
    """``class-means``: round 0 collects feature means per class and starts the head from them."""

    head_start_options: dict[str, JsonValue] = {}
    """Its options by name, for example ``{"rule": "nearest-mean"}``."""

    server_optimizer: Literal["none", "momentum", "adam"] = "none"
    """Optimiser on the server that treats the mean update as a gradient."""

    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """Its learning rate."""

    server_optimizer_options: dict[str, JsonValue] = {}
    """Its other options by name, for example ``{"beta1": 0.8}``."""

    max_update_norm: Annotated[float, Field(gt=0)] = 1e4
    """Largest joint l2 norm of an update's adapter tensors; a larger one is refused."""

    use_measured_speed: bool = False
    """Whether methods see the step times devices measured in earlier rounds, in place of an
    estimate from their profiles. Plans then depend on wall-clock time, so that two runs of one
    seed may differ."""

    keep_updates: bool = False
    """Whether the devices' updates stay on the server's disk after their round."""

    @field_validator("targets", "labels", "precisions")
    @classmethod
    def _without_repetition(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"lists {', '.join(map(repr, repeated))} more than once")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.lora_dropout and self.adapter != "lora":
            raise ValueError(
                f"lora_dropout: {self.adapter} has none, got {self.lora_dropout}; set 0"
            )
        needs_labels = not self.task_kind.endswith("language-modeling")
        if needs_labels and len(self.labels) < 2:
            raise ValueError(f"labels: {self.task_kind} needs at least 2, got {self.labels}")
        if not needs_labels and self.labels:
            raise ValueError(
                f"labels: {self.task_kind} has none, got {len(self.labels)}; drop them"
            )
        if self.evaluation_data is not None and self.task_kind not in _MEASURED_HERE:
            raise ValueError(
                f"evaluation_data: the server does not measure {self.task_kind}; "
                "drop it and set evaluate_on_devices"
            )
        if self.use_rslora and self.adapter not in ("lora", "dora"):
            raise ValueError(
                f"use_rslora: adapter {self.adapter!r} has no rank; drop it, or use lora or dora"
            )
        if self.min_rank > self.max_rank:
            raise ValueError(
                f"min_rank {self.min_rank} exceeds max_rank {self.max_rank}; lower the first"
            )
        if self.min_updates is not None and self.min_updates > self.min_devices:
            raise ValueError(
                f"min_updates {self.min_updates} exceeds min_devices {self.min_devices}; "
                "a round could not be sure to reach it"
            )
        return self

    @property
    def possible_precisions(self) -> tuple[str, ...]:
        """Every precision that a device of the run may get, sorted."""
        return tuple(
            sorted({*self.precisions, *(p for c in self.class_precisions.values() for p in c)})
        )

    @property
    def needed_updates(self) -> int:
        """Fewest updates a round closes with."""
        return self.min_updates or (self.min_devices + 1) // 2

    @property
    def task(self) -> Task:
        """What the model is trained to do."""
        return Task(
            kind=self.task_kind,
            labels=self.labels,
            text_column=self.text_column,
            label_column=self.label_column,
            image_column=self.image_column,
        )

    def canonical(self) -> str:
        """JSON of every setting, equal for equal settings."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


class LimitsConfig(_Settings):
    """What the server takes on at a time."""

    max_update_bytes: Annotated[int, Field(ge=1)] = 256 << 20
    """Largest update accepted from a device."""

    max_uploads: Annotated[int, Field(ge=1)] = 64
    """Uploads at a time; a device that comes on top is told when to try again."""

    max_downloads: Annotated[int, Field(ge=1)] = 64
    """Downloads at a time."""

    max_calls: Annotated[int, Field(ge=8)] = 4096
    """Calls of any kind at a time, waiting ones included."""

    max_devices: Annotated[int, Field(ge=1)] = 100_000
    """Devices that may be enrolled."""

    busy_retry_seconds: Annotated[float, Field(gt=0)] = 5.0
    """What a device that met a limit is told to wait."""

    calls_per_second: Annotated[float, Field(gt=0)] = 100.0
    """Mean rate of calls of one device, operator or unknown address; more are refused."""

    call_burst: Annotated[float, Field(ge=1)] = 1000.0
    """Calls of one of them at once, beyond that rate."""

    stall_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest time a stream may stand still."""

    min_bytes_per_second: Annotated[float, Field(gt=0)] = 1024.0
    """Slowest mean rate of an upload, on top of ``stall_seconds``."""


class ServerConfig(_Settings):
    """One server: where it listens, where it keeps things, what it takes on."""

    folder: Path = Path("runs")
    """Folder of the database, the blobs and the runs' results."""

    address: str = "localhost:50051"
    """Host and port to listen on; port 0 takes a free one."""

    database: str = ""
    """SQLAlchemy URL; empty means a SQLite file in the folder."""

    tls_certificate: Path | None = None
    """Certificate chain of the server, PEM; with ``tls_key`` it turns TLS on."""

    tls_key: Path | None = None
    """Private key of the certificate, PEM."""

    insecure: bool = False
    """Say that plain text is meant; it is spoken on loopback alone."""

    enrol_address: str = ""
    """Host and port where devices enrol when there is an authority; empty means the next port of
    ``address``."""

    certificate_days: Annotated[float, Field(gt=0, le=825)] = 90.0
    """How long a client's certificate is good; devices renew theirs when a third is left."""

    lease_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long a task stays with a device that is not heard of."""

    presence_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long a device counts as present after its last call; never longer than a lease."""

    settle_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long a restarted server waits for the devices of the last round to come back before it
    hands out the next one."""

    max_wait_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest time a device may wait for work in one call."""

    retry_seconds: Annotated[float, Field(gt=0)] = 1.0
    """Shortest pause of a device that found no work; the longest is twice that."""

    handout_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long a stopping server waits for present devices that are still to fetch the last adapter
    of a run that has ended."""

    stop_seconds: Annotated[float, Field(ge=0)] = 5.0
    """How long a stopping server lets calls in progress end."""

    limits: LimitsConfig = LimitsConfig()
    """What the server takes on at a time."""

    @model_validator(mode="after")
    def _consistent(self) -> ServerConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; set both or neither")
        has_tls = self.tls_certificate is not None or self.has_authority
        if not has_tls and not _is_loopback(self.address):
            raise ValueError(
                f"address {self.address!r} can be reached by other machines without TLS; make "
                f"certificates with `lorikit certs init --folder {self.folder}`, or set "
                "tls_certificate and tls_key, or listen on localhost"
            )
        return self

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database or f"sqlite:///{self.private_folder / 'lorikit.sqlite'}"

    @property
    def private_folder(self) -> Path:
        """What the server keeps for itself; no run can have its name."""
        return self.folder.absolute() / ".server"

    @property
    def identity_folder(self) -> Path:
        """Where the authority is; its keys never leave it."""
        return self.private_folder / "identity"

    @property
    def has_authority(self) -> bool:
        """Whether callers are known by certificates."""
        return (self.identity_folder / "authority.pem").is_file()

    def run_folder(self, name: str) -> Path:
        """Where the results of a run go."""
        return self.folder.absolute() / name


def parse_run_config(text: str | bytes) -> RunConfig:
    """Settings of a run from JSON.

    Raises:
        RequestError: CONFIG_INVALID; the detail names each wrong field with its value.
    """
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        raise RequestError(ErrorCode.CONFIG_INVALID, explain(error)) from error


def read_run_config(path: Path, **overrides: object) -> RunConfig:
    """Settings of a run from a TOML or JSON file; relative paths start at the file's folder.

    Args:
        path: The file; its suffix says which of the two it is.
        overrides: Fields that take the place of the file's.

    Raises:
        ConfigError: Not readable, not parseable, or a field is wrong.
    """
    fields = _read_fields(path)
    for name in ("model", "evaluation_data"):
        if isinstance(fields.get(name), str):
            fields[name] = str(path.parent / fields[name])
    return _build(RunConfig, {**fields, **overrides}, path)


def read_server_config(path: Path, **overrides: object) -> ServerConfig:
    """Settings of a server from a TOML file; relative paths start at the file's folder.

    Raises:
        ConfigError: Not readable, not parseable, or a field is wrong.
    """
    fields = _read_fields(path)
    for name in ("folder", "tls_certificate", "tls_key"):
        if isinstance(fields.get(name), str):
            fields[name] = str(path.parent / fields[name])
    return _build(ServerConfig, {**fields, **overrides}, path)


def explain(error: ValidationError) -> str:
    """Each wrong field with what is wrong and the value that was given, in one line."""
    return "; ".join(_sentence(details) for details in error.errors(include_url=False))


@dataclass(frozen=True, slots=True)
class EvaluationData:
    """Texts and the numbers of their classes."""

    texts: Sequence[str]
    labels: Sequence[int]


def read_evaluation_data(path: Path, task: Task) -> EvaluationData:
    """Rows of a ``.jsonl`` or ``.jsonl.gz`` file as texts and class numbers (0 without classes).

    Raises:
        ConfigError: No such file, a row that is not an object with the two columns, or a class that
            is not among the labels; the message names the line.
    """
    classes = {label: index for index, label in enumerate(task.labels)}
    texts: list[str] = []
    labels: list[int] = []
    for number, row in _rows(path):
        text, label = row.get(task.text_column), row.get(task.label_column)
        if not isinstance(text, str):
            raise ConfigError(
                f"{path}, line {number}: column {task.text_column!r} holds no text; "
                "name the column with text_column"
            )
        if classes and (not isinstance(label, str) or label not in classes):
            raise ConfigError(
                f"{path}, line {number}: {label!r} in column {task.label_column!r} is not one of "
                f"the {len(classes)} labels of the run"
            )
        texts.append(text)
        labels.append(classes.get(str(label), 0))
    if not texts:
        raise ConfigError(f"{path} holds no rows; give a file with at least one")
    return EvaluationData(texts, labels)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_EVALUATION_LINE):
                number += 1
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}, line {number} is not a JSON object")
                yield number, row
    except (OSError, EOFError) as error:
        raise ConfigError(f"cannot read evaluation_data {path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error


_Config = TypeVar("_Config", RunConfig, ServerConfig)


def _build(kind: type[_Config], fields: Mapping[str, object], path: Path) -> _Config:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from error


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        fields = json.loads(data) if path.suffix == ".json" else tomllib.loads(data.decode())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be parsed: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is not a table of settings")
    return fields


def _sentence(details: Mapping[str, Any]) -> str:
    field = ".".join(str(part) for part in details["loc"])
    message = str(details["msg"]).removeprefix("Value error, ")
    if not field:
        return message
    if details["type"] == "missing":
        return f"{field} is missing"
    if details["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{field} is not a setting; remove it or correct its name"
    return f"{field}: {message}, got {details['input']!r:.200}"


def neighbour(address: str, port: int) -> str:
    """The address whose port is the next one; any free one where ``address`` left it open."""
    host, _, given = address.rpartition(":")
    return f"{host}:{port + 1 if given != '0' else 0}"


def _is_loopback(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
