"""Made the dump beside this file: python make.py FOLDER, with libtpu. A product of 128 x 256 and 256 x 128 in 2 steps of 128."""

import os
import sys

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={sys.argv[1]} --xla_jf_dump_llo_text=true"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402


def kernel(a, b, out, total):
    @pl.when(pl.program_id(0) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    total[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(0) == pl.num_programs(0) - 1)
    def _():
        out[...] = total[...]


def product(a, b):
    return pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec((128, 128), lambda k: (0, k)), pl.BlockSpec((128, 128), lambda k: (k, 0))],
        out_specs=pl.BlockSpec((128, 128), lambda k: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((128, 128), jnp.float32),
        scratch_shapes=[pltpu.VMEM((128, 128), jnp.float32)],
        name="product",
    )(a, b)


device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
array = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16, sharding=SingleDeviceSharding(device))
jax.jit(product).lower(array, jax.ShapeDtypeStruct((256, 128), jnp.bfloat16, sharding=array.sharding)).compile()
