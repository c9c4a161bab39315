"""A push on its way: what it declared, what has been staged, why it is refused."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optserve._dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from optserve._errors import (
    InvalidArgument,
    InvalidChunk,
    InvalidFormat,
    InvalidTransform,
    NonFiniteValue,
    Refusal,
    TensorMismatch,
)
from optserve._policies import check_samples
from optserve._results import Position
from optserve._rows import Indices
from optserve._specification import Holds, ParameterSetSpec, Pushes, Run, StateFormat, TensorSpec
from optserve._transforms import check_loss_scale
from optserve.formats import BFloat16, Float16, Format, Int8
from optserve_server.engine.formats import INT8
from optserve_server.engine.rows import SparseGradient, check_rows, check_transforms, gathered
from optserve_server.engine.staging import Received, StagedTensor, Staging
from optserve_server.engine.threads import Threads

_STAGED = {BFloat16: BFLOAT16, Float16: FLOAT16, Int8: INT8}  # read as they travel; top-k is decoded on arrival


class Declared(NamedTuple):
    """A tensor that a push will send: a gradient, or the caller's parameters; and what it travels as, if not as it is.

    Of a gradient for some rows only, the specification has their number in the place of the first dimension.
    """

    spec: TensorSpec
    is_parameter: bool = False
    format: Format | None = None
    rows: Indices | None = None

    @property
    def staged(self) -> TensorSpec:
        """The tensor as updates will read it."""
        return self.spec if self.format is None else replace(self.spec, dtype=_STAGED.get(type(self.format), FLOAT32))

    @property
    def is_plain(self) -> bool:
        """Whether it comes whole and as it is."""
        return self.format is None and self.rows is None

    @property
    def blocked(self) -> Format | None:
        """The format, if it has records of many elements."""
        return None if isinstance(self.format, BFloat16 | Float16) else self.format


class Push:
    """One push. What is wrong with it is kept in `refusal`, so that the rest can be drained and a receipt recorded."""

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
        loss_scale: float = 1.0,
        samples: float = 1.0,
    ) -> None:
        self.sequence = sequence
        self.refusal: Refusal | None = None
        self.digest = b""
        self.released: Callable[[], None] | None = None  # what to do once its memory is free
        self.gradient_norm = 0.0
        self._spec = spec
        self._indices = indices
        self._gradients: dict[int, int] = {}  # index in the set to index in the push
        self._parameters: dict[int, int] = {}
        self._sparse: dict[int, SparseGradient] = {}
        self._values = spec.treatments if spec.buffers else {}
        self._declared = declared
        try:
            self._resolve(declared)
        except InvalidArgument as error:
            self.refuse(error)
        self.say(base=base, changes=changes, loss_scale=loss_scale, samples=samples)
        if self.refusal is not None:
            self._declared = declared = ()  # nothing is made room for that was not registered
        self._registered = {k: index for index, k in self._gradients.items()}
        self.covers = tuple(
            sorted((index, declared[k].rows is not None) for index, k in self._gradients.items() if declared)
        )
        staged, formats = [each.staged for each in declared], [each.blocked for each in declared]
        self._staging = Staging(staged, threads, formats, guard=spec.guard)

    @property
    def nbytes(self) -> int:
        """Size of the tensors that it will hold, in bytes; 1 if there are none."""
        return max(1, sum(tensor.spec.nbytes for tensor in self._staging.tensors))

    @property
    def indices(self) -> list[int]:
        """The tensors that it has gradients of."""
        return [index for index, _ in self.covers]

    @property
    def declared(self) -> Sequence[Declared]:
        """The tensors that it said it would send."""
        return self._declared

    @property
    def received(self) -> Sequence[Received]:
        """The chunks that came."""
        return self._staging.received

    @property
    def gradients(self) -> dict[int, StagedTensor]:
        """Staged gradients of whole tensors by their index in the set, in the set's order."""
        return {
            index: self._staging.tensors[k]
            for index, k in sorted(self._gradients.items())
            if self._declared[k].rows is None
        }

    @property
    def sparse(self) -> dict[int, SparseGradient]:
        """Gradients for some rows only, likewise, after `finish`."""
        return self._sparse

    @property
    def sparse_dtypes(self) -> set[DType]:
        """What gradients for some rows travel as."""
        return {self._declared[k].spec.dtype for k in self._gradients.values() if self._declared[k].rows is not None}

    @property
    def norms(self) -> dict[int, float]:
        """Euclidean norm of each gradient, by the tensor's index in the set, after `finish`; 0 if there is no guard."""
        sparse = self._sparse
        return {
            index: sparse[index].norm if index in sparse else self._staging.norm(k)
            for index, k in sorted(self._gradients.items())
        }

    @property
    def skippable(self) -> bool:
        """Whether nothing is wrong with it but values that are not finite."""
        return self.refusal is not None and self.refusal.reason == NonFiniteValue.reason()

    @property
    def parameters(self) -> dict[int, StagedTensor]:
        """Staged parameters of the caller, likewise."""
        return {index: self._staging.tensors[k] for index, k in sorted(self._parameters.items())}

    def say(
        self,
        *,
        base: Position | None,
        changes: Mapping[str, Mapping[str, Any]] | None,
        loss_scale: float,
        samples: float,
    ) -> None:
        """What rides with the gradients: from now on this, whatever was said before."""
        self.base = base
        self.changes = changes or {}
        self.loss_scale = loss_scale
        self.samples = samples
        if self.refusal is not None:
            return
        try:
            check_loss_scale(loss_scale)
            check_samples(samples)
            self._check_values(self._declared)
        except InvalidArgument as error:
            self.refuse(error)

    def add(self, runs: Sequence[Run], data: Any, *, replace: bool) -> None:
        """Stage a chunk, unless the push is refused already."""
        if self.refusal is None:
            try:
                self._staging.add(runs, data, replace=replace)
            except InvalidArgument as error:
                self.refuse(error)

    def add_shared(
        self, runs: Sequence[Run], memory: NDArray[np.uint8], offsets: Sequence[int], *, replace: bool
    ) -> None:
        """Stage runs that lie in shared memory, every registered tensor at its offset in bytes."""
        if self.refusal is None:
            try:
                starts = []
                for run in runs:
                    index = self._registered.get(run.tensor)
                    if index is None or not self._declared[run.tensor].is_plain:
                        raise InvalidChunk(
                            f"expected gradients as they are in shared memory; got tensor {run.tensor} of this push. Send "
                            "others in chunks"
                        )
                    starts.append(offsets[index])
                self._staging.add_shared(runs, memory, starts, replace=replace)
            except InvalidArgument as error:
                self.refuse(error)

    def finish(self, pulled: Iterable[str] = ()) -> None:
        """All chunks are here: guard them, and take the digest and the norm of the gradients.

        `pulled` names the tensors that are asked for right after the push; it is refused if one of them won't be there.
        """
        if self.refusal is None:
            try:
                self._check_pulled(pulled)
                self._staging.finish()
                self._gather_rows()
                if self._spec.state is StateFormat.INT8:  # whose blocks are updated as a whole
                    self._staging.align()
            except InvalidArgument as error:
                self.refuse(error)
            else:
                if not self._spec.guard:
                    self.gradient_norm = math.nan
                    return
                self.digest = self._staging.digest(
                    f"{sorted(self.changes.items())} {self.loss_scale} {self.samples} {self._row_digests()}"
                )
                norms = [norm for index, norm in self.norms.items() if index not in self._values]
                self.gradient_norm = math.hypot(*norms) / self.loss_scale

    def refuse(self, error: InvalidArgument) -> None:
        """Never apply it."""
        self.refusal = Refusal.of(error)
        self.let_go()

    def let_go(self) -> None:
        """Let go of what was received."""
        self._staging = Staging((), Threads(1))
        self._sparse = {}
        if self.released is not None:
            self.released()

    def _resolve(self, declared: Sequence[Declared]) -> None:
        spec = self._spec
        for k, each in enumerate(declared):
            tensor, is_parameter = each.spec, each.is_parameter
            index = self._indices.get(tensor.name)
            if index is None:
                raise mismatch(spec, tensor)
            if not _fits(spec.tensors[index], each):
                raise mismatch(spec, tensor, each.rows)
            if each.rows is not None:
                self._check_sparse(each, spec.tensors[index])
            elif tensor.name in spec.tables:
                raise TensorMismatch(
                    f"set {spec.id!r}: expected a row-sparse gradient, RowSparse(keys, values), for table {tensor.name!r}; got "
                    "a dense one"
                )
            if each.format is not None and tensor.dtype.compute != FLOAT32.compute:
                raise TensorMismatch(f"set {spec.id!r}: expected {tensor} as it is; got it encoded as {each.format}")
            if is_parameter and each.format is not None:
                raise TensorMismatch(f"set {spec.id!r}: expected parameters as they are; got {tensor} as {each.format}")
            if is_parameter and spec.holds is Holds.PARAMETERS:
                raise TensorMismatch(
                    f"set {spec.id!r} holds its parameters: expected gradients only; got parameters for {tensor.name!r}"
                )
            if (self._parameters if is_parameter else self._gradients).setdefault(index, k) != k:
                raise TensorMismatch(f"expected each tensor once in a push; got {tensor.name!r} twice")
        if not self._gradients:
            raise TensorMismatch(f"expected the gradient of at least one tensor of set {spec.id!r}; got none")

    def _check_values(self, declared: Sequence[Declared]) -> None:
        """Raises InvalidArgument kinds for what can be done to gradients, but not to values of tensors."""
        spec, trained = self._spec, self._spec.pushes is Pushes.PARAMETERS
        if trained and self.loss_scale != 1:
            raise InvalidTransform(
                f"set {spec.id!r}: expected parameters as they were trained; got a loss_scale of {self.loss_scale:g}"
            )
        for index, k in self._gradients.items():
            format = declared[k].format
            if format is not None and format.error_feedback and (trained or index in self._values):
                raise InvalidFormat(
                    f"set {spec.id!r}: expected values of {spec.tensors[index].name!r} as they are, or rounded; got them as "
                    f"{format}, which is for what is added up. Push without a format, or as BFloat16 or Float16"
                )

    def _check_sparse(self, declared: Declared, tensor: TensorSpec) -> None:
        """Raises InvalidArgument kinds for what can't be had for some rows only."""
        spec = self._spec
        assert declared.rows is not None
        if declared.is_parameter or declared.format is not None or spec.holds is Holds.MOMENTS:
            raise TensorMismatch(
                f"set {spec.id!r}: expected row-sparse gradients as they are, of a set that holds parameters; {tensor.name!r} "
                "is pushed otherwise"
            )
        check_rows(spec, tensor, declared.rows)
        check_transforms(spec)

    def _gather_rows(self) -> None:
        for index, k in sorted(self._gradients.items()):
            rows = self._declared[k].rows
            if rows is not None:
                self._sparse[index] = gathered(rows, self._staging.tensors[k])

    def _row_digests(self) -> str:
        """What tells the rows of a push from others."""
        return " ".join(
            f"{k}: {hashlib.blake2b(each.rows.tobytes(), digest_size=16).hexdigest()}"
            for k, each in enumerate(self._declared)
            if each.rows is not None
        )

    def _check_pulled(self, names: Iterable[str]) -> None:
        present = self._gradients if self._spec.holds is Holds.MOMENTS else range(len(self._spec.tensors))
        check_present(self._spec, self._indices, present, names)


def _fits(tensor: TensorSpec, declared: Declared) -> bool:
    """Whether what is declared is a tensor as it was registered, or some rows of it."""
    if declared.rows is None:
        return declared.spec == tensor
    return bool(tensor.shape) and declared.spec == replace(tensor, shape=(len(declared.rows), *tensor.shape[1:]))


def check_present(
    spec: ParameterSetSpec, indices: Mapping[str, int], present: Iterable[int], names: Iterable[str]
) -> None:
    """Raises TensorMismatch for a name that is not among the tensors that are present, given as indices."""
    known, names = set(present), list(names)
    if len(set(names)) < len(names):
        raise TensorMismatch(f"set {spec.id!r}: expected each tensor once in a pull; {len(names)} names came")
    for name in names:
        if indices.get(name) not in known:
            raise TensorMismatch(
                f"set {spec.id!r}: expected tensors among {_some(spec.tensors[k].name for k in sorted(known))}; got {name!r}"
            )


def mismatch(spec: ParameterSetSpec, tensor: TensorSpec, rows: Indices | None = None) -> TensorMismatch:
    """The error that says how a tensor, or some rows of one, differs from the registered ones."""
    by_name = {each.name: each for each in spec.tensors}
    if tensor.name in by_name and rows is not None:
        return TensorMismatch(
            f"set {spec.id!r}: expected {len(rows)} rows of {by_name[tensor.name]}; got {tensor.dtype.name}{list(tensor.shape)}"
        )
    if tensor.name in by_name:
        return TensorMismatch(
            f"set {spec.id!r}: expected {by_name[tensor.name]}; got {tensor.dtype.name}{list(tensor.shape)}"
        )
    return TensorMismatch(f"set {spec.id!r}: expected a tensor among {_some(by_name)}; got {tensor.name!r}")


def _some(names: Iterable[str]) -> str:
    """The first few of many names."""
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:10]) + (", ..." if len(quoted) > 10 else "") or "none yet"
