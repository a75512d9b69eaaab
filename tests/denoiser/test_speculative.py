"""Speculative decoding decides what stepwise decoding does, token for token, and never needs more passes."""

import jax
import numpy as np
import pytest

from dlm_kernels.denoiser import sampler, speculative


@pytest.fixture(scope="module")
def board(config):
    random = np.random.default_rng(6)
    tokens = np.full((3, 21), config.mask_id, np.int32)
    for row, start in enumerate((0, 4, 2)):
        tokens[row, :start] = config.pad_id
        tokens[row, start:6] = random.integers(3, config.vocab, 6 - start)
    tokens[2, 9:13] = random.integers(3, config.vocab, 4)
    return dict(tokens=tokens, start=np.array([0, 4, 2]), first=np.array([6, 6, 6]))


@pytest.mark.parametrize("drafts", [1, 3])
def test_equals_stepwise_decoding(drafts, config, params, board):
    """Blocks of 8 leave a last one of 7; 3 steps commit 3, 3, 2, and 8 commit one by one."""
    saved = 0
    for steps in (3, 8):
        for row in range(3):
            alone = {name: array[row : row + 1] for name, array in board.items()}
            stepwise = sampler.decode(config, params, block=8, steps=steps, **alone)
            drafted = speculative.decode(config, params, block=8, steps=steps, drafts=drafts, **alone)
            np.testing.assert_array_equal(drafted.tokens, stepwise.tokens)
            assert drafted.steps[0] == stepwise.passes >= drafted.passes
            saved += int(stepwise.passes - drafted.passes)
    assert saved > 0


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_a_drafter_changes_the_passes_and_not_the_text(scale, config, params, board):
    """The model itself as its drafter guesses the next step right, always; another one guesses as well as it can."""
    drafter = {name: x * scale for name, x in params.items()}
    for row in range(3):
        alone = {name: array[row : row + 1] for name, array in board.items()}
        stepwise = sampler.decode(config, params, block=8, steps=8, **alone)
        drafted = speculative.decode(config, params, block=8, steps=8, drafts=1, drafter=drafter, **alone)
        np.testing.assert_array_equal(drafted.tokens, stepwise.tokens)
        assert drafted.steps[0] == stepwise.passes
        if scale == 1.0:
            blocks = -(-(board["tokens"][row, 8:] == config.mask_id).sum() // 8)
            assert drafted.passes <= stepwise.passes // 2 + blocks
    together = speculative.decode(config, params, block=8, steps=8, drafts=2, drafter=drafter, **board)
    for row in range(3):
        alone = {name: array[row : row + 1] for name, array in board.items()}
        decoded = speculative.decode(config, params, block=8, steps=8, drafts=2, drafter=drafter, **alone)
        np.testing.assert_array_equal(decoded.tokens[0], together.tokens[row])


def test_a_row_does_not_depend_on_its_batch(config, params, board):
    together = speculative.decode(config, params, block=8, steps=8, drafts=3, **board)
    for row in range(3):
        alone = {name: array[row : row + 1] for name, array in board.items()}
        decoded = speculative.decode(config, params, block=8, steps=8, drafts=3, **alone)
        np.testing.assert_array_equal(decoded.tokens[0], together.tokens[row])
        assert decoded.steps[0] == together.steps[row]


def test_stops_where_stepwise_decoding_stops(config, params, board):
    alone = {name: array[:1] for name, array in board.items()}
    free = np.asarray(sampler.decode(config, params, block=8, steps=8, **alone).tokens)
    for stop_at in np.unique(free[0, 6:])[:4]:
        options = dict(block=8, steps=8, stop_at=int(stop_at), **alone)
        np.testing.assert_array_equal(
            speculative.decode(config, params, drafts=3, **options).tokens,
            sampler.decode(config, params, **options).tokens,
        )


def test_a_model_that_never_changes_its_mind_needs_one_pass_for_all_drafts(config, params, board):
    """Without attention or RoPE's help a position's scores do not depend on the others: every guess is right."""
    fixed = {name: x * 0 if name.endswith(".out") else x for name, x in params.items()}
    alone = {name: array[:1] for name, array in board.items()}
    decoded = speculative.decode(config, fixed, block=15, steps=15, drafts=14, **alone)
    # The first pass knows of no guess; the second checks all that are left.
    assert decoded.passes == 2 and decoded.steps[0] == 15


def test_numbers_are_data(config, params, board):
    """New steps and prompt lengths compile nothing."""
    before = None
    for steps, first in ((3, 6), (5, 6), (3, 8)):
        speculative.decode(config, params, block=8, steps=steps, drafts=1, **(board | {"first": np.full(3, first)}))
        before = before or speculative._decode._cache_size()
        assert speculative._decode._cache_size() == before


def test_bad_arguments(config, params):
    with pytest.raises(ValueError, match="drafts: expected an int of at least 1, got 0"):
        speculative.decode(config, params, np.full((1, 4), config.mask_id), block=2, steps=1, drafts=0)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        speculative.decode(config, params, np.full((1, 4), config.mask_id), block=2, steps=0, drafts=1)
    with pytest.raises(ValueError, match="tokens: expected shape"):
        speculative.decode(config, params, jax.numpy.zeros(4, int), block=2, steps=1, drafts=1)
