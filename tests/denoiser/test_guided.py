"""Guidance while decoding: what each scale, schedule and stream must give, from those that are no guidance on."""

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.denoiser import blocks, checkpoint, generate, guided


def test_guidance_scale_one_is_plain_and_zero_is_the_other_prompt(run, config, board):
    other = board["tokens"].copy()
    other[:, 5:8] = [[9, 8, 7]]
    given = dict(unconditional=other, unconditional_start=board["start"], steps=3)
    plain = run(board, steps=3)
    np.testing.assert_array_equal(run(board, guidance_scale=1.0, **given).tokens, plain.tokens)
    swapped = run(board | {"tokens": other}, steps=3).tokens
    zero = run(board, guidance_scale=0.0, **given).tokens
    holes = board["tokens"] == config.mask_id
    np.testing.assert_array_equal(zero[holes], swapped[holes])
    assert (swapped != plain.tokens)[holes].any()


def test_guidance_holds_within_its_interval_only(run, config, board):
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], guidance_scale=3.0, steps=3)
    plain, guided = run(board, steps=3).tokens, run(board, **given).tokens
    np.testing.assert_array_equal(run(board, guidance_interval=(2.0, 3.0), **given).tokens, plain)
    np.testing.assert_array_equal(run(board, guidance_interval=(0.0, 1.0), **given).tokens, guided)
    # The first pass of a block sees it all masked; here it alone is guided, or it alone is not.
    first = run(board, guidance_interval=(1.0, 1.0), **given)
    later = run(board, guidance_interval=(0.0, 0.99), **given)
    early = first.revealed == 0
    np.testing.assert_array_equal(first.tokens[early], run(board, **given).tokens[early])
    assert (later.tokens[later.revealed == 0] == plain[later.revealed == 0]).all()
    assert (plain != guided).any()


def test_guidance_goes_from_one_scale_to_another_as_the_block_fills(run, config, board):
    """The pass over a block all masked has the first scale; the scale of a later one is between, by the share masked."""
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], steps=3)
    plain = run(board, steps=3)
    constant = run(board, guidance_scale=3.0, guidance_final=3.0, **given)
    np.testing.assert_array_equal(constant.tokens, run(board, guidance_scale=3.0, **given).tokens)
    falling = run(board, guidance_scale=3.0, guidance_final=-9.0, **given)
    first = falling.revealed == 0
    np.testing.assert_array_equal(falling.tokens[first], constant.tokens[first])
    assert (falling.tokens != constant.tokens).any() and (falling.tokens != plain.tokens).any()
    todo, inside = jnp.asarray([[True, False, False, True]]), jnp.asarray([[True, True, False, True]])
    data = dict(guidance_scale=jnp.float32(3), guidance_final=jnp.float32(0), guidance_interval=None)
    np.testing.assert_allclose(guided.scale(data, todo, inside, jnp.zeros(1, jnp.int32)), [[2.0] * 4], rtol=1e-6)


def test_guidance_by_the_token(run, config, board):
    """Scale 1 in a column is no guidance there: with it everywhere but in one block, the others read that block alone."""
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], steps=3)
    plain = run(board, steps=3)
    everywhere = run(board, guidance_scale=np.full((3, 23), 3.0), **given)
    np.testing.assert_array_equal(everywhere.tokens, run(board, guidance_scale=3.0, **given).tokens)
    late = np.where(np.arange(23) < 14, 1.0, 3.0) * np.ones((3, 1))
    late = run(board, guidance_scale=late, **given)
    np.testing.assert_array_equal(late.tokens[:, :14], plain.tokens[:, :14])
    assert (late.tokens[:, 14:] != plain.tokens[:, 14:]).any()


@pytest.mark.parametrize("options", [dict(), dict(attend="blocks", cache=True), dict(cache=True, refresh=1)])
def test_the_unconditional_stream_every_so_many_passes(options, run, config, board):
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], guidance_scale=3.0, steps=3) | options
    together = run(board, **given)
    np.testing.assert_array_equal(run(board, guidance_refresh=1, **given).tokens, together.tokens)
    # Once a block: its first pass is as before, later ones mix with what that one said.
    once = run(board, guidance_refresh=100, **given)
    first = together.revealed == 0
    np.testing.assert_array_equal(once.tokens[first], together.tokens[first])
    assert (once.tokens != together.tokens).any()


def test_a_renewal_waits_for_the_unconditional_stream(run, config, board):
    """It is due in passes 2 and 4, and the stream computed in 0 and 3: there anew, which with scale 0 is all that counts."""
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], guidance_scale=0.0, guidance_refresh=3, steps=6)
    waited, always, never = (run(board, cache=True, refresh=every, **given).tokens for every in (2, 1, 100))
    np.testing.assert_array_equal(waited, always)
    assert (never != always).any()


def test_adaptive_guidance_masks_the_least_confident_anew(config):
    tokens = jnp.asarray([[9, 5, config.mask_id, 6, 7, 8], [9, config.mask_id, config.mask_id, 3, 4, 5]])
    confidence = jnp.asarray([[0.0, 0.9, 0.0, 0.2, np.nan, 0.2], [0.0, 0.0, 0.0, 0.5, 0.5, 0.6]])
    hole = jnp.asarray([[False, True, True, True, True, True]] * 2)
    decoded = blocks.Decoded(tokens, None, confidence, None)
    m = config.mask_id
    masked = guided.without_doubtful(config, 0.5, decoded, hole)  # 2 of 4; 1 of 3
    np.testing.assert_array_equal(masked, [[9, 5, m, m, m, 8], [9, m, m, m, 4, 5]])
    one = guided.without_doubtful(config, 0.1, decoded, hole)  # of either row one at least
    np.testing.assert_array_equal(one, [[9, 5, m, 6, m, 8], [9, m, m, m, 4, 5]])
    everything = guided.without_doubtful(config, 1.0, decoded, hole)
    np.testing.assert_array_equal(everything, np.where(hole, m, tokens))


def test_adaptive_guidance_changes_what_is_decoded(run, board):
    plain = run(board, steps=6)
    guided = run(board, steps=6, guidance_scale=3.0, guidance_remask=0.4)
    assert (guided.tokens != plain.tokens).any()
    one = run(board, steps=6, guidance_scale=1.0, guidance_remask=0.4)
    np.testing.assert_array_equal(one.tokens, plain.tokens)


def test_guidance_with_a_cache(run, config, board):
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    options = dict(
        unconditional=other, unconditional_start=board["start"], guidance_scale=2.0, steps=2, attend="blocks"
    )
    np.testing.assert_array_equal(
        run(board, cache=True, **options).tokens, run(board, **options).tokens
    )


def test_a_hole_has_a_scale_of_its_own(saved):
    """That of its mark; a scale of 1 is none, one that all holes share is that of the whole."""
    model = checkpoint.load(saved, dtype=jnp.float32)
    board = generate.canvas(*model[::2], ["a<mask:2@3.5>b<mask:1>", "<mask:1@-2>"], 4)
    np.testing.assert_array_equal(board.guidance[:, -3:], [[3.5, np.nan, np.nan], [np.nan, np.nan, -2]])
    assert (board.tokens[0, -4:-2] == model[0].mask_id).all() and board.guidance[0, -4] == 3.5

    def written(marks, **options):
        return generate.generate(model, ["def add(" + marks], block=12, steps=3, **options).decoded.tokens[0, -12:]

    plain, guided = written("<mask:12>"), written("<mask:12>", guidance=3.0)
    np.testing.assert_array_equal(written("<mask:12@3>"), guided)
    np.testing.assert_array_equal(written("<mask:12@1>", guidance=3.0), plain)
    np.testing.assert_array_equal(written("<mask:6@1><mask:6@3>"), written("<mask:6@1><mask:6>", guidance=3.0))
    assert not any(np.array_equal(written("<mask:6@1><mask:6@3>"), other) for other in (plain, guided))


def test_a_scale_may_begin_at_one(saved):
    """It nears its final value as a block fills, wherever it begins."""
    model = checkpoint.load(saved, dtype=jnp.float32)
    made = {
        final: generate.generate(model, ["def add("], length=12, block=12, steps=6, exact=True, guidance_final=final)
        for final in (None, 1.0, 9.0)
    }
    assert made[1.0].texts == made[None].texts != made[9.0].texts
