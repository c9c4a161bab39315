"""Methods whose workers train on their own for a while, as arguments of `Client.create_parameter_set`.

    weights = client.create_parameter_set("model", parameters, **presets.diloco(workers=4))

A worker takes the parameters θ, makes some steps with an optimizer of its own, and pushes how far it has come,
Δ = θ_local − θ, and the number n of samples or tokens that it saw: `weights.step(delta, samples=n)`. The server makes of it the
pseudo-gradient g = −Δ, or of several their mean ḡ = Σ nᵢgᵢ / Σ nᵢ, for an outer optimizer. Without `samples` all weigh the
same, as in most of the papers. A preset is that optimizer (`optserve.optim` has the mathematics), the policy that says when
pushes become an update, and what is pushed. What else a policy has takes its place:

    presets.diloco() | {"policy": Sync(quorum=3, grace=30.0, deadline=600.0), "pushes": "parameters"}

A round is over `deadline` seconds after its first push, for the slowest may have many steps to make until it pushes; let the
client's timeout be longer. Without `workers` it waits for all members. Running statistics of a normalization are nothing to
optimize: `create_parameter_set(..., buffers={"*running_*": "average"})`. Sorted from simple to complex.
"""

from typing import TypedDict

from optserve._policies import Async, Buffered, Policy, Sync
from optserve._specification import Pushes
from optserve.optim import SGD, DelayedNesterov, FedAdagrad, FedAdam, FedYogi, Optimizer
from optserve.staleness import Polynomial

__all__ = [
    "Preset",
    "delayed_nesterov",
    "diloco",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedbuff",
    "fedyogi",
    "streaming_diloco",
]

DEADLINE = 600.0  # seconds


class Preset(TypedDict):
    """Arguments of `Client.create_parameter_set`."""

    optimizer: Optimizer
    policy: Policy
    pushes: Pushes | str


def fedavg(workers: int | None = None, *, lr: float = 1.0, deadline: float = DEADLINE) -> Preset:
    """Federated averaging: with η = 1 the parameters become the mean of the workers', weighted by samples.

        θ ← θ − ηḡ

    Reference: McMahan et al., AISTATS 2017, arXiv:1602.05629.
    """
    return _in_rounds(SGD(lr=lr), workers, deadline)


def fedavgm(
    workers: int | None = None, *, lr: float = 1.0, momentum: float = 0.9, deadline: float = DEADLINE
) -> Preset:
    """Federated averaging with momentum on the server.

        b ← μb + ḡ
        θ ← θ − ηb

    Reference: Hsu, Qi & Brown, 2019, arXiv:1909.06335, which tries μ from 0 to 0.997.
    """
    return _in_rounds(SGD(lr=lr, momentum=momentum), workers, deadline)


def fedadagrad(workers: int | None = None, *, lr: float = 0.1, tau: float = 1e-3, deadline: float = DEADLINE) -> Preset:
    """Adagrad on the server: `optim.FedAdagrad`.

        v ← v + ḡ²                              v starts at τ²
        θ ← θ − η ḡ / (√v + τ)

    Reference: Reddi et al., ICLR 2021, arXiv:2003.00295, which chooses η for each task; this one is Flower's.
    """
    return _in_rounds(FedAdagrad(lr=lr, tau=tau), workers, deadline)


def fedadam(
    workers: int | None = None,
    *,
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    deadline: float = DEADLINE,
) -> Preset:
    """Adam on the server: `optim.FedAdam`, which also has Flower's and TensorFlow Federated's bias correction.

        m ← β₁m + (1 − β₁)ḡ
        v ← β₂v + (1 − β₂)ḡ²                    v starts at τ²
        θ ← θ − η m / (√v + τ)

    Reference: Reddi et al., ICLR 2021, arXiv:2003.00295, which chooses η for each task; this one is Flower's.
    """
    return _in_rounds(FedAdam(lr=lr, betas=betas, tau=tau), workers, deadline)


def fedyogi(
    workers: int | None = None,
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    deadline: float = DEADLINE,
) -> Preset:
    """Yogi on the server: `optim.FedYogi`, which also has TensorFlow Federated's bias correction.

        m ← β₁m + (1 − β₁)ḡ
        v ← v − (1 − β₂) sign(v − ḡ²) ḡ²        v starts at τ²
        θ ← θ − η m / (√v + τ)

    Reference: Reddi et al., ICLR 2021, arXiv:2003.00295, which chooses η for each task; this one is Flower's.
    """
    return _in_rounds(FedYogi(lr=lr, betas=betas, tau=tau), workers, deadline)


def diloco(workers: int | None = None, *, lr: float = 0.7, momentum: float = 0.9, deadline: float = DEADLINE) -> Preset:
    """DiLoCo: Nesterov's momentum on the server, and H steps of AdamW in every worker, whose moments stay there.

        b ← μb + ḡ
        θ ← θ − η(ḡ + μb)

    H is 500 in the paper.

    Reference: Douillard et al., 2023, arXiv:2311.08105.
    """
    return _in_rounds(SGD(lr=lr, momentum=momentum, nesterov=True), workers, deadline)


def streaming_diloco(
    workers: int | None = None, *, lr: float = 0.4, momentum: float = 0.9, deadline: float = DEADLINE
) -> Preset:
    """`diloco` by fragments: a push brings some of the tensors, and other steps go on meanwhile.

    All workers push the same fragment in turn, each every H steps, and mix what comes back into what they have by then:
    θ_local ← αθ_local + (1 − α)θ. A tensor's momentum moves when its fragment does.

    Reference: Douillard et al., 2025, arXiv:2501.18512.
    """
    return diloco(workers, lr=lr, momentum=momentum, deadline=deadline)


def fedbuff(pushes: int = 10, *, lr: float = 1.0, a: float = 0.5) -> Preset:
    """Buffered asynchronous averaging: every K pushes make an update, nobody waits, and what is stale weighs less.

        θ ← θ − η/K Σ (1 + τᵢ)^−a gᵢ            over K pushes, τᵢ updates old

    K is `pushes`. With `samples`, nᵢ/Σnᵢ is in the place of 1/K.

    Reference: Nguyen et al., AISTATS 2022, arXiv:2106.06639.
    """
    return Preset(optimizer=SGD(lr=lr), policy=Buffered(pushes=pushes, staleness=Polynomial(a)), pushes=Pushes.DELTAS)


def delayed_nesterov(workers: int, *, lr: float = 0.7, momentum: float = 0.9, c: float = 0.0) -> Preset:
    """DiLoCo without rounds: each push moves the parameters, every N-th the momentum, too: `optim.DelayedNesterov`.

        Δ ← Δ + g
        every N-th push:  m ← βm + Δ/N,  Δ ← 0,  θ ← θ − η(g/N + (1 − cN + c)βm)
        otherwise:        θ ← θ − η(g/N + cβm)

    N is the number of workers. In the paper a slow worker makes fewer steps before it pushes.

    Reference: Liu et al., 2024, arXiv:2401.09135.
    """
    optimizer = DelayedNesterov(lr=lr, momentum=momentum, every=workers, c=c)
    return Preset(optimizer=optimizer, policy=Async(), pushes=Pushes.DELTAS)


def _in_rounds(optimizer: Optimizer, workers: int | None, deadline: float) -> Preset:
    return Preset(optimizer=optimizer, policy=Sync(workers, deadline=deadline), pushes=Pushes.DELTAS)
