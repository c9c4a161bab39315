"""The emulated links that benchmarks use."""

from pathlib import Path

import pytest
from benchmarks.link import NoLink, isolated
from benchmarks.relay import OFFLOAD, on_the_wire

from link_probe import SENT


def networks() -> set[str]:
    """The network namespaces that some process is in."""
    found = set()
    for each in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(str(each.readlink()))
        except OSError:  # it has ended
            continue
    return found


def test_segments_carried_as_one_are_counted_with_a_header_each() -> None:
    ip, tcp = bytes(20), bytes(12) + bytes([8 << 4]) + bytes(19)
    carried = OFFLOAD.pack(1, 1, 52, 1448, 20, 16) + ip + tcp + bytes(3000)
    assert on_the_wire(carried) == (3000 + 3 * 52, 3)


def test_a_packet_by_itself_is_counted_as_it_is() -> None:
    assert on_the_wire(OFFLOAD.pack(0, 0, 0, 0, 0, 0) + bytes(40)) == (40, 1)


def test_a_link_counts_what_it_carries_and_leaves_nothing_behind(capfd: pytest.CaptureFixture[str]) -> None:
    before = networks()
    try:
        isolated("tests.link_probe")
    except NoLink as missing:
        pytest.skip(str(missing))
    received, up, on_the_other, dropped = map(int, capfd.readouterr().out.split())
    assert received == SENT
    assert SENT < up < 1.1 * SENT
    assert on_the_other < 1000
    assert dropped == 0
    assert networks() <= before
