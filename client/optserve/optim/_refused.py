"""Rules that need more than gradients, and what to do instead."""

LOSS_AGAIN = (
    "it evaluates loss and gradient again along its line search, and a push brings one gradient. Run it where the loss is; "
    "from gradients alone, Adam and Rprop adapt their steps"
)
SECOND_GRADIENT = (
    "its gradient is that of a perturbed point, which takes a second pass through the model. Make it in the worker, and push "
    "it to a set with the optimizer that SAM wraps, such as optim.SGD"
)
HESSIAN = (
    "it divides by an estimate of the Hessian's diagonal, from products of the Hessian with vectors, and a push brings "
    "gradients only. optim.AdaBelief and optim.Adam estimate curvature from those"
)
LOSS = (
    "its step size comes from the value of the loss, and a push brings gradients only. Compute the step size in the worker, "
    'and push it along: weights.step(gradients, hyperparameters={"default": {"lr": ...}})'
)

REFUSED = {
    "LBFGS": LOSS_AGAIN,
    "SAM": SECOND_GRADIENT,
    "Sophia": HESSIAN,
    "SophiaG": HESSIAN,
    "SophiaH": HESSIAN,
    "AdaHessian": HESSIAN,
    "PolyakSGD": LOSS,
    "MoMo": LOSS,
    "MoMoAdam": LOSS,
}

_PLAIN = {name.lower(): why for name, why in REFUSED.items()}


def refusal(name: str) -> str | None:
    """Why there is no rule of that name, in whatever case and with whatever underscores; None for all other names."""
    why = _PLAIN.get(name.lower().replace("_", ""))
    return why and f"expected a rule that needs nothing but gradients; got {name!r}: {why}"
