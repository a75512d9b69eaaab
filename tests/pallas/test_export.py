"""The operations exported for the TPU on a machine without one carry the Pallas kernels."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

import dlm_kernels

LOGITS = jax.ShapeDtypeStruct((2, 8, 1000), jnp.float32)
OPERATIONS = {
    "mix_guidance": (lambda c, u: dlm_kernels.mix_guidance(c, u, 1.5), (LOGITS, LOGITS)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_tpu_takes_pallas(name):
    function, arrays = OPERATIONS[name]
    choices = dlm_kernels.explain(function, *arrays)
    assert choices and all(choice.implementations["tpu"] == "pallas" for choice in choices)
    exported = export.export(jax.jit(function), platforms=["tpu"])(*arrays)
    assert exported.mlir_module().count("tpu_custom_call") == len(choices)
