"""Exports: where a set stands in one safetensors file (https://github.com/huggingface/safetensors), which other tools read.

Its tensors are named `parameters/<tensor>`, `<slot>/<tensor>`, as the server calculates with them; all the rest is JSON below
`optserve` in the metadata, with a checksum of each tensor. A file of parameters alone, for inference, has them under their own
names, and can't be restored. Nothing in these files is executable.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from google.protobuf import json_format
from numpy.typing import NDArray

from optserve._errors import InvalidArgument
from optserve._messages import (
    decode_group_states,
    decode_outline,
    decode_spec,
    encode_group_states,
    encode_outline,
    encode_spec,
)
from optserve._specification import ParameterSetSpec
from optserve._state import Outline, State, assembled
from optserve.v1 import parameter_set_pb2, state_pb2
from optserve_server.engine import outlines
from optserve_server.engine.arena import aligned
from optserve_server.engine.engine import Engine
from optserve_server.storage import checkpoint, files
from optserve_server.storage.tensors import PART, Damaged, Tensors, Writer

FORMAT = 1
KEY = "optserve"  # of the metadata
SUFFIX = ".safetensors"
Progress = Callable[[int, int], None]  # bytes that are done, of how many


def write_state(
    path: Path, spec: ParameterSetSpec, state: State, progress: Progress = lambda done, total: None
) -> None:
    """Let a file have a state of a set, durably and at once; raises OSError, and then it has what it had."""
    outline, elements = state.packed()
    shapes = [each.shape for each in outline.elements(spec.tensors)]
    tensors = {
        name: array.reshape(shape) for name, array, shape in zip(_names(spec, outline), elements, shapes, strict=True)
    }
    total = 2 * sum(array.nbytes for array in elements)  # checksums come first in the file
    done = 0

    def note(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    record = {
        "format": FORMAT,
        "spec": json_format.MessageToDict(encode_spec(spec)),
        "groups": [json_format.MessageToDict(each) for each in encode_group_states(state.groups)],
        "outline": json_format.MessageToDict(encode_outline(outline, spec.tensors)),
        "crc32": {name: _checksum(array, note) for name, array in tensors.items()},
    }
    about = {"parameter_set": spec.id, "version": str(state.version), KEY: json.dumps(record)}
    _write(path, tensors, about, note)


def write_parameters(
    path: Path, set_id: str, version: int, parameters: Tensors, progress: Progress = lambda done, total: None
) -> None:
    """Let a file have parameters under their own names, durably and at once; raises OSError, and then it has what it had."""
    total, done = sum(array.nbytes for array in parameters.values()), 0

    def note(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    _write(path, parameters, {"parameter_set": set_id, "version": str(version)}, note)


def read_state(path: Path, progress: Progress = lambda done, total: None) -> tuple[ParameterSetSpec, State]:
    """The specification and the state that `write_state` wrote, or those of a checkpoint's directory.

    Raises Damaged, OSError, or InvalidArgument kinds for what can't be here.
    """
    try:
        return _from_checkpoint(path, progress) if path.is_dir() else _from_file(path, progress)
    except (OSError, InvalidArgument, Damaged):
        raise
    except (
        safetensors.SafetensorError,
        json_format.ParseError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise Damaged(f"{path}: expected a file that `optserve export` wrote, whole; got another ({error})") from error


def _from_file(path: Path, progress: Progress) -> tuple[ParameterSetSpec, State]:
    with path.open("rb"):  # an OSError that names it, where the library's would not
        pass
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise Damaged(
                f"{path}: expected a whole state, from `optserve export`; this file has tensors only. To begin from these as "
                "parameters, read them with the safetensors library, and call create_parameter_set"
            )
        record = json.loads(metadata[KEY])
        if record["format"] != FORMAT:
            raise Damaged(f"{path}: expected format {FORMAT}; got {record['format']}: another version wrote it")
        spec = decode_spec(json_format.ParseDict(record["spec"], parameter_set_pb2.ParameterSetSpec()))
        groups = [json_format.ParseDict(each, parameter_set_pb2.GroupState()) for each in record["groups"]]
        outline = decode_outline(json_format.ParseDict(record["outline"], state_pb2.State()), spec.tensors)
        arrays = list(_elements(path, file, spec, outline, record["crc32"], progress))
    return spec, assembled(spec.tensors, decode_group_states(groups), outline, arrays)


def _elements(
    path: Path, file: Any, spec: ParameterSetSpec, outline: Outline, checksums: Mapping[str, int], progress: Progress
) -> Iterator[NDArray[Any]]:
    """The elements in the outline's order, each checked."""
    names, expected = _names(spec, outline), outline.elements(spec.tensors)
    if set(names) != set(file.keys()):
        raise Damaged(
            f"{path}: expected the tensors that its metadata names; {len(set(names) ^ set(file.keys()))} differ"
        )
    total, done = sum(each.nbytes for each in expected), 0

    def note(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    for name, each in zip(names, expected, strict=True):
        array = file.get_tensor(name)
        if (array.dtype, array.shape) != (each.dtype.compute, each.shape):
            raise Damaged(f"{path}: expected {name!r} as {each}; got {array.dtype}{list(array.shape)}")
        if _checksum(array, note) != checksums[name]:
            raise Damaged(f"{path}: the checksum of {name!r} does not match; restore another file")
        yield array


def _from_checkpoint(path: Path, progress: Progress) -> tuple[ParameterSetSpec, State]:
    if path not in checkpoint.present(path.parent) or not (path / checkpoint.MANIFEST).exists():
        raise Damaged(f"expected a checkpoint's directory, sets/.../checkpoint-<event>; got {path}")
    described = checkpoint.read(path)
    outlines.check_movable(described.state.spec)
    total = sum(file.stat().st_size for file in path.glob(f"*{checkpoint.SUFFIX}"))
    engine = Engine(threads=1)
    try:
        parameter_set = engine.new(described.state.spec)
        parameter_set.restore(described.state)
        done = 0
        for nbytes in checkpoint.fill(path, described, parameter_set):
            done += nbytes
            progress(min(done, total), total)
        state = parameter_set.capture()
    finally:
        engine.close()
    outline, elements = outlines.outlined(state)
    return state.spec, assembled(state.spec.tensors, state.groups, outline, elements)


def _names(spec: ParameterSetSpec, outline: Outline) -> list[str]:
    """The names of the outline's elements in a file, in its order."""
    return [f"{part.name}/{spec.tensors[index].name}" for part in outline.parts for index in part.tensors]


def _write(path: Path, tensors: Tensors, metadata: Mapping[str, str], note: Callable[[int], None]) -> None:
    temporary = path.with_name(path.name + files.TEMPORARY)
    files.remove(temporary)
    try:
        writer = Writer(temporary, tensors, metadata)
        try:
            memory = aligned(PART)  # so large that it begins at a page
            for begin in range(0, writer.nbytes, PART):
                part = memory[: min(PART, writer.nbytes - begin)]
                writer.copy(begin, part)
                writer.write(begin, part)
                note(part.size)
            writer.finish()
        finally:
            writer.close()
        files.rename(temporary, path)
    except BaseException:
        files.remove(temporary)
        raise
    files.sync_directory(path.parent)


def _checksum(array: NDArray[Any], note: Callable[[int], None]) -> int:
    checksum, data = 0, np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for begin in range(0, data.size, PART):
        part = data[begin : begin + PART]
        checksum = zlib.crc32(part.data, checksum)
        note(part.size)
    return checksum
