"""The one place where exceptions become gRPC status codes."""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc

from optserve._errors import ServerBusy
from optserve._transport import REASON_KEY
from optserve_server.failures import told

PUSHBACK_KEY = "grpc-retry-pushback-ms"  # gRFC A6: the earliest time at which to try again


class ErrorInterceptor(grpc.ServerInterceptor):
    """Ends a call whose handler raised an OptserveError with that error's code, reason and message.

    Anything else is a bug: it is logged with its traceback, and the caller learns only that it happened.
    """

    def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.response_streaming:
            behavior = handler.stream_stream or handler.unary_stream
            factories = {True: grpc.stream_stream_rpc_method_handler, False: grpc.unary_stream_rpc_method_handler}
            wrapped: Callable[..., Any] = _streaming(behavior, method)
        else:
            behavior = handler.stream_unary or handler.unary_unary
            factories = {True: grpc.stream_unary_rpc_method_handler, False: grpc.unary_unary_rpc_method_handler}
            wrapped = _single(behavior, method)
        make = factories[handler.request_streaming]
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _single(behavior: Callable[..., Any], method: str) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behavior(request, context)
        except Exception as error:
            _abort(context, method, error)

    return call


def _streaming(behavior: Callable[..., Any], method: str) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from behavior(request, context)
        except Exception as error:
            _abort(context, method, error)

    return call


def _abort(context: grpc.ServicerContext, method: str, error: Exception) -> NoReturn:
    if not context.is_active():  # the caller is gone: nobody to tell, and no fault of ours
        raise error
    answer = told(error, method)
    hint = ((PUSHBACK_KEY, str(round(answer.retry_after * 1000))),) if isinstance(answer, ServerBusy) else ()
    context.set_trailing_metadata(((REASON_KEY, answer.reason()), *hint))
    context.abort(grpc.StatusCode[answer.code], str(answer))
