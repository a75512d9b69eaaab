import functools
import importlib

import jax
import numpy as np
import pytest


@pytest.fixture(params=["cpu", "xla"])
def leaf(request):
    """leaf("unmask", "score_tokens"): a function of two implementations' arrays, as the API's dispatch would call it."""
    package = {"cpu": "cpu_kernels", "xla": "xla"}[request.param]

    def find(module, name):
        function = getattr(importlib.import_module(f"dlm_kernels.{package}.{module}"), name)

        def run(*operands, **static):
            results = jax.jit(functools.partial(function, **static))(*operands)
            return [np.asarray(result) for result in jax.tree.leaves(results)]

        return run

    find.package = package
    return find
