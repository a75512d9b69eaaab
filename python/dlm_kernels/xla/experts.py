"""A mixture of experts in plain jax.numpy: on a CPU one expert after the other, elsewhere all of them on every token."""

import functools

import jax
import jax.numpy as jnp

# jax.nn.gelu is the approximation by tanh.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


def mix_experts(x, gate, up, down, expert, weight, *, activation):
    """x [R,D]; gate, up [E,D,F]; down [E,F,D], one dtype; expert int32, weight float32 [R,K]. Returns [R,D]."""
    by_tiles, by_all = (functools.partial(mix, activation=activation) for mix in (mix_by_tiles, mix_by_all))
    return jax.lax.platform_dependent(x, gate, up, down, expert, weight, cpu=by_tiles, default=by_all)


def mix_by_all(x, gate, up, down, expert, weight, *, activation):
    """Every expert computes every token. A block of tokens needs most of the experts: their weights are read once either way."""
    rows = jnp.arange(x.shape[0])[:, None]
    known = (expert >= 0) & (expert < len(gate))
    of_all = jnp.zeros((len(gate), x.shape[0]), jnp.float32).at[jnp.where(known, expert, 0), rows].add(jnp.where(known, weight, 0))
    own = jnp.zeros(of_all.shape, bool).at[jnp.where(known, expert, 0), rows].max(known)[..., None]
    # Not a share of 0: what an expert makes of another's token may be infinite.
    g, u = (jnp.where(own, jnp.einsum("rd,edf->erf", x, matrix), 0) for matrix in (gate, up))
    a = ACTIVATIONS[activation](g) * u
    weighed = (a.astype(jnp.float32) * of_all[..., None]).astype(x.dtype)
    out = jnp.einsum("erf,efd->rd", weighed, down, preferred_element_type=jnp.float32).astype(x.dtype)
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
        y = _product(ACTIVATIONS[activation](_product(h, own_gate)) * _product(h, own_up), own_down)
        share = weight.reshape(-1)[own, None]
        # Not a share of 0: what this expert makes of another's token may be infinite.
        added = jnp.where(counts[:, None], y.astype(jnp.float32) * share, 0)
        return at + counts.sum(dtype=jnp.int32), total.at[token].add(added)

    # Like the operands, for within a shard_map the state must vary from the start over the axes over which they do.
    start = jnp.zeros_like(pairs), jnp.zeros_like(x, jnp.float32)
    _, total = jax.lax.while_loop(lambda state: state[0] < pairs, one_tile, start)
    return jnp.where(known.all(-1, keepdims=True), total, jnp.nan).astype(x.dtype)


def mix_experts_backward(x, gate, up, down, expert, weight, dout, *, activation):
    """dout [R,D]. Returns dx, dgate, dup, ddown in the dtype of x, and dweight float32; 0 of a row with an unknown expert."""

    known = ((expert >= 0) & (expert < len(gate))).all(-1, keepdims=True)
    # Zeros times a NaN of a row that has no part would still be NaN.
    x, expert = jnp.where(known, x, 0), jnp.where(known, expert, -1)

    def of_all(x, gate, up, down, weight):
        return mix_by_all(x, gate, up, down, expert, weight, activation=activation)

    _, pull = jax.vjp(of_all, x, gate, up, down, weight)
    return pull(dout)


def _tile(n, chosen, experts):
    """As long as a mean expert's list, so that most are one tile; n may be symbolic."""
    return min(max(8, 1 << (n * chosen // experts).bit_length()), 256, n) if isinstance(n, int) else 64


def _product(x, weight):
    """x @ weight. Of 16 bits the sum is float32 by name: else XLA on a CPU widens all weights, and keeps them for the loop."""
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


def _at(weights, index):
    """weights[index], where the loop computes the index: behind the barrier XLA cannot widen the weights before it."""
    weights, index = jax.lax.optimization_barrier((weights, index))
    return weights[index]
