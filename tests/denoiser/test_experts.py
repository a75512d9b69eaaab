"""A mixture of experts: the router's choices, and what a config may say of it; see test_pretrained.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.denoiser import experts, model
from dlm_kernels.denoiser.config import DenoiserConfig
from dlm_kernels.denoiser.experts import Experts


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
