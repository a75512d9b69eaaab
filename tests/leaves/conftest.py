import functools
import importlib
import os

import jax
import numpy as np
import pytest
from jax.experimental import pallas

# Triton reads this when a kernel is decorated, at import: here its kernels run in its interpreter. `make test-gpu` sets 0.
INTERPRETED = os.environ.setdefault("TRITON_INTERPRET", "1") == "1"

PACKAGES = {"cpu": "cpu_kernels", "xla": "xla", "triton": "triton_kernels", "pallas": "pallas_kernels"}


@pytest.fixture(params=PACKAGES)
def leaf(request, monkeypatch):
    """leaf("unmask", "score_tokens"): a function of an implementation's arrays, as the API's dispatch would call it."""
    package = PACKAGES[request.param]
    # TPU kernels run in Pallas's interpreter; tests/pallas compiles them.
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))

    def find(module, name):
        function = getattr(importlib.import_module(f"dlm_kernels.{package}.{module}"), name)

        def run(*operands, **static):
            if request.param == "triton" and INTERPRETED:
                results = function(*(None if x is None else np.array(x) for x in operands), **static)
            else:
                results = jax.jit(functools.partial(function, **static))(*operands)
            return [np.asarray(result) for result in jax.tree.leaves(results)]

        return run

    find.package = package
    return find


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if _is_not_for_tritons_interpreter(item) or _is_refused_by_the_tpu(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_refused_by_the_tpu(item):
    parameters = getattr(item, "callspec", None) and item.callspec.params
    return bool(parameters) and parameters.get("leaf") == "pallas" and parameters.get("dtype") == "float16"


def _is_not_for_tritons_interpreter(item):
    """Its bfloat16 products and roundings are wrong; and it takes a minute for what tests/triton has in small."""
    parameters = getattr(item, "callspec", None) and item.callspec.params
    if not INTERPRETED or not parameters or parameters.get("leaf") != "triton":
        return False
    reads_only = item.originalname in ("test_greedy", "test_every_option")
    slow = "test_keys_nobody_sees_change_no_bit", "test_rows_do_not_depend_on_the_batch"
    shape = parameters.get("shape")
    large = shape == (200, 36, 1101, 260)
    large |= shape == (200, 300, 260) and parameters.get("confidence", "probability") != "probability"
    return large or item.originalname in slow or (parameters.get("dtype") == "bfloat16" and not reads_only)
