import functools
import importlib

import jax
import numpy as np
import pytest
from jax.experimental import pallas


@pytest.fixture(params=["cpu", "xla", "pallas"])
def leaf(request, monkeypatch):
    """leaf("unmask", "score_tokens"): a function of two implementations' arrays, as the API's dispatch would call it."""
    package = {"cpu": "cpu_kernels", "xla": "xla", "pallas": "pallas_kernels"}[request.param]
    # TPU kernels run in Pallas's interpreter; tests/pallas compiles them.
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))

    def find(module, name):
        if request.param == "pallas" and module not in ("guidance", "unmask"):
            pytest.skip("not written yet")
        function = getattr(importlib.import_module(f"dlm_kernels.{package}.{module}"), name)

        def run(*operands, **static):
            results = jax.jit(functools.partial(function, **static))(*operands)
            return [np.asarray(result) for result in jax.tree.leaves(results)]

        return run

    find.package = package
    return find
