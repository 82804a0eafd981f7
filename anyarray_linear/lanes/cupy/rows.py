"""Rows of an array: neighbours in a warp share one, and add up what they found in it."""

from __future__ import annotations

from .kernels import blocks

SOURCE = """
struct Sizes { long long rows, columns; double factor; int shift, blocks; };

// `1 << shift` neighbours in a warp share a row. Every thread makes every round, with or without a row: a shuffle takes
// the whole warp.
__device__ A shared_sum(A x, int width)
{
    for (int o = width / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
#define WALK \\
    const int width = 1 << s.shift, neighbour = threadIdx.x & (width - 1); \\
    const long long stride = STRIDE >> s.shift, mine = INDEX >> s.shift; \\
    for (long long first = 0; first < s.rows; first += stride)
#define ROW \\
    const bool here = first + mine < s.rows; \\
    const long long row = here ? first + mine : 0, start = row * s.columns, end = here ? s.columns : 0;
#define EACH_COLUMN for (long long j = neighbour; j < end; j += width)
"""
SIZES = "qqdii"
"""How `Sizes` is packed."""


def shared(rows: int, columns: int) -> tuple[int, int]:
    """The shift, and how many blocks share the rows: a thread takes about four columns, and at most a warp shares a row."""
    shift = min(5, (-(-columns // 4) - 1).bit_length())
    return shift, blocks(rows << shift)
