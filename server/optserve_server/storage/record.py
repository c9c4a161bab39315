"""A set's state without its tensors, as JSON and back. Nothing in it is executable."""

import base64
import datetime
import json
from collections import OrderedDict
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
from optserve._results import Change, Position
from optserve.optim import Optimizer
from optserve.v1 import optimizer_pb2, parameter_set_pb2, step_pb2
from optserve_server.engine.arena import Arena
from optserve_server.engine.pipeline import Progress
from optserve_server.engine.sessions import Session
from optserve_server.engine.state import State

FORMAT = 2


def to_json(state: State) -> str:
    """Everything but the arenas."""
    return json.dumps(
        {
            "format": FORMAT,
            "spec": json_format.MessageToDict(encode_spec(state.spec)),
            "incarnation": state.position.incarnation,
            "version": state.position.version,
            "create_time": state.create_time.isoformat(),
            "optimizers": {
                name: json_format.MessageToDict(encode_optimizer(each)) for name, each in state.optimizers.items()
            },
            "changes": [json_format.MessageToDict(encode_change(each)) for each in state.changes],
            "progress": _from_progress(state.progress),
            "keys": list(state.keys.items()),
            "forgotten": state.forgotten,
            "sessions": [_from_session(session) for session in state.sessions],
        }
    )


def from_json(text: str, arenas: dict[str, Arena]) -> State:
    """The state that `to_json` wrote, with its arenas.

    Raises InvalidArgument for a set that can't be on this server, other ValueErrors or KeyError for what is not a state.
    """
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
    return State(
        spec=decoded,
        position=Position(record["incarnation"], record["version"], record["version"]),
        create_time=datetime.datetime.fromisoformat(record["create_time"]),
        optimizers={name: _to_optimizer(each) for name, each in record["optimizers"].items()},
        changes=[_to_change(each) for each in record["changes"]],
        arenas=arenas,
        progress=_to_progress(record["progress"]),
        keys=dict(record["keys"]),
        forgotten=record["forgotten"],
        sessions=[_to_session(each) for each in record["sessions"]],
    )


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
    }


def _to_progress(record: Any) -> Progress:
    return Progress(
        steps=np.array(record["steps"], np.int64),
        memory=[tuple(values) for values in record["memory"]],
        group_memory={name: np.array(values) for name, values in record["group_memory"].items()},
        accumulated=record["accumulated"],
        accumulating=tuple(record["accumulating"]),
        skipped=record["skipped"],
    )


def _to_change(record: Any) -> Change:
    return decode_change(json_format.ParseDict(record, optimizer_pb2.Change()))


def _from_session(session: Session) -> dict[str, Any]:
    return {
        "client_id": session.client_id,
        "epoch": session.epoch,
        "last_sequence": session.last_sequence,
        "receipts": [
            [base64.b64encode(digest).decode(), json_format.MessageToDict(encode_receipt(receipt))]
            for digest, receipt in session.receipts.values()
        ],
    }


def _to_session(record: Any) -> Session:
    receipts = OrderedDict()
    for digest, each in record["receipts"]:
        receipt = decode_receipt(json_format.ParseDict(each, step_pb2.Receipt()))
        receipts[receipt.sequence] = (base64.b64decode(digest), receipt)
    last = record["last_sequence"]
    return Session(record["client_id"], record["epoch"], last, durable_sequence=last, receipts=receipts)
