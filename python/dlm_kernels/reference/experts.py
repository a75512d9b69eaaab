"""A mixture of experts, in float64: a loop over tokens and their experts."""

import numpy as np


def mix_experts(x, gate, up, down, expert, weight, *, activation):
    """x [R,D]; gate, up [E,D,F]; down [E,F,D]; expert int [R,K]; weight [R,K]; activation "silu" or "gelu".

    Returns float64 [R,D]; NaN in a row with an expert outside [0, E).
    """
    act = {"silu": _silu, "gelu": _gelu}[activation]
    x, gate, up, down, weight = (np.asarray(array, np.float64) for array in (x, gate, up, down, weight))
    out = np.zeros(x.shape)
    for r, j in np.ndindex(*expert.shape):
        e = expert[r, j]
        if 0 <= e < len(gate):
            out[r] += weight[r, j] * ((act(x[r] @ gate[e]) * (x[r] @ up[e])) @ down[e])
        else:
            out[r] = np.nan
    return out


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    """Its approximation by tanh, which Gemma's layers have."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
