"""A mixture of experts: of many narrow gated layers each token passes through a few."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels.ops import checks, dispatch, sharding

_INPUTS = (("x", "rd"), ("gate", "edf"), ("up", "edf"), ("down", "efd"), ("expert", "rk"), ("weight", "rk"))
MIX = dispatch.Leaf("experts", "mix_experts", _INPUTS, ("rd",), fold="r", sharded="r")
BACKWARD = dispatch.Leaf(
    "experts", "mix_experts_backward", (*_INPUTS, ("dout", "rd")), ("rd", "edf", "edf", "efd", "rk"), fold="r", sharded=None
)


def mix_experts(x, gate, up, down, expert, weight, *, activation="silu", implementation=None):
    """What each token's experts make of it, weighed.

        for n, j in np.ndindex(expert.shape):
            e = expert[n, j]
            out[n] += weight[n, j] * ((act(x[n] @ gate[e]) * (x[n] @ up[e])) @ down[e])     # float32

    Arguments:
      x: [N, D] or [B, L, D]; gate, up: [E, D, F]; down: [E, F, D], one dtype, float32, bfloat16 or float16.
      expert: int [N, K] or [B, L, K], in [0, E); one may come twice in a row. weight: float, of the same shape.
      activation: act above, "silu", or "gelu" by its tanh approximation.
      implementation: "cpu", "triton", "pallas", "xla" or None.

    Returns an array of x's shape and dtype; no experts (K = 0) give zeros. What is between act and down is rounded to x's dtype. A
    row depends on no other, and one with an expert outside [0, E) is NaN. Differentiable in x, gate, up, down and weight: a first
    gradient, in reverse mode alone, which XLA computes with every implementation, and each expert for every token.
    Raises ValueError for shapes or dtypes that do not fit.
    Source: the routed experts of LLaDA2, SDAR-MoE and LLaDA-MoE ("silu") and of DiffusionGemma ("gelu").
    """
    dispatch.check(implementation)
    x = checks.array("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected shape [N, D] or [B, L, D], got {list(x.shape)}")
    lead = "N" if x.ndim == 2 else "BL"
    x, gate = checks.floats("x", x, lead + "D"), checks.floats("gate", gate, "EDF")
    e, _, f = gate.shape
    d = x.shape[-1]
    if e == 0 or f == 0 or gate.shape[1] != d:
        raise ValueError(f"gate: expected shape [E, {d}, F] with E and F of at least 1, got {list(gate.shape)}")
    up = checks.shaped("up", checks.floats("up", up, "EDF"), (e, d, f), "gate's shape")
    down = checks.shaped("down", checks.floats("down", down, "EFD"), (e, f, d), "gate's, the last two turned round")
    if not x.dtype == gate.dtype == up.dtype == down.dtype:
        raise ValueError(f"gate, up, down: expected x's dtype {x.dtype}, got {gate.dtype}, {up.dtype} and {down.dtype}")
    expert = checks.ints("expert", expert, lead + "K")
    shape = (*x.shape[:-1], expert.shape[-1])
    checks.shaped("expert", expert, shape, "x's rows, experts of each")
    weight = checks.shaped("weight", checks.numbers("weight", weight), shape, "expert's shape")
    checks.one_of("activation", activation, ("silu", "gelu"))
    if x.size == 0 or expert.size == 0:
        return jnp.zeros(x.shape, x.dtype)
    return dispatch.differentiable(_mix, (activation, implementation), x, gate, up, down, expert, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(static, *arrays):
    activation, implementation = static
    return dispatch.call(MIX, implementation, sharding.varying_by_name(MIX, arrays), activation=activation)[0]


def _mix_fwd(static, *arrays):
    return _mix(static, *arrays), arrays


def _mix_bwd(static, arrays, dout):
    activation, _ = static
    gradients = dispatch.call(BACKWARD, "xla", sharding.varying_by_name(BACKWARD, (*arrays, dout)), activation=activation)
    *of_arrays, of_weight = sharding.typed_as((*arrays[:4], arrays[5]), gradients)
    return *of_arrays, None, of_weight


_mix.defvjp(_mix_fwd, _mix_bwd)
