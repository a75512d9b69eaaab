"""A mixture of experts: both ways of computing it against a loop over tokens, and the router's choices; see test_pretrained.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.denoiser import experts, model
from dlm_kernels.denoiser.config import DenoiserConfig
from dlm_kernels.denoiser.experts import Experts

D, FFN = 8, 12
COMPUTED = {"tiles": jax.jit(experts.mix_by_tiles), "all": jax.jit(experts.mix_by_all)}


def operands(random, tokens, count, chosen):
    gate, up = (random.normal(size=(count, D, FFN)).astype(np.float32) for _ in range(2))
    down = random.normal(size=(count, FFN, D)).astype(np.float32)
    expert = np.array([random.permutation(count)[:chosen] for _ in range(tokens)], np.int32)
    weight = random.uniform(0.1, 1, (tokens, chosen)).astype(np.float32)
    return random.normal(size=(tokens, D)).astype(np.float32), gate, up, down, expert, weight


def naive(x, gate, up, down, expert, weight):
    x, gate, up, down = (a.astype(np.float64) for a in (x, gate, up, down))
    out = np.zeros_like(x)
    for n, j in np.ndindex(expert.shape):
        e = expert[n, j]
        g = x[n] @ gate[e]
        out[n] += weight[n, j] * ((g / (1 + np.exp(-g)) * (x[n] @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.parametrize("tokens, count, chosen", [(1, 5, 2), (7, 16, 1), (33, 4, 3), (700, 2, 2)])
def test_against_a_loop(computed, tokens, count, chosen, random):
    """Lists of no token, of a part of a tile and of more than one; 700 pairs of 2 experts are tiles of 256."""
    given = operands(random, tokens, count, chosen)
    if tokens == 33:
        given[4][:, 0], given[4][:, 1:] = 2, [[0, 3]]  # nobody chooses expert 1
    expected = naive(*given)
    out = COMPUTED[computed](*given)
    assert np.linalg.norm(out - expected) < 1e-6 * np.linalg.norm(expected)


def test_what_an_expert_makes_of_others_tokens_does_not_count(random):
    """An expert that would overflow on the tokens that are not its own."""
    x, gate, up, down, expert, weight = operands(random, 6, 2, 1)
    x[1:] *= 1e30
    expert[:] = 1
    expert[0], gate[1], up[0] = 0, 0, 1e30
    out = COMPUTED["tiles"](x, gate, up, down, expert, weight)
    assert np.isfinite(out).all() and np.abs(out[0]).max() > 0


def test_gradients(random):
    """Of the tiles, whose loop has no end that is known before, they are those of all experts together."""
    *arrays, expert, weight = operands(random, 9, 4, 2)

    def gradient(computed):
        return jax.grad(lambda *given: (computed(*given[:4], expert, given[4]) ** 2).sum(), (0, 1, 2, 3, 4))(*arrays, weight)

    tiles = gradient(COMPUTED["tiles"])
    for ours, expected in zip(tiles, gradient(COMPUTED["all"])):
        assert np.linalg.norm(ours - expected) < 1e-5 * np.linalg.norm(expected)
    direction = [random.normal(size=a.shape) for a in (*arrays, weight)]
    ours = sum(float((np.asarray(a, np.float64) * b).sum()) for a, b in zip(tiles, direction))

    def moved(by):
        *given, share = (a + by * b for a, b in zip((*arrays, weight), direction))
        return (naive(*given, expert, share) ** 2).sum()

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert abs(ours - slope) < 1e-4 * abs(slope)


def test_half_precision_sums_in_float32(random):
    given = operands(random, 20, 8, 4)
    half = [jnp.asarray(a, jnp.bfloat16) for a in given[:4]]
    expected = naive(*(np.asarray(a, np.float32) for a in half), *given[4:])
    for computed in COMPUTED.values():
        out = computed(*half, *given[4:])
        assert out.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(out, np.float64) - expected) < 8e-3 * np.linalg.norm(expected)


def test_half_precision_is_not_widened_in_memory():
    """A 16-bit layer's weights as float32 would be twice their bytes; the loop holds those of one expert at a time."""
    shapes = [(32, 64), (16, 64, 128), (16, 64, 128), (16, 128, 64)]
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    given += [jax.ShapeDtypeStruct((32, 4), dtype) for dtype in (jnp.int32, jnp.float32)]
    held = COMPUTED["tiles"].lower(*given).compile().memory_analysis().temp_size_in_bytes
    assert held < sum(x.size for x in given[1:4]) / 2


def test_the_bias_chooses_and_does_not_weigh():
    shape = Experts(count=4, chosen=2, ffn=1, router="sigmoid", scale=2.0)
    logits = jnp.array([[3.0, 2.0, 1.0, -1.0]])
    expert, weight = experts.choose(shape, logits, jnp.array([0.0, 0.0, 0.0, 5.0]))
    np.testing.assert_array_equal(expert, [[3, 0]])
    scores = 1 / (1 + np.exp(-np.array([-1.0, 3.0])))
    np.testing.assert_allclose(weight, [scores / scores.sum() * 2], rtol=1e-6)


def test_groups_are_as_good_as_their_two_best():
    """The single best expert, 0, is in the group that is left out."""
    shape = Experts(count=6, chosen=2, ffn=1, router="sigmoid", groups=3, kept=2)
    expert, _ = experts.choose(shape, jnp.array([[4.0, -9.0, 2.0, 2.1, 3.0, 1.0]]))
    np.testing.assert_array_equal(expert, [[4, 3]])


def test_training_starts_from_and_writes_such_a_shape():
    config = DenoiserConfig(layers=3, experts=Experts(count=4, chosen=2, ffn=6, shared_ffn=5, dense_layers=1), rotary_size=32)
    assert DenoiserConfig.from_dict(config.to_dict()) == config
    shapes = model.parameter_shapes(config)
    assert "layers.0.gate" in shapes and "layers.0.router" not in shapes
    assert shapes["layers.1.expert_down"] == (4, 6, 256) and shapes["layers.2.shared_up"] == (256, 5)
    params = model.init(config, jax.random.key(0))
    assert abs(float(params["layers.1.expert_gate"].std()) * 16 - 1) < 0.05


@pytest.mark.parametrize(
    "wrong, expected",
    [
        (dict(router="tanh"), "experts.router: expected one of ('softmax', 'sigmoid'), got 'tanh'"),
        (dict(chosen=5), "experts.chosen: expected no more than the groups that are kept hold, got 5"),
        (dict(groups=4), "experts.groups, experts.kept: expected equal groups of at least 2 of 4 experts"),
        (dict(groups=3), "experts.groups, experts.kept: expected equal groups of at least 2 of 4 experts"),
        (dict(groups=2, kept=3), "some of them kept, got 2, 3"),
        (dict(count=0), "experts.count: expected an int of at least 1, got 0"),
    ],
)
def test_what_cannot_be(wrong, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        Experts(**dict(count=4, chosen=2, ffn=6) | wrong)
    with pytest.raises(ValueError, match="config: experts: expected the fields .* got also \\['width'\\]"):
        DenoiserConfig.from_dict(dict(experts=dict(width=3)))
    with pytest.raises(ValueError, match="rotary_size: expected an even number up to head_size 64, got 66"):
        DenoiserConfig(rotary_size=66)
