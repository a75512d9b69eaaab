"""Keys and values that are kept: exact for blocks that see no further, and for all others where they are renewed."""

import numpy as np
import pytest


@pytest.mark.parametrize("block", [1, 4])
def test_the_block_causal_cache_is_exact(block, run, board):
    options = dict(block=block, steps=max(block // 2, 1), attend="blocks")
    np.testing.assert_array_equal(
        run(board, cache=True, **options).tokens, run(board, **options).tokens
    )


def test_the_block_causal_cache_survives_given_blocks(run, board):
    """Blocks that are given are skipped, and their keys were last computed with masks before them."""
    tokens = board["tokens"].copy()
    tokens[:, 11:18] = 9
    options = dict(block=3, steps=2, attend="blocks")
    plain = run(board | {"tokens": tokens}, **options)
    cached = run(board | {"tokens": tokens}, cache=True, **options)
    np.testing.assert_array_equal(cached.tokens, plain.tokens)


def test_block_causal_blocks_do_not_see_what_follows(run, board):
    other = board["tokens"].copy()
    other[:, 14:] = 9
    options = dict(block=6, steps=3, attend="blocks")
    first, second = (run(board | {"tokens": t}, **options).tokens for t in (board["tokens"], other))
    np.testing.assert_array_equal(first[:2, :14], second[:2, :14])


def test_a_dual_cache_renewed_every_pass_is_no_cache(run, board):
    plain = run(board, steps=3).tokens
    np.testing.assert_array_equal(run(board, steps=3, cache=True, refresh=1).tokens, plain)
