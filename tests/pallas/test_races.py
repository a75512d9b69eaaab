"""Each kernel in Pallas's TPU interpreter: nothing races with a copy or the chip's other core, nothing reads unwritten memory.

That interpreter runs the copies and two cores of a v5p as they would run, and fills memory with NaN first. It is slow: one case
of each kernel, large enough for several steps along every axis of its grid and for blocks past the arrays' ends.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas
from jax.experimental.pallas import tpu as pltpu

from dlm_kernels.pallas_kernels import (
    attention,
    attention_backward,
    chips,
    cross_entropy,
    divergence,
    experts,
    guidance,
    head,
    lm_head,
    unmask,
)
from dlm_kernels.reference import attention as attention_reference
from dlm_kernels.reference import cross_entropy as cross_entropy_reference
from dlm_kernels.reference import divergence as divergence_reference
from dlm_kernels.reference import experts as experts_reference
from dlm_kernels.reference import guidance as guidance_reference
from dlm_kernels.reference import lm_head as lm_head_reference
from dlm_kernels.reference import unmask as unmask_reference

CLOSE = functools.partial(np.testing.assert_allclose, rtol=3e-5, atol=3e-5)


@pytest.fixture
def run(monkeypatch):
    """run(function, *operands, **static), failing if a race was found."""
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized", num_cores_or_threads=2
    )
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=params))
    monkeypatch.setattr(chips, "chip", lambda: chips.CHIPS["TPU v5"])

    def parameters(*semantics, given=chips.parameters):
        """The interpreter wants parallel axes first: those before one count as parallel too, which only makes more races."""
        parallel = len(semantics) - semantics[::-1].index("parallel")
        return given(*["parallel"] * parallel, *semantics[parallel:])

    monkeypatch.setattr(chips, "parameters", parameters)

    def run(function, *operands, **static):
        pltpu.reset_tpu_interpret_mode_state()
        results = jax.jit(functools.partial(function, **static))(*operands)
        results = [np.asarray(result) for result in jax.tree.leaves(results)]
        assert interpreter.races is not None, "no kernel ran in the TPU's interpreter"
        assert not interpreter.races.races_found
        return results

    return run


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def as_numpy(arrays):
    return [None if x is None else np.asarray(x) for x in arrays]


def test_a_race_is_found(run):
    """Two cores that write the same block: else the tests below could not fail."""

    def kernel(out):
        out[...] = jnp.full(out.shape, pallas.program_id(0), jnp.float32)

    def call():
        return pallas.pallas_call(
            kernel,
            grid=(2,),
            out_specs=pallas.BlockSpec((8, 128), lambda i: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        )()

    with pytest.raises(AssertionError, match="races_found"):
        run(call)


@pytest.fixture
def small_tiles(monkeypatch, request):
    """Attention in tiles of 128 rows and so many keys: several at shapes that the interpreter is done with soon."""
    for module in (attention, attention_backward):

        def choose(*shape, chosen=module.choose_tiles):
            tiles = chosen(*shape)
            parts = dict(rows=min(tiles.rows, 128), keys=request.param, row_part=min(tiles.rows, 128), key_part=128)
            return dataclasses.replace(tiles, unrolled=1, **parts)

        monkeypatch.setattr(module, "choose_tiles", choose)


# Logits as [rows, keys], and as [keys, rows]; blocks as [length, H], and as [H, length]; several tiles of keys, and one.
@pytest.mark.parametrize("queries, size, small_tiles", [(12, 128, 128), (150, 64, 128), (150, 128, 384)], indirect=["small_tiles"])
def test_attention(run, small_tiles, queries, size):
    query, dout = normal(0, 2, queries, 2, size), normal(1, 2, queries, 2, size)
    key, value = normal(2, 2, 300, 2, size), normal(3, 2, 300, 2, size)
    bounds = np.zeros((2, queries, 2), np.int32)
    bounds[0], bounds[1] = (0, 200), (140, 300)  # a tile of keys that no row sees, one that all do, one at an edge
    options = dict(scale=0.125, logits_soft_cap=None)
    out, lse = run(attention.attention_forward, query, key, value, bounds, None, **options)
    arrays = as_numpy((query, key, value))
    expected = attention_reference.attention_forward(*arrays, bounds, None, **options)
    CLOSE(out, expected[0])
    CLOSE(lse, expected[1])
    if queries > 128:
        saved = out, lse, dout, jnp.zeros_like(lse)
        got = run(attention.attention_backward, query, key, value, bounds, None, *saved, **options)
        wanted = attention_reference.attention_backward(*arrays, bounds, None, None, None, *as_numpy(saved[2:]), **options)
        for result, want in zip(got, wanted, strict=True):
            CLOSE(result, want)


def test_score_tokens(run, monkeypatch):
    monkeypatch.setattr(unmask, "ROWS", 16)
    monkeypatch.setattr(unmask, "COLUMNS", 256)
    r, v = 2 * unmask.ROWS + 3, 2 * unmask.COLUMNS + 100
    active = jnp.arange(r) >= unmask.ROWS  # the first tile of rows is not read
    rows = jnp.arange(r, dtype=jnp.int32)
    options = jnp.linspace(0, 1.5, r), jax.random.bits(jax.random.key(5), (r, 2)), rows, None, active, jnp.array([5, -1], jnp.int32)
    arrays = normal(0, r, v), normal(1, r, v), jnp.full(r, 1.5), *options
    static = dict(confidence="margin", tempered_confidence=True, logits_soft_cap=20.0)
    got, expected = run(unmask.score_tokens, *arrays, **static), unmask_reference.score_tokens(*as_numpy(arrays), **static)
    np.testing.assert_array_equal(got[0], expected[0])
    for result, wanted in zip(got[1:], expected[1:], strict=True):
        CLOSE(result, wanted)


def test_unmask_topk(run):
    b, length = 3, 300
    keys = jax.random.split(jax.random.key(0), 4)
    tokens, proposal = (jax.random.randint(key, (b, length), 1, 50) for key in keys[:2])
    sure, eligible = jnp.round(jax.random.uniform(keys[2], (b, length)), 1), jax.random.bernoulli(keys[3], 0.6, (b, length))
    rules = jnp.array([0, 5, 9], jnp.int32), jnp.array([0.5, 0.9, 0.1]), jnp.array([0.5, 1, 2]), jnp.array([0, 2, 9.0])
    arrays = tokens, proposal, sure, jnp.ones((b, length)), eligible, ~eligible, *rules, jnp.full(b, 0.55)
    for result, wanted in zip(run(unmask.unmask_topk, *arrays), unmask_reference.unmask_topk(*as_numpy(arrays)), strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.fixture
def head_operands(monkeypatch):
    """Hidden rows, the weight and which rows are active: two tiles of rows (the first not live) and three of the weight."""
    monkeypatch.setattr(head, "tiles", lambda *_, **__: (16, 128))
    return normal(0, 20, 40), normal(1, 300, 40) / 3, jnp.arange(20) >= 16


def test_lm_head_scores(run, head_operands):
    arrays = *head_operands[:2], None, None, None, None, head_operands[2], None
    static = dict(confidence="neg_entropy", tempered_confidence=False, logits_soft_cap=None, logits_dtype=None)
    got, expected = run(lm_head.lm_head_scores, *arrays, **static), lm_head_reference.lm_head_scores(*as_numpy(arrays), **static)
    np.testing.assert_array_equal(got[0], expected[0])
    for result, wanted in zip(got[1:], expected[1:], strict=True):
        CLOSE(result, wanted)


def test_masked_cross_entropy(run, head_operands):
    hidden, weight, active = head_operands
    arrays = hidden, weight, jax.random.randint(jax.random.key(2), (20,), 0, 300), active
    loss, lse = run(cross_entropy.masked_cross_entropy_forward, *arrays, logits_soft_cap=None)
    expected, expected_lse = cross_entropy_reference.masked_cross_entropy_forward(*as_numpy(arrays), logits_soft_cap=None)
    CLOSE(loss, expected)
    CLOSE(lse[active], expected_lse[active])
    more = *arrays, lse, normal(3, 20)
    wanted = cross_entropy_reference.masked_cross_entropy_backward(*as_numpy(more), logits_soft_cap=None)
    for result, want in zip(run(cross_entropy.masked_cross_entropy_backward, *more, logits_soft_cap=None), wanted, strict=True):
        CLOSE(result, want)


def test_masked_divergence(run, head_operands):
    hidden, weight, active = head_operands
    arrays = hidden, weight, normal(4, 20, 24), normal(5, 300, 24), active
    got = run(divergence.masked_divergence_forward, *arrays)
    for result, want in zip(got, divergence_reference.masked_divergence_forward(*as_numpy(arrays)), strict=True):
        CLOSE(result, want)
    more = *arrays, *got[1:], normal(3, 20)
    wanted = divergence_reference.masked_divergence_backward(*as_numpy(more))
    for result, want in zip(run(divergence.masked_divergence_backward, *more), wanted, strict=True):
        CLOSE(result, want)


def test_a_core_with_fewer_tiles_counts_none_twice(run, head_operands):
    """Three whole tiles over two cores, of which no mask past the vocabulary hides a fourth."""
    hidden, active = head_operands[0], jnp.ones(20, bool)
    weight, target_weight, tokens = normal(1, 384, 40) / 3, normal(2, 384, 40) / 3, jnp.arange(20) * 19
    arrays = hidden, weight, tokens, active
    wanted = cross_entropy_reference.masked_cross_entropy_forward(*as_numpy(arrays), logits_soft_cap=None)
    CLOSE(run(cross_entropy.masked_cross_entropy_forward, *arrays, logits_soft_cap=None), wanted)
    arrays = hidden, weight, hidden, target_weight, active
    CLOSE(run(divergence.masked_divergence_forward, *arrays), divergence_reference.masked_divergence_forward(*as_numpy(arrays)))


def test_a_weight_is_refused_by_the_width_that_it_has_in_memory():
    kept = head.streamed(4)
    most = max(d for d in range(128, 2**17, 128) if head.refuse(jax.ShapeDtypeStruct((300, d), jnp.float32), *kept) is None)
    assert "VMEM holds no" in head.refuse(jax.ShapeDtypeStruct((300, most + 1), jnp.float32), *kept)


def test_cores_share_the_rows_where_each_has_enough():
    sizes = 50258, 768, 2, *head.streamed(2)
    assert [head.tiles(r, *sizes, least=2)[0] for r in (100, 511, 512, 1000)] == [112, 512, 256, 512]
    assert head.tiles(512, *sizes)[0] == 512


def test_guidance(run):
    streams, scale = normal(0, 3, guidance.ROWS + 5, guidance.COLUMNS + 100), jnp.linspace(-0.5, 3, guidance.ROWS + 5)
    CLOSE(run(guidance.mix_guidance, *streams[:2], scale)[0], guidance_reference.mix_guidance(*as_numpy((*streams[:2], scale))))
    weights = normal(1, 3, guidance.ROWS + 5)
    CLOSE(run(guidance.combine_guidance, streams, weights)[0], guidance_reference.combine_guidance(*as_numpy((streams, weights))))


@pytest.mark.parametrize("rows, chosen, columns", [(18, (0, 3, 3, 3), 128), (9, (4,), 200)])
def test_mix_experts(run, monkeypatch, rows, chosen, columns):
    """Three tiles over two cores, of an expert's parts, the last of them short; and no tile."""
    monkeypatch.setattr(experts, "_columns", lambda gate: columns)
    x, gate, up, down = normal(0, rows, 40), *(normal(i, 4, 40, 200) / 6 for i in (1, 2)), normal(3, 4, 200, 40) / 14
    expert = jnp.tile(jnp.array(chosen), (rows, 1))
    arrays = x, gate, up, down, expert, normal(4, *expert.shape)
    static = dict(activation="gelu")
    CLOSE(run(experts.mix_experts, *arrays, **static)[0], experts_reference.mix_experts(*as_numpy(arrays), **static))


@pytest.mark.parametrize("drawn", ["by a key", "before"])
def test_lm_head_scores_with_every_option(run, head_operands, drawn):
    """Each tile of rows and of the weight has its own part of each option; three whole tiles over two cores, none counted twice."""
    hidden, weight, rows = head_operands[0], normal(1, 384, 40) / 3, jnp.arange(20, dtype=jnp.int32)
    banned = jnp.unique((hidden @ weight.T).argmax(1))
    assert set((banned // 128).tolist()) == {0, 1, 2}
    draws = (jax.random.bits(jax.random.key(5), (20, 2)), rows, None) if drawn == "by a key" else (None, None, normal(6, 20, 384))
    arrays = hidden, weight, jnp.linspace(0, 1.5, 20), *draws, rows != 3, banned.astype(jnp.int32)
    static = dict(confidence="margin", tempered_confidence=True, logits_soft_cap=20.0, logits_dtype=None)
    got, expected = run(lm_head.lm_head_scores, *arrays, **static), lm_head_reference.lm_head_scores(*as_numpy(arrays), **static)
    np.testing.assert_array_equal(got[0], expected[0])
    for result, wanted in zip(got[1:], expected[1:], strict=True):
        CLOSE(result, wanted)


def test_rows_are_multiplied_part_by_part(run, head_operands, monkeypatch):
    """All 20 in one tile, 16 of them at a time."""
    monkeypatch.setattr(head, "PART", 16)
    monkeypatch.setattr(head, "tiles", lambda *_, **__: (32, 128))
    test_masked_cross_entropy(run, head_operands)
