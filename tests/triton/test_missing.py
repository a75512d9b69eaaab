"""Where the GPU's software or the GPU itself is missing, a call that insists on Triton says what to do, and others go without."""

import importlib
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from dlm_kernels import triton_kernels

QUERY = jnp.ones((1, 4, 2, 16))


def without_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    return "need the triton package, 3.6 or newer: pip install 'dlm_kernels[gpu]'"


def with_an_old_triton(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.5.1")
    return "3.6 or newer, and 3.5.1 is installed: pip install"


def without_jax_cuda_plugin(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    # Without the plugin jaxlib's module is there, and empty.
    monkeypatch.delattr("jaxlib.gpu_triton.get_compute_capability", raising=False)
    return "need the CUDA plugin of JAX: pip install 'jax[cuda13]'"


def with_a_triton_that_does_not_load(monkeypatch):
    """As where it wants a newer C library than there is."""
    load = importlib.import_module

    def fail(module, *rest):
        if module == "triton":
            raise ImportError("GLIBC_2.38 not found\nand more")
        return load(module, *rest)

    triton_kernels._failure.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    return "3.6 or newer, and what is installed does not load (ImportError: GLIBC_2.38 not found): pip install 'dlm_kernels[gpu]'"


def with_a_folder_called_triton(monkeypatch):
    monkeypatch.delattr("triton.__version__")
    return "3.6 or newer, and none is installed: pip install"


def with_a_jax_triton_that_does_not_load(monkeypatch):
    triton_kernels._failure.cache_clear()
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.setattr("jaxlib.gpu_triton.get_compute_capability", None, raising=False)
    importlib.import_module("dlm_kernels.triton_kernels.launch").jax_triton.cache_clear()
    monkeypatch.setitem(sys.modules, "jax_triton.triton_lib", None)
    return "0.3.1 or newer, and what is installed does not load (ModuleNotFoundError: "


@pytest.fixture(autouse=True)
def _forget():
    yield
    triton_kernels._failure.cache_clear()


@pytest.mark.parametrize("missing", [
    without_triton, with_an_old_triton, with_a_triton_that_does_not_load, with_a_folder_called_triton, without_jax_cuda_plugin,
    with_a_jax_triton_that_does_not_load,
])  # fmt: skip
def test_what_is_missing_is_said_and_the_default_goes_without(missing, monkeypatch):
    sentence = missing(monkeypatch)
    with pytest.raises(ValueError, match="implementation='triton' cannot run attention: the Triton kernels ") as raised:
        dlm_kernels.attention(QUERY, QUERY, QUERY, implementation="triton")
    assert sentence in str(raised.value)
    assert sentence in str(dlm_kernels.explain(dlm_kernels.attention, QUERY, QUERY, QUERY))
    np.testing.assert_allclose(dlm_kernels.attention(QUERY, QUERY, QUERY), QUERY, rtol=1e-6)


@pytest.mark.parametrize("missing", [without_triton, with_an_old_triton, with_a_triton_that_does_not_load])
def test_torch_says_the_same_of_a_tensor_on_a_gpu(missing, monkeypatch):
    pytest.importorskip("torch", reason="the torch extra is not installed")
    adapter = importlib.import_module("dlm_kernels.torch")
    sentence = missing(monkeypatch)
    with pytest.raises(RuntimeError, match="a tensor is on a GPU, and the Triton kernels ") as raised:
        adapter._native()
    assert sentence in str(raised.value)


def test_without_a_gpu_and_without_the_interpreter():
    """In a process of its own: the tests beside it interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", WITHOUT_A_GPU], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    sentences = run.stdout.splitlines()
    on_cpu = "runs on NVIDIA GPUs, and this computation is for cpu; set TRITON_INTERPRET=1"
    asked = "ValueError: implementation='triton' cannot run attention on cpu: the Triton kernel forward_kernel "
    assert sentences[0].startswith(asked) and on_cpu in sentences[0]
    assert sentences[1:] == ["the default goes without"] or (
        sentences[1] == sentences[0]
        and sentences[2] == "ValueError: launch of forward_kernel: expected CUDA tensors, given one on cpu"
        and sentences[3:] == ["the default goes without"]
    )


WITHOUT_A_GPU = """
import importlib.util
import jax
jax.config.update("jax_platforms", "cpu")
import dlm_kernels

def say(call, *arguments):
    try:
        call(*arguments, implementation="triton")
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])

query = jax.numpy.ones((1, 4, 2, 16))
say(dlm_kernels.attention, query, query, query)
if importlib.util.find_spec("torch") is not None:
    import torch
    import dlm_kernels.torch
    from dlm_kernels.torch import native
    query = torch.ones(1, 4, 2, 16)
    say(dlm_kernels.torch.attention, query, query, query)
    say(native.attention, query, query, query)
    dlm_kernels.torch.attention(query, query, query)
print("the default goes without")
"""
