"""What every launch keeps to, whatever the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dlm_kernels import score_tokens
from dlm_kernels.triton_kernels import attention, cross_entropy, guidance, launch, lm_head, unmask

MANY = 70_000  # more than CUDA starts along a grid's second or third axis


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


ROWS, FLAGS, TARGETS = array(MANY), array(MANY, dtype="bool"), array(MANY, dtype="int32")
QUERY, KEY, LSE = array(MANY, 8, 4, 64), array(MANY, 1024, 1, 64), array(MANY, 4, 8)
HIDDEN, HEAD = array(MANY, 64), array(1000, 64)
OPTIONS = dict(confidence="margin", tempered_confidence=False, logits_soft_cap=None)
SCALE = dict(scale=1.0, logits_soft_cap=None)
CALLS = {
    "attention": lambda q, k, lse, *_: attention.attention_forward(q, k, k, None, None, **SCALE),
    "attention backward": lambda q, k, lse, *_: attention.attention_backward(q, k, k, None, None, q, lse, q, lse, **SCALE),
    "score_tokens": lambda *x: unmask.score_tokens(x[6], None, None, x[3], None, None, x[6], x[4], None, **OPTIONS),
    "unmask_topk": lambda *x: unmask.unmask_topk(*[x[6].astype(int)] * 2, x[6], None, x[6] > 0, None, x[5], *[None] * 4),
    "lm_head_scores": lambda *x: lm_head.lm_head_scores(x[7], x[8], *[None] * 6, **OPTIONS, logits_dtype=None),
    "loss": lambda *x: cross_entropy.masked_cross_entropy_forward(x[7], x[8], x[5], x[4], logits_soft_cap=None),
    "loss backward": lambda *x: cross_entropy.masked_cross_entropy_backward(*x[7:], x[5], x[4], x[3], x[3], logits_soft_cap=None),
    "mix_guidance": lambda *x: guidance.mix_guidance(x[6], x[6], x[3]),
    "combine_guidance": lambda *x: guidance.combine_guidance(x[6][None], x[3][None]),
}


@pytest.mark.parametrize("call", CALLS)
def test_as_many_rows_as_memory_holds(call, monkeypatch):
    monkeypatch.setattr(launch, "_launch_jax", lambda c, _: [jnp.zeros(out.shape, out.dtype) for out in c.wanted.values()])
    jax.eval_shape(CALLS[call], QUERY, KEY, LSE, ROWS, FLAGS, TARGETS, array(MANY, 16), HIDDEN, HEAD)


def test_a_grid_that_cuda_does_not_start_is_refused():
    programs = r"launch of mix_kernel: expected at most 65535 programs along axes 1 and 2, got \(1, 65537\)"
    with pytest.raises(ValueError, match=programs):
        logits = np.zeros((1, 65537 * 2048), np.float16)
        guidance.mix_guidance(logits, logits, np.zeros(1, np.float32))


def test_devices_that_interpret_at_once_do_not_mix():
    logits = jax.random.normal(jax.random.key(0), (8, 4, 50))
    mesh, rows = Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows")
    score = functools.partial(score_tokens, implementation="triton")
    for _ in range(3):
        split = jax.shard_map(score, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(logits)
        for mine, other in zip(split, score(logits)):
            np.testing.assert_array_equal(mine, other)


def test_a_tensor_on_another_device_is_named():
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    logits = torch.zeros(1, 8)
    with pytest.raises(ValueError, match="unconditional: expected a tensor on cpu, as conditional is, got one on meta"):
        guidance.mix_guidance(logits, logits.to("meta"), torch.zeros(1))


# Keys that far apart would be read from a place before the first, and values too.
def test_strides_whose_offsets_32_bits_cannot_hold_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "_interpret", lambda call, *_: [np.zeros(out.shape, out.dtype) for out in call.wanted.values()])
    query = np.zeros((1, 8, 1, 64), np.float32)

    def far_apart(step):
        return np.lib.stride_tricks.as_strided(query, (1, 4096, 1, 64), (4, 4 * step, 4, 4))

    block = attention._tiles("float32", 64, True, 0)[0]["BLOCK_N"]
    attention.attention_forward(query, *[far_apart(2**31 // block - 64)] * 2, None, None, **SCALE)
    strides = r"\(1, 67108864, 1, 1\) of shape \(1, 4096, 1, 64\)"
    with pytest.raises(ValueError, match=rf"value: expected strides .* below 2\*\*31 elements, got {strides}"):
        attention.attention_forward(query, query, far_apart(2**31 // block), None, None, **SCALE)
