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
        # A partial is a function of its own to JAX: what it compiles for equal calls it keeps, but not for other tests.
        function = functools.partial(getattr(importlib.import_module(f"dlm_kernels.{package}.{module}"), name))

        def run(*operands, **static):
            if request.param == "triton" and INTERPRETED:
                results = function(*(None if x is None else np.array(x) for x in operands), **static)
            else:
                results = jax.jit(function, static_argnames=tuple(static))(*operands, **static)
            return [np.asarray(result) for result in jax.tree.leaves(results)]

        return run

    find.package = package
    return find


@pytest.fixture
def check_gradients(leaf):
    """check_gradients(got, wanted, dloss, factors): what `leaf` gives for the gradients of an LM head's loss, against the oracle's.

    factors: what of each product is no gradient of a logit.
    """
    # The result's rounding; in bfloat16 the logits' gradients are rounded too where the matrix instructions take no other dtype.
    twice = leaf.package == "cpu_kernels" and importlib.import_module("dlm_kernels.cpu_kernels").isa() == "avx512_bf16"
    tolerances = {"float32": 2e-5, "bfloat16": (1 + twice) * 2**-8, "float16": 2**-10}

    def check(got, wanted, dloss, factors):
        for result, want, factor in zip(got, wanted, factors, strict=True):
            assert result.dtype == factor.dtype
            # The difference of two probabilities may cancel to nothing, the rounding of each does not.
            scale = max(np.abs(want).max(), np.nanmax(np.abs(np.asarray(factor, np.float64))) * np.abs(dloss).max())
            atol = tolerances[str(factor.dtype)] * scale
            np.testing.assert_allclose(np.asarray(result, np.float64), want, rtol=0, atol=atol)

    return check


def pytest_collection_modifyitems(config, items):
    rules = _is_not_for_tritons_interpreter, _is_not_for_the_tpu, _is_the_same_of_any_product, _is_the_same_in_any_tile
    left_out = [item for item in items if any(rule(item) for rule in rules)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _is_the_same_of_any_product(item):
    """What the margin or the entropy is, of more rows or more depth. The CPU kernels share these out, and a GPU runs them all."""
    parameters = _parameters(item)
    if parameters.get("leaf") == "cpu" or not INTERPRETED:
        return False
    large = parameters.get("shape") in ((200, 300, 260), (250, 1101, 40))
    return large and parameters.get("confidence", "probability") != "probability"


def _is_the_same_in_any_tile(item):
    """What a dtype or an activation is to a mixture of experts that a kernel has in one tile anyway."""
    parameters = _parameters(item)
    if item.path.stem != "test_experts" or "shape" not in parameters or parameters.get("leaf") not in ("triton", "pallas"):
        return False
    return parameters["shape"][0] < 20 and (parameters["dtype"], parameters["activation"]) != ("float32", "silu")


def _is_not_for_the_tpu(item):
    """Which refuses float16; and to whose tiles one token is what 33 are."""
    parameters = _parameters(item)
    if parameters.get("leaf") != "pallas":
        return False
    return parameters.get("dtype") == "float16" or (item.path.stem == "test_truncation" and parameters.get("v") == 1)


def _is_not_for_tritons_interpreter(item):
    """Its bfloat16 products and roundings are wrong; and it takes a minute for what tests/triton has in small."""
    parameters = _parameters(item)
    if not INTERPRETED or parameters.get("leaf") != "triton":
        return False
    reads_only = item.originalname in ("test_greedy", "test_every_option", "test_the_most_likely_are_kept")
    slow = "test_keys_nobody_sees_change_no_bit", "test_rows_do_not_depend_on_the_batch"
    large = parameters.get("shape") == (250, 36, 1101, 260) and parameters.get("dtype") == "float16"
    return large or item.originalname in slow or (parameters.get("dtype") == "bfloat16" and not reads_only)
