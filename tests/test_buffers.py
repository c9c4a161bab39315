"""Pulled arrays are the caller's for as long as the caller holds any of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import optserve
from optserve import TensorSpec, optim
from optserve._buffers import WORTHWHILE, Buffers

SPECS = [TensorSpec.of("a", np.zeros(WORTHWHILE // 4, np.float32)), TensorSpec.of("b", np.zeros((3, 5)))]


@given(
    st.lists(st.sampled_from(["take", "drop", "drop all but a slice", "drop all but a view of a view"]), max_size=30)
)
def test_no_array_that_is_held_is_handed_out_again(actions: list[str]) -> None:
    buffers = Buffers()
    held: list[tuple[np.ndarray[Any, Any], int]] = []
    for number, action in enumerate(actions):
        if action == "take":
            for array in buffers.arrays(SPECS):
                array.fill(number)
                held.append((array, number))
            del array
        elif held:
            array, value = held.pop(0)
            if action == "drop all but a slice":
                held.append((array[1:2], value))
            elif action == "drop all but a view of a view":
                held.append((array.reshape(-1)[::2].view(array.dtype)[:3], value))
            del array
        for array, value in held:
            assert (array == value).all()
            del array


def test_a_loop_that_lets_go_uses_two_buffers_for_ever() -> None:
    buffers = Buffers()
    arrays = buffers.arrays(SPECS)
    addresses = set()
    for _ in range(10):
        arrays = buffers.arrays(SPECS)
        addresses.add(arrays[0].ctypes.data)
    assert len(addresses) == 2


def test_parameters_of_an_earlier_step_stay_as_they_were(client: optserve.Client, new_id: Callable[[], str]) -> None:
    size = WORTHWHILE
    weights = client.create_parameter_set(new_id(), {"x": np.zeros(size, np.float32)}, optim.SGD(lr=1.0, maximize=True))
    gradient = {"x": np.ones(size, np.float32)}
    history = [weights.step(gradient) for _ in range(5)]
    for number, params in enumerate(history, start=1):
        assert (params["x"] == number).all()
