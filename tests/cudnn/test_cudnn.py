"""cuDNN is refused with its reason, and asked in its own layout. With no GPU here, JAX's own attention stands in for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import attention, explain, masks
from dlm_kernels.cudnn import attention as cudnn
from dlm_kernels.xla import attention as plain


def arrays(dtype="float16", h=24):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (2, n, heads, h)).astype(dtype) for k, n, heads in zip(keys, (5, 7, 7), (4, 2, 2))]


@pytest.mark.parametrize(
    "reason, dtype, h, options",
    [
        ("takes no mask", "float16", 24, dict(mask=masks.KeyIntervals(jnp.zeros((1, 5), int), jnp.ones((1, 5), int)))),
        ("no soft cap", "float16", 24, dict(logits_soft_cap=3.0)),
        ("bfloat16 and float16", "float32", 24, {}),
        ("head sizes", "float16", 136, {}),
        ("needs an NVIDIA GPU", "float16", 24, {}),
    ],
)
def test_refuses_with_the_reason(reason, dtype, h, options):
    with pytest.raises(ValueError, match=reason):
        attention(*arrays(dtype, h), implementation="cudnn", **options)


def test_no_call_takes_it_by_itself():
    assert all("cudnn" not in choice.implementations.values() for choice in explain(attention, *arrays()))


def test_out_and_lse_in_our_layout(monkeypatch):
    asked = []

    def stand_in(*args, implementation, **kwargs):
        asked.append(implementation)
        return attend(*args, implementation="xla", **kwargs)

    attend = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    got = cudnn.attention_forward(*arrays(), None, None, scale=0.3, logits_soft_cap=None)
    exact = plain.attention_forward(*(x.astype("float32") for x in arrays()), None, None, scale=0.3, logits_soft_cap=None)
    assert asked == ["cudnn"] and got[0].dtype == jnp.float16 and got[1].dtype == jnp.float32
    for mine, other in zip(got, exact, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), other, rtol=4e-3, atol=2e-3)


def test_has_no_gradient(monkeypatch):
    monkeypatch.setattr(cudnn, "supports_attention_forward", lambda *_, **__: None)
    monkeypatch.setattr(cudnn, "attention_forward", plain.attention_forward)
    with pytest.raises(ValueError, match="has no attention_backward"):
        jax.grad(lambda q, *kv: attention(q, *kv, implementation="cudnn").sum())(*arrays())
