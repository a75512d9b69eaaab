"""What runs on CUDA tensors, here on CPU tensors in Triton's interpreter, gives what the JAX operations give, gradients too.

`make test-gpu` runs it on CUDA tensors. The kernels are tested elsewhere; these tests are of what lies between torch and them:
layouts, masks, scalars, keys, autograd.
"""

import functools
import os
import subprocess
import sys
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from dlm_kernels import masks

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
torch = pytest.importorskip("torch", reason="the torch extra is not installed")

B, L, V, D = 2, 5, 40, 16


@pytest.fixture
def native():
    from dlm_kernels.torch import native

    with torch.device(DEVICE):
        yield native


def draw(seed, *shape):
    return np.array(jax.random.normal(jax.random.key(seed), shape))


def same(got, expected):
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine.detach().cpu().numpy(), other, rtol=2e-5, atol=2e-6)


def test_attention_and_its_gradients_with_overlapping_intervals(native):
    arrays = [draw(0, B, 4, L, 16), draw(1, B, 2, 9, 16), draw(2, B, 2, 9, 16)]
    ends = np.random.default_rng(0).integers(-2, 12, (4, B, L))
    ends[:, 0, 0] = 0  # sees nothing
    expected, back = jax.vjp(
        lambda *x: dlm_kernels.attention(
            *(y.swapaxes(1, 2) for y in x), mask=masks.KeyIntervals(*jnp.asarray(ends)), return_lse=True, implementation="xla"
        ),
        *map(jnp.asarray, arrays),
    )
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    mask = masks.KeyIntervals(*torch.tensor(ends))
    bounds = masks.bounds(masks.KeyIntervals(*jnp.asarray(ends)), 9)
    np.testing.assert_array_equal(native.arguments.bounds(mask, 9).cpu(), bounds)
    out, lse = native.attention(*(x.transpose(1, 2) for x in tensors), mask=mask, return_lse=True)
    same((out, lse), expected)
    cotangent = draw(3, *out.shape), np.where(np.isneginf(expected[1]), 0, draw(4, *lse.shape))
    torch.autograd.backward((out, lse), tuple(map(torch.tensor, cotangent)))
    same([x.grad for x in tensors], back(tuple(map(jnp.asarray, cotangent))))


def test_the_loss_and_its_gradients(native):
    arrays = [draw(0, B, L, D), draw(1, V, D), np.array([[0, 1, 2, 0, 1], [0.5] * 5], np.float32)]
    targets = np.random.default_rng(0).integers(0, V, (B, L))

    def loss(hidden, weight, weights):
        return dlm_kernels.masked_cross_entropy(
            hidden, weight, jnp.asarray(targets), weights, logits_soft_cap=9, implementation="xla"
        )

    expected, gradients = jax.value_and_grad(loss, (0, 1, 2))(*map(jnp.asarray, arrays))
    hidden, weight, weights = (torch.tensor(x, requires_grad=True) for x in arrays)
    got = native.masked_cross_entropy(hidden, weight, torch.tensor(targets), weights, logits_soft_cap=9)
    got.backward()
    same([got, hidden.grad, weight.grad, weights.grad], [expected, *gradients])


def test_the_divergence_and_its_gradients(native):
    weights = np.array([[0, 1, 2, 0, 1], [0.5] * 5], np.float32)
    arrays = [draw(0, B, L, D), draw(1, V, D), draw(2, B, L, D + 8), draw(3, V, D + 8), weights]
    loss = functools.partial(dlm_kernels.masked_divergence, implementation="xla")
    expected, gradients = jax.value_and_grad(loss, (0, 1, 4))(*map(jnp.asarray, arrays))
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    got = native.masked_divergence(*tensors)
    got.backward()
    assert tensors[2].grad is None and tensors[3].grad is None
    same([got, *(tensors[i].grad for i in (0, 1, 4))], [expected, *gradients])
    nothing = native.masked_divergence(tensors[0][:, :0], tensors[1], tensors[2][:, :0], tensors[3], tensors[4][:, :0])
    nothing.backward()
    assert nothing == 0


@pytest.mark.parametrize("width", [D, D + 8])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, logits_soft_cap=3.0)])
def test_the_soft_embedding_and_its_gradients(native, monkeypatch, width, options):
    """By attention, with a cap too, and by chunks of the vocabulary, of which the last is short."""
    monkeypatch.setattr("dlm_kernels.ops.soft_embedding.CHUNK", 16)
    arrays = [draw(0, B, L, D), draw(1, V, D), draw(2, V, width)]

    def naive(hidden, weight, embedding):
        return dlm_kernels.soft_embedding(hidden, weight, embedding=embedding, **options, implementation="xla")

    expected, back = jax.vjp(naive, *map(jnp.asarray, arrays))
    hidden, weight, embedding = (torch.tensor(x, requires_grad=True) for x in arrays)
    got = native.soft_embedding(hidden, weight, embedding=embedding, **options)
    cotangent = draw(3, B, L, width)
    got.backward(torch.tensor(cotangent))
    same([got, hidden.grad, weight.grad, embedding.grad], [expected, *back(jnp.asarray(cotangent))])
    low = native.soft_embedding(*(x.detach().half() for x in (hidden, weight)), embedding=embedding.detach().half(), **options)
    assert low.dtype == torch.float16 and (low - got).abs().max() < 1e-2
    assert native.soft_embedding(hidden[:, :0], weight, embedding=embedding).shape == (B, 0, width)


@pytest.mark.parametrize("options", [dict(temperature=np.inf, logits_soft_cap=30.0), dict(temperature=1e-40)])
def test_a_soft_embedding_at_the_ends_of_temperatures(native, options):
    """Beyond what attention multiplies by."""
    hidden, weight = draw(0, B, L, D), draw(1, V, D)
    expected = dlm_kernels.soft_embedding(jnp.asarray(hidden), jnp.asarray(weight), **options, implementation="xla")
    same([native.soft_embedding(torch.tensor(hidden), torch.tensor(weight), **options)], [expected])


def test_a_product_is_torchs_own(native):
    x, weight = draw(0, B, L, D), draw(1, D, V)
    same([native.matmul(torch.tensor(x), torch.tensor(weight))], [jnp.asarray(x) @ weight])
    with pytest.raises(ValueError, match="implementation: expected None .* got 'triton'"):
        native.matmul(torch.tensor(x), torch.tensor(weight), implementation="triton")
    with pytest.raises(ValueError, match="weight: expected shape"):
        native.matmul(torch.tensor(x), torch.tensor(weight.T))


def test_the_mixture_of_experts_and_its_gradients(native):
    """Nobody chose one expert, one comes twice, and one is unknown, whose row, of NaN, has no gradient; views of every array."""
    arrays = [draw(0, B, L, D), *(draw(1 + i, 4, D, 24) / 8 for i in range(2)), draw(3, 4, 24, D) / 8, draw(4, B, L, 3)]
    expert = np.random.default_rng(0).integers(0, 3, (B, L, 3))
    expert[0, 0], expert[1, 1, 2] = [1, 0, 1], 4
    arrays[0][1, 1] = np.nan

    def naive(*given):
        return dlm_kernels.mix_experts(*given[:4], jnp.asarray(expert), given[4], activation="gelu", implementation="xla")

    expected, back = jax.vjp(naive, *map(jnp.asarray, arrays))
    tensors = [torch.tensor(np.ascontiguousarray(x.mT), requires_grad=True) for x in arrays]
    views = [x.mT for x in tensors]
    got = native.mix_experts(*views[:4], torch.tensor(expert), views[4], activation="gelu")
    same([got], [expected])
    cotangent = draw(5, B, L, D)
    got.backward(torch.tensor(cotangent))
    same([x.grad.mT for x in tensors], back(jnp.asarray(cotangent)))
    frozen = [x if i in (0, 4) else x.detach() for i, x in enumerate(views)]
    out = native.mix_experts(*frozen[:4], torch.tensor(expert), frozen[4], activation="gelu")
    expected = back(jnp.asarray(cotangent))
    same(torch.autograd.grad(out, [frozen[0], frozen[4]], torch.tensor(cotangent)), [expected[0], expected[4]])
    halves = (x.detach().half() for x in views[:4])
    low = native.mix_experts(*halves, torch.tensor(expert), views[4].detach(), activation="gelu")
    assert low.dtype == torch.float16 and (low - got)[0].abs().max() < 3e-2 * got[0].abs().max()
    nothing = native.mix_experts(*views[:4], torch.tensor(expert[..., :0]), views[4][..., :0])
    nothing.sum().backward()
    assert not nothing.any() and nothing.shape == got.shape


@pytest.mark.parametrize("keys", ["one", "per row"])
def test_scores_at_a_temperature_with_guidance(native, keys):
    key = jax.random.key(5) if keys == "one" else jax.random.split(jax.random.key(5), B)
    logits, unconditional = draw(0, B, L, V), draw(1, B, L, V)
    active = np.arange(B * L).reshape(B, L) % 3 != 1
    options = dict(guidance_scale=1.5, temperature=0.7, key=key, confidence="margin")
    got = native.score_tokens(
        torch.tensor(logits), unconditional=torch.tensor(unconditional), active=torch.tensor(active),
        banned_tokens=torch.tensor([3, 99]), **options,
    )  # fmt: skip
    expected = dlm_kernels.score_tokens(
        jnp.asarray(logits), unconditional=jnp.asarray(unconditional), active=jnp.asarray(active),
        banned_tokens=jnp.array([3, 99]), **options, implementation="xla",
    )  # fmt: skip
    same(got, expected)


def test_the_head_with_guidance_and_random_confidence(native):
    hidden, other, weight = draw(0, B, L, D), draw(1, B, L, D), draw(2, V, D)
    hidden[1, 2] = np.nan  # a row of no token, which random confidence must not commit
    options = dict(guidance_scale=2.0, confidence="random", key=jax.random.key(1))
    got = native.lm_head_scores(torch.tensor(hidden), torch.tensor(weight), unconditional_hidden=torch.tensor(other), **options)
    expected = dlm_kernels.lm_head_scores(
        jnp.asarray(hidden), jnp.asarray(weight), unconditional_hidden=jnp.asarray(other), **options, implementation="xla"
    )
    if DEVICE == "cuda":  # where a row of NaN may have another token
        assert 0 <= got.token[1, 2] < V
        got.token[1, 2] = int(expected.token[1, 2])
    same(got, expected)


def test_a_step_on_a_block_with_edits(native):
    logits = draw(0, B, L, V)
    tokens = np.array([[39, 39, 7, 39, 3], [39, 1, 39, 39, 39]])
    options = dict(mask_id=39, num_unmask=[1, 2], candidates=(0, 4), edit_threshold=0.01)
    got = native.unmask_step(torch.tensor(logits), torch.tensor(tokens), **options)
    options["num_unmask"] = jnp.array([1, 2])
    expected = dlm_kernels.unmask_step(jnp.asarray(logits), jnp.asarray(tokens), **options, implementation="xla")
    same(got, expected)


def test_streams_with_a_weight_per_row(native):
    logits, weights = draw(0, 3, B, L, V), draw(1, 3, B)
    got = native.combine_guidance(torch.tensor(logits), torch.tensor(weights))
    same([got], [dlm_kernels.combine_guidance(jnp.asarray(logits), jnp.asarray(weights), implementation="xla")])


def test_truncation(native):
    logits = draw(0, B, L, V)
    for options in (dict(top_k=[3, 40]), dict(top_p=0.5, temperature=[0.7, 0]), dict(top_p=[1, 0.25], top_k=5), {}):
        arrays = {name: jnp.array(x) if isinstance(x, list) else x for name, x in options.items()}
        expected = dlm_kernels.truncate_logits(jnp.asarray(logits), **arrays, implementation="xla")
        same([native.truncate_logits(torch.tensor(logits), **{n: torch.tensor(x) for n, x in options.items()})], [expected])
    assert native.truncate_logits(torch.tensor(logits[:, :0]), top_p=0.5).shape == (B, 0, V)


def test_bad_arguments_are_told_as_jax_tells_them(native):
    query = torch.zeros(1, 3, 4, 16)
    with pytest.raises(ValueError, match="key: expected a number of heads that divides"):
        native.attention(query, query[:, :, :3], query[:, :, :3])
    with pytest.raises(ValueError, match="implementation: expected 'triton' or None"):
        native.attention(query, query, query, implementation="cpu")
    with pytest.raises(ValueError, match="key intervals only"):
        native.attention(query, query, query, mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"query: expected dtype float32, bfloat16 or float16, got float64"):
        native.attention(query.double(), query.double(), query.double())
    with pytest.raises(ValueError, match="at most 8192 positions, and tokens has 8193"):
        tokens = torch.zeros(1, 8193, dtype=torch.int32)
        native.unmask_topk(tokens, dlm_kernels.TokenScores(tokens, *[torch.zeros(1, 8193)] * 3), mask_id=0, num_unmask=1)
    packed = dlm_kernels.pack_lm_head(jnp.ones((40, 16)), implementation="cpu")
    with pytest.raises(ValueError, match=r"as \[V, D\], not packed"):
        native.lm_head_scores(query[0], packed)


def test_integers_past_32_bits_are_not_wrapped(native):
    tokens = torch.tensor([[2**32 + 3, 3]])
    scores = dlm_kernels.TokenScores(torch.tensor([[5, 5]]), *[torch.zeros(1, 2)] * 3)
    many = torch.tensor(2**40)
    assert native.unmask_topk(tokens, scores, mask_id=3, num_unmask=many).unmasked.tolist() == [[False, True]]
    block = dict(candidates=(0, many))
    assert native.unmask_step(torch.zeros(1, 2, 9), tokens, mask_id=3, num_unmask=2, **block).unmasked.tolist() == [[False, True]]
    for nobody in (torch.tensor(2**32 + 3), np.int64(2**32 + 3)):
        assert native.unmask_topk(torch.tensor([[3, 3]]), scores, mask_id=nobody, num_unmask=2).count == 0
    with pytest.raises(ValueError, match=f"num_unmask: .* got {2**40}"):
        native.unmask_topk(tokens, scores, mask_id=3, num_unmask=2**40)


@pytest.mark.parametrize("wrong", [1.0, True])
def test_a_number_that_equals_a_good_one_is_refused_after_it_too(native, wrong):
    tokens = torch.ones(1, 2, dtype=torch.int32)
    step = functools.partial(native.unmask_topk, tokens, dlm_kernels.TokenScores(tokens, *[torch.zeros(1, 2)] * 3), num_unmask=1)
    step(mask_id=1)
    with pytest.raises(ValueError, match="mask_id: expected a single integer"):
        step(mask_id=wrong)


def test_arrays_of_numpy_and_jax_beside_tensors_are_taken(native):
    logits, tokens = draw(0, B, L, V), np.full((B, L), 39)
    options = dict(
        num_unmask=np.array([1, 2]), candidates=np.arange(L)[None] + np.zeros((B, 1)) < 4, banned_tokens=np.array([3, 99]),
        noise=draw(1, B, L, V), temperature=np.float32(0.5), mask_id=jnp.int32(39),
    )  # fmt: skip
    expected = dlm_kernels.unmask_step(jnp.asarray(logits), jnp.asarray(tokens), **options, implementation="xla")
    same(native.unmask_step(torch.tensor(logits), tokens, **options), expected)
    same(native.unmask_step(torch.tensor(logits), tokens, **options | dict(banned_tokens=[3, 2**32 + 5])), expected)
    assert expected.unmasked.any()
    greedy = options | dict(temperature=np.float32(0))
    expected = dlm_kernels.unmask_step(jnp.asarray(logits), jnp.asarray(tokens), **greedy, implementation="xla")
    same(native.unmask_step(torch.tensor(logits), tokens, **greedy), expected)
    streams = torch.tensor(np.stack([logits, -logits]))
    same([native.combine_guidance(streams, [2.0, 1.0])], [logits])
    rows = dlm_kernels.pack_lm_head(jnp.asarray(draw(2, V, D)), implementation="xla")
    hidden = draw(3, B, L, D)
    same(native.lm_head_scores(torch.tensor(hidden), rows), dlm_kernels.lm_head_scores(jnp.asarray(hidden), rows))


def test_arrays_of_jax_with_dtypes_that_numpy_and_torch_do_not_share(native):
    """bfloat16, and uint32, which is the dtype of a key's words too."""
    logits, other = (jnp.asarray(draw(i, B, L, V), jnp.bfloat16) for i in range(2))
    options = dict(unconditional=other, guidance_scale=2.0, key=jax.random.PRNGKey(5), temperature=0.7)
    got = native.score_tokens(torch.tensor(np.asarray(logits, np.float32)).bfloat16(), **options)
    same(got, dlm_kernels.score_tokens(logits, **options, implementation="xla"))
    tokens = jnp.full((B, L), 39, jnp.uint32)
    scores = dlm_kernels.TokenScores(torch.ones(B, L, dtype=torch.int32), *[torch.zeros(B, L)] * 3)
    assert (native.unmask_topk(tokens, scores, mask_id=39, num_unmask=L).tokens == 1).all()
    with pytest.raises(ValueError, match="banned_tokens: expected an array, got set"):
        native.score_tokens(torch.zeros(B, L, V), banned_tokens={1, 2})


def test_numbers_are_not_of_torchs_default_dtype(native):
    """To bfloat16 0.9 is 0.8984."""
    tokens, scores = torch.zeros(1, 2, dtype=torch.int32), dlm_kernels.TokenScores(torch.ones(1, 2), *torch.zeros(3, 1, 2))
    scores = scores._replace(token=torch.ones(1, 2).int(), confidence=torch.tensor([[0.9, 0.899]]))
    streams = torch.tensor(draw(0, 2, B, L, V))
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = native.unmask_topk(tokens, scores, mask_id=0, threshold=0.9)
        mixed = native.combine_guidance(streams, [1.7, -0.7])
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.unmasked.tolist() == [[True, False]]
    same([mixed], [dlm_kernels.combine_guidance(jnp.asarray(streams.cpu()), jnp.array([1.7, -0.7]), implementation="xla")])


def test_a_temperature_of_zero_says_so_in_a_tensor_too(native):
    hidden, weight = torch.ones(1, 2, D, device=DEVICE), torch.ones(V, D, device=DEVICE)
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0.0"):
        native.soft_embedding(hidden, weight, temperature=torch.tensor(0.0, device=DEVICE))


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_temperature_of_a_soft_embedding_has_a_gradient(native, cap):
    hidden, weight = draw(0, B, L, D), draw(1, V, D)

    def total(temperature):
        out = dlm_kernels.soft_embedding(hidden, weight, temperature=temperature, logits_soft_cap=cap, implementation="xla")
        return (out * jnp.arange(D)).sum()

    temperature = torch.tensor(0.7, requires_grad=True)
    out = native.soft_embedding(torch.tensor(hidden), torch.tensor(weight), temperature=temperature, logits_soft_cap=cap)
    (out * torch.arange(D)).sum().backward()
    np.testing.assert_allclose(temperature.grad.cpu(), jax.grad(total)(jnp.float32(0.7)), rtol=1e-4)


def test_the_negative_of_a_tensor_that_torch_has_not_computed(native):
    """Given, and as a gradient that comes in."""
    query = torch.tensor(draw(0, B, L, 2, 16), requires_grad=True)
    out = native.attention(torch._neg_view(query), query, query)
    expected = native.attention(-query, query, query)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(x, query, g)[0] for x, g in ((out, torch._neg_view(out.detach())), (expected, -out.detach()))]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_several_threads(native):
    """Of which the interpreter runs one after another."""
    arrays = [torch.tensor(draw(i, 1, L + 16 * i, 1, 16)) for i in range(4)]
    with futures.ThreadPoolExecutor() as pool:
        for x, out in zip(arrays, pool.map(lambda x: native.attention(x, x, x), arrays)):
            torch.testing.assert_close(out, native.attention(x, x, x), rtol=0, atol=0)


def test_without_a_key_no_backend_of_jax_is_started(native):
    """On a GPU it would take three quarters of the memory."""
    code = f"""
import torch
from dlm_kernels.torch import masks, native

with torch.device({DEVICE!r}):
    query = torch.ones(1, 2, 1, 16, requires_grad=True)
    hidden, head, words = torch.ones(1, 2, 16, requires_grad=True), torch.ones(40, 16), torch.ones(1, 2, dtype=torch.int64)
    many = torch.tensor([2])
    mask = masks.block_causal(2, 1, offset=many) & masks.padding(many, 2) & masks.sliding_window(2, 1, 1, offset=many)
    mask = masks.block_diffusion(1, 1) & masks.packed(words) & mask & masks.cache(2, many)
    native.attention(query, query, query, mask=mask).sum().backward()
    native.masked_cross_entropy(hidden, head, words, torch.ones(1, 2)).backward()
    native.masked_divergence(hidden, head, hidden, head, torch.ones(1, 2)).backward()
    native.soft_embedding(hidden, head).sum().backward()
    native.mix_experts(hidden, *[torch.ones(2, 16, 16)] * 3, words[..., None], torch.ones(1, 2, 1)).sum().backward()
    logits = torch.zeros(1, 2, 40)
    native.mix_guidance(logits, logits, 1.5), native.combine_guidance(logits[None], [1.0])
    native.truncate_logits(logits, top_p=0.5)
    native.lm_head_scores(hidden.detach(), native.pack_lm_head(head))
    scores = native.score_tokens(logits)
    native.unmask_topk(words, scores, mask_id=1, num_unmask=1)
    native.unmask_step(logits, words, mask_id=1, num_unmask=1)
"""
    known = {"DLM_KERNELS_CUDA_ARCH": "90"} if DEVICE == "cpu" else {}  # else JAX is asked where torch has no GPU
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "nowhere", **known})


def test_a_number_is_not_copied_to_a_gpu(native, monkeypatch):
    """There torch would wait for all that came before; a device of no memory stands for the GPU."""
    made, copy = [], torch.as_tensor
    monkeypatch.setattr(torch, "as_tensor", lambda x, **options: made.append(options.get("device")) or copy(x, **options))
    assert native.arguments.rows(0.5, (2, 3), "meta").shape == (6,)
    assert native.arguments.rows(np.int64(3), (2,), "meta", torch.int32).dtype == torch.int32
    tokens = torch.zeros(2, 5, dtype=torch.int32, device="meta")
    native.arguments.allowed((0, 4), tokens), native.arguments.masked(tokens, 3)
    assert made == ["cpu"] * 5
    rows = [native.arguments.rows(x, (2, 1), DEVICE) for x in (0.9, 1e40, np.float64(-np.inf))]
    assert torch.stack(rows).tolist() == [[np.float32(0.9)] * 2, [np.inf] * 2, [-np.inf] * 2]


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs an NVIDIA GPU")
def test_a_step_is_captured_by_a_cuda_graph(native):
    """With the rules as numbers."""
    logits, tokens = torch.tensor(draw(0, B, L, V)), torch.full((B, L), 39)
    step = functools.partial(native.unmask_step, logits, tokens, mask_id=39, num_unmask=2, threshold=0.9, candidates=(0, 4))
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    logits.copy_(torch.tensor(draw(1, B, L, V)))
    graph.replay()
    for mine, other in zip(made, step()):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("pairs", [1, 2])
def test_one_row_of_starts_for_all_stops(native, pairs):
    query, key = draw(0, B, L, 2, 16), draw(1, B, 9, 2, 16)
    ends = [np.zeros((1, L), int), np.array([[3] * L, [7] * L]), np.full((1, L), 5), np.full((1, L), 8)][: 2 * pairs]
    got = native.attention(*map(torch.tensor, (query, key, key)), mask=masks.KeyIntervals(*map(torch.tensor, ends)))
    ends = [jnp.broadcast_to(end, (B, L)) for end in ends]
    same([got], [dlm_kernels.attention(query, key, key, mask=masks.KeyIntervals(*ends), implementation="xla")])


def test_a_new_number_is_not_checked_by_tracing_the_kernels_anew(native, monkeypatch):
    from dlm_kernels.triton_kernels import launch

    logits, tokens = torch.tensor(draw(0, B, L, V)), torch.full((B, L), 39)
    run = functools.partial(native.unmask_step, logits, tokens, mask_id=39, unconditional=logits)
    run(threshold=0.9, guidance_scale=1.5)
    traced = []
    monkeypatch.setattr(launch, "_launch_jax", lambda call, values: traced.append(call))
    run(threshold=0.8, guidance_scale=1.25)
    assert not traced


def test_a_gradient_that_no_kernel_computes_is_refused(native, monkeypatch):
    monkeypatch.setattr("dlm_kernels.triton_kernels.attention_backward.multiplies_by_warp", lambda: True)
    query = torch.tensor(draw(0, 1, 2, 1, 512), requires_grad=True)
    out = native.attention(query, query, query)
    with pytest.raises(ValueError, match="the gradient of attention on .* in float32 on this GPU it takes head sizes up to 256"):
        out.sum().backward()


def test_a_gradient_of_a_gradient_is_refused(native):
    query = torch.tensor(draw(0, B, L, 2, 16), requires_grad=True)
    (gradient,) = torch.autograd.grad(native.attention(query, query, query).sum(), query)
    with pytest.raises(ValueError, match="create_graph=False"):
        torch.autograd.grad(native.attention(query, query, query).sum(), query, create_graph=True)
    hidden, targets = torch.tensor(draw(0, B, L, D), requires_grad=True), torch.zeros(B, L, dtype=torch.int64)
    loss = native.masked_cross_entropy(hidden, torch.tensor(draw(1, V, D)), targets, torch.ones(B, L))
    with pytest.raises(ValueError, match="create_graph=False"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_gradients_of_nothing(native):
    query, hidden = torch.ones(B, L, 2, 16, requires_grad=True), torch.ones(0, L, D, requires_grad=True)
    native.attention(query, query[:, :0], query[:, :0]).sum().backward()
    native.masked_cross_entropy(hidden, torch.ones(V, D), torch.ones(0, L, dtype=torch.int32), torch.ones(0, L)).backward()
    assert (query.grad == 0).all() and hidden.grad.shape == hidden.shape


def test_every_option_reaches_its_kernel(native):
    query, key, value = draw(0, B, L, 2, 16), draw(1, B, 9, 2, 16), draw(2, B, 9, 2, 16)
    options = dict(scale=0.7, logits_soft_cap=2.0, return_lse=True)
    for keys in (9, 0):
        arrays = query, key[:, :keys], value[:, :keys]
        expected = dlm_kernels.attention(*map(jnp.asarray, arrays), **options, implementation="xla")
        same(native.attention(*map(torch.tensor, arrays), **options), expected)
    # Integers, whose sums are exact, of more bits than float16 has, and are rounded alike.
    random = np.random.default_rng(0)
    hidden, weight = (random.integers(-n, n + 1, shape).astype(np.float32) for n, shape in ((99, (B, L, 40)), (9, (V, 40))))
    arrays = hidden, weight / 512
    options = dict(temperature=0.7, tempered_confidence=True, logits_soft_cap=100.0, key=jax.random.key(5))
    expected = dlm_kernels.lm_head_scores(*map(jnp.asarray, arrays), **options, logits_dtype="float16", implementation="xla")
    same(native.lm_head_scores(*map(torch.tensor, arrays), **options, logits_dtype="float16"), expected)
    logits, tokens = draw(3, B, L, V), np.full((B, L), 39)
    options = dict(mask_id=39, entropy_budget=8.0)
    expected = dlm_kernels.unmask_step(jnp.asarray(logits), jnp.asarray(tokens), **options, implementation="xla")
    assert 2 < expected.unmasked.sum() < B * L
    same(native.unmask_step(torch.tensor(logits), torch.tensor(tokens), **options), expected)
    arrays = hidden / 99, weight / 9, random.integers(0, V, (B, L)), np.arange(B * L, dtype=np.float32).reshape(B, L)
    expected = dlm_kernels.masked_cross_entropy(*map(jnp.asarray, arrays), reduction="none", implementation="xla")
    same([native.masked_cross_entropy(*map(torch.tensor, arrays), reduction="none")], [expected])
    arrays = arrays[0], arrays[1], arrays[0] / 2, arrays[1], arrays[3]
    expected = dlm_kernels.masked_divergence(*map(jnp.asarray, arrays), reduction="none", implementation="xla")
    same([native.masked_divergence(*map(torch.tensor, arrays), reduction="none")], [expected])
