"""The compiled CRI against wire.tsv, the table of every name and number on the wire."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor

from crio_native.api import generate
from crio_native.api.runtime.v1 import api_pb2

REPOSITORY = Path(__file__).parents[2]
Row = tuple[str, ...]

SCALARS = {
    getattr(FieldDescriptor, f"TYPE_{name.upper()}"): name
    for name in ("bool", "bytes", "double", "int32", "int64", "string", "uint32", "uint64")
}


def local_name(descriptor: Descriptor | EnumDescriptor) -> str:
    return str(descriptor.full_name).removeprefix("runtime.v1.")


def type_name(field: FieldDescriptor) -> str:
    named = field.message_type or field.enum_type
    return local_name(named) if named else SCALARS[field.type]


def field_row(owner: Descriptor, field: FieldDescriptor) -> Row:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        shape = f"map map<{type_name(entry.fields_by_name['key'])},{type_name(entry.fields_by_name['value'])}>"
    else:
        shape = f"{'repeated' if field.is_repeated else 'singular'} {type_name(field)}"
    note = "deprecated" if field.GetOptions().deprecated else "-"
    return ("field", local_name(owner), field.name, str(field.number), shape, note)


def enum_rows(enum: EnumDescriptor) -> Iterator[Row]:
    for value in enum.values:
        yield ("enum", local_name(enum), value.name, str(value.number), "-", "-")


def message_rows(message: Descriptor) -> Iterator[Row]:
    if not message.fields:
        yield ("message", local_name(message), "-", "-", "-", "-")
    for field in message.fields:
        yield field_row(message, field)
    for enum in message.enum_types:
        yield from enum_rows(enum)
    for nested in message.nested_types:
        if not nested.GetOptions().map_entry:
            yield from message_rows(nested)


def compiled_rows(file: FileDescriptor) -> Iterator[Row]:
    for service in file.services_by_name.values():
        for method in service.methods:
            request = ("stream " if method.client_streaming else "") + local_name(method.input_type)
            response = ("stream " if method.server_streaming else "") + local_name(method.output_type)
            yield ("rpc", service.full_name, method.name, "-", f"{request} -> {response}", "-")
    for enum in file.enum_types_by_name.values():
        yield from enum_rows(enum)
    for message in file.message_types_by_name.values():
        yield from message_rows(message)


def table_rows() -> list[Row]:
    with open(REPOSITORY / "api/runtime/v1/wire.tsv", newline="") as table:
        rows = list(csv.reader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows[0] == ["kind", "owner", "name", "number", "type", "note"]
    return [tuple(row) for row in rows[1:]]


def test_every_row_of_the_table_is_compiled_and_nothing_else() -> None:
    table, compiled = table_rows(), list(compiled_rows(api_pb2.DESCRIPTOR))
    assert len(set(table)) == len(table), "the table repeats a row"
    assert set(table) - set(compiled) == set(), "missing from api.proto"
    assert set(compiled) - set(table) == set(), "not on the wire"


def test_there_are_43_calls_in_two_services() -> None:
    assert api_pb2.DESCRIPTOR.package == "runtime.v1"
    calls = {name: len(service.methods) for name, service in api_pb2.DESCRIPTOR.services_by_name.items()}
    assert calls == {"RuntimeService": 37, "ImageService": 6}


def test_every_message_enum_and_call_has_a_comment() -> None:
    lines = (REPOSITORY / "api/runtime/v1/api.proto").read_text().splitlines()
    bare = [
        line.strip()
        for before, line in pairwise(lines)
        if line.lstrip().startswith(("message ", "enum ", "rpc ", "service ")) and not before.lstrip().startswith("//")
    ]
    assert bare == []


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    fresh = {path.relative_to(tmp_path): path.read_bytes() for path in generate.generate(tmp_path)}
    committed = {
        path.relative_to(REPOSITORY): path.read_bytes()
        for path in (REPOSITORY / generate.PACKAGE).rglob("*_pb2*.py*")
        if path.suffix in (".py", ".pyi")
    }
    assert fresh.keys() == committed.keys()
    changed = [str(path) for path in fresh if fresh[path] != committed[path]]
    assert changed == [], "run python -m crio_native.api.generate and commit the result"
