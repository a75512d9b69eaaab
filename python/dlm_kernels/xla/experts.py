"""A mixture of experts in plain jax.numpy: on a CPU one expert after the other, elsewhere all of them on every token."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels.xla.matmul import product

# jax.nn.gelu is the approximation by tanh.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


def mix_experts(x, gate, up, down, expert, weight, *, activation):
    """x [R,D]; gate, up [E,D,F]; down [E,F,D], one dtype; expert int32, weight float32 [R,K]. Returns [R,D]."""
    by_tiles, by_all = (functools.partial(mix, activation=activation) for mix in (mix_by_tiles, mix_by_all))
    return jax.lax.platform_dependent(x, gate, up, down, expert, weight, cpu=by_tiles, default=by_all)


def mix_by_all(x, gate, up, down, expert, weight, *, activation):
    """Every expert computes every token. A block of tokens needs most of the experts: their weights are read once either way."""
    known, own, share = _of_all(len(gate), expert, weight)
    g, u = _inside(x, gate, up, own)
    weighed = (ACTIVATIONS[activation](g) * u).astype(x.dtype).astype(jnp.float32) * share
    out = product("erf,efd->rd", weighed.astype(x.dtype), down).astype(x.dtype)
    return jnp.where(known.all(-1, keepdims=True), out, jnp.nan)


def mix_by_tiles(x, gate, up, down, expert, weight, *, activation):
    """Tokens sorted by expert, a tile of one expert's tokens after the other. Experts that nobody chose are not read."""
    n, chosen = expert.shape
    tile = _tile(n, chosen, len(gate))
    known = (expert >= 0) & (expert < len(gate))
    # Those that are unknown come last, where the loop ends before them.
    expert = jnp.where(known, expert, len(gate)).reshape(-1)
    pairs = known.sum(dtype=jnp.int32)
    order = jnp.argsort(expert)
    # A last tile reaches beyond the end: no expert is -1, so nothing there counts.
    sorted_expert = jnp.pad(expert[order], (0, tile), constant_values=-1)
    order = jnp.pad(order, (0, tile))

    def one_tile(state):
        at, total = state
        own = jax.lax.dynamic_slice_in_dim(order, at, tile)
        this = sorted_expert[at]
        counts = jax.lax.dynamic_slice_in_dim(sorted_expert, at, tile) == this
        token = own // chosen
        h = x[token]
        own_gate, own_up, own_down = (_at(weights, this) for weights in (gate, up, down))
        g, u = product("rd,df->rf", h, own_gate), product("rd,df->rf", h, own_up)
        y = product("rf,fd->rd", (ACTIVATIONS[activation](g) * u).astype(x.dtype), own_down)
        share = weight.reshape(-1)[own, None]
        # Not a share of 0: what this expert makes of another's token may be infinite.
        added = jnp.where(counts[:, None], y * share, 0)
        return at + counts.sum(dtype=jnp.int32), total.at[token].add(added)

    # Like the operands, for within a shard_map the state must vary from the start over the axes over which they do.
    start = jnp.zeros_like(pairs), jnp.zeros_like(x, jnp.float32)
    _, total = jax.lax.while_loop(lambda state: state[0] < pairs, one_tile, start)
    return jnp.where(known.all(-1, keepdims=True), total, jnp.nan).astype(x.dtype)


def mix_experts_backward(x, gate, up, down, expert, weight, dout, *, activation):
    """dout [R,D]. Returns dx, dgate, dup, ddown in the dtype of x, and dweight float32; 0 of a row with an unknown expert."""

    known = ((expert >= 0) & (expert < len(gate))).all(-1, keepdims=True)
    # Zeros times a NaN of a row that has no part would still be NaN.
    x, dout, expert = jnp.where(known, x, 0), jnp.where(known, dout, 0), jnp.where(known, expert, -1)

    known, own, share = _of_all(len(gate), expert, weight)
    hidden, pull = jax.vjp(lambda g, u: ACTIVATIONS[activation](g) * u, *_inside(x, gate, up, own))
    hidden = hidden.astype(x.dtype)
    dhidden = jnp.where(own, product("rd,efd->erf", dout, down), 0)
    # 16 bits again: a product of two dtypes would be one of float32.
    dg, du = (gradient.astype(x.dtype) for gradient in pull(dhidden * share))
    dx = product("erf,edf->rd", dg, gate) + product("erf,edf->rd", du, up)
    dgate, dup = (product("rd,erf->edf", x, gradient) for gradient in (dg, du))
    ddown = product("erf,rd->efd", (hidden.astype(jnp.float32) * share).astype(x.dtype), dout)
    dshare = (hidden.astype(jnp.float32) * dhidden).sum(-1)
    dweight = jnp.where(known, dshare[jnp.where(known, expert, 0), jnp.arange(x.shape[0])[:, None]], 0)
    return *(gradient.astype(x.dtype) for gradient in (dx, dgate, dup, ddown)), dweight


def _of_all(experts, expert, weight):
    """Whether each is known, [R,K]; and of every expert and row, [E,R,1], whether it is one of the row's, and its weight."""
    known = (expert >= 0) & (expert < experts)
    at, shape = (jnp.where(known, expert, 0), jnp.arange(expert.shape[0])[:, None]), (experts, expert.shape[0])
    own = jnp.zeros(shape, bool).at[at].max(known)
    share = jnp.zeros(shape, jnp.float32).at[at].add(jnp.where(known, weight, 0))
    return known, own[..., None], share[..., None]


def _inside(x, gate, up, own):
    """Of every expert and row, float32 [E,R,F] each: x times the expert's matrices, which is float32 until past the activation."""
    # Not a share of 0: what an expert makes of another's token may be infinite.
    return [jnp.where(own, product("rd,edf->erf", x, matrix), 0) for matrix in (gate, up)]


def _tile(n, chosen, experts):
    """As long as a mean expert's list, so that most are one tile; n may be symbolic."""
    return min(max(8, 1 << (n * chosen // experts).bit_length()), 256, n) if isinstance(n, int) else 64


def _at(weights, index):
    """weights[index], where the loop computes the index: behind the barrier XLA cannot widen the weights before it."""
    weights, index = jax.lax.optimization_barrier((weights, index))
    return weights[index]
