"""What decoding wrote may be replaced or masked anew, and is done in time all the same."""

import jax
import numpy as np
import pytest


def test_editing_replaces_a_token_the_model_now_rejects(run, board):
    plain = run(board, steps=6)
    edited = run(board, steps=6, edit_threshold=0.2)
    # Writing again later in the same block is what only an edit does.
    assert (edited.tokens != plain.tokens).any()
    never = run(board, steps=6, edit_threshold=1.0)
    np.testing.assert_array_equal(never.tokens, plain.tokens)


def test_remasking_takes_doubtful_tokens_back_and_ends_in_time(run, config, board):
    frames = []
    options = dict(block=15, steps=8, remask=0.4)
    decoded = run(board, row=0, on_pass=frames.append, **options)
    jax.effects_barrier()
    assert decoded.passes == 8 and (decoded.tokens != config.mask_id).all()
    taken_back = 0
    for before, after in zip(frames, frames[1:]):
        known = np.asarray(before.tokens[0]) != config.mask_id
        lost = known & (np.asarray(after.tokens[0]) == config.mask_id)
        kept = known & ~lost & (np.arange(23) >= 8)
        # Those that go are what was surest least when it was written; of what stays nothing was less sure.
        if lost.any():
            sure = np.asarray(after.confidence[0])
            assert lost.sum() == int(0.4 * (lost.sum() + kept.sum())) and sure[lost].max() <= sure[kept].min()
        taken_back += lost.sum()
    assert taken_back > 3
    none = run(board, row=0, block=15, steps=8, remask=0.0)
    np.testing.assert_array_equal(none.tokens, run(board, row=0, block=15, steps=8).tokens)


@pytest.mark.parametrize("rule", ["cap", "rescale", "confidence"])
def test_remdm_masks_at_random_and_ends_in_time(rule, run, config, board):
    """8 passes of a block of 15; how many come back follows sigma, which is 0 after the last pass."""
    frames = []
    keys = jax.random.split(jax.random.key(8), 40)
    rows = {name: np.repeat(array[:1], 40, 0) for name, array in board.items()}
    options = dict(block=15, steps=8, remask=0.3, remask_rule=rule)
    decoded = run(rows, key=keys, on_pass=frames.append, **options)
    jax.effects_barrier()
    assert decoded.passes == 8 and (decoded.tokens != config.mask_id).all()
    lost, expected = 0, 0.0
    for at, (before, after) in enumerate(zip(frames, frames[1:]), 1):
        known = (np.asarray(before.tokens) != config.mask_id)[:, 8:]
        now = known & (np.asarray(after.tokens) == config.mask_id)[:, 8:]
        most = min(1.0, (1 - (at + 1) / 8) / (at / 8))
        p = min(0.3, most) if rule == "cap" else 0.3 * most
        expected += (p * known.any(1) if rule == "confidence" else p * known.sum(1)).sum()
        lost += now.sum()
        if rule == "confidence":
            sure = np.asarray(before.confidence)[:, 8:]
            assert not now.any() or sure[now].mean() < sure[known].mean() + 0.1
    assert abs(lost - expected) < 4 * np.sqrt(expected)
    again = run(rows, key=keys, **options)
    np.testing.assert_array_equal(again.tokens, decoded.tokens)
    alone = run(rows, row=3, key=keys[3:4], **options)
    np.testing.assert_array_equal(alone.tokens[0], decoded.tokens[3])
