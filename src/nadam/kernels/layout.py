"""The words of every record that a kernel reads: tensor descriptors, chunks, arguments. All tables are int64."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 15  # elements; 128 KiB of float32: small enough to share out evenly, large enough to stream

# A row per tensor: addresses of its memory, and of the layouts of parameter and gradient (dimensions, or -1 for dense;
# sizes; strides in bytes); then which of the call's tensors it is.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, EMA, ACCUMULATOR, REMAINDER, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE = range(9)
PARAM_LAYOUT, GRAD_LAYOUT, MEMBER = range(9, 12)
COLUMNS = 12
# A row per chunk: which tensor, first element, number of elements.
TENSOR, START, COUNT = range(3)
CHUNK_COLUMNS = 3
# What the threads of one pass share: the next chunk to draw, and whether to stop.
TICKET, STOP = range(2)
# The block of a kernel's arguments: addresses and counts; from EXTRA on, what the one kernel takes besides. SHOWN is
# how many parameters have counters of their own: the last three times as many words of the counters.
CONTROL, NUM_CHUNKS, ROWS, CHUNKS, COUNTERS, NEXT_COUNTERS, NUM_COUNTERS, SHOWN, EXTRA = range(9)


def cut_into_chunks(sizes: Sequence[int], chunk: int = CHUNK) -> NDArray[np.int64]:
    """Rows (tensor, start, count) of at most ``chunk`` elements, for tensors of these sizes, in their order.

    Example:
        >>> cut_into_chunks([5, 0, 2], chunk=3).tolist()
        [[0, 0, 3], [0, 3, 2], [2, 0, 2]]
    """
    rows = [(t, start, min(chunk, n - start)) for t, n in enumerate(sizes) for start in range(0, n, chunk)]
    return np.array(rows, np.int64).reshape(-1, CHUNK_COLUMNS)
