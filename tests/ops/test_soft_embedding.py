"""The soft embedding against its oracle, by attention and by chunks of the vocabulary.

Vocabularies: 1, one that no tile divides, and one of two chunks and a rest. Widths: those of attention, and 300, which it leaves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_kernels
from dlm_kernels.ops import soft_embedding as op
from dlm_kernels.reference import soft_embedding as oracle

IMPLEMENTATIONS = ["cpu", "xla", None]


def inputs(random, v, d, e=None, dtype=jnp.float32, rows=(2, 5)):
    # Logits of a few units, as a model's are; float32 rounds greater ones by more than the tolerance.
    hidden = jnp.asarray(random.normal(size=(*rows, d)) * 3 * d**-0.5, dtype)
    weight = jnp.asarray(random.normal(size=(v, d)), dtype)
    embedding = None if e is None else jnp.asarray(random.normal(size=(v, e)), dtype)
    return hidden, weight, embedding


def expected(hidden, weight, embedding, temperature=1.0, soft_cap=None):
    wide = [np.asarray(x, np.float64) for x in (hidden, weight, weight if embedding is None else embedding)]
    rows = oracle.soft_embedding(wide[0].reshape(-1, hidden.shape[-1]), *wide[1:], temperature, logits_soft_cap=soft_cap)
    return rows.reshape(*hidden.shape[:2], -1)


def error(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


@pytest.fixture
def random():
    return np.random.default_rng(21)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("v, d", [(1, 8), (257, 24), (2 * op.CHUNK + 7, 64)])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.6), dict(temperature=0.8, soft_cap=3.0)])
def test_against_the_oracle(options, v, d, implementation, random):
    hidden, weight, _ = inputs(random, v, d)
    soft_cap = options.get("soft_cap")
    named = dict(temperature=options.get("temperature", 1.0), logits_soft_cap=soft_cap, implementation=implementation)
    assert error(dlm_kernels.soft_embedding(hidden, weight, **named), expected(hidden, weight, None, **options)) < 2e-6


@pytest.mark.parametrize("d, e", [(300, 300), (24, 40)])
def test_widths_that_attention_does_not_take_go_by_chunks(d, e, random):
    hidden, weight, embedding = inputs(random, 4500, d, e)
    found = dlm_kernels.soft_embedding(hidden, weight, embedding=embedding)
    assert error(found, expected(hidden, weight, embedding)) < 2e-6
    with pytest.raises(ValueError, match="'cpu' cannot run soft_embedding: it takes equal widths of at most 256"):
        dlm_kernels.soft_embedding(hidden, weight, embedding=embedding, implementation="cpu")


def test_the_greatest_width_goes_by_attention():
    assert dlm_kernels.explain(dlm_kernels.soft_embedding, jnp.ones((1, 1, 256)), jnp.ones((3, 256)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_as_precise_as_the_plain_product(implementation, random):
    hidden, weight, embedding = inputs(random, 500, 64, 64, jnp.bfloat16)
    wanted = expected(hidden, weight, embedding)
    logits = jnp.einsum("bld,vd->blv", hidden, weight)
    plain = jnp.einsum("blv,ve->ble", jax.nn.softmax(logits), embedding)
    found = dlm_kernels.soft_embedding(hidden, weight, embedding=embedding, implementation=implementation)
    assert found.dtype == jnp.bfloat16 and error(found, wanted) < 1.5 * error(plain, wanted)


def test_a_traced_temperature_compiles_once(random):
    hidden, weight, _ = inputs(random, 100, 16)
    run = jax.jit(lambda t: dlm_kernels.soft_embedding(hidden, weight, temperature=t))
    for temperature in (0.4, 0.8):
        assert error(run(temperature), expected(hidden, weight, None, temperature)) < 2e-6
    assert run._cache_size() == 1
    low = hidden.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    found = jax.jit(lambda t: dlm_kernels.soft_embedding(*low, temperature=t))(0.5)
    assert error(found, expected(*low, None, 0.5)) < 5e-3


@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("temperature", [0.6, 1e-10, 1e-30])
def test_a_temperature_that_is_compiled_in(temperature, soft_cap, random):
    """XLA multiplies by its inverse, and fuses the product with what is subtracted from it."""
    hidden, weight, _ = inputs(random, 2 * op.CHUNK + 7, 24)
    named = dict(temperature=temperature, logits_soft_cap=soft_cap, implementation="xla")

    def run(hidden, weight):
        out, back = jax.vjp(lambda *x: dlm_kernels.soft_embedding(*x, **named), hidden, weight)
        return out, back(jnp.ones_like(out))

    found, gradients = jax.jit(run)(hidden, weight)
    assert error(found, expected(hidden, weight, None, temperature, soft_cap)) < 2e-6
    assert all(jnp.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_no_probabilities_in_memory(implementation):
    """Neither of the forward nor of the gradient's program holds an array with an entry for each row and vocabulary entry."""
    rows, v, d = 96, 8 * op.CHUNK, 8
    shapes = jax.ShapeDtypeStruct((1, rows, d), jnp.float32), jax.ShapeDtypeStruct((v, d), jnp.float32)

    def total(hidden, weight):
        return dlm_kernels.soft_embedding(hidden, weight, implementation=implementation).sum()

    for function in (total, jax.grad(total, argnums=(0, 1))):
        memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
        assert memory.temp_size_in_bytes < rows * v * 4


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_gradients_are_those_of_the_naive_code(implementation, random):
    hidden, weight, _ = inputs(random, op.CHUNK + 3, 12, rows=(1, 4))
    pull = jnp.asarray(random.normal(size=hidden.shape), jnp.float32)

    def naive(hidden, weight):
        p = jax.nn.softmax(jnp.einsum("bld,vd->blv", hidden, weight) / 0.7)
        return (pull * jnp.einsum("blv,vd->bld", p, weight)).sum()

    def ours(hidden, weight):
        return (pull * dlm_kernels.soft_embedding(hidden, weight, temperature=0.7, implementation=implementation)).sum()

    for found, wanted in zip(*(jax.grad(f, argnums=(0, 1))(hidden, weight) for f in (ours, naive))):
        assert error(found, np.asarray(wanted, np.float64)) < 1e-5


@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_the_gradient_of_the_temperature(soft_cap, random):
    """By chunks, two of them."""
    hidden, weight, _ = inputs(random, op.CHUNK + 3, 12, rows=(1, 4))
    embedding = jnp.asarray(random.normal(size=(len(weight), 5)), jnp.float32)

    def naive(t):
        logits = jnp.einsum("bld,vd->blv", hidden, weight)
        logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
        return (jnp.einsum("blv,vd->bld", jax.nn.softmax(logits / t), embedding) ** 2).sum()

    def ours(t):
        return (dlm_kernels.soft_embedding(hidden, weight, embedding=embedding, temperature=t, logits_soft_cap=soft_cap) ** 2).sum()

    np.testing.assert_allclose(jax.grad(ours)(0.7), jax.grad(naive)(0.7), rtol=1e-5)


def test_bad_arguments(random):
    hidden, weight, _ = inputs(random, 9, 8)
    with pytest.raises(ValueError, match=r"weight: expected shape \[V, 6\] with V of at least 1, got \[9, 8\]"):
        dlm_kernels.soft_embedding(hidden[..., :6], weight)
    with pytest.raises(ValueError, match=r"embedding: expected shape \[9, E\], as many entries as weight, got \[8, 9\]"):
        dlm_kernels.soft_embedding(hidden, weight, embedding=weight.T)
    with pytest.raises(ValueError, match="embedding: expected hidden's dtype float32, got bfloat16"):
        dlm_kernels.soft_embedding(hidden, weight, embedding=weight.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0.0"):
        dlm_kernels.soft_embedding(hidden, weight, temperature=0.0)
    with pytest.raises(ValueError, match="weight: expected hidden's dtype float32, got bfloat16"):
        dlm_kernels.soft_embedding(hidden, weight.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="with a soft cap it takes a temperature that is a Python number"):
        dlm_kernels.soft_embedding(hidden, weight, temperature=jnp.float32(1), logits_soft_cap=3.0, implementation="cpu")
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 1e-320"):
        dlm_kernels.soft_embedding(hidden, weight, temperature=1e-320)
    with pytest.raises(ValueError, match="soft_embedding: at temperature inf it would multiply by numbers beyond float32"):
        dlm_kernels.soft_embedding(hidden, weight, temperature=np.inf, logits_soft_cap=3.0, implementation="cpu")
    np.testing.assert_allclose(  # of no implementation asked for, plain XLA's
        dlm_kernels.soft_embedding(hidden, weight, temperature=np.inf, logits_soft_cap=3.0)[0, 0], weight.mean(0), rtol=1e-4
    )
    assert dlm_kernels.soft_embedding(hidden[:, :0], weight).shape == (2, 0, 8)


def test_weights_of_16_bits_are_not_widened_as_a_whole():
    """By XLA on a CPU, in front of the loop over chunks: in float32 DiffusionGemma's embedding takes 3 GB."""
    hidden, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 8, 300), (10 * 4096, 300)))
    compiled = jax.jit(lambda *x: dlm_kernels.soft_embedding(*x, implementation="xla")).lower(hidden, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weight.size * 4 / 2
