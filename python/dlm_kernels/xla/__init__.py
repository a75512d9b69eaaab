"""The operations in plain jax.numpy: the fallback on any platform, and the baseline to beat."""
