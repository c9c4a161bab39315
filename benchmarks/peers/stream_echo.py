"""A gRPC Python stream that sends back what it gets: raw bytes, one message each way, no work.

`python -m benchmarks.peers.stream_echo` prints its address, then serves until it is ended.
"""

from concurrent.futures import ThreadPoolExecutor

import grpc

METHOD = "/peer.Echo/Echo"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def main() -> None:
    """Serve."""
    server = grpc.server(ThreadPoolExecutor(2), options=OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(lambda requests, context: requests)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer.Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
