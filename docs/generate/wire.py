"""The contract, as protoc reads it: services, messages and values with their comments."""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[2] / "proto"
FOLDER = "reference/wire"
MAIN = "optimizer_service.proto"
INTRODUCTION = """\
What travels between a worker and a server, for clients in any language: `grpcurl`, or stubs that protoc makes of
[`proto/optserve/v1`](../../../proto/optserve/v1). Server reflection is on.
[A session by hand](../../shared-optimizer.md#another-language) shows the order of messages. Comments are those of the files.
"""

LABEL = re.compile(r"\n(?=[A-Z]\w+( \w+)?: )")  # of a paragraph, such as "Errors: "

# Numbers of fields in descriptor.proto, of which the paths of comments are made.
SYNTAX, MESSAGE, ENUM, SERVICE = 12, 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ONEOF, VALUE, METHOD = 2, 3, 8, 2, 2
SCALARS = {number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()}


@dataclass(frozen=True)
class Comments:
    """Comments of a file by the path of what they are about."""

    leading: dict[tuple[int, ...], str]
    about: str

    def of(self, *path: int) -> str:
        """A comment as paragraphs."""
        return self.leading.get(path, "")

    def line(self, *path: int) -> str:
        """A comment in a table."""
        return " ".join(self.of(*path).split()).replace("|", "\\|")


def pages() -> dict[str, str]:
    """A page for each file, the service's first."""
    files = _files()
    homes: dict[str, str] = {}
    for file in files:
        names = (*(each.name for each in file.message_type), *(each.name for each in file.enum_type))
        homes |= {f".{file.package}.{name}": _uri(file) for name in names}
    return {f"{FOLDER}/{_uri(file)}": "\n\n".join(_page(file, homes)) + "\n" for file in files}


def _files() -> list[FileDescriptorProto]:
    wellknown = Path(grpc_tools.__file__).parent / "_proto"
    names = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    with tempfile.NamedTemporaryFile() as written:
        options = ["--include_source_info", f"--descriptor_set_out={written.name}"]
        if protoc.main(["protoc", f"-I{PROTO}", f"-I{wellknown}", *options, *names]) != 0:
            raise RuntimeError("protoc failed")
        return list(FileDescriptorSet.FromString(Path(written.name).read_bytes()).file)


def _uri(file: FileDescriptorProto) -> str:
    name = Path(file.name).name
    return "index.md" if name == MAIN else name.replace(".proto", ".md")


def _comments(file: FileDescriptorProto) -> Comments:
    locations = {tuple(each.path): each for each in file.source_code_info.location}
    about = locations[(SYNTAX,)].leading_detached_comments
    return Comments(
        {
            path: LABEL.sub("\n\n", each.leading_comments.replace("\n ", "\n").strip())
            for path, each in locations.items()
        },
        " ".join(about[0].split()) if about else "",
    )


def _page(file: FileDescriptorProto, homes: dict[str, str]) -> Iterator[str]:
    comments = _comments(file)
    name = Path(file.name).name
    yield f"# The service\n\n{INTRODUCTION}" if name == MAIN else f"# {name}\n\n{comments.about}"
    yield f"Package `{file.package}`, file [`{name}`](../../../proto/{file.name})."
    for index, service in enumerate(file.service):
        yield from _service(service, comments, (SERVICE, index), homes)
    for index, message in enumerate(file.message_type):
        yield from _message(message, comments, (MESSAGE, index), homes)
    for index, enum in enumerate(file.enum_type):
        yield from _enum(enum, comments, (ENUM, index))


def _service(
    service: ServiceDescriptorProto, comments: Comments, path: tuple[int, ...], homes: dict[str, str]
) -> Iterator[str]:
    yield f"## {service.name}\n\n{comments.of(*path)}"
    for index, method in enumerate(service.method):
        taken, given = _type(method.input_type, homes), _type(method.output_type, homes)
        streams = ("a stream of " * method.client_streaming, "a stream of " * method.server_streaming)
        yield f"### {method.name}\n\nTakes {streams[0]}{taken}, gives {streams[1]}{given}."
        yield comments.of(*path, METHOD, index)


def _message(
    message: DescriptorProto, comments: Comments, path: tuple[int, ...], homes: dict[str, str], outer: str = ""
) -> Iterator[str]:
    yield f"## {outer}{message.name}\n\n{comments.of(*path)}"
    maps = {each.name: each for each in message.nested_type if each.options.map_entry}
    rows = []
    for index, field in enumerate(message.field):
        entry = maps.get(field.type_name.rpartition(".")[2])
        kind = (
            f"map of {_kind(entry.field[0], homes)} to {_kind(entry.field[1], homes)}"
            if entry
            else _label(field, homes)
        )
        text = comments.line(*path, MESSAGE_FIELD, index)
        if field.HasField("oneof_index") and not field.proto3_optional:
            text = f"{text} *One of `{message.oneof_decl[field.oneof_index].name}`.*"
        rows.append(f"| {field.number} | `{field.name}` | {kind} | {text} |")
    if rows:
        yield "\n".join(("| | field | type | |", "|---|---|---|---|", *rows))
    alternatives = {
        field.oneof_index for field in message.field if field.HasField("oneof_index") and not field.proto3_optional
    }
    for index in sorted(alternatives):
        yield f"`{message.oneof_decl[index].name}`: {comments.line(*path, MESSAGE_ONEOF, index)}"
    for index, nested in enumerate(message.nested_type):
        if nested.name not in maps:
            yield from _message(nested, comments, (*path, MESSAGE_NESTED, index), homes, f"{outer}{message.name}.")


def _enum(enum: EnumDescriptorProto, comments: Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield f"## {enum.name}\n\n{comments.of(*path)}"
    rows = [
        f"| {value.number} | `{value.name}` | {comments.line(*path, VALUE, index)} |"
        for index, value in enumerate(enum.value)
    ]
    yield "\n".join(("| | value | |", "|---|---|---|", *rows))


def _label(field: FieldDescriptorProto, homes: dict[str, str]) -> str:
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    return ("repeated " if repeated else "optional " if field.proto3_optional else "") + _kind(field, homes)


def _kind(field: FieldDescriptorProto, homes: dict[str, str]) -> str:
    return _type(field.type_name, homes) if field.type_name else SCALARS[field.type]


def _type(name: str, homes: dict[str, str]) -> str:
    short = name.rpartition(".")[2]
    return f"[{short}]({homes[name]}#{short.lower()})" if name in homes else f"`{short}`"
