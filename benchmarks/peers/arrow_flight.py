"""Arrow Flight, echoing: the same bytes there, then back, in record batches of 2 MiB on an open exchange, and no work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pyarrow
from pyarrow import flight

from benchmarks.peers.gradient import gradient
from benchmarks.peers.process import spawned

ROWS = (2 << 20) // 4  # of a batch


class Echo(flight.FlightServerBase):
    """Answers each step's batches once they are all there; the descriptor says how many they are."""

    def do_exchange(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.MetadataRecordBatchWriter,
    ) -> None:
        """Echo until the stream ends."""
        writer.begin(reader.schema)
        batches: list[pyarrow.RecordBatch] = []
        for chunk in reader:
            batches.append(chunk.data)
            if len(batches) == int(descriptor.command):
                for batch in batches:
                    writer.write_batch(batch)
                batches.clear()


@contextmanager
def contender(size: int) -> Iterator[Callable[[], object]]:
    """Write all batches, then read as many."""
    table = pyarrow.table({"x": gradient(size)})
    batches = table.to_batches(max_chunksize=ROWS)
    with spawned(serve) as server, flight.connect(server.recv()) as client:
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(str(len(batches))))
        writer.begin(table.schema)

        def step() -> list[pyarrow.RecordBatch]:
            for batch in batches:
                writer.write_batch(batch)
            return [reader.read_chunk().data for _ in batches]

        yield step
        writer.close()


def serve(parent: Connection) -> None:
    """Serve until the parent is gone."""
    server = Echo("grpc://127.0.0.1:0")
    parent.send(f"grpc://127.0.0.1:{server.port}")
    parent.poll(None)
