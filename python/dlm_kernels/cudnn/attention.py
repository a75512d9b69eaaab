"""Dense attention without a mask by cuDNN. Forward only: JAX does not differentiate cuDNN's lse."""

import jax
import jax.numpy as jnp


def supports_attention_forward(query, key, value, bounds, dense, *, scale, logits_soft_cap) -> str | None:
    if bounds is not None or dense is not None:
        return "it takes no mask: cuDNN would read a dense one from memory"
    if logits_soft_cap is not None:
        return "it has no soft cap"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, and query is {query.dtype}"
    if query.shape[-1] > 128 or query.shape[-1] % 8:
        return f"it takes head sizes up to 128 in steps of 8, and query's is {query.shape[-1]}"
    # JAX looks for cuDNN while it traces.
    if not any(device.platform == "gpu" for device in jax.local_devices()):
        return "it needs an NVIDIA GPU on this machine"
    return None


def attention_forward(query, key, value, bounds, dense, *, scale, logits_soft_cap):
    """query [B,T,N,H], key and value [B,S,K,H]. Returns out [B,T,N,H] and lse float32 [B,N,T], rounded by JAX to query's."""
    out, lse = jax.nn.dot_product_attention(
        query, key, value, scale=scale, implementation="cudnn", return_residual=True
    )
    return out, lse.astype(jnp.float32).swapaxes(1, 2)
