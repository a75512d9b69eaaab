"""A mixture of experts: the pairs of a row and an expert it chose, sorted by expert, and for tiles of them two matrix products.

Four kernels, none of which waits for the host: which pairs each expert has; their hidden activations; what each pair gives; and the
sum over a row's pairs, in the order in which they are given, so that a row is the same in any batch.
"""

import triton
import triton.language as tl

from dlm_kernels.triton_kernels.head import head_tile
from dlm_kernels.triton_kernels.launch import Out, dtype_name, launch, multiplies_by_warp, strides, tuned
from dlm_kernels.triton_kernels.numerics import exp

MOST_EXPERTS = 4095  # that are counted at once
_PAIRS, _COLUMNS = 2048, 512  # that a program looks at, and adds up, at a time


@triton.jit
def _sort_kernel(
    expert,  # int32 [N, K], contiguous; P = N * K
    order,  # int32 [P]; the pairs of expert 0, then those of 1, each expert's in their order; at the end those of no expert
    tile_expert, tile_start, tile_stop,  # int32 [TILES]; whose a tile is, -1: nobody's, and its part of `order`
    pairs,  # P
    experts,  # E
    tiles,  # TILES
    BLOCK_M: tl.constexpr,  # pairs in a tile
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,  # a power of two above E
):  # fmt: skip
    # The last program's are the pairs of no expert.
    own = tl.program_id(0)
    each = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, pairs, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        chosen = tl.load(expert + pair, mask=pair < pairs, other=-1)
        chosen = tl.where((chosen >= 0) & (chosen < experts), chosen, experts)
        counts += tl.histogram(chosen, BLOCK_E, mask=pair < pairs)
    before = each < own
    first = tl.sum(tl.where(before, counts, 0), 0)
    place = first
    for start in range(0, pairs, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        chosen = tl.load(expert + pair, mask=pair < pairs, other=-1)
        chosen = tl.where((chosen >= 0) & (chosen < experts), chosen, experts)
        mine = ((chosen == own) & (pair < pairs)).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, 0) - 1, pair, mask=mine != 0)
        place += tl.sum(mine, 0)
    tile = tl.sum(tl.where(before, (counts + BLOCK_M - 1) // BLOCK_M, 0), 0)
    stop = tl.where(own == experts, tiles, tile + (place - first + BLOCK_M - 1) // BLOCK_M)
    for start in range(tile, stop, BLOCK_P):
        at = start + tl.arange(0, BLOCK_P)
        tl.store(tile_expert + at, tl.where(own == experts, -1, own), mask=at < stop)
        tl.store(tile_start + at, first + (at - tile) * BLOCK_M, mask=at < stop)
        tl.store(tile_stop + at, tl.minimum(first + (at - tile + 1) * BLOCK_M, place), mask=at < stop)


@triton.jit
def _hidden_kernel(
    x,  # [N, D]
    gate, up,  # [E, D, F]
    order,  # int32 [P]
    tile_expert, tile_start, tile_stop,  # int32 [TILES]
    hidden,  # [P, F] in x's dtype; in the order of `order`, and only of those that a tile has
    chosen,  # K
    width,  # D
    inner,  # F
    x_n, x_d, gate_e, gate_d, gate_f, up_e, up_d, up_f,
    ACTIVATION: tl.constexpr,  # "silu" or "gelu"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(inner, BLOCK_N)
    tile = tl.program_id(0) // blocks
    owner = tl.load(tile_expert + tile).to(tl.int64)
    if owner >= 0:
        row = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
        row_inside = row < tl.load(tile_stop + tile)
        token = tl.load(order + row, mask=row_inside, other=0) // chosen
        f = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_K)
        x_at = x + token.to(tl.int64)[:, None] * x_n + d[None, :] * x_d
        gate_at = gate + owner * gate_e + f.to(tl.int64)[None, :] * gate_f + d[:, None] * gate_d
        up_at = up + owner * up_e + f.to(tl.int64)[None, :] * up_f + d[:, None] * up_d
        a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # One loop for both, so that a row's piece is fetched once.
        for start in range(0, width, BLOCK_K):
            inside = d < width - start
            piece = tl.load(x_at, mask=row_inside[:, None] & inside[None, :], other=0)
            weight_inside = (f < inner)[None, :] & inside[:, None]
            a = tl.dot(piece, tl.load(gate_at, mask=weight_inside, other=0), a, input_precision=PRECISION)
            b = tl.dot(piece, tl.load(up_at, mask=weight_inside, other=0), b, input_precision=PRECISION)
            x_at += BLOCK_K * x_d
            gate_at += BLOCK_K * gate_d
            up_at += BLOCK_K * up_d
        # silu is a * sigmoid(a), and 0.5 * (1 + tanh(z)), by which gelu has a, is sigmoid(2 * z); the number is 2 * sqrt(2 / pi).
        z = a if ACTIVATION == "silu" else 1.5957691216057308 * (a + 0.044715 * a * a * a)
        a = a / (1.0 + exp(-z))
        at = hidden + row.to(tl.int64)[:, None] * inner + f[None, :]
        tl.store(at, (a * b).to(hidden.dtype.element_ty), mask=row_inside[:, None] & (f < inner)[None, :])


@triton.jit
def _down_kernel(
    hidden,  # [P, F]
    down,  # [E, F, D]
    order,  # int32 [P]
    tile_expert, tile_start, tile_stop,  # int32 [TILES]
    given,  # float32 [P, D]; in the order of the pairs, and only of those that a tile has
    width,  # D
    inner,  # F
    down_e, down_f, down_d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0) // blocks
    owner = tl.load(tile_expert + tile).to(tl.int64)
    if owner >= 0:
        row = tl.load(tile_start + tile) + tl.arange(0, BLOCK_M)
        row_inside = row < tl.load(tile_stop + tile)
        d = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        value = head_tile(
            hidden, down + owner * down_e, row, row_inside, d, width, inner, inner, 1, down_d, down_f,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        pair = tl.load(order + row, mask=row_inside, other=0)
        at = given + pair.to(tl.int64)[:, None] * width + d[None, :]
        tl.store(at, value, mask=row_inside[:, None] & (d < width)[None, :])


@triton.jit
def _sum_kernel(
    given,  # float32 [P, D]
    expert,  # int32 [N, K], contiguous
    weight,  # float32 [N, K], contiguous
    out,  # [N, D] in x's dtype
    experts,  # E
    chosen,  # K
    width,  # D
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    # Unrolled, so that several are on their way at a time.
    for j in tl.range(0, chosen, loop_unroll_factor=4):
        pair = row * chosen + j
        owner = tl.load(expert + pair)
        value = tl.load(given + pair * width + d, mask=d < width, other=0.0)
        known = (owner >= 0) & (owner < experts)
        total += tl.where(known, tl.load(weight + pair) * value, float("nan"))
    tl.store(out + row * width + d, total.to(out.dtype.element_ty), mask=d < width)


@tuned("experts")
def _tiles(dtype: str, few_pairs: bool) -> tuple[dict, int, int]:
    """Constants of the first product, warps and stages of both: the largest that spill no register.

    BLOCK_K and the instruction that multiplies never depend on the pairs, nor do a row's bits.
    """
    if dtype == "float32":
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "PRECISION": "tf32x3"}, 8, 2
    if few_pairs:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "PRECISION": "ieee"}, 4, 4
    return {"BLOCK_M": 128, "BLOCK_N": 64 if multiplies_by_warp() else 128, "BLOCK_K": 64, "PRECISION": "ieee"}, 8, 3


def supports_mix_experts(x, gate, up, down, expert, weight, **static) -> str | None:
    if gate.shape[0] > MOST_EXPERTS:
        return f"it counts the pairs of at most {MOST_EXPERTS} experts, not {gate.shape[0]}"
    return None


def sort(expert, experts, block):
    """The outputs of `_sort_kernel` by name, for tiles of `block` pairs; experts: E."""
    pairs = expert.shape[0] * expert.shape[1]
    # As many as there can be: each expert's last one may be short.
    tiles = min(pairs, pairs // block + min(pairs, experts))
    per_tile = Out((tiles,), "int32")
    outputs = {"order": Out((pairs,), "int32"), "tile_expert": per_tile, "tile_start": per_tile, "tile_stop": per_tile}
    found = launch(
        _sort_kernel,
        (experts + 1,),
        inputs={"expert": expert},
        outputs=outputs,
        scalars={"pairs": pairs, "experts": experts, "tiles": tiles},
        constants={"BLOCK_M": block, "BLOCK_P": _PAIRS, "BLOCK_E": max(128, triton.next_power_of_2(experts + 1))},
    )
    return dict(zip(outputs, found))


def mix_experts(x, gate, up, down, expert, weight, *, activation):
    """x [N,D]; gate, up [E,D,F]; down [E,F,D]; expert int32, weight float32 [N,K], contiguous. Returns [N,D] as x."""
    (n, width), (experts, _, inner), chosen = x.shape, gate.shape, expert.shape[1]
    pairs = n * chosen
    # Where a mean expert has no more than fills the larger tile, much of those would be empty.
    constants, num_warps, num_stages = _tiles(dtype_name(x), pairs <= 128 * experts)
    # The first is two, so the second has twice the columns; of more than 128 it would spill.
    columns, depth = min(2 * constants["BLOCK_N"], 128), constants["BLOCK_K"]
    sorted_pairs = sort(expert, experts, constants["BLOCK_M"])
    tiles = sorted_pairs["tile_expert"].shape[0]
    (hidden,) = launch(
        _hidden_kernel,
        (tiles * triton.cdiv(inner, constants["BLOCK_N"]),),
        inputs={"x": x, "gate": gate, "up": up, **sorted_pairs},
        outputs={"hidden": Out((pairs, inner), dtype_name(x))},
        scalars={
            "chosen": chosen, "width": width, "inner": inner, **strides(x, "x_n x_d", x_d=depth),
            **strides(gate, "gate_e gate_d gate_f", gate_d=depth), **strides(up, "up_e up_d up_f", up_d=depth),
        },
        constants={"ACTIVATION": activation, **constants},
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    (given,) = launch(
        _down_kernel,
        (tiles * triton.cdiv(width, columns),),
        inputs={"hidden": hidden, "down": down, **sorted_pairs},
        outputs={"given": Out((pairs, width), "float32")},
        scalars={"width": width, "inner": inner, **strides(down, "down_e down_f down_d", down_f=depth)},
        constants=constants | {"BLOCK_N": columns},
        num_warps=num_warps,
        num_stages=num_stages,
    )
    (out,) = launch(
        _sum_kernel,
        (n, triton.cdiv(width, _COLUMNS)),
        inputs={"given": given, "expert": expert, "weight": weight},
        outputs={"out": Out((n, width), dtype_name(x))},
        scalars={"experts": experts, "chosen": chosen, "width": width},
        constants={"BLOCK": _COLUMNS},
    )
    return out
