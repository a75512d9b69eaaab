"""GPU kernels in Triton, a file per operation; launch.py alone knows jax-triton, its versions and the interpreter."""
