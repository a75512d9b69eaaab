"""How the product of hidden states and the LM head's weight is spread over programs, for the scores and the losses; `head_tile`
is the experts' second product too.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels.launch import dtype_name, multiplies_by_warp, strides, tuned

SPAN = 128  # tokens per program
_FEW_ROWS = 64  # in one tile: fewer Hopper multiplies by another instruction, and a row's bits would depend on how many there are
_RESIDENT = 16 << 20  # bytes of hidden states that stay in L2 (40 MB on A100, 50 on H100) beside what streams through


@triton.jit
def grouped_block():
    """The block of axis 0 that is this program's, in a grid by `grouped`."""
    return tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def tile_of_head(
    active,  # bool [R] | None
    rows,  # R
    HAS_ACTIVE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """This program's rows, int32 [BLOCK_R]; which of them are there and active; and its tokens, int32 [BLOCK_V]."""
    row = grouped_block() * BLOCK_R + tl.arange(0, BLOCK_R)
    wanted = row < rows
    if HAS_ACTIVE:
        wanted &= tl.load(active + row, mask=wanted, other=0) != 0
    return row, wanted, tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)


@triton.jit
def head_tile(
    hidden,  # [R, D]
    weight,  # [V, D]
    row,  # int32 [BLOCK_R]
    row_inside,  # bool [BLOCK_R]; False: the row is not read and counts as zeros
    token,  # int32 [BLOCK_V]
    vocabulary,  # V
    width,  # D
    hidden_r, hidden_d, weight_v, weight_d,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_R, BLOCK_V]: hidden[row] @ weight[token].T."""
    d = tl.arange(0, BLOCK_D)
    hidden_at = hidden + row.to(tl.int64)[:, None] * hidden_r + d[None, :] * hidden_d
    weight_at = weight + token.to(tl.int64)[None, :] * weight_v + d[:, None] * weight_d
    total = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in range(0, width, BLOCK_D):
        inside = d < width - start
        h = tl.load(hidden_at, mask=row_inside[:, None] & inside[None, :], other=0)
        w = tl.load(weight_at, mask=(token < vocabulary)[None, :] & inside[:, None], other=0)
        total = tl.dot(h, w, total, input_precision=PRECISION)
        hidden_at += BLOCK_D * hidden_d
        weight_at += BLOCK_D * weight_d
    return total


def grouped(blocks: int, others: int, most: int) -> tuple[int, int, int]:
    """A grid of blocks by others, started in groups of `most` blocks: all of a group, for one of the others after another."""
    return min(blocks, most), others, triton.cdiv(blocks, most)


def grid(hidden, block: int, spans: int, target_width: int = 0) -> tuple[int, int, int]:
    """Blocks of rows by spans of the vocabulary: a group's hidden states stay in L2, and the weights pass by once for each group.

    target_width: of the target's hidden states, where a program reads those too.

    2048 rows of LLaDA, 17 MB, are one group: 132 programs in flight are 8 spans, and all 988, 1.04 GB, are read once. 8192 rows
    would not stay in L2 from one span to the next, and would be read anew for every two, 33 GB; in 4 groups the weights are
    read 4 times.
    """
    rows, width = hidden.shape
    row_bytes = (width + target_width) * (4 if dtype_name(hidden) == "float32" else 2)
    return grouped(triton.cdiv(rows, block), spans, max(1, _RESIDENT // (row_bytes * block)))


def tiles(hidden, sampled=False) -> tuple[dict, int, int]:
    """Constants of a head product, its warps and its stages."""
    return _tiles(dtype_name(hidden), hidden.shape[0] <= _FEW_ROWS, sampled)


@tuned("lm_head")
def _tiles(dtype: str, few_rows: bool, sampled: bool) -> tuple[dict, int, int]:
    """The largest that spill no register, of which noise takes many.

    The span never depends on the rows: see `scores`.
    """
    if dtype == "float32":
        return {"BLOCK_R": 16 if sampled else 32, "BLOCK_V": SPAN, "BLOCK_D": 32, "PRECISION": "tf32x3"}, 8, 2
    block = _FEW_ROWS if few_rows or sampled else 128
    num_warps = 4 if few_rows and not sampled and not multiplies_by_warp() else 8
    return {"BLOCK_R": block, "BLOCK_V": SPAN, "BLOCK_D": 64, "PRECISION": "ieee"}, num_warps, 3


def sizes(hidden, weight, depth):
    """depth: BLOCK_D."""
    return {
        "rows": hidden.shape[0], "vocabulary": weight.shape[0], "width": hidden.shape[1],
        **strides(hidden, "hidden_r hidden_d", hidden_d=depth), **strides(weight, "weight_v weight_d", weight_d=depth),
    }  # fmt: skip
