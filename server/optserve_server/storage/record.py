"""A set's state without its tensors, as JSON and back. Nothing in it is executable."""

import base64
import datetime
import json
from collections import OrderedDict
from typing import Any

import numpy as np
from google.protobuf import json_format

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
from optserve_server.engine.sessions import Session
from optserve_server.engine.state import State

FORMAT = 1


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
            "steps": state.steps.tolist(),
            "memory": state.memory,
            "sessions": [_from_session(session) for session in state.sessions],
        }
    )


def from_json(text: str, arenas: dict[str, Arena]) -> State:
    """The state that `to_json` wrote, with its arenas; raises ValueError or KeyError for anything else."""
    record = json.loads(text)
    if record["format"] != FORMAT:
        raise ValueError(f"expected checkpoint format {FORMAT}; got {record['format']}")
    return State(
        spec=decode_spec(json_format.ParseDict(record["spec"], parameter_set_pb2.ParameterSetSpec())),
        position=Position(record["incarnation"], record["version"], record["version"]),
        create_time=datetime.datetime.fromisoformat(record["create_time"]),
        optimizers={name: _to_optimizer(each) for name, each in record["optimizers"].items()},
        changes=[_to_change(each) for each in record.get("changes", ())],  # the first records had none
        arenas=arenas,
        steps=np.array(record["steps"], np.int64),
        memory=[tuple(values) for values in record["memory"]],
        sessions=[_to_session(each) for each in record["sessions"]],
    )


def _to_optimizer(record: Any) -> Optimizer:
    return decode_optimizer(json_format.ParseDict(record, optimizer_pb2.Optimizer()))


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
    return Session(record["client_id"], record["epoch"], record["last_sequence"], receipts)
