"""A group of tensors that one call of a kernel does together."""

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nadam.core.clock import Commit
from nadam.core.coefficients import SMALLEST_NORMAL, clamp_eps
from nadam.core.element import Flags
from nadam.core.scalars import Scalars
from nadam.kernels import native, spans
from nadam.kernels.threads import get_num_threads, share_out

# Below this many elements the calling thread is done before a helper has woken up.
WORTH_SHARING = 1 << 20


class Tensors(NamedTuple):
    """Where the tensors of a group lie."""

    rows: NDArray[np.int64]  # one per tensor, columns as in spans.py
    sizes: Sequence[int]  # elements
    keep: Any  # what owns the memory


class Table:
    """Tensors with one parameter format and one gradient format, cut into chunks, and the passes over them.

    Not for two threads at once. The arguments of its kernels live in buffers that it reuses, so that a step allocates
    nothing. ``default_threads`` tells how many threads a framework uses, where nobody asks for another number;
    ``rounded`` whether the first moments are bfloat16.
    """

    def __init__(
        self,
        param_format: str,
        grad_format: str,
        tensors: Tensors,
        default_threads: Callable[[], int] | None = None,
        rounded: bool = False,
    ) -> None:
        self.param_format, self.grad_format, self.rounded = param_format, grad_format, rounded
        self._default_threads = default_threads
        self.rows, self.sizes, self.keep = tensors
        self.compute = spans.COMPUTE_DTYPE[param_format]
        self.chunks = spans.spans(self.sizes)
        self.worth_sharing = sum(self.sizes) >= WORTH_SHARING
        self.largest, self.smallest = float(np.finfo(self.compute).max), SMALLEST_NORMAL[self.compute]
        n = len(self.sizes)
        self._factors, self._decays = np.ones(n, self.compute), np.zeros(n, self.compute)
        self._bounds, self._scale = np.zeros(2, self.compute), np.ones(1)
        self._scalars, self._pack_scalars = (
            np.zeros(len(Scalars._fields), self.compute),
            Struct(f"{len(Scalars._fields)}{'f' if self.compute == 'float32' else 'd'}"),
        )
        self._totals, self._outside = np.zeros(len(self.chunks)), np.zeros(len(self.chunks), np.int64)
        self._control = np.zeros(2, np.int64)
        self.shared = self._control.data  # the same, faster to read
        self.keys = np.zeros(n, np.uint32)  # of the first moments' rounding by chance, new at every step
        self._update_block = self._block(self._factors, self._decays, self._scalars, self.keys)
        self._blocks = {
            "one_pass": self._update_block,
            "accumulate": self._block(self._bounds),
            "measure": self._block(self._bounds, self._scale, self._totals, self._outside),
        }
        gradient = (grad_format, self.compute)
        self._formats = {"one_pass": (param_format, grad_format), "accumulate": gradient, "measure": gradient}
        self._kernels: dict[tuple[str, tuple[Any, ...]], Callable[[int, int], None]] = {}
        self._commits: dict[str, Commit] = {}
        self._multipliers: Any = None

    def _block(self, *extra: NDArray[Any] | None) -> tuple[NDArray[np.int64], int]:
        common = [address(self._control), len(self.chunks), address(self.rows), address(self.chunks), 0, 0, 0, 0]
        block = np.array([*common, *(0 if array is None else address(array) for array in extra)], np.int64)
        return block, address(block)

    def ready(self, name: str, commit: Commit | None, *variant: Any) -> tuple[Callable[[int, int], None], int]:
        """The kernel of a pass, and the address of its arguments."""
        kernel = self._kernels.get((name, variant))
        if kernel is None:
            kernel = self._kernels[name, variant] = native.kernel("numba", name, *self._formats[name], *variant)
        block, address_of_block = self._blocks[name]
        if commit is not None and commit is not self._commits.get(name):
            self._commits[name] = commit
            now, advanced, shown = commit
            block[spans.CLOCK : spans.EXTRA] = address(now), address(advanced), len(now), shown
        return kernel, address_of_block

    def _run(self, name: str, commit: Commit | None, *variant: Any) -> None:
        kernel, address_of_block = self.ready(name, commit, *variant)
        helpers = min(get_num_threads(self._default_threads), len(self.chunks)) - 1 if self.worth_sharing else 0
        share_out(kernel, address_of_block, self.shared, len(self.chunks), helpers)

    def measure(
        self, unscale: float, accumulated: bool, largest: float | None = None, scale: float = 1.0
    ) -> tuple[NDArray[np.float64], int]:
        """Read the gradients once.

        Args:
            unscale: Multiplies each gradient.
            accumulated: Whether the accumulator is then added.
            largest: Values whose magnitude is not at most this (after unscale, before the accumulator) are counted.
            scale: Multiplies each value before it is squared; only together with ``largest``.

        Returns:
            The sum of squares of each tensor, float64, added in chunk order whatever the threads; and the count.
        """
        counted = largest is not None
        self._bounds[:] = unscale, largest or 0.0
        self._scale[0] = scale
        self._totals[:], self._outside[:] = 0.0, 0
        self._run("measure", None, accumulated, counted)
        sums = np.zeros(len(self.sizes))
        np.add.at(sums, self.chunks[:, spans.TENSOR], self._totals)
        if not (accumulated or counted):
            sums *= unscale**2
        return sums, int(self._outside.sum())

    def set_multipliers(self, grad_factors: Sequence[float] | float, decay: float, decays: NDArray[np.float64]) -> None:
        """What multiplies each tensor's gradient, or all of them, and how much of each parameter decays."""
        wanted = (grad_factors, decay)
        if wanted != self._multipliers:
            self._multipliers = None
            self._factors[:] = grad_factors
            np.multiply(decays, decay, out=self._decays, casting="same_kind")
            self._multipliers = wanted

    def forget_multipliers(self) -> None:
        """Somebody else writes them."""
        self._multipliers = None

    def accumulate(self, unscale: float, commit: Commit) -> None:
        """Add the unscaled gradients to the accumulators."""
        self._bounds[0] = unscale
        self._run("accumulate", commit)

    def update(
        self,
        s: Scalars,
        flags: Flags,
        commit: Commit,
    ) -> None:
        """The one pass, after `set_multipliers`.

        Args:
            s: This update's scalars.
            flags: What it does besides the rule.
            commit: The counters before and after.
        """
        s = s._replace(eps=clamp_eps(s.eps, s.eps, self.smallest))
        self._pack_scalars.pack_into(self._scalars.data, 0, *s)  # five times as fast as NumPy's assignment
        self._run("one_pass", commit, *flags, self.rounded)


def address(array: NDArray[Any]) -> int:
    """Where an array's first element lies."""
    return int(array.__array_interface__["data"][0])
