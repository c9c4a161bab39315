"""What happened during training, in numbers."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Measurement:
    """One step of one worker: the loss of its minibatch, and where its gradient stood in the set's history."""

    version: int
    staleness: int
    loss: float
    samples: int


@dataclass(frozen=True, slots=True)
class History:
    """Measurements in the order of their arrival, and (version, accuracy on the test images) now and then."""

    measurements: list[Measurement] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
