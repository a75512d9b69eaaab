"""Runs JAX on the CPU with four devices, so that sharding is tested where there is one machine."""

import os

import jax

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 4)
