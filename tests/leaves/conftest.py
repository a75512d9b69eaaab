import functools
import importlib
import os

import jax
import numpy as np
import pytest
from jax.experimental import pallas

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"

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
    # The result's rounding; in bfloat16 the logits' gradients are rounded too where the matrix instructions take no other dtype, as
    # a GPU's do.
    twice = leaf.package == "triton_kernels" and not INTERPRETED
    twice |= leaf.package == "cpu_kernels" and importlib.import_module("dlm_kernels.cpu_kernels").isa() == "avx512_bf16"
    tolerances = {"float32": 2e-5, "bfloat16": (1 + twice) * 2**-8, "float16": 2**-10}

    def check(got, wanted, dloss, factors):
        for result, want, factor in zip(got, wanted, factors, strict=True):
            assert result.dtype == factor.dtype
            # The difference of two probabilities may cancel to nothing, the rounding of each does not.
            scale = max(np.abs(want).max(), np.nanmax(np.abs(np.asarray(factor, np.float64))) * np.abs(dloss).max())
            atol = tolerances[str(factor.dtype)] * scale
            np.testing.assert_allclose(np.asarray(result, np.float64), want, rtol=0, atol=atol)

    return check


MARKERS = (
    "leave_out(when): when(leaf=..., interpreted=..., **the other parameters) is true where the test is not run",
    "only_reads: bfloat16 is an input's dtype alone, which Triton's interpreter has right",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if "leaf" in _parameters(item) and _is_left_out(item, **_parameters(item))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _is_left_out(item, leaf, dtype=None, **_):
    if leaf == "pallas" and dtype == "float16":
        return True  # which the TPU's kernels refuse
    if leaf == "triton" and INTERPRETED and dtype == "bfloat16" and not item.get_closest_marker("only_reads"):
        return True  # products and roundings of which the interpreter has wrong
    return any(marker.kwargs["when"](interpreted=INTERPRETED, **_parameters(item)) for marker in item.iter_markers("leave_out"))
