"""Deletions and insertions within a block, against a loop over lists; experts that the tokens of a block choose together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.denoiser import data, experts, generate, indel, sampler
from dlm_kernels.denoiser.config import DenoiserConfig

CONFIG = DenoiserConfig(vocab=12, delete_id=3, insert_id=4)


@pytest.mark.parametrize("seed", range(4))
def test_moves_are_those_of_a_list(seed):
    """Places in any part of the window; all deleted in one row, all inserting in another, one that has no place."""
    random = np.random.default_rng(seed)
    tokens, before = random.integers(2, 8, (6, 9)), random.integers(5, 12, (6, 9))
    inside, marks = random.random((6, 9)) < 0.7, random.random((6, 9)) < 0.5
    tokens[0], tokens[1], inside[2] = CONFIG.delete_id, CONFIG.insert_id, False
    got, got_marks, got_when = indel.apply(
        CONFIG, *map(jnp.asarray, (tokens, before, inside)), (jnp.asarray(marks), False), (jnp.asarray(before), -1)
    )
    for row in range(6):
        made = []
        for i in np.flatnonzero(inside[row]):
            kept = marks[row, i], before[row, i]
            if tokens[row, i] == CONFIG.insert_id:
                made += [(CONFIG.mask_id, False, -1), (before[row, i], *kept)]
            elif tokens[row, i] != CONFIG.delete_id:
                made += [(tokens[row, i], *kept)]
        made = (made + [(CONFIG.mask_id, False, -1)] * 9)[: inside[row].sum()]
        for array, given, part in ((got, tokens, 0), (got_marks, marks, 1), (got_when, before, 2)):
            np.testing.assert_array_equal(array[row][inside[row]], [x[part] for x in made])
            np.testing.assert_array_equal(array[row][~inside[row]], given[row][~inside[row]])


def test_a_block_has_so_many_experts():
    """Of blocks of 1, 4 and 3 tokens, not one behind the other."""
    shape = experts.Experts(count=9, chosen=2, ffn=4, router="sigmoid", capacity=3)
    logits, bias = jax.random.normal(jax.random.key(0), (8, 9)) * 2, jax.random.normal(jax.random.key(1), (9,))
    block = np.array([5, 0, 0, 3, 0, 3, 0, 3])
    expert, weight = experts.choose(shape, logits, bias, jnp.asarray(block))
    score = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    for i in range(8):
        wanted = (score + bias)[block == block[i]].max(0)
        admitted = np.argsort(-wanted)[:3]
        best = admitted[np.argsort(-(score + bias)[i, admitted])[:2]]
        assert expert[i].tolist() == best.tolist()
        np.testing.assert_allclose(weight[i], score[i, best] / score[i, best].sum(), rtol=1e-6)
    free, _ = experts.choose(dataclasses.replace(shape, capacity=9), logits, bias, jnp.asarray(block))
    np.testing.assert_array_equal(free, experts.choose(dataclasses.replace(shape, capacity=None), logits, bias)[0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="delete_id, insert_id: expected both or neither, got 3, None"):
        DenoiserConfig(delete_id=3)
    with pytest.raises(ValueError, match=r"insert_id: expected token ids in \[0, 12\), got 12"):
        DenoiserConfig(vocab=12, delete_id=3, insert_id=12)
    shape = dict(count=8, chosen=2, ffn=4, capacity=4)
    with pytest.raises(ValueError, match="experts.capacity: expected from the 2 of a token to all 8, and no groups, got 4 and 2"):
        experts.Experts(**shape, groups=2)
    with pytest.raises(ValueError, match="experts.capacity: expected a block_size, whose tokens choose experts together, got None"):
        DenoiserConfig(experts=experts.Experts(**shape))
    config = DenoiserConfig(vocab=12, block_size=4, experts=experts.Experts(**shape))
    with pytest.raises(ValueError, match="start, stop: expected whole blocks of 4 between them, .* got 1 and 8"):
        sampler.decode(config, {}, np.full((1, 8), 2), block=4, steps=1, start=1)
    tokenizer = data.train_tokenizer(["ab"], 0)
    with pytest.raises(ValueError, match="prompts: expected text and holes of whole blocks of 4 tokens, .* got 5 tokens"):
        generate.canvas(config, tokenizer, ["ab<mask:6>", "ab<mask:3>"], 1)
