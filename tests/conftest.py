"""Runs JAX on the CPU with four devices, so that sharding is tested where there is one machine."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
