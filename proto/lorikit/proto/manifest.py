# SPDX-License-Identifier: Apache-2.0
"""The manifest of a package: which blobs it is made of and what is in them.

A manifest is canonical JSON (sorted keys, no spaces), so equal packages have equal digests. Graph
files name their weight blobs by digest as external data; a device keeps all blobs in one flat
folder and opens the graph there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MANIFEST_FORMAT = 1
"""Manifest format that this version writes, and the highest it reads."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_RELEASE = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}", re.ASCII)
_HUGE = 10**300
"""Facts lie below it: JSON knows whole numbers that no float can hold."""


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
class BlobPatch:
    """How a blob of weights comes from another one by a smaller download."""

    target: str
    """Digest of the blob that it makes."""
    base: str
    """Digest of the blob that must be there."""
    patch: BlobRef
    """A patch, as ``lorikit.quantization.patches`` reads it."""

    def __post_init__(self) -> None:
        for digest in (self.target, self.base):
            if not is_digest(digest):
                raise ManifestError(f"patch: not a SHA-256 digest: {digest[:80]!r}")


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

    def __post_init__(self) -> None:
        if not is_digest(self.blob):
            raise ManifestError(f"weight {self.name!r}: not a SHA-256 digest: {self.blob[:80]!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One ONNX graph of the package."""

    name: str
    """``train``, ``predict``, ``evaluate`` (loss and correct labels without gradients), ..."""
    runtime: str
    """``onnx`` (standard and contrib operators of stock onnxruntime) or ``onnx-training``."""
    blob: BlobRef
    inputs: tuple[str, ...]
    """Names of all inputs: ``input_ids``, ``attention_mask``, ``labels``, ``weights``, scalar
    inputs of the plan, and adapter tensors."""
    outputs: tuple[str, ...]
    minimum_runtime: str = ""
    """Oldest release of the runtime that has every operator of the graph, for example ``1.22``;
    empty where any supported release will do."""
    prepack: bool = False
    """Whether the runtime may keep weights in a second layout for faster kernels; memory was
    planned for it."""

    def __post_init__(self) -> None:
        if self.minimum_runtime and not _RELEASE.fullmatch(self.minimum_runtime):
            raise ManifestError(
                f"graph {self.name!r}: minimum_runtime must be numbers and dots, "
                f"got {self.minimum_runtime!r:.80}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the model is trained to do."""

    kind: str
    """``sequence-classification``, ``token-classification``, ``masked-language-modeling``,
    ``causal-language-modeling`` or ``image-classification``."""
    labels: tuple[str, ...]
    """Class names by index; empty for language modelling, where the classes are the vocabulary."""
    text_column: str = "text"
    """Column of the input: a text, or its words where tokens are classified."""
    label_column: str = "label"
    image_column: str = "image"
    """Column of the input where images are classified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextInput:
    """What a device must know of a model that reads tokens, beside its tokeniser."""

    max_positions: int = 0
    """Most tokens the model can read at once; 0: no bound known."""
    pad_id: int = 0
    """Token that fills up shorter examples; never attended to."""
    mask_id: int = -1
    """Token that hides another one in masked language modelling; -1: there is none."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a generated text; the first of them ends a text that is trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInput:
    """How an image becomes ``pixel_values``: resize, crop, scale to 0..1, subtract, divide."""

    height: int
    """Rows that the model reads."""
    width: int
    """Columns that the model reads."""
    shortest_edge: int = 0
    """Length to which the shorter side is resized before the centre is cut out; 0: the whole
    image is resized to ``height`` x ``width``."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """By channel; there are as many channels as numbers: 3 (RGB) or 1 (grey)."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ManifestError(f"an image has pixels, got {self.height} x {self.width}")
        if 0 < self.shortest_edge < max(self.height, self.width):
            raise ManifestError(
                f"{self.height} x {self.width} cannot be cut out of an image whose shorter side "
                f"is {self.shortest_edge}"
            )
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ManifestError(f"mean and std need 1 or 3 numbers, got {self.mean}, {self.std}")
        if not min(self.std) > 0:
            raise ManifestError(f"std must be positive, got {self.std}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What one layer's keys, and its values, take in the cache of the ``decode`` graph."""

    heads: int
    """Heads of keys and values; fewer than those of queries where they share them."""
    width: int
    """Numbers in a head."""

    def __post_init__(self) -> None:
        if min(self.heads, self.width) < 1:
            raise ManifestError(f"a cache has heads and width, got {self.heads}, {self.width}")


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
    really is stands in ``weights``."""
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
    device compares its own engine with it before the first use."""
    text: TextInput | None = None
    """None for models that read no tokens."""
    image: ImageInput | None = None
    """None for models that read no images."""
    cache: CacheShape | None = None
    """None for packages without a ``decode`` graph."""
    patches: tuple[BlobPatch, ...] = ()
    """Other ways to some of ``weight_blobs``, for devices that hold the base at another
    precision."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Measured and predicted numbers by name, for reports: parameters, FLOPs per token, bytes."""

    def __post_init__(self) -> None:
        if self.format != MANIFEST_FORMAT:
            raise ManifestError(
                f"manifest format {self.format} is not {MANIFEST_FORMAT}; update the SDK"
            )
        if not 0 <= self.lowest_trained_layer <= self.layer_count:
            raise ManifestError(
                f"lowest_trained_layer must lie in 0..{self.layer_count}, "
                f"got {self.lowest_trained_layer}"
            )
        if not all(0 <= layer < self.layer_count for layer in self.kept_layers):
            raise ManifestError(
                f"kept_layers must lie below layer_count {self.layer_count}, got {self.kept_layers}"
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
    """Canonical JSON of the manifest.

    Raises:
        ManifestError: A fact that is not a finite number.
    """
    fields = dataclasses.asdict(manifest)
    fields["facts"] = {name: float(value) for name, value in manifest.facts.items()}
    try:
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise ManifestError(f"facts must be finite, got {dict(manifest.facts)}") from error


def load(data: bytes) -> Manifest:
    """Parse and check a manifest.

    Raises:
        ManifestError: Not JSON, another format (checked first), a field that is missing, unknown,
            of the wrong type or out of range; the message names the field.
    """
    try:
        fields = json.loads(data, parse_constant=_refuse_constant)
    except ManifestError:
        raise
    except (ValueError, RecursionError) as error:
        raise ManifestError("bytes are not a JSON manifest") from error
    if not isinstance(fields, dict):
        raise ManifestError("manifest is not a JSON object")
    if fields.get("format") != MANIFEST_FORMAT:
        raise ManifestError(
            f"manifest format {fields.get('format')!r:.80} is not {MANIFEST_FORMAT}; update the SDK"
        )
    return _manifest(fields)


_Fields = Mapping[str, object]


def _manifest(value: object) -> Manifest:
    fields = _object(value, Manifest)
    return Manifest(
        format=_whole(fields, "format"),
        model=_text(fields, "model"),
        model_digest=_text(fields, "model_digest"),
        architecture=_text(fields, "architecture"),
        layer_count=_whole(fields, "layer_count"),
        precision=_text(fields, "precision"),
        kept_layers=_wholes(fields, "kept_layers"),
        lowest_trained_layer=_whole(fields, "lowest_trained_layer"),
        task=_task(fields["task"]),
        graphs=tuple(_graph(item) for item in _items(fields, "graphs")),
        adapter=tuple(_adapter_tensor(item) for item in _items(fields, "adapter")),
        weights=tuple(_weight_tensor(item) for item in _items(fields, "weights")),
        weight_blobs=tuple(_blob(item) for item in _items(fields, "weight_blobs")),
        tokenizer=_optional_blob(fields["tokenizer"]),
        probe=_optional_blob(fields["probe"]),
        text=_text_input(fields["text"]),
        image=_image_input(fields["image"]),
        cache=_cache_shape(fields["cache"]),
        patches=tuple(_patch(item) for item in _items(fields, "patches")),
        facts=_numbers(fields, "facts"),
    )


def _task(value: object) -> Task:
    fields = _object(value, Task)
    return Task(
        kind=_text(fields, "kind"),
        labels=_texts(fields, "labels"),
        text_column=_text(fields, "text_column"),
        label_column=_text(fields, "label_column"),
        image_column=_text(fields, "image_column"),
    )


def _text_input(value: object) -> TextInput | None:
    if value is None:
        return None
    fields = _object(value, TextInput)
    return TextInput(
        max_positions=_whole(fields, "max_positions"),
        pad_id=_whole(fields, "pad_id"),
        mask_id=_whole(fields, "mask_id", least=-1),
        end_ids=_wholes(fields, "end_ids"),
    )


def _image_input(value: object) -> ImageInput | None:
    if value is None:
        return None
    fields = _object(value, ImageInput)
    return ImageInput(
        height=_whole(fields, "height"),
        width=_whole(fields, "width"),
        shortest_edge=_whole(fields, "shortest_edge"),
        mean=tuple(_checked_number("mean", item) for item in _items(fields, "mean")),
        std=tuple(_checked_number("std", item) for item in _items(fields, "std")),
    )


def _cache_shape(value: object) -> CacheShape | None:
    if value is None:
        return None
    fields = _object(value, CacheShape)
    return CacheShape(heads=_whole(fields, "heads"), width=_whole(fields, "width"))


def _graph(value: object) -> Graph:
    fields = _object(value, Graph)
    return Graph(
        name=_text(fields, "name"),
        runtime=_text(fields, "runtime"),
        blob=_blob(fields["blob"]),
        inputs=_texts(fields, "inputs"),
        outputs=_texts(fields, "outputs"),
        minimum_runtime=_text(fields, "minimum_runtime"),
        prepack=_flag(fields, "prepack"),
    )


def _adapter_tensor(value: object) -> AdapterTensor:
    fields = _object(value, AdapterTensor)
    return AdapterTensor(
        name=_text(fields, "name"),
        role=_text(fields, "role"),
        module=_text(fields, "module"),
        layer=_whole(fields, "layer", least=-1),
        shape=tuple(
            "rank" if length == "rank" else _checked_whole("shape", length)
            for length in _items(fields, "shape")
        ),
        trained=_flag(fields, "trained"),
    )


def _weight_tensor(value: object) -> WeightTensor:
    fields = _object(value, WeightTensor)
    return WeightTensor(
        name=_text(fields, "name"),
        codec=_text(fields, "codec"),
        shape=_wholes(fields, "shape"),
        nbytes=_whole(fields, "nbytes"),
        blob=_text(fields, "blob"),
    )


def _patch(value: object) -> BlobPatch:
    fields = _object(value, BlobPatch)
    return BlobPatch(
        target=_text(fields, "target"), base=_text(fields, "base"), patch=_blob(fields["patch"])
    )


def _blob(value: object) -> BlobRef:
    fields = _object(value, BlobRef)
    return BlobRef(digest=_text(fields, "digest"), size=_whole(fields, "size"))


def _optional_blob(value: object) -> BlobRef | None:
    return None if value is None else _blob(value)


def _object(value: object, kind: type) -> _Fields:
    if not isinstance(value, dict):
        raise _wrong(kind.__name__, "an object", value)
    names = {field.name for field in dataclasses.fields(kind)}
    if value.keys() != names:
        missing, unknown = sorted(names - value.keys()), sorted(value.keys() - names)
        raise ManifestError(f"{kind.__name__}: missing fields {missing}, unknown {unknown!r:.200}")
    return value


def _items(fields: _Fields, name: str) -> list[object]:
    value = fields[name]
    if not isinstance(value, list):
        raise _wrong(name, "a list", value)
    return value


def _text(fields: _Fields, name: str) -> str:
    return _checked_text(name, fields[name])


def _texts(fields: _Fields, name: str) -> tuple[str, ...]:
    return tuple(_checked_text(name, item) for item in _items(fields, name))


def _whole(fields: _Fields, name: str, *, least: int = 0) -> int:
    return _checked_whole(name, fields[name], least=least)


def _wholes(fields: _Fields, name: str) -> tuple[int, ...]:
    return tuple(_checked_whole(name, item) for item in _items(fields, name))


def _flag(fields: _Fields, name: str) -> bool:
    value = fields[name]
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _numbers(fields: _Fields, name: str) -> dict[str, float]:
    value = fields[name]
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return {key: _checked_number(f"{name}[{key!r:.80}]", item) for key, item in value.items()}


def _checked_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a text", value)
    return value


def _checked_whole(name: str, value: object, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(name, f"a whole number of at least {least}", value)
    return value


def _checked_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _HUGE:
        raise _wrong(name, "a finite number", value)
    return float(value)


def _refuse_constant(text: str) -> float:
    raise ManifestError(f"{text} is not a number of a manifest")


def _wrong(name: str, wanted: str, value: object) -> ManifestError:
    return ManifestError(f"{name} must be {wanted}, got {value!r:.80}")
