"""The operations on torch tensors give what they give on JAX arrays. Needs the `torch` extra."""

import contextlib
import functools
import importlib
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from dlm_kernels import masks
from dlm_kernels.denoiser import model
from dlm_kernels.denoiser.config import DenoiserConfig

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
adapter = importlib.import_module("dlm_kernels.torch")
forward_ad = importlib.import_module("torch.autograd.forward_ad")
FakeTensorMode = importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode
torch_llada = importlib.import_module("bench.torch_llada")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_transposed_tensor_with_a_mask(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, 9, 16).to(dtype).transpose(1, 2) for n in (4, 2, 2))
    stop = torch.tensor([[3] * 9, [9] * 9])
    out = adapter.attention(query, key, value, mask=masks.KeyIntervals(torch.zeros_like(stop), stop))
    assert out.dtype == dtype
    arrays = [jnp.asarray(x.float().numpy()).astype(str(dtype).removeprefix("torch.")) for x in (query, key, value)]
    bounds = jnp.asarray(stop.numpy(), jnp.int32)
    expected = dlm_kernels.attention(*arrays, mask=masks.KeyIntervals(jnp.zeros_like(bounds), bounds))
    np.testing.assert_array_equal(out.float().numpy(), np.asarray(expected, np.float32))


def test_masks_of_torch():
    """As scaled_dot_product_attention has them; as intervals for the kernels where they can be."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 7, n, 16) for n in (4, 4, 4))
    where = torch.arange(7)
    runs = (where[:, None] // 2 == where // 2) | (where < 1)  # one for the first queries, two for the others
    padding = (where < torch.tensor([[5], [7]]))[:, None, None]
    combs = (where % 2 == 0).expand(7, 7)  # four runs
    nothing = torch.zeros(7, 7, dtype=torch.bool)
    of_heads = torch.stack([runs, combs, runs, runs])[None]
    cases = [(runs, True), (padding, True), (padding & runs, True), (combs, False), (nothing, True), (of_heads, False)]
    cases += [((where < 3)[:, None], True)]
    for mask, kept in cases:
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        for given in (mask, bias, bias.double().masked_fill(~mask, -torch.inf)):
            assert isinstance(adapter.intervals(given, 4, 7, 7), masks.KeyIntervals) == kept
            expected = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask
            ).transpose(1, 2)
            torch.testing.assert_close(adapter.attention(query, key, value, mask=given), expected.nan_to_num())
    with pytest.raises(ValueError, match="mask: expected bool, or 0 where a query sees a key and -inf elsewhere"):
        adapter.attention(query, key, value, mask=torch.full((7, 7), -1.0))
    with pytest.raises(ValueError, match="mask: expected bool, or 0 .*, got dtype torch.int64"):
        adapter.attention(query, key, value, mask=padding.long())
    with pytest.raises(ValueError, match="query: expected an array, got NoneType"):
        adapter.attention(None, key, value, mask=padding)
    with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \[2, 4, 7, 7\]"):
        adapter.attention(query, key, value, mask=torch.ones(7, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \[2, 4, 7, 7\]"):
        adapter.attention(query, key, value, mask=runs.expand(1, 3, 7, 7))


def test_what_a_mask_repeats_is_looked_at_once(monkeypatch):
    """A model of 32 layers would look at heads x queries x keys numbers 32 times."""
    looked, pad = [], torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda x, *rest: looked.append(x.numel()) or pad(x, *rest))
    padding = (torch.arange(7) < torch.tensor([[5], [6]]))[:, None, None]
    bias = torch.zeros(2, 1, 1, 7).masked_fill(~padding, -torch.inf)
    for given in (padding, padding.expand(2, 4, 7, 7), bias.expand(2, 4, 7, 7)):
        mask = adapter.intervals(given, 4, 7, 7)
        assert mask.stop.tolist() == [[5] * 7, [6] * 7] and mask.start2 is None
    assert looked == [14, 14, 14]
    assert adapter.intervals(torch.tensor(True).expand(2, 4, 7, 7), 4, 7, 7).stop.tolist() == [[7] * 7] * 2
    combs = (torch.arange(7) % 2 == 0).expand(2, 4, 7, 7)
    assert torch.equal(adapter.intervals(combs, 4, 7, 7), combs)


def test_a_step_with_a_key():
    logits = torch.randn(2, 7, 31, generator=torch.Generator().manual_seed(1))
    tokens = torch.full((2, 7), 30)
    options = dict(mask_id=30, num_unmask=3, temperature=0.7, key=jax.random.key(3))
    got = adapter.unmask_step(logits, tokens, **options)
    expected = dlm_kernels.unmask_step(jnp.asarray(logits.numpy()), jnp.full((2, 7), 30), **options)
    assert got.unmasked.dtype == torch.bool
    for mine, other in zip(got, expected):
        np.testing.assert_array_equal(mine.numpy(), other)


def test_banned_tokens_may_be_a_list():
    logits = torch.randn(2, 7, 31, generator=torch.Generator().manual_seed(1))
    expected = adapter.score_tokens(logits, banned_tokens=torch.tensor([3, 4])).logsumexp
    assert (expected < adapter.score_tokens(logits).logsumexp).all()
    torch.testing.assert_close(adapter.score_tokens(logits, banned_tokens=[3, 4]).logsumexp, expected)
    tokens = torch.full((2, 7), 30)
    for banned in ([int(logits[0, 0].argmax())], (int(logits[0, 0].argmax()),)):
        made = adapter.unmask_step(logits, tokens, mask_id=30, num_unmask=7, banned_tokens=banned).tokens
        assert made[0, 0] == logits[0, 0].topk(2).indices[1]


def test_generation_as_the_readme_has_it():
    """Its own lines, on a model of torch, are LLaDA's sampler token for token, in LLaDA's dtype."""
    readme = pathlib.Path(__file__).parents[2].joinpath("README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "def generate(" in block)
    config = DenoiserConfig(layers=2, d_model=32, heads=4, kv_heads=2, head_size=8, ffn=64, vocab=48)
    params = {name: torch.tensor(np.array(x)) for name, x in model.init(config, jax.random.key(0)).items()}

    def logits_of(tokens):
        logits = torch_llada.forward(config, params, tokens)
        logits[..., [config.mask_id, config.pad_id]] = -torch.inf
        return types.SimpleNamespace(logits=logits)

    q, k, v = torch.randn(3, 2, 4, 9, 16)
    names = {"q": q, "k": k, "v": v}
    exec(code, names)
    torch.testing.assert_close(names["out"], torch.nn.functional.scaled_dot_product_attention(q, k, v))
    prompt, options = torch.randint(3, config.vocab, (2, 5)), dict(length=12, block=6, steps=4)
    made = names["generate"](logits_of, prompt, **options, mask_id=config.mask_id)
    assert made.dtype == torch.int64
    np.testing.assert_array_equal(made, torch_llada.generate(config, params, prompt, **options))


def test_the_soft_embedding():
    hidden, weight = torch.randn(1, 3, 8), torch.randn(31, 8)
    expected = torch.softmax(hidden @ weight.T / 0.7, -1) @ weight
    torch.testing.assert_close(adapter.soft_embedding(hidden, weight, temperature=0.7), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_of_attention(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, 9, 16).to(dtype).transpose(1, 2).requires_grad_() for n in (4, 2, 2))
    mask = masks.KeyIntervals(torch.zeros(2, 9, dtype=torch.int32), torch.tensor([[3] * 9, [9] * 9]))
    cotangents = torch.randn(2, 9, 4, 16).to(dtype), torch.randn(2, 4, 9)
    torch.autograd.backward(adapter.attention(query, key, value, mask=mask, return_lse=True), cotangents)
    arrays = [jnp.asarray(x.detach().float().numpy()).astype(str(dtype).removeprefix("torch.")) for x in (query, key, value)]
    bounds = masks.KeyIntervals(*(jnp.asarray(x.numpy(), jnp.int32) for x in (mask.start, mask.stop)))
    _, back = jax.vjp(lambda *x: dlm_kernels.attention(*x, mask=bounds, return_lse=True), *arrays)
    expected = back((jnp.asarray(cotangents[0].float().numpy()).astype(arrays[0].dtype), jnp.asarray(cotangents[1].numpy())))
    for mine, other in zip((query.grad, key.grad, value.grad), expected):
        assert mine.dtype == dtype
        np.testing.assert_array_equal(mine.float().numpy(), np.asarray(other, np.float32))


def test_a_model_of_torch_learns_on_the_cpu():
    torch.manual_seed(0)
    hidden, head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 31, bias=False)
    inputs, targets, weights = torch.randn(1, 6, 4), torch.randint(0, 31, (1, 6)), torch.rand(1, 6)
    plain = torch.nn.functional.cross_entropy(head(hidden(inputs))[0], targets[0], reduction="none") @ weights[0]
    expected = torch.autograd.grad(plain, [hidden.weight, head.weight])
    loss = adapter.masked_cross_entropy(hidden(inputs), head.weight, targets, weights)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden.weight, head.weight]), expected)


def test_gradients_that_would_be_wrong_are_refused():
    hidden, weight = torch.randn(1, 2, 8), torch.randn(9, 8, requires_grad=True)
    with pytest.raises(ValueError, match="lm_head_scores has no gradient: expected torch.no_grad"):
        adapter.lm_head_scores(hidden, weight)
    with pytest.raises(ValueError, match="mix_guidance has no gradient: expected torch.no_grad"):
        adapter.mix_guidance(hidden.requires_grad_(), hidden, 1.0)
    hidden.requires_grad_(False)
    with torch.no_grad():
        adapter.lm_head_scores(hidden, weight)
    out = adapter.soft_embedding(hidden, weight)
    with pytest.raises(ValueError, match="create_graph=False"):
        torch.autograd.grad(out.sum(), weight, create_graph=True)
    out = adapter.soft_embedding(hidden, weight)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("changed", ["query", "out", "lse"])
def test_what_was_written_since_has_no_gradient(changed):
    """JAX keeps the memory of inputs and results: gradients of what is there now would be wrong."""
    query = torch.randn(1, 9, 2, 16)
    learnt = (2 * query).requires_grad_() if changed != "query" else query.clone().requires_grad_() * 1
    out, lse = adapter.attention(learnt, query, query, return_lse=True)
    with torch.no_grad() if changed == "query" else contextlib.nullcontext():
        {"query": learnt, "out": out, "lse": lse}[changed].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.sum() + lse.sum()).backward()


@pytest.mark.parametrize("changed", ["key", "mask", "weights", "weight"])
def test_what_has_no_gradient_and_was_written_since_is_seen_too(changed):
    """A cache of keys, a buffer of weights, a frozen head: JAX keeps their memory as well."""
    frozen = dict(key=torch.randn(1, 9, 2, 16), mask=torch.rand(1, 2, 9, 9) < 0.7)
    frozen |= dict(weight=torch.randn(31, 8), weights=torch.ones(1, 6))
    if changed in ("key", "mask"):
        learnt = torch.randn(1, 9, 2, 16, requires_grad=True)
        loss = adapter.attention(learnt, frozen["key"], torch.randn(1, 9, 2, 16), mask=frozen["mask"]).sum()
    else:
        learnt, targets = torch.randn(1, 6, 8, requires_grad=True), torch.zeros(1, 6, dtype=torch.int64)
        loss = adapter.masked_cross_entropy(learnt, frozen["weight"], targets, frozen["weights"])
    frozen[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_of_inference_mode_may_stand_beside_learnt_ones():
    with torch.inference_mode():
        key = torch.randn(1, 9, 2, 16)
    query = key.clone().requires_grad_()
    adapter.attention(query, key, key).sum().backward()
    assert query.grad.abs().max() > 0


def test_a_result_that_no_gradient_needs_may_be_written():
    hidden, weight = torch.randn(1, 3, 8, requires_grad=True), torch.randn(31, 8)
    run = functools.partial(adapter.masked_cross_entropy, hidden, weight, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3))
    (whole,) = torch.autograd.grad(run(), hidden)
    loss = run()
    loss /= 4
    torch.testing.assert_close(*torch.autograd.grad(loss, hidden), whole / 4)


def test_the_gradients_beside_float64():
    """JAX then counts its loops in int64."""
    hidden, weight, embedding = torch.randn(1, 3, 8, requires_grad=True), torch.randn(5000, 8), torch.randn(5000, 6)
    temperature = torch.tensor(0.7, dtype=torch.float64)
    mine, other = (
        torch.autograd.grad(adapter.soft_embedding(hidden, weight, embedding=embedding, temperature=x).sum(), hidden)
        for x in (temperature, 0.7)
    )
    torch.testing.assert_close(mine, other)


def test_torch_keeps_what_the_gradients_need():
    """So that it frees it with the graph, and checkpointing sees it."""
    query = torch.randn(1, 9, 2, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = adapter.attention(query, query, query)
    assert len(kept) > 4
    out.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


def test_a_packed_head_and_rounded_logits():
    hidden, weight = torch.randn(1, 3, 40).bfloat16(), torch.randn(301, 40).bfloat16()
    packed = adapter.pack_lm_head(weight)
    assert isinstance(packed.array, torch.Tensor)
    for options in ({}, dict(logits_dtype=torch.bfloat16)):
        got, expected = (adapter.lm_head_scores(hidden, x, **options) for x in (packed, weight))
        assert all(torch.equal(*pair) for pair in zip(got, expected))
    assert not torch.equal(got.logsumexp, adapter.lm_head_scores(hidden, weight).logsumexp)  # they were rounded
    with pytest.raises(ValueError, match=r"weight: expected an array of numbers, got Tensor of torch.bfloat16, shape \[301, 40\]"):
        dlm_kernels.pack_lm_head(weight)


def test_a_model_with_an_operation_is_saved_and_loaded():
    assert pickle.loads(pickle.dumps(adapter.attention)) is adapter.attention
    assert pickle.loads(pickle.dumps(adapter.unmask_step)) is adapter.unmask_step


def test_integers_beyond_32_bits_are_refused():
    scores = adapter.score_tokens(torch.randn(1, 2, 9))
    assert scores.token.dtype == torch.int64
    with pytest.raises(ValueError, match=f"expected integers of 32 bits, got one of {2**32 + 3}"):
        adapter.unmask_topk(torch.tensor([[2**32 + 3, 3]]), scores, mask_id=3, num_unmask=1)
    with pytest.raises(ValueError, match=f"expected integers of 32 bits, got one of {2**32 + 3}"):
        adapter.unmask_topk(torch.tensor([[3, 3]]), scores, mask_id=torch.tensor(2**32 + 3), num_unmask=2)
    with pytest.raises(ValueError, match=f"num_unmask: .* got {2**40}"):
        adapter.unmask_topk(torch.tensor([[3, 3]]), scores, mask_id=3, num_unmask=2**40)


def test_tokens_of_a_dtype_too_narrow_for_the_vocabulary_are_refused():
    """Token 300 would be 44."""
    logits, tokens = torch.zeros(1, 2, 400), torch.full((1, 2), 200, dtype=torch.uint8)
    logits[..., [255, 300]] = torch.tensor([4.0, 5.0])
    with pytest.raises(ValueError, match="tokens: expected a dtype that holds 399, got torch.uint8"):
        adapter.unmask_step(logits, tokens, mask_id=200, num_unmask=2)
    scores = adapter.score_tokens(logits)
    with pytest.raises(ValueError, match="tokens: expected a dtype that holds 300, got torch.uint8"):
        adapter.unmask_topk(tokens=tokens, scores=scores, mask_id=200, num_unmask=2)
    for made in (
        adapter.unmask_step(logits[..., :256], tokens=tokens, mask_id=200, num_unmask=2).tokens,
        adapter.unmask_topk(tokens, adapter.score_tokens(logits[..., :256]), mask_id=200, num_unmask=2).tokens,
    ):
        assert made.dtype == torch.uint8 and (made == 255).all()
    assert (adapter.unmask_step(logits, tokens.short(), mask_id=200, num_unmask=2).tokens == 300).all()


def test_the_negative_of_a_tensor_that_torch_has_not_computed():
    logits = torch.randn(1, 3, 31)
    assert torch._neg_view(logits).is_contiguous()
    got, expected = (adapter.score_tokens(x).token for x in (torch._neg_view(logits), -logits))
    np.testing.assert_array_equal(got, expected)


def test_logits_that_nothing_truncates_are_a_copy():
    logits = torch.randn(1, 3, 31)
    out = adapter.truncate_logits(logits)
    np.testing.assert_array_equal(out, logits)
    assert out.data_ptr() != logits.data_ptr()


def test_tangents_of_forward_mode_are_refused():
    x = torch.randn(1, 5, 2, 16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(ValueError, match="expected tensors without tangents: attention has no forward mode"):
            adapter.attention(x, dual, x)
        with pytest.raises(ValueError, match="expected tensors without tangents: attention has no forward mode"):
            torch.ops.dlm_kernels.attention(dual, x, x, None, None, None, None)
        with pytest.raises(ValueError, match="expected tensors without tangents: score_tokens has no forward mode"):
            adapter.score_tokens(dual[0])
        adapter.attention(x, x, x)


def test_tensors_without_memory_are_refused():
    with FakeTensorMode():
        hidden = torch.randn(1, 2, 8)
    with pytest.raises(ValueError, match="expected tensors with memory of their own, got a FakeTensor"):
        adapter.score_tokens(hidden)


def test_float64_is_refused_and_not_rounded_unasked():
    hidden, targets = torch.randn(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="weight: expected dtype float32, bfloat16 or float16, got float64"):
        adapter.lm_head_scores(hidden, torch.randn(9, 8).double())
    # Weights of a loss may be any numbers.
    weights = torch.ones(1, 2)
    mine, other = (adapter.masked_cross_entropy(hidden, hidden[0], targets, x) for x in (weights.double(), weights))
    assert mine.dtype == torch.float32 and mine == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncation_is_torchs_by_sorting(dtype):
    """Where no logits tie and no sum is near top_p."""
    logits = (4 * torch.stack([torch.randperm(60, generator=torch.manual_seed(row)) for row in range(6)]) / 60).to(dtype)
    ranked, order = torch.softmax(logits.double() / 0.7, -1).sort(-1, descending=True)
    kept = (ranked.cumsum(-1) - ranked < 0.9) & (torch.arange(60) < torch.tensor([3, 60])[:, None, None])
    kept = torch.zeros_like(kept).scatter(-1, order.expand(2, -1, -1), kept)
    out = adapter.truncate_logits(
        logits.expand(2, -1, -1), top_p=0.9, top_k=torch.tensor([3, 60]), temperature=torch.tensor(0.7)
    )
    assert out.dtype == dtype and 3 < kept[1].sum(-1).max() < 60
    np.testing.assert_array_equal(out.float(), torch.where(kept, logits, -torch.inf).float())


def test_results_are_where_the_tensors_are_whatever_the_default_of_jax():
    """What JAX makes of no tensor, random confidence and the results of nothing; another CPU stands for JAX's GPU."""
    code = """
import jax, torch
from dlm_kernels import torch as dlm

made, taken = [], dlm._to_torch
dlm._to_torch = lambda leaf: made.extend(leaf.devices()) or taken(leaf)
with jax.default_device(jax.devices()[1]):
    dlm.score_tokens(torch.randn(1, 3, 9), confidence="random", key=jax.random.key(0))
    query = torch.randn(1, 3, 2, 8)
    dlm.attention(query, query[:, :0], query[:, :0], return_lse=True)
assert set(made) == {jax.devices()[0]}, made
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
