"""Jit helpers for features of second order as the left side of products, made in registers and never stored.

The products x_a·x_b of 8 columns a and 8 columns b of a tile are an outer product [M, 8, 8], of which the reshape to
[M, 64] is, thread by thread, what the tensor cores take as a left operand. With a <= b blocks of columns, the triangle
of pairs and squares costs little more than it has features: 2,304 for 2,080 with 64 columns, 8,704 for 8,256 with 128.
"""

import triton
import triton.language as tl

from .tiles import INTERPRETED, dot, rounded_to

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def keep(acc, HOPPER: tl.constexpr):
    """acc, opaque to the compiler, which therefore waits for the products that it is the sum of.

    Left to itself Triton 3.6 and 3.7 let them run while the next iteration overwrites their left side (issue 9433).
    """
    if HOPPER:
        acc = tl.inline_asm_elementwise("", "=r,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    return acc


@triton.jit
def outer(a, b):
    """Products [M, A · B] of the columns of a [M, A] and b [M, B], rounded to their dtype."""
    if _INTERPRETED:  # which multiplies the bit patterns of bfloat16
        product = rounded_to(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[:, None, :], a.dtype)
    else:
        product = a[:, :, None] * b[:, None, :]
    return tl.reshape(product, [a.shape[0], a.shape[1] * b.shape[1]])


@triton.jit
def load_block(rows, block):
    """Columns 8 · block ... of rows that begin at `rows` [M, 1], at addresses that are multiples of 16 bytes.

    In copies of 8 bytes, which go through the L1 cache: those of 16 bytes go past it and fetch every row from L2 for
    each block, and half of what they fetch there in vain.
    """
    columns = tl.max_contiguous(tl.multiple_of(tl.arange(0, 8), [4]), [4])[None, :]
    return tl.load(tl.max_contiguous(tl.multiple_of(rows + block * 8 + columns, [1, 8]), [1, 4]))


@triton.jit
def add_blocks(acc, a_rows, b_rows, z_ptr, NUM_A: tl.constexpr, NUM_B: tl.constexpr, TRIANGLE: tl.constexpr, dims):
    """acc [M, 64] + Σ outer(a_i, b_j) @ z_ij over blocks i of NUM_A and j of NUM_B, i fastest; i <= j if TRIANGLE.

    z is [blocks, 64, 64], contiguous. Without masks: rows beyond the last have to be others that exist.
    """
    NUM_BLOCKS: tl.constexpr = NUM_B * (NUM_B + 1) // 2 if TRIANGLE else NUM_A * NUM_B
    z_ptrs = z_ptr + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    i, j = 0, 0
    for block in tl.range(0, NUM_BLOCKS, num_stages=dims.STAGES):
        phi = outer(load_block(a_rows, i), load_block(b_rows, j))
        acc = keep(dot(phi, tl.load(z_ptrs + block * 4096), acc, dims.PREFIX_PRECISION), dims.HOPPER)
        last = i == (j if TRIANGLE else NUM_A - 1)
        j = tl.where(last, j + 1, j)
        i = tl.where(last, 0, i + 1)
    return acc


@triton.jit
def block_of_triangle(number):
    """i and j, i <= j, of the blocks in the order in which `add_blocks` takes them."""
    j = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > number, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= number, j + 1, j)
    return number - j * (j + 1) // 2, j
