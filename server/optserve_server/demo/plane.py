"""A long valley, f(x, y) = x²/20 + y², in which every rule shows its character."""

from dataclasses import dataclass

import numpy as np

import optserve
from optserve import optim
from optserve_server.demo.digits import Array

START = (-7.0, 2.0)
CURVATURE = (0.1, 2.0)
STEPS = 40


@dataclass(frozen=True, slots=True)
class Descent:
    """A rule's way down: points from START on, (STEPS + 1, 2)."""

    rule: optim.Optimizer
    points: Array


def height(x: Array, y: Array) -> Array:
    """f at each point."""
    return (CURVATURE[0] * x**2 + CURVATURE[1] * y**2) / 2


def descend(client: optserve.Client, rule: optim.Optimizer) -> Descent:
    """Let a rule find its way."""
    points = [np.array(START)]
    with client.create_parameter_set(f"demo/plane-{rule.rule}", {"point": points[0]}, rule) as weights:
        for _ in range(STEPS):
            points.append(weights.step({"point": points[-1] * CURVATURE})["point"])
        weights.delete()
    return Descent(rule, np.array(points))
