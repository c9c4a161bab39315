"""The other server of a primary and its standby, over gRPC."""

from collections.abc import Iterator
from typing import Any

import grpc

from optserve._transport import CHANNEL_OPTIONS, SERVICE, serialize, typed
from optserve.v1.standby_pb2 import FollowRequest, FollowResponse


class Peer:
    """A server at an address; called with requests, it gives a Follow stream."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._follow = self._channel.stream_stream(f"/{SERVICE.full_name}/Follow", serialize, FollowResponse.FromString)

    def __call__(self, requests: Iterator[FollowRequest]) -> "PeerStream":
        return PeerStream(self._follow(requests), self._address)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()


class PeerStream:
    """A Follow stream; raises OptserveErrors."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address

    def __iter__(self) -> Iterator[FollowResponse]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise typed(error, self._address) from None

    def cancel(self) -> None:
        """End it."""
        self._call.cancel()
