# SPDX-License-Identifier: Apache-2.0
"""The wire stays readable for released versions, and its source says what everything means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorSet,
)

from lorikit.proto.v1 import device_service_pb2, operator_service_pb2, plan_pb2, tensor_pb2

RELEASED = Path(__file__).parent / "released" / "v1.binpb"
SOURCES = sorted(Path(tensor_pb2.__file__).parent.glob("*.proto"))


def released() -> FileDescriptorSet:
    return FileDescriptorSet.FromString(RELEASED.read_bytes())


def current() -> FileDescriptorSet:
    modules = (device_service_pb2, operator_service_pb2, plan_pb2, tensor_pb2)
    files = [module.DESCRIPTOR.serialized_pb for module in modules]
    whole = FileDescriptorSet()
    for file in files:
        whole.file.add().ParseFromString(file)
    return whole


def all_messages(files: FileDescriptorSet) -> dict[str, DescriptorProto]:
    """Messages by full name, nested ones too."""

    def walk(prefix: str, message: DescriptorProto) -> Iterator[tuple[str, DescriptorProto]]:
        name = f"{prefix}.{message.name}"
        yield name, message
        for nested in message.nested_type:
            yield from walk(name, nested)

    return {
        name: message
        for file in files.file
        for top in file.message_type
        for name, message in walk(file.package, top)
    }


def reserved_numbers(message: DescriptorProto) -> set[int]:
    return {n for span in message.reserved_range for n in range(span.start, span.end)}


def shape(field: FieldDescriptorProto, message: DescriptorProto) -> tuple[object, ...]:
    """All that decides how a field's bytes are read."""
    oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
    return field.type, field.type_name, field.label, oneof


def field_breaks(name: str, old: DescriptorProto, new: DescriptorProto) -> Iterator[str]:
    """What the fields of a message do to those who speak the old one."""
    numbers = {field.number: field for field in new.field}
    for field in old.field:
        where = f"{name}.{field.name} = {field.number}"
        now = numbers.get(field.number)
        if now is None:
            if field.number not in reserved_numbers(new) or field.name not in new.reserved_name:
                yield f"{where}: removed without reserving its number and name"
        elif now.name != field.name:
            yield f"{where}: the number now belongs to {now.name}"
        elif shape(now, new) != shape(field, old):
            yield f"{where}: changed its type"
    for number in sorted(reserved_numbers(old) & numbers.keys()):
        yield f"{name}: {numbers[number].name} reuses the reserved number {number}"


def breaks(old: FileDescriptorSet, new: FileDescriptorSet) -> list[str]:
    """What would break those who speak the old version, in words."""
    before, after = all_messages(old), all_messages(new)
    found = [f"{name}: removed" for name in before.keys() - after.keys()]
    for name in before.keys() & after.keys():
        found += field_breaks(name, before[name], after[name])
    return sorted(found + sorted(calls(old) - calls(new)))


def calls(files: FileDescriptorSet) -> set[str]:
    """Every call of every service with its types, as one text each."""
    return {
        f"{file.package}.{service.name}/{call.name}: {call.input_type} {call.client_streaming} "
        f"-> {call.output_type} {call.server_streaming}"
        for file in files.file
        for service in file.service
        for call in service.method
    }


def test_wire_can_still_be_read_by_the_last_release() -> None:
    assert breaks(released(), current()) == []


def message(files: FileDescriptorSet, name: str) -> DescriptorProto:
    return all_messages(files)[f"lorikit.proto.v1.{name}"]


def remove_field(files: FileDescriptorSet) -> None:
    del message(files, "BlobRef").field[1]


def renumber_field(files: FileDescriptorSet) -> None:
    message(files, "BlobRef").field[1].number = 7


def retype_field(files: FileDescriptorSet) -> None:
    message(files, "BlobRef").field[1].type = FieldDescriptorProto.TYPE_DOUBLE


def swap_names(files: FileDescriptorSet) -> None:
    first, second = message(files, "BlobRef").field
    first.name, second.name = second.name, first.name


def leave_oneof(files: FileDescriptorSet) -> None:
    message(files, "NextTaskResponse").field[0].ClearField("oneof_index")


def reuse_reserved(files: FileDescriptorSet) -> None:
    message(files, "TensorBundle").field.add(name="extra", number=5)


def remove_message(files: FileDescriptorSet) -> None:
    file = next(file for file in files.file if file.name.endswith("tensor.proto"))
    del file.message_type[0]


def unstream_call(files: FileDescriptorSet) -> None:
    service = next(s for file in files.file for s in file.service if s.name == "DeviceService")
    next(call for call in service.method if call.server_streaming).server_streaming = False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove_field, "BlobRef.size = 2: removed without reserving"),
        (renumber_field, "BlobRef.size = 2: removed without reserving"),
        (retype_field, "BlobRef.size = 2: changed its type"),
        (swap_names, "BlobRef.digest = 1: the number now belongs to size"),
        (leave_oneof, "NextTaskResponse.task = 1: changed its type"),
        (reuse_reserved, "TensorBundle: extra reuses the reserved number 5"),
        (remove_message, "TensorPart: removed"),
        (unstream_call, "DeviceService/DownloadBlob"),
    ],
)
def test_breaking_change_is_noticed(
    change: Callable[[FileDescriptorSet], None], reason: str
) -> None:
    changed = released()
    change(changed)

    assert any(reason in found for found in breaks(released(), changed))


def test_added_field_and_reserved_removal_break_nothing() -> None:
    changed = released()
    blob = message(changed, "BlobRef")
    del blob.field[1]
    blob.reserved_name.append("size")
    blob.reserved_range.add(start=2, end=3)
    blob.field.add(name="length", number=9, type=FieldDescriptorProto.TYPE_INT64)

    assert breaks(released(), changed) == []


DECLARATION = re.compile(
    r"(message|service|oneof|enum|rpc) \w+|(repeated |optional )?[\w.<>, ]+ \w+ = \d+;"
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_declaration_has_a_comment(source: Path) -> None:
    lines = [line.strip() for line in source.read_text().splitlines()]
    declared = [number for number, line in enumerate(lines) if DECLARATION.match(line)]

    assert declared
    bare = [lines[number] for number in declared if not lines[number - 1].startswith("//")]
    assert bare == []
