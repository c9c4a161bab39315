"""Manifests: all of a checkpoint but its tensors, as JSON with a checksum. Nothing in it is executable."""

import base64
import datetime
import hashlib
import json
import platform
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
from google.protobuf import json_format

from optserve._errors import InvalidArgument, InvalidState
from optserve._messages import (
    decode_change,
    decode_optimizer,
    decode_receipt,
    decode_spec,
    encode_change,
    encode_optimizer,
    encode_receipt,
    encode_spec,
)
from optserve._policy_messages import decode_policy, encode_policy
from optserve._results import Change, Position
from optserve.optim import Optimizer
from optserve.v1 import optimizer_pb2, parameter_set_pb2, policy_pb2, step_pb2
from optserve_server.engine.pipeline import Progress
from optserve_server.engine.sessions import Kept, Session
from optserve_server.engine.state import State
from optserve_server.storage.tensors import Damaged, Entry

FORMAT = 4


@dataclass(frozen=True, slots=True)
class Manifest:
    """A state without its arenas, and the entries of the files that have them, by the arena's name."""

    state: State
    files: Mapping[str, Sequence[Entry]]


def to_bytes(manifest: Manifest) -> bytes:
    """A line of JSON, and a line with its SHA-256."""
    state = manifest.state
    text = json.dumps(
        {
            "format": FORMAT,
            "software": {name: metadata.version(name) for name in ("optserve", "numpy", "protobuf")}
            | {"python": platform.python_version()},
            "spec": json_format.MessageToDict(encode_spec(state.spec)),
            "incarnation": state.position.incarnation,
            "version": state.position.version,
            "events": state.events,
            "undone": state.undone,
            "create_time": state.create_time.isoformat(),
            "policy": json_format.MessageToDict(encode_policy(state.policy)),
            "policy_since": state.policy_since,
            "optimizers": {
                name: json_format.MessageToDict(encode_optimizer(each)) for name, each in state.optimizers.items()
            },
            "changes": [json_format.MessageToDict(encode_change(each)) for each in state.changes],
            "progress": _from_progress(state.progress),
            "forgotten": state.forgotten,
            "sessions": [_from_session(session) for session in state.sessions],
            "files": {name: [asdict(entry) for entry in entries] for name, entries in manifest.files.items()},
        }
    ).encode()
    return text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def from_bytes(data: bytes) -> Manifest:
    """The manifest that `to_bytes` wrote.

    Raises Damaged for what is not one, InvalidArgument for a set that can't be on this server.
    """
    text, _, checksum = data.rstrip(b"\n").rpartition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise Damaged("the manifest's checksum does not match")
    record = json.loads(text)
    if record["format"] != FORMAT:
        raise InvalidState(
            f"expected a checkpoint of format {FORMAT}; got {record['format']}: another version wrote it"
        )
    spec = json_format.ParseDict(record["spec"], parameter_set_pb2.ParameterSetSpec())
    try:
        decoded = decode_spec(spec)
    except InvalidArgument as error:
        raise type(error)(f"parameter set {spec.id!r}: {error}") from error
    state = State(
        spec=decoded,
        position=Position(record["incarnation"], record["version"]),
        create_time=datetime.datetime.fromisoformat(record["create_time"]),
        policy=decode_policy(json_format.ParseDict(record["policy"], policy_pb2.Policy())),
        policy_since=record["policy_since"],
        optimizers={name: _to_optimizer(each) for name, each in record["optimizers"].items()},
        changes=[_to_change(each) for each in record["changes"]],
        arenas={},
        progress=_to_progress(record["progress"]),
        forgotten=record["forgotten"],
        sessions=[_to_session(each) for each in record["sessions"]],
        events=record["events"],
        undone=tuple((first, last) for first, last in record["undone"]),
    )
    return Manifest(state, {name: [_to_entry(each) for each in entries] for name, entries in record["files"].items()})


def _to_optimizer(record: Any) -> Optimizer:
    return decode_optimizer(json_format.ParseDict(record, optimizer_pb2.Optimizer()))


def _from_progress(progress: Progress) -> dict[str, Any]:
    return {
        "steps": progress.steps.tolist(),
        "memory": progress.memory,
        "group_memory": {name: values.tolist() for name, values in progress.group_memory.items()},
        "accumulated": progress.accumulated,
        "accumulating": progress.accumulating,
        "skipped": progress.skipped,
        "samples": progress.samples,
        "divisor": progress.divisor,
        "staleness": list(progress.staleness.items()),
    }


def _to_progress(record: Any) -> Progress:
    return Progress(
        steps=np.array(record["steps"], np.int64),
        memory=[tuple(values) for values in record["memory"]],
        group_memory={name: np.array(values) for name, values in record["group_memory"].items()},
        accumulated=record["accumulated"],
        accumulating=tuple(record["accumulating"]),
        skipped=record["skipped"],
        samples=record["samples"],
        divisor=record["divisor"],
        staleness=dict(record["staleness"]),
    )


def _to_change(record: Any) -> Change:
    return decode_change(json_format.ParseDict(record, optimizer_pb2.Change()))


def _to_entry(record: Any) -> Entry:
    return Entry(record["name"], record["dtype"], tuple(record["shape"]), record["crc32"])


def _from_session(session: Session) -> dict[str, Any]:
    return {
        "client_id": session.client_id,
        "epoch": session.epoch,
        "last_sequence": session.last_sequence,
        "receipts": [
            [
                base64.b64encode(kept.digest).decode(),
                json_format.MessageToDict(encode_receipt(kept.receipt)),
                kept.event,
            ]
            for kept in session.receipts.values()
        ],
    }


def _to_session(record: Any) -> Session:
    receipts = OrderedDict()
    for digest, each, event in record["receipts"]:
        receipt = decode_receipt(json_format.ParseDict(each, step_pb2.Receipt()))
        receipts[receipt.sequence] = Kept(base64.b64decode(digest), receipt, event)
    last = record["last_sequence"]
    return Session(record["client_id"], record["epoch"], last, durable_sequence=last, receipts=receipts)
