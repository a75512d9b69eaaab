"""What the numbers given to the denoiser may be. Each check raises a ValueError that names the argument and what came."""

import jax
import jax.numpy as jnp
import numpy as np


def numbers(low=-np.inf, high=np.inf, **given):
    """Finite and from low to high: numbers, arrays or pairs of them. None and JAX's own arrays, which are not read here, pass."""
    if high < np.inf:
        expected = f"a number in [{low}, {high}]"
    else:
        expected = f"at least {low}" if low > -np.inf else "a finite number"
    for name, value in given.items():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if part is None or isinstance(part, jax.Array):
                continue
            array = np.asarray(part)
            if not jnp.issubdtype(array.dtype, jnp.number) or not ((low <= array) & (array <= high) & np.isfinite(array)).all():
                raise ValueError(f"{name}: expected {expected}, got {value}")


def counts(least=1, **given):
    """Whole numbers, which are never traced."""
    for name, value in given.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
