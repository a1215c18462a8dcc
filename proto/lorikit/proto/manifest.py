# SPDX-License-Identifier: Apache-2.0
"""The manifest of a package: which blobs it is made of and what is in them.

A manifest is canonical JSON (sorted keys, no spaces), so equal packages have equal digests. Graph
files name
their weight blobs by digest as external data; a device keeps all blobs in one flat folder and
opens the
graph there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MANIFEST_FORMAT = 1
"""Manifest format that this version writes, and the highest it reads."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class ManifestError(ValueError):
    """The bytes are not a manifest, or break one of its rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRef:
    """A content-addressed file."""

    digest: str
    """Lower-case hexadecimal SHA-256 of the content."""
    size: int
    """Length in bytes."""

    def __post_init__(self) -> None:
        if not is_digest(self.digest):
            raise ManifestError(f"not a SHA-256 digest: {self.digest[:80]!r}")
        if self.size < 0:
            raise ManifestError(f"blob {self.digest}: negative size {self.size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTensor:
    """A tensor that travels: an input of the graphs, trained or held."""

    name: str
    """Name in the base model's own module path, for example
    ``bert.encoder.layer.0.attention.self.query.lora_A.weight``."""
    role: str
    """``lora_A``, ``lora_B``, ``head``, ``bias``, ``norm``, ``prompt``, ..."""
    module: str
    """Module it belongs to, for example ``bert.encoder.layer.0.attention.self.query``."""
    layer: int
    """Layer from the input, from 0; -1 for what belongs to no layer (the head)."""
    shape: tuple[int | str, ...]
    """Length of each axis; the string ``rank`` is the LoRA rank of its module."""
    trained: bool
    """Whether the training graph returns a gradient for it (output ``<name>.grad``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTensor:
    """A frozen tensor of the base, as it is stored."""

    name: str
    codec: str
    """The codec really used, measured from what was written."""
    shape: tuple[int, ...]
    nbytes: int
    blob: str
    """Digest of the blob that holds its parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One ONNX graph of the package."""

    name: str
    """``train``, ``predict``."""
    runtime: str
    """``onnx`` (standard and contrib operators of stock onnxruntime) or ``onnx-training``."""
    blob: BlobRef
    inputs: tuple[str, ...]
    """Names of all inputs: ``input_ids``, ``attention_mask``, ``labels``, ``weights``, scalar
    inputs of
    the plan, and adapter tensors."""
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the model is trained to do."""

    kind: str
    """``sequence-classification``."""
    labels: tuple[str, ...]
    """Class names by index."""
    text_column: str = "text"
    label_column: str = "label"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a device needs to know to open and run a package."""

    format: int = MANIFEST_FORMAT
    model: str
    """Name of the base model, for people."""
    model_digest: str
    """Digest of the base model's weights file(s)."""
    architecture: str
    """Hugging Face architecture class, for example ``BertForSequenceClassification``."""
    layer_count: int
    precision: str
    """Requested precision of the base (``nf4``, ``int8``, ``fp16``, ``fp32``); what each tensor
    really is
    stands in ``weights``."""
    kept_layers: tuple[int, ...]
    lowest_trained_layer: int
    """Layers below it get no gradient; ``layer_count`` when only the head is trained."""
    task: Task
    graphs: tuple[Graph, ...]
    adapter: tuple[AdapterTensor, ...]
    weights: tuple[WeightTensor, ...]
    weight_blobs: tuple[BlobRef, ...]
    tokenizer: BlobRef | None
    """A ``tokenizer.json``."""
    probe: BlobRef | None
    """A bundle with one batch, an adapter, and the loss and gradients torch + PEFT gives for it; a
    device
    compares its own engine with it before the first use."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Measured and predicted numbers by name, for reports: parameters, FLOPs per token, bytes."""

    def __post_init__(self) -> None:
        if self.format != MANIFEST_FORMAT:
            raise ManifestError(
                f"manifest format {self.format} is not {MANIFEST_FORMAT}; update the SDK"
            )

    def blobs(self) -> tuple[BlobRef, ...]:
        """Every blob of the package, without repetition, the smallest first."""
        optional = [blob for blob in (self.tokenizer, self.probe) if blob is not None]
        every = {
            b.digest: b for b in (*self.weight_blobs, *(g.blob for g in self.graphs), *optional)
        }
        return tuple(sorted(every.values(), key=lambda blob: (blob.size, blob.digest)))

    def graph(self, name: str, runtime: str = "onnx") -> Graph:
        """The graph of that name for that runtime, or for stock onnxruntime where there is none."""
        for wanted in (runtime, "onnx"):
            for graph in self.graphs:
                if graph.name == name and graph.runtime == wanted:
                    return graph
        raise ManifestError(f"package has no graph {name!r} for {runtime!r}")


def is_digest(text: str) -> bool:
    """Whether the text is a lower-case hexadecimal SHA-256, and so a safe file name."""
    return _DIGEST.fullmatch(text) is not None


def digest_of(data: bytes) -> str:
    """Lower-case hexadecimal SHA-256 of the bytes."""
    return hashlib.sha256(data).hexdigest()


def dump(manifest: Manifest) -> bytes:
    """Canonical JSON of the manifest."""
    fields = dataclasses.asdict(manifest)
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def load(data: bytes) -> Manifest:
    """Parse and check a manifest.

    Raises:
        ManifestError: Not JSON, a newer format, a field that is missing, unknown or of the wrong
        type.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError("bytes are not a JSON manifest") from error
    if not isinstance(fields, dict):
        raise ManifestError("manifest is not a JSON object")
    if fields.get("format") != MANIFEST_FORMAT:
        raise ManifestError(
            f"manifest format {fields.get('format')!r} is not {MANIFEST_FORMAT}; update the SDK"
        )
    try:
        return _manifest(fields)
    except ManifestError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ManifestError(f"manifest breaks its own rules: {error}") from error


def _manifest(fields: dict[str, Any]) -> Manifest:
    known = {f.name for f in dataclasses.fields(Manifest)}
    plain = {name: value for name, value in fields.items() if name in known}
    plain["task"] = Task(**{**fields["task"], "labels": _texts(fields["task"]["labels"])})
    plain["graphs"] = tuple(
        Graph(
            **{
                **graph,
                "blob": BlobRef(**graph["blob"]),
                "inputs": _texts(graph["inputs"]),
                "outputs": _texts(graph["outputs"]),
            }
        )
        for graph in fields["graphs"]
    )
    plain["adapter"] = tuple(
        AdapterTensor(**{**t, "shape": tuple(t["shape"])}) for t in fields["adapter"]
    )
    plain["weights"] = tuple(
        WeightTensor(**{**w, "shape": tuple(w["shape"])}) for w in fields["weights"]
    )
    plain["weight_blobs"] = tuple(BlobRef(**b) for b in fields["weight_blobs"])
    plain["tokenizer"] = _optional_blob(fields["tokenizer"])
    plain["probe"] = _optional_blob(fields["probe"])
    plain["kept_layers"] = tuple(int(layer) for layer in fields["kept_layers"])
    plain["facts"] = {str(name): float(value) for name, value in fields.get("facts", {}).items()}
    return Manifest(**plain)


def _optional_blob(fields: dict[str, Any] | None) -> BlobRef | None:
    return None if fields is None else BlobRef(**fields)


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ManifestError(f"expected a list of texts, got {values!r:.80}")
    return tuple(values)
