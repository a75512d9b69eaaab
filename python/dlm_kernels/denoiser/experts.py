"""A mixture of experts: in the place of one wide SwiGLU many narrow ones, of which a router picks a few for each token."""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_kernels.denoiser import limits

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
    capacity: int | None = None  # a block of tokens has so many of them, those that one of its tokens wants most; None: all
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
        if self.capacity is not None:
            limits.counts(**{"experts.capacity": self.capacity})
            if self.groups > 1 or not self.chosen <= self.capacity <= self.count:
                expected = f"from the {self.chosen} of a token to all {self.count}, and no groups"
                raise ValueError(f"experts.capacity: expected {expected}, got {self.capacity} and {self.groups} groups")


def together(experts):
    """Whether the tokens of a block choose their experts together; experts may be None."""
    return experts is not None and experts.capacity is not None


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


def choose(experts, logits, bias=None, block=None):
    """Which experts each token gets, and their weights: (int32 [N, chosen], float32 [N, chosen]).

        scores = softmax(logits)
        expert = top_k(scores + bias, chosen)
        weight = scores[expert] / scores[expert].sum() * scale

    logits float32 [N, count]; bias [count] or None. With groups the experts outside of the `kept` best are left out: a group is as
    good as its two best experts together. With a capacity those are left out that are not among the so many best of the token's
    block: an expert is as good as for the token that wants it most; block: int32 [N], from 0 to below N, equal for its tokens. Not
    normalized, nothing is divided by the sum. Sources: SDAR's MoE, which is Qwen3's, LLaDA-MoE's modeling_lladamoe.py and
    modeling_llada2_moe.py of LLaDA2.0 and, of the capacity, 2.2.
    """
    scores = jax.nn.softmax(logits, axis=-1) if experts.router == "softmax" else jax.nn.sigmoid(logits)
    rank = scores if bias is None else scores + bias.astype(jnp.float32)
    if experts.groups > 1:
        grouped = rank.reshape(len(rank), experts.groups, -1)
        _, kept = jax.lax.top_k(jax.lax.top_k(grouped, 2)[0].sum(-1), experts.kept)
        is_kept = (kept[:, None] == jnp.arange(experts.groups)[:, None]).any(-1)
        rank = jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(rank.shape)
    if experts.capacity is not None:
        wanted = jax.ops.segment_max(rank, block, len(rank))
        _, admitted = jax.lax.top_k(wanted, experts.capacity)
        is_admitted = jnp.zeros(wanted.shape, bool).at[jnp.arange(len(rank))[:, None], admitted].set(True)
        rank = jnp.where(is_admitted[block], rank, -jnp.inf)
    _, expert = jax.lax.top_k(rank, experts.chosen)
    weight = jnp.take_along_axis(scores, expert, axis=-1)
    if experts.normalized:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return expert, weight * experts.scale
