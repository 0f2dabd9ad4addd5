"""Tensors on one GPU in the tables of its kernels: addresses, chunks, and what of them has to be launched.

One launch then takes all tensors of a format, and nothing is uploaded while the gradients lie where they lay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nadam.core.compressed import BLOCK as TILE
from nadam.core.compressed import SCALES
from nadam.core.dtypes import COMPRESSED, HALF, SPLIT8, WIDE
from nadam.kernels import layout as at
from nadam.kernels.cpu.pointers import Pointers
from nadam.kernels.gpu.passes import ALIGNED, BLOCK, CHUNK, EXCLUDED, FLAGS, KEY, TILE_WARPS, WARPS
from nadam.kernels.strides import address, bounds, overlapping
from nadam.torch.compressed import has_codes
from nadam.torch.memory import FORMATS, Array, Methods, check_apart, footprint, param_format, watching

State = dict[str, Any]
COLUMNS = {
    "exp_avg": at.EXP_AVG,
    "exp_avg_sq": at.EXP_AVG_SQ,
    "ema": at.EMA,
    "grad_accumulator": at.ACCUMULATOR,
    "remainder": at.REMAINDER,
}
MEMORY = [at.PARAM, at.GRAD, *COLUMNS.values()]
SCALE_COLUMNS = dict(zip(SCALES.values(), (at.EXP_AVG_SCALE, at.EXP_AVG_SQ_SCALE), strict=True))
# Tables can be uploaded so many times while CUDA graphs are being captured; each of these copies stays in its graph.
CAPTURES = 4
ABSENT = 0  # the address of a gradient that is missing
PRESENT = 16  # and of one without elements, which has none


class Kind(NamedTuple):
    """Tensors of the same number formats: one launch of each kernel."""

    param_format: str
    grad_format: str
    kept: str  # how the moments are kept
    first: int  # of its chunks
    programs: int
    chunks: Tensor

    @property
    def block(self) -> int:
        """Elements at once: 16 bytes of the widest format for each thread, or twice that.

        More of a narrow format would have the compiler deal the elements of narrow and wide ones to different threads.
        """
        if self.kept == COMPRESSED:
            return TILE
        return BLOCK if self.param_format == self.grad_format == "float32" and self.kept == WIDE else 512

    @property
    def warps(self) -> int:
        """Of a program: so many that each thread has 16 bytes of the widest format, or twice that."""
        return TILE_WARPS if self.kept == COMPRESSED else WARPS

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded stochastically."""
        return self.kept != WIDE or self.param_format == SPLIT8


class Tables:
    """Parameters of a bucket, their state and the gradients of a call.

    Attributes:
        rows: On the device, int64: a row per tensor, sorted by formats.
        chunks: On the device, int64: a row per chunk.
        ends: On the device, int64: where the chunks of each tensor begin, and the last one's end.
        kinds: Tensors of the same formats, which are launched together.
        order: Whose rows they are, in their order.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        grads: Sequence[Tensor | None],
        decays: Sequence[bool] | None = None,
        written: Sequence[Array] | None = None,
    ) -> None:
        self.params, self.device = list(params), params[0].device
        for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
            if grad is not None and grad.shape != param.shape:
                raise ValueError(f"grads[{i}]: shape {tuple(grad.shape)}, expected {tuple(param.shape)}")
        columns: dict[int, list[Any]] = {at.PARAM: self.params}
        columns |= {column: [state.get(name) for state in states] for name, column in (COLUMNS | SCALE_COLUMNS).items()}
        named = [(f"params[{i}]", t) for ts in columns.values() for i, t in enumerate(ts) if t is not None]
        self._written = check_apart(named, []) if written is None else written
        ranges = sorted(bounds(array) for array in self._written if array.size)
        self._lows, self._highs = np.array(ranges, np.int64).reshape(-1, 2).T
        self._highs = np.maximum.accumulate(self._highs)
        self._formats = formats = list(map(_formats, params, grads, states))
        kinds = sorted(set(formats))
        self.order = sorted(range(len(params)), key=lambda i: kinds.index(formats[i]))
        self._host = np.zeros((len(params), at.COLUMNS), np.int64)
        for column, tensors in columns.items():
            self._host[:, column] = [0 if tensors[i] is None else tensors[i].data_ptr() for i in self.order]
        self._host[:, KEY] = self.order
        self._host[:, FLAGS] = [0 if decays is None or decays[i] else EXCLUDED for i in self.order]
        chunks = at.cut_into_chunks([self.params[i].numel() for i in self.order], CHUNK)
        ends = np.searchsorted(chunks[:, at.TENSOR], np.arange(len(params) + 1))
        self.count, self.chunk_count = len(params), len(chunks)
        self.chunks, self.ends = self._on_device(chunks), self._on_device(ends.astype(np.int64))
        self.kinds = []
        for kind in kinds:
            own = [place for place, i in enumerate(self.order) if formats[i] == kind]
            first, last = int(ends[own[0]]), int(ends[own[-1] + 1])
            if last > first:
                self.kinds.append(Kind(*kind, first, last - first, self.chunks[first:last]))
        self.rows = torch.zeros((self.count, at.COLUMNS), dtype=torch.int64, device=self.device)
        self._uploaded = np.full(self.count, -1, np.int64)  # where gradients lie in the device's table
        # Where the host's table keeps the address of each parameter's gradient.
        self._cells = (address(self._host) + 8 * (at.GRAD + at.COLUMNS * np.argsort(self.order))).tolist()
        self._fixed = [tensor for _, tensor in named]
        self._fixed_watch = watching(self._fixed)
        self._watch: Pointers | Methods | None = None  # the same with gradients, where none is missing or copied
        self._reserve: list[Tensor] = []  # pinned, for uploads while a graph is being captured
        self._captured: list[Tensor] = []  # which those graphs copy from
        self._copies: list[Tensor] = []
        self._take(grads)

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether this still holds with these gradients; if so, the device's table has their addresses now."""
        if len(grads) != self.count:
            return False
        if self.fits_at_once(grads):
            return True
        if not self._fixed_watch.fits([]):
            return False
        for grad, param, (_, grad_format, _) in zip(grads, self.params, self._formats, strict=True):
            if grad is not None and (FORMATS.get(grad.dtype) != grad_format or grad.shape != param.shape):
                return False
        self._take(grads)
        return True

    def fits_at_once(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether they do by one look at all tensors; False also where that is not enough to know."""
        if self._watch is None or not self._watch.fits(grads if type(grads) is list else list(grads)):
            return False
        self._copies = []
        self._upload()
        return True

    def _take(self, grads: Sequence[Tensor | None]) -> None:
        """Put the addresses of gradients into the table, or of copies in their parameters' order of dimensions."""
        dense = [
            grad if grad is None or in_step(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
            for grad, param in zip(grads, self.params, strict=True)
        ]
        self._copies = [one for one, other in zip(dense, grads, strict=True) if one is not None and one is not other]
        pointers = [ABSENT if grad is None else grad.data_ptr() or PRESENT for grad in dense]
        self._check_apart(pointers, dense)
        self._host[:, at.GRAD] = np.array(pointers, np.int64)[self.order]
        self._upload()
        present = [grad for grad in grads if grad is not None]
        if self._watch is None and not self._copies and len(present) == self.count:
            self._watch = watching(self._fixed, list(zip(present, self._cells, strict=True)), self._written)

    def _check_apart(self, pointers: list[int], grads: Sequence[Tensor | None]) -> None:
        begins = np.array(pointers, np.int64)
        ends = begins + [0 if grad is None else grad.nbytes for grad in grads]
        last = np.searchsorted(self._lows, ends) - 1
        shared = (last >= 0) & (ends > begins)
        shared[shared] = self._highs[last[shared]] > begins[shared]
        near = np.flatnonzero(shared).tolist()
        found = overlapping(self._written, [footprint(grads[i]) for i in near]) if near else None
        if found is not None:
            i = near[found[1] - len(self._written)]
            raise ValueError(f"grads[{i}]: it shares memory with a variable or the optimizer's state")

    def _upload(self) -> None:
        """Bring the table to the device, if gradients lie elsewhere than in the one that is there."""
        rows = self._host
        if (rows[:, at.GRAD] == self._uploaded).all():
            return
        aligned = (rows[:, MEMORY] % 16 == 0).all(axis=1)
        rows[:, FLAGS] = rows[:, FLAGS] & ~ALIGNED | np.where(aligned, ALIGNED, 0)
        self._bring()
        self._uploaded = rows[:, at.GRAD].copy()

    def _bring(self) -> None:
        if self.device.type != "cuda":
            self.rows.copy_(torch.from_numpy(self._host))
        elif torch.cuda.is_current_stream_capturing():
            if not self._reserve:
                raise RuntimeError("step: capture a CUDA graph only after a step outside of one, with fewer captures")
            staging = self._reserve.pop()
            self._captured.append(staging)
            staging.numpy()[:] = self._host
            self.rows.copy_(staging, non_blocking=True)
        else:
            # PyTorch keeps pinned memory until the copies from it are done.
            self.rows.copy_(self._pinned().copy_(torch.from_numpy(self._host)), non_blocking=True)
            while len(self._reserve) < CAPTURES:
                self._reserve.append(self._pinned())

    def _pinned(self) -> Tensor:
        return torch.empty(self._host.shape, dtype=torch.int64, device="cpu", pin_memory=True)

    def _on_device(self, array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.clone()


def _formats(param: Tensor, grad: Tensor | None, state: State) -> tuple[str, str, str]:
    own, kept = FORMATS[param.dtype], HALF if state["exp_avg"].dtype == torch.bfloat16 else WIDE
    kept = COMPRESSED if has_codes(state) else kept
    return param_format(param, state.get("remainder")), own if grad is None else FORMATS[grad.dtype], kept


def in_step(tensor: Tensor, param: Tensor) -> bool:
    """Whether a tensor's elements lie in the order of a parameter's.

    Example:
        >>> image = torch.zeros(2, 3, 4, 4)
        >>> in_step(image.contiguous(memory_format=torch.channels_last), image)
        False
    """
    if tensor.stride() == param.stride():
        return True
    pairs = zip(tensor.stride(), param.stride(), param.shape, strict=True)
    return param.numel() < 2 or all(one == other or size == 1 for one, other, size in pairs)


def takes(param: Tensor, state: State) -> bool:
    """Whether the kernels can work on a parameter and its state in place: dense memory, in one order of dimensions.

    Example:
        >>> weight = torch.zeros(4, 4)
        >>> moments = {name: torch.zeros(4, 4) for name in ("exp_avg", "exp_avg_sq")}
        >>> takes(weight, moments), takes(torch.zeros(4, 8)[:, ::2], moments)
        (True, False)
    """
    if param.dtype not in FORMATS or param.layout != torch.strided or param.is_neg():
        return False
    dense = torch.empty_like(param, device="meta", memory_format=torch.preserve_format)
    present = [state[name] for name in COLUMNS if state.get(name) is not None]
    return in_step(param, dense) and all(in_step(each, param) and each.device == param.device for each in present)
