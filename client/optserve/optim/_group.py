"""Groups of tensors with hyperparameters of their own."""

from typing import Any, ClassVar

from optserve._errors import InvalidGroup


class Group:
    """Tensors with hyperparameters of their own: `Group("no_decay", "*.bias", weight_decay=0.0)`.

    `tensors` are names or shell patterns (`*`, `?`, `[...]`); the first group that matches a tensor claims it, and what
    no group claims belongs to the group `default`. Raises InvalidGroup.
    """

    DEFAULT: ClassVar[str] = "default"

    def __init__(self, name: str, /, *tensors: str, **hyperparameters: Any) -> None:
        allowed = name.replace(".", "").replace("_", "").replace("-", "")
        if not (0 < len(name) <= 128 and allowed.isalnum() and allowed.isascii()) or name == self.DEFAULT:
            raise InvalidGroup(
                f"expected a group name of 1 to 128 letters, digits, '.', '_', '-', other than 'default'; got {name!r}"
            )
        if not tensors:
            raise InvalidGroup(f"expected at least one tensor name or pattern for group {name!r}; got none")
        self.name = name
        self.tensors = tensors
        self.hyperparameters = hyperparameters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.name, self.tensors))

    def __repr__(self) -> str:
        arguments = [repr(self.name), *map(repr, self.tensors)]
        return f"Group({', '.join(arguments + [f'{name}={value!r}' for name, value in self.hyperparameters.items()])})"
