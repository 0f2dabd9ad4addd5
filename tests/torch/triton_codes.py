"""Moments of 8 bits as Triton has the format, in its interpreter, beside core/compressed.py; see test_triton.py."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from nadam.core import compressed
from nadam.kernels.gpu import compressed as triton_compressed


@triton.jit
def format_kernel(
    addresses, first, second, chances, first_back, second_back, left, block: tl.constexpr, wide: tl.constexpr
):
    """Narrows one block in memory and widens it again."""
    i = triton_compressed.offsets(block)
    chance = tl.load(chances + i).to(tl.uint32, bitcast=True)
    codes, more_codes, scales, more_scales, start = (
        tl.load(addresses),
        tl.load(addresses + 1),
        tl.load(addresses + 2),
        tl.load(addresses + 3),
        tl.load(addresses + 4),
    )
    given, more = tl.load(first + i), tl.load(second + i)
    triton_compressed.store_moments(
        codes, more_codes, scales, more_scales, start, left, given, more, chance, block, wide
    )
    given, more = triton_compressed.load_moments(codes, more_codes, scales, more_scales, start, left, block, wide)
    tl.store(first_back + i, given)
    tl.store(second_back + i, more)


def through_triton(first, second, chance, left=compressed.BLOCK):
    """Codes and scales of one block, and the moments that they are widened to, of the second block of a tensor."""
    size, groups = 2 * compressed.BLOCK, 2 * compressed.LANES
    made = [torch.full((n,), 77, dtype=torch.uint8) for n in (size, size, groups, groups)]
    addresses = torch.tensor([*(each.data_ptr() for each in made), compressed.BLOCK])
    given = [torch.from_numpy(each.reshape(-1).copy()) for each in (first, second, chance.view(np.int32))]
    back = [torch.zeros(compressed.BLOCK) for _ in range(2)]
    wide = left == compressed.BLOCK
    format_kernel[(1,)](addresses, *given, *back, left, block=compressed.BLOCK, wide=wide)
    halves = [each.chunk(2) for each in made]
    assert all(bool((before == 77).all()) for before, _ in halves)
    return [after.numpy() for _, after in halves], [each.numpy() for each in back]


def block_of(bits):
    return np.asarray(bits, np.uint32).view(np.float32).reshape(1, compressed.ROWS, compressed.LANES)


def drawn_blocks():
    """First and second moments of many sizes, with some that are special."""
    generator = np.random.default_rng(3)
    for spread, special in ((0, None), (3, 0), (38, None), (44, 0x7F7FFFFF), (38, 0x7F800000), (3, 0x7FC00000)):
        shape = 1, compressed.ROWS, compressed.LANES
        sizes = 10.0 ** generator.uniform(-spread, min(spread, 30), (2, *shape))
        first, second = (generator.standard_normal((2, *shape)) * sizes).astype(np.float32)
        second = np.abs(second)
        first[0, :, 5] = second[0, :, 5] = 0
        first[0, ::7, 6] = second[0, ::9, 6] = 0
        first[0, ::5, 7] = -0.0
        if special is not None:
            first[0, 3, 8::9] = second[0, 4, 9::9] = block_of([special] * compressed.BLOCK)[0, 0, 0]
        yield first, second, generator.integers(0, 1 << 32, shape, np.uint32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_format_is_that_of_the_core_to_the_bit():
    for first, second, chance in drawn_blocks():
        codes, back = through_triton(first, second, chance)
        wanted = compressed.narrow(first, second, chance)
        for one, other in zip(codes, wanted, strict=True):
            assert (one == other.view(np.uint8).reshape(-1)).all()
        for one, other in zip(back, compressed.widen(*wanted), strict=True):
            np.testing.assert_array_equal(one, other.reshape(-1))


@pytest.mark.parametrize("left", [1, 63, 64, 65, 2047])
def test_of_a_part_of_a_block_nothing_else_is_looked_at(left):
    first, second, chance = next(drawn_blocks())
    whole, _ = through_triton(first, second, chance)
    for each in (first, second):
        each.reshape(-1)[left:] = 0
    wanted = [each.view(np.uint8).reshape(-1) for each in compressed.narrow(first, second, chance)]
    for each in (first, second):
        each.reshape(-1)[left:] = np.inf
    codes, _ = through_triton(first, second, chance, left)
    for one, other in zip(codes[:2], wanted[:2], strict=True):
        assert (one[:left] == other[:left]).all()
        assert (one[left:] == 77).all()
    assert all((one == other).all() for one, other in zip(codes[2:], wanted[2:], strict=True))
    assert left > 65 or any((one != other).any() for one, other in zip(codes[2:], whole[2:], strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000, 0x7F800001])
def test_a_nan_of_any_bits_stays_one(bits):
    """An NVIDIA GPU's own has all bits set but the sign: rounded up they would be those of a zero."""
    moment = block_of(np.full(compressed.BLOCK, bits))
    for chance in (0, 0xFFFFFFFF):
        codes, back = through_triton(moment, moment, np.full(moment.shape, chance, np.uint32))
        assert all(np.isnan(each).all() for each in back)
        quiet = block_of(np.full(compressed.BLOCK, 0x7FC00000))
        wanted = compressed.narrow(quiet, quiet, np.full(moment.shape, chance, np.uint32))
        assert all((a == b.view(np.uint8).reshape(-1)).all() for a, b in zip(codes, wanted, strict=True))
