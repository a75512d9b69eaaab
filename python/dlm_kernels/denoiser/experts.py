"""A mixture of experts: in the place of one wide SwiGLU many narrow ones, of which a router picks a few for each token."""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_kernels.denoiser import half, limits

ROUTERS = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Experts:
    """The shape of a layer's mixture, and how its router chooses; see `choose`."""

    count: int
    chosen: int  # of them for each token
    ffn: int  # width inside each
    router: str = "softmax"  # of the router's logits; "sigmoid" has a bias, which chooses but does not weigh
    normalized: bool = True  # the weights of the chosen ones add up to 1
    groups: int = 1  # experts are chosen from the `kept` best of so many equal groups
    kept: int = 1
    scale: float = 1.0  # of what the chosen ones give together
    shared_ffn: int = 0  # width inside one more that reads every token; 0: there is none
    dense_layers: int = 0  # the first layers have one SwiGLU, of the config's ffn

    def __post_init__(self):
        limits.counts(**{f"experts.{name}": getattr(self, name) for name in ("count", "chosen", "ffn", "groups", "kept")})
        limits.counts(0, **{f"experts.{name}": getattr(self, name) for name in ("shared_ffn", "dense_layers")})
        limits.numbers(0, **{"experts.scale": self.scale})
        if not isinstance(self.normalized, bool):
            raise ValueError(f"experts.normalized: expected true or false, got {self.normalized!r}")
        if self.router not in ROUTERS:
            raise ValueError(f"experts.router: expected one of {ROUTERS}, got {self.router!r}")
        if self.count % self.groups or self.kept > self.groups or (self.groups > 1 and self.count // self.groups < 2):
            raise ValueError(
                f"experts.groups, experts.kept: expected equal groups of at least 2 of {self.count} experts, some of them kept, "
                f"got {self.groups}, {self.kept}"
            )
        if self.chosen > self.count // self.groups * self.kept:
            raise ValueError(f"experts.chosen: expected no more than the groups that are kept hold, got {self.chosen}")


def parameter_shapes(experts, d_model):
    """Name -> shape of a layer's parameters; matrices are [in, out], those of all experts behind one another."""
    e, width, shared = experts.count, experts.ffn, experts.shared_ffn
    shapes = {
        "router": (d_model, e),
        "expert_gate": (e, d_model, width),
        "expert_up": (e, d_model, width),
        "expert_down": (e, width, d_model),
    }
    if experts.router == "sigmoid":
        shapes["router_bias"] = (e,)
    if shared:
        shapes |= {"shared_gate": (d_model, shared), "shared_up": (d_model, shared), "shared_down": (shared, d_model)}
    return shapes


def choose(experts, logits, bias=None):
    """Which experts each token gets, and their weights: (int32 [N, chosen], float32 [N, chosen]).

        scores = softmax(logits)
        expert = top_k(scores + bias, chosen)
        weight = scores[expert] / scores[expert].sum() * scale

    logits float32 [N, count]; bias [count] or None. With groups the experts outside of the `kept` best are left out: a group is as
    good as its two best experts together. Not normalized, nothing is divided by the sum. Sources: SDAR's MoE, which is Qwen3's,
    LLaDA-MoE's modeling_lladamoe.py and LLaDA2's modeling_llada2_moe.py.
    """
    scores = jax.nn.softmax(logits, axis=-1) if experts.router == "softmax" else jax.nn.sigmoid(logits)
    rank = scores if bias is None else scores + bias.astype(jnp.float32)
    if experts.groups > 1:
        grouped = rank.reshape(len(rank), experts.groups, -1)
        _, kept = jax.lax.top_k(jax.lax.top_k(grouped, 2)[0].sum(-1), experts.kept)
        is_kept = (kept[:, None] == jnp.arange(experts.groups)[:, None]).any(-1)
        rank = jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(rank.shape)
    _, expert = jax.lax.top_k(rank, experts.chosen)
    weight = jnp.take_along_axis(scores, expert, axis=-1)
    if experts.normalized:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return expert, weight * experts.scale


def mix(x, gate, up, down, expert, weight):
    """sum of weight[n, j] * swiglu of expert[n, j] of x[n], over j: [N, d_model] in x's dtype, summed in float32.

    x [N, d_model]; gate, up [count, d_model, ffn]; down [count, ffn, d_model]; expert int32, weight float32 [N, chosen].
    """
    return jax.lax.platform_dependent(x, gate, up, down, expert, weight, cpu=mix_by_tiles, default=mix_by_all)


def mix_by_all(x, gate, up, down, expert, weight):
    """Every expert computes every token. A block of tokens needs most of the experts: their weights are read once either way."""
    a = jax.nn.silu(jnp.einsum("nd,edf->enf", x, gate)) * jnp.einsum("nd,edf->enf", x, up)
    of_all = jnp.zeros((len(gate), len(x)), jnp.float32).at[expert, jnp.arange(len(x))[:, None]].add(weight)
    weighed = (a.astype(jnp.float32) * of_all[..., None]).astype(x.dtype)
    return jnp.einsum("enf,efd->nd", weighed, down, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def mix_by_tiles(x, gate, up, down, expert, weight):
    """Tokens sorted by expert, a tile of one expert's tokens after the other. Experts that nobody chose are not read."""
    n, chosen = expert.shape
    # As long as a mean expert's list, so that most are one tile.
    tile = min(max(8, 1 << (n * chosen // len(gate)).bit_length()), 256, n)
    order = jnp.argsort(expert.reshape(-1))
    # A last tile reaches beyond the end: no expert is -1, so nothing there counts.
    sorted_expert = jnp.pad(expert.reshape(-1)[order], (0, tile), constant_values=-1)
    order = jnp.pad(order, (0, tile))

    def one_tile(state):
        at, total = state
        own = jax.lax.dynamic_slice_in_dim(order, at, tile)
        this = sorted_expert[at]
        counts = jax.lax.dynamic_slice_in_dim(sorted_expert, at, tile) == this
        token = own // chosen
        h = x[token]
        own_gate, own_up, own_down = (half.at(weights, this) for weights in (gate, up, down))
        y = half.product(jax.nn.silu(half.product(h, own_gate)) * half.product(h, own_up), own_down)
        share = weight.reshape(-1)[own, None]
        # Not a share of 0: what this expert makes of another's token may be infinite.
        added = jnp.where(counts[:, None], y.astype(jnp.float32) * share, 0)
        return at + counts.sum(dtype=jnp.int32), total.at[token].add(added)

    start = jnp.int32(0), jnp.zeros(x.shape, jnp.float32)
    _, total = jax.lax.while_loop(lambda state: state[0] < n * chosen, one_tile, start)
    return total.astype(x.dtype)


def _forward(x, gate, up, down, expert, weight):
    return mix_by_tiles(x, gate, up, down, expert, weight), (x, gate, up, down, expert, weight)


def _backward(given, gradient):
    *arrays, expert, weight = given
    _, pull = jax.vjp(lambda x, gate, up, down, weight: mix_by_all(x, gate, up, down, expert, weight), *arrays, weight)
    *of_arrays, of_weight = pull(gradient)
    return *of_arrays, None, of_weight


mix_by_tiles.defvjp(_forward, _backward)
