"""Names: what libraries call what rules keep."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from optserve import optim
from optserve._errors import InvalidState
from optserve._state import State
from optserve.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Names:
    """A library's names for the slots and the memory of a rule, by ours; `convention` is the one that has its numbers.

    It keeps slots in `negated` with the other sign. Slots in `shaped` don't have their tensor's shape; some tensors may have no
    elements there, and the library nothing. `eager` if its optimizer has state before its first update, not `counted` if it
    does not keep the number of updates, `plain` if it keeps that as an int.
    """

    slots: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)
    convention: str = "torch"
    negated: tuple[str, ...] = ()
    shaped: tuple[str, ...] = ()
    eager: bool = False
    counted: bool = True
    plain: bool = False


def _same(*slots: str) -> Mapping[str, str]:
    return {name: name for name in slots}


Table = Mapping[type[Optimizer], Names]  # a subclass has its parent's

# Keys of `state_dict()["state"]`, beside `step`.
TORCH: Table = {
    optim.SGD: Names(_same("momentum_buffer"), counted=False),
    # torch keeps eta and mu of the next update; those of the last have no effect.
    optim.ASGD: Names(_same("ax"), {"eta": "eta", "mu": "mu", "next_eta": "eta", "next_mu": "mu"}),
    optim.Adagrad: Names(_same("sum"), eager=True),
    optim.Adadelta: Names(_same("square_avg", "acc_delta")),
    optim.RMSprop: Names(_same("square_avg", "grad_avg", "momentum_buffer")),
    optim.Rprop: Names(_same("prev", "step_size")),
    optim.Adam: Names(_same("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    optim.NAdam: Names(_same("exp_avg", "exp_avg_sq"), {"mu_product": "mu_product"}),
    optim.RAdam: Names(_same("exp_avg", "exp_avg_sq")),
    optim.Adamax: Names(_same("exp_avg", "exp_inf")),
    optim.SparseAdam: Names(_same("exp_avg", "exp_avg_sq"), plain=True),
    optim.Adafactor: Names(_same("row_var", "col_var", "variance"), shaped=("row_var", "col_var", "variance")),
    # Averages are of tensors that are no matrices, which torch's Muon does not take.
    optim.Muon: Names(_same("momentum_buffer"), shaped=("momentum_buffer", "exp_avg", "exp_avg_sq"), counted=False),
}

# Fields of NamedTuples, beside `count`.
OPTAX: Table = {
    optim.SGD: Names({"momentum_buffer": "trace"}),
    optim.AveragedMomentum: Names({"exp_avg": "ema"}),
    optim.SignSGD: Names(),
    optim.Signum: Names({"exp_avg": "ema"}),
    optim.Lion: Names({"exp_avg": "mu"}),
    optim.Adagrad: Names({"sum": "sum_of_squares"}, convention="optax"),
    optim.Adadelta: Names({"square_avg": "e_g", "acc_delta": "e_x"}),
    optim.RMSprop: Names(
        {"square_avg": "nu", "grad_avg": "mu", "momentum_buffer": "trace"},
        convention="optax",
        negated=("momentum_buffer",),
    ),
    optim.BiasCorrectedRMSprop: Names({"square_avg": "nu"}),
    optim.Adam: Names({"exp_avg": "mu", "exp_avg_sq": "nu", "max_exp_avg_sq": "nu_max"}, convention="optax"),
    optim.NAdam: Names({"exp_avg": "mu", "exp_avg_sq": "nu"}, convention="optax"),
    optim.RAdam: Names({"exp_avg": "mu", "exp_avg_sq": "nu"}, convention="optax"),
    optim.Adamax: Names({"exp_avg": "mu", "exp_inf": "nu"}),
    optim.AdaBelief: Names({"exp_avg": "mu", "exp_avg_var": "nu"}),
    optim.Yogi: Names({"exp_avg": "mu", "exp_avg_sq": "nu"}),
    optim.AdEMAMix: Names({"exp_avg": "m1", "exp_avg_slow": "m2", "exp_avg_sq": "nu"}),
    optim.ADOPT: Names({"exp_avg": "mu", "exp_avg_sq": "nu"}),
    optim.LARS: Names({"momentum_buffer": "trace"}, negated=("momentum_buffer",)),
    optim.LAMB: Names({"exp_avg": "mu", "exp_avg_sq": "nu"}),
    optim.NovoGrad: Names({"exp_avg": "mu", "exp_avg_sq": "nu"}, shaped=("exp_avg_sq",)),
}

# Ends of the names of `optimizer.variables`, beside `iteration` and `learning_rate`; all may have `average` (`use_ema=True`).
KERAS: Table = {
    optim.SGD: Names({"velocity": "momentum"}, convention="keras"),
    optim.VelocityMomentum: Names({"velocity": "momentum"}),
    optim.Lion: Names({"exp_avg": "momentum"}),
    optim.Adagrad: Names({"sum": "accumulator"}, convention="keras"),
    optim.Adadelta: Names({"square_avg": "accumulated_grad", "acc_delta": "accumulated_delta_var"}),
    optim.RMSprop: Names(
        {"square_avg": "velocity", "grad_avg": "average_gradient", "momentum_buffer": "momentum"}, convention="keras"
    ),
    optim.FTRL: Names({"accumulator": "accumulator", "linear": "linear"}),
    optim.Adam: Names(
        {"exp_avg": "momentum", "exp_avg_sq": "velocity", "max_exp_avg_sq": "velocity_hat"}, convention="keras"
    ),
    # Keras does not name Nadam's product itself.
    optim.NAdam: Names(
        {"exp_avg": "momentum", "exp_avg_sq": "velocity"}, {"mu_product": "variable"}, convention="keras"
    ),
    optim.Adamax: Names({"exp_avg": "momentum", "exp_inf": "norm"}, convention="keras"),
    optim.LAMB: Names({"exp_avg": "momentum", "exp_avg_sq": "velocity"}, convention="keras"),
}


def names_of(optimizer: type[Optimizer], table: Table, library: str) -> Names:
    """A library's names for a rule; raises InvalidState if it does not keep the same for it."""
    for kind in optimizer.__mro__:
        if kind in table:
            return table[kind]
    raise InvalidState(
        f"expected a rule whose state moves to and from {library}: {', '.join(kind.__name__ for kind in table)}; got "
        f"{optimizer.__name__}"
    )


def names_for(optimizer: Optimizer, table: Table, library: str) -> Names:
    """As `names_of`; raises InvalidState, too, if an optimizer does not have the library's numbers."""
    names = names_of(type(optimizer), table, library)
    convention = getattr(optimizer, "convention", names.convention)
    if convention != names.convention:
        raise InvalidState(
            f"expected {optimizer.rule} with {library}'s numbers, convention={names.convention!r}; got {convention!r}"
        )
    return names


def check_place(state: State, slots: Collection[str], library: str) -> None:
    """Raises InvalidState for what a state has beside these slots."""
    for name in state.slots:
        if name not in slots:
            raise InvalidState(
                f"expected a state that {library}'s {state.optimizer.rule} has a place for; got the slot {name!r}. Take it "
                "from state.slots and leave it out"
            )
    if state.accumulation is not None:
        raise InvalidState(
            f"expected a state between updates, for {library}; got one with {state.accumulation.pushes} pushes that wait. "
            "Push until they make an update"
        )
