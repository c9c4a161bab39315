"""A push on its way: what it declared, what has been staged, why it is refused."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optserve._errors import InvalidArgument, TensorMismatch
from optserve._results import Position
from optserve._specification import Holds, ParameterSetSpec, Run, TensorSpec
from optserve_server.engine.staging import StagedTensor, Staging
from optserve_server.engine.threads import Threads


class Declared(NamedTuple):
    """A tensor that a push will send: a gradient, or the caller's parameters."""

    spec: TensorSpec
    is_parameter: bool = False


class Push:
    """One push. What is wrong with it is kept in `error`, so that the rest can be drained and a receipt recorded."""

    def __init__(
        self,
        spec: ParameterSetSpec,
        indices: Mapping[str, int],
        threads: Threads,
        sequence: int,
        declared: Sequence[Declared],
        *,
        base: Position | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.sequence = sequence
        self.base = base
        self.changes = changes or {}
        self.error: InvalidArgument | None = None
        self.digest = b""
        self.gradient_norm = 0.0
        self._staging = Staging([each.spec for each in declared], threads)
        self._gradients: dict[int, int] = {}  # index in the set to index in the push
        self._parameters: dict[int, int] = {}
        try:
            self._resolve(spec, indices, declared)
        except InvalidArgument as error:
            self.error = error

    @property
    def gradients(self) -> dict[int, StagedTensor]:
        """Staged gradients by the tensor's index in the set, in the set's order."""
        return {index: self._staging.tensors[k] for index, k in sorted(self._gradients.items())}

    @property
    def parameters(self) -> dict[int, StagedTensor]:
        """Staged parameters of the caller, likewise."""
        return {index: self._staging.tensors[k] for index, k in sorted(self._parameters.items())}

    def add(self, runs: Sequence[Run], data: Any, *, replace: bool) -> None:
        """Stage a chunk, unless the push is refused already."""
        if self.error is None:
            try:
                self._staging.add(runs, data, replace=replace)
            except InvalidArgument as error:
                self.error = error

    def finish(self) -> None:
        """All chunks are here: guard them, and take the digest and the norm of the gradients."""
        if self.error is None:
            try:
                self._staging.finish()
            except InvalidArgument as error:
                self.error = error
            else:
                self.digest = self._staging.digest()
                self.gradient_norm = self._staging.norm(k for _, k in sorted(self._gradients.items()))

    def _resolve(self, spec: ParameterSetSpec, indices: Mapping[str, int], declared: Sequence[Declared]) -> None:
        for k, (tensor, is_parameter) in enumerate(declared):
            index = indices.get(tensor.name)
            if index is None or spec.tensors[index] != tensor:
                raise mismatch(spec, tensor)
            if is_parameter and spec.holds is Holds.PARAMETERS:
                raise TensorMismatch(
                    f"set {spec.id!r} holds its parameters: expected gradients only; got parameters for {tensor.name!r}"
                )
            if (self._parameters if is_parameter else self._gradients).setdefault(index, k) != k:
                raise TensorMismatch(f"expected each tensor once in a push; got {tensor.name!r} twice")
        if not self._gradients:
            raise TensorMismatch(f"expected the gradient of at least one tensor of set {spec.id!r}; got none")


def mismatch(spec: ParameterSetSpec, tensor: TensorSpec) -> TensorMismatch:
    """The error that says how a tensor differs from the registered ones."""
    by_name = {each.name: each for each in spec.tensors}
    if tensor.name in by_name:
        return TensorMismatch(
            f"set {spec.id!r}: expected {by_name[tensor.name]}; got {tensor.dtype.name}{list(tensor.shape)}"
        )
    names = ", ".join(repr(name) for name in list(by_name)[:10]) + (", ..." if len(by_name) > 10 else "")
    return TensorMismatch(f"set {spec.id!r}: expected a tensor among {names}; got {tensor.name!r}")
