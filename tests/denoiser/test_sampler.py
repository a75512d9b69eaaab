"""The compiled loop against a plain Python one, and the promises about rows, pads, holes, guidance and caches.

Rows are ragged on purpose (prompts of 3 to 8 tokens, holes inside), and block 6 divides no length here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import masks
from dlm_kernels.denoiser import guided, model, sampler

RULES = {
    "steps": dict(steps=3),
    "more steps than tokens": dict(steps=40),  # compiles nothing new
    "threshold": dict(threshold=0.3),
    "factor": dict(factor=1.5),
    "entropy budget": dict(entropy_budget=4.0),
}


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, start, stop):
    """One row [L] without its padding's influence; float32 [L, V]."""
    columns = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    mask = masks.KeyIntervals(jnp.full_like(columns, start), jnp.full_like(columns, stop))
    hidden = model.hidden_states(config, params, tokens[None], positions=columns - start, mask=mask)
    return (hidden @ model.head_weight(config, params).T)[0]


def naive(config, params, tokens, *, block, start, first, stop, unconditional=None, guidance_scale=None, **rules):
    """One row, a list of ints; returns it and the passes made."""
    given = [t != config.mask_id for t in tokens]
    tokens, passes = list(tokens), 0
    block_of = [(c - first) // block for c in range(len(tokens))]
    for index in sorted(set(block_of)):
        for step in range(1000):
            todo = [
                c for c in range(start, stop) if block_of[c] == index and tokens[c] == config.mask_id and not given[c]
            ]
            if not todo:
                break
            logits = np.asarray(logits_of(config, params, np.array(tokens, np.int32), start, stop), np.float64)
            if unconditional is not None:
                other = [u if g else t for u, g, t in zip(unconditional, given, tokens)]
                other = np.asarray(logits_of(config, params, np.array(other, np.int32), start, stop), np.float64)
                logits = other + guidance_scale * (logits - other)
            logits[:, [config.mask_id, config.pad_id]] = -np.inf
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            entropy = -(p * np.log(np.where(p == 0, 1, p))).sum(-1)
            by_entropy = "entropy_budget" in rules
            order = sorted(todo, key=lambda c: (entropy[c] if by_entropy else -p[c].max(), c))
            for c in order[: quota(order, p.max(-1), entropy, step, **rules)]:
                tokens[c] = int(p[c].argmax())
            passes += 1
    return tokens, passes


def quota(order, sure, entropy, step, steps=None, threshold=None, factor=None, entropy_budget=None):
    counts = [1]
    if steps is not None:
        left = max(steps - step, 1)
        counts.append((len(order) + left - 1) // left)
    if threshold is not None:
        counts.append(sum(sure[c] > threshold for c in order))
    if factor is not None:
        n = 1
        while n < len(order) and sure[order[n]] >= 1 - factor / (n + 2):
            n += 1
        counts.append(n)
    if entropy_budget is not None:
        n = 1
        while n < len(order) and sum(entropy[c] for c in order[:n]) <= entropy_budget:
            n += 1
        counts.append(n)
    return max(counts)


@pytest.fixture(scope="module")
def board(config):
    """Three left-padded rows of 23: prompts of 8, 3 and 5 tokens, the last with text after its holes."""
    random = np.random.default_rng(5)
    tokens = np.full((3, 23), config.mask_id, np.int32)
    for row, (start, end) in enumerate([(0, 8), (5, 8), (3, 8)]):
        tokens[row, :start] = config.pad_id
        tokens[row, start:end] = random.integers(3, config.vocab, end - start)
    tokens[2, 12:17] = random.integers(3, config.vocab, 5)
    return dict(tokens=tokens, start=np.array([0, 5, 3]), first=np.array([8, 8, 8]))


def run(config, params, board, **options):
    return jax.tree.map(np.asarray, sampler.decode(config, params, **({"block": 6} | board | options)))


def row_of(board, row):
    return {name: array[row : row + 1] for name, array in board.items()}


@pytest.mark.parametrize("rule", RULES)
def test_against_the_plain_loop(rule, config, params, board):
    decoded = run(config, params, board, **RULES[rule])
    expected = [
        naive(config, params, board["tokens"][row], block=6, start=start, first=8, stop=23, **RULES[rule])
        for row, start in enumerate([0, 5, 3])
    ]
    np.testing.assert_array_equal(decoded.tokens, [tokens for tokens, _ in expected])
    # Rows go through the blocks together, so a row may wait for the slowest, never longer.
    assert max(passes for _, passes in expected) <= decoded.passes <= sum(passes for _, passes in expected)


def test_guidance_against_the_plain_loop(config, params, board):
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    rules = dict(steps=3, guidance_scale=2.5)
    decoded = run(config, params, board, unconditional=other, unconditional_start=board["start"], **rules)
    for row, start in enumerate([0, 5, 3]):
        tokens = board["tokens"][row]
        expected, _ = naive(
            config, params, tokens, block=6, start=start, first=8, stop=23, unconditional=other[row], **rules
        )
        np.testing.assert_array_equal(decoded.tokens[row], expected)


def test_guidance_scale_one_is_plain_and_zero_is_the_other_prompt(config, params, board):
    other = board["tokens"].copy()
    other[:, 5:8] = [[9, 8, 7]]
    given = dict(unconditional=other, unconditional_start=board["start"], steps=3)
    plain = run(config, params, board, steps=3)
    np.testing.assert_array_equal(run(config, params, board, guidance_scale=1.0, **given).tokens, plain.tokens)
    swapped = run(config, params, board | {"tokens": other}, steps=3).tokens
    zero = run(config, params, board, guidance_scale=0.0, **given).tokens
    holes = board["tokens"] == config.mask_id
    np.testing.assert_array_equal(zero[holes], swapped[holes])
    assert (swapped != plain.tokens)[holes].any()


def test_guidance_holds_within_its_interval_only(config, params, board):
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], guidance_scale=3.0, steps=3)
    plain, guided = run(config, params, board, steps=3).tokens, run(config, params, board, **given).tokens
    np.testing.assert_array_equal(run(config, params, board, guidance_interval=(2.0, 3.0), **given).tokens, plain)
    np.testing.assert_array_equal(run(config, params, board, guidance_interval=(0.0, 1.0), **given).tokens, guided)
    # The first pass of a block sees it all masked; here it alone is guided, or it alone is not.
    first = run(config, params, board, guidance_interval=(1.0, 1.0), **given)
    later = run(config, params, board, guidance_interval=(0.0, 0.99), **given)
    early = first.revealed == 0
    np.testing.assert_array_equal(first.tokens[early], run(config, params, board, **given).tokens[early])
    assert (later.tokens[later.revealed == 0] == plain[later.revealed == 0]).all()
    assert (plain != guided).any()


def test_guidance_goes_from_one_scale_to_another_as_the_block_fills(config, params, board):
    """The pass over a block all masked has the first scale; the scale of a later one is between, by the share masked."""
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], steps=3)
    plain = run(config, params, board, steps=3)
    constant = run(config, params, board, guidance_scale=3.0, guidance_final=3.0, **given)
    np.testing.assert_array_equal(constant.tokens, run(config, params, board, guidance_scale=3.0, **given).tokens)
    falling = run(config, params, board, guidance_scale=3.0, guidance_final=-9.0, **given)
    first = falling.revealed == 0
    np.testing.assert_array_equal(falling.tokens[first], constant.tokens[first])
    assert (falling.tokens != constant.tokens).any() and (falling.tokens != plain.tokens).any()
    todo, inside = jnp.asarray([[True, False, False, True]]), jnp.asarray([[True, True, False, True]])
    data = dict(guidance_scale=3.0, guidance_final=0.0, guidance_interval=None)
    np.testing.assert_allclose(guided.scale(data, todo, inside, jnp.zeros(1, jnp.int32)), [[2.0] * 4], rtol=1e-6)


def test_guidance_by_the_token(config, params, board):
    """Scale 1 in a column is no guidance there: with it everywhere but in one block, the others read that block alone."""
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], steps=3)
    plain = run(config, params, board, steps=3)
    everywhere = run(config, params, board, guidance_scale=np.full((3, 23), 3.0), **given)
    np.testing.assert_array_equal(everywhere.tokens, run(config, params, board, guidance_scale=3.0, **given).tokens)
    late = np.where(np.arange(23) < 14, 1.0, 3.0) * np.ones((3, 1))
    late = run(config, params, board, guidance_scale=late, **given)
    np.testing.assert_array_equal(late.tokens[:, :14], plain.tokens[:, :14])
    assert (late.tokens[:, 14:] != plain.tokens[:, 14:]).any()


@pytest.mark.parametrize("options", [dict(), dict(attend="blocks", cache=True), dict(cache=True, refresh=1)])
def test_the_unconditional_stream_every_so_many_passes(options, config, params, board):
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], guidance_scale=3.0, steps=3) | options
    together = run(config, params, board, **given)
    np.testing.assert_array_equal(run(config, params, board, guidance_refresh=1, **given).tokens, together.tokens)
    # Once a block: its first pass is as before, later ones mix with what that one said.
    once = run(config, params, board, guidance_refresh=100, **given)
    first = together.revealed == 0
    np.testing.assert_array_equal(once.tokens[first], together.tokens[first])
    assert (once.tokens != together.tokens).any()


@pytest.mark.parametrize("guidance", [False, True])
def test_logit_bias(guidance, config, params, board):
    """A bias that is the same for every token changes nothing; one token's makes it come everywhere or nowhere."""
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], guidance_scale=2.0) if guidance else {}
    plain = run(config, params, board, steps=3, **given)
    even = run(config, params, board, steps=3, logit_bias=np.full(config.vocab, 2.0), **given)
    np.testing.assert_array_equal(even.tokens, plain.tokens)
    holes = board["tokens"] == config.mask_id
    bias = np.zeros(config.vocab)
    bias[7] = 1e4
    assert (run(config, params, board, steps=3, logit_bias=bias, **given).tokens[holes] == 7).all()
    common = np.bincount(plain.tokens[holes]).argmax()
    bias = np.zeros(config.vocab)
    bias[common] = -1e4
    assert not (run(config, params, board, steps=3, logit_bias=bias, **given).tokens[holes] == common).any()


def test_adaptive_guidance_masks_the_least_confident_anew(config):
    tokens = jnp.asarray([[9, 5, config.mask_id, 6, 7, 8], [9, config.mask_id, config.mask_id, 3, 4, 5]])
    confidence = jnp.asarray([[0.0, 0.9, 0.0, 0.2, np.nan, 0.2], [0.0, 0.0, 0.0, 0.5, 0.5, 0.6]])
    hole = jnp.asarray([[False, True, True, True, True, True]] * 2)
    decoded = sampler.Decoded(tokens, None, confidence, None)
    m = config.mask_id
    masked = guided.without_doubtful(config, 0.5, decoded, hole)  # 2 of 4; 1 of 3
    np.testing.assert_array_equal(masked, [[9, 5, m, m, m, 8], [9, m, m, m, 4, 5]])
    everything = guided.without_doubtful(config, 1.0, decoded, hole)
    np.testing.assert_array_equal(everything, np.where(hole, m, tokens))


def test_adaptive_guidance_changes_what_is_decoded(config, params, board):
    plain = run(config, params, board, steps=6)
    guided = run(config, params, board, steps=6, guidance_scale=3.0, guidance_remask=0.4)
    assert (guided.tokens != plain.tokens).any()
    one = run(config, params, board, steps=6, guidance_scale=1.0, guidance_remask=0.4)
    np.testing.assert_array_equal(one.tokens, plain.tokens)


@pytest.mark.parametrize(
    "options",
    [
        dict(threshold=0.3, edit_threshold=0.3),
        dict(steps=6, block=7, remask=0.5, attend="blocks", cache=True),
    ],
)
def test_a_row_does_not_depend_on_its_batch(options, config, params, board):
    keys = jax.random.split(jax.random.key(2), 3)
    together = run(config, params, board, temperature=0.8, key=keys, **options)
    for row in range(3):
        alone = run(config, params, row_of(board, row), temperature=0.8, key=keys[row : row + 1], **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_sampling_follows_the_key(config, params, board):
    keys = jax.random.split(jax.random.key(2), 3)
    first, again = (run(config, params, board, steps=3, temperature=1.0, key=keys).tokens for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = run(config, params, board, steps=3, temperature=1.0, key=jax.random.split(jax.random.key(3), 3)).tokens
    assert (first != other).sum() > 10


def test_left_padding_changes_nothing(config, params, board):
    keys = jax.random.split(jax.random.key(2), 3)
    plain = run(config, params, board, steps=3, temperature=0.8, key=keys).tokens
    # What a pad holds is no content either: here it is a word.
    wide = np.concatenate([np.full((3, 9), 17, np.int32), board["tokens"]], axis=1)
    moved = dict(tokens=wide, start=board["start"] + 9, first=board["first"] + 9)
    np.testing.assert_array_equal(run(config, params, moved, steps=3, temperature=0.8, key=keys).tokens[:, 9:], plain)


def test_columns_from_stop_on_are_nobodys(config, params, board):
    plain = run(config, params, board, steps=3).tokens
    wide = np.concatenate([board["tokens"], np.full((3, 4), config.mask_id, np.int32)], axis=1)
    decoded = run(config, params, board | {"tokens": wide}, stop=23, steps=3).tokens
    np.testing.assert_array_equal(decoded[:, :23], plain)
    assert (decoded[:, 23:] == config.mask_id).all()


@pytest.mark.parametrize("attend, cache", [("all", True), ("blocks", True)])
def test_what_is_given_stays_and_every_hole_is_filled(attend, cache, config, params, board):
    decoded = run(config, params, board, steps=2, attend=attend, cache=cache, banned_tokens=np.arange(10, 30))
    holes = board["tokens"] == config.mask_id
    np.testing.assert_array_equal(decoded.tokens[~holes], board["tokens"][~holes])
    chosen = decoded.tokens[holes]
    assert not np.isin(chosen, [config.mask_id, config.pad_id, *range(10, 30)]).any()
    np.testing.assert_array_equal(decoded.revealed[~holes], -1)
    assert ((0 <= decoded.revealed[holes]) & (decoded.revealed[holes] < decoded.passes)).all()
    assert ((0 < decoded.confidence[holes]) & (decoded.confidence[holes] <= 1)).all()


def test_a_row_stops_at_its_stop_token(config, params, board):
    """Every token is taken as the stop token once; what stands before it must be what decoding without a stop gives."""
    free = run(config, params, board, block=15, steps=15).tokens
    stopped = 0
    for stop_at in np.unique(free[0, 8:]):
        decoded = run(config, params, board, block=15, steps=15, stop_at=int(stop_at)).tokens[0]
        assert (decoded != config.mask_id).all()
        (ends,) = np.nonzero(decoded[8:] == stop_at)
        np.testing.assert_array_equal(decoded[8 + ends[0] + 1 :], config.pad_id)
        assert (decoded[8 : 8 + ends[0]] != config.pad_id).all()
        stopped += ends[0] < 14
    assert stopped > 0


def test_a_stop_ends_the_work(config, params, board):
    free = run(config, params, row_of(board, 0), block=3, steps=3)
    stop_at = int(free.tokens[0, 8])
    stopped = run(config, params, row_of(board, 0), block=3, steps=3, stop_at=stop_at)
    assert stopped.passes <= 3 < free.passes
    np.testing.assert_array_equal(stopped.tokens[0, 9:], config.pad_id)


@pytest.mark.parametrize("block", [1, 4])
def test_the_block_causal_cache_is_exact(block, config, params, board):
    options = dict(block=block, steps=max(block // 2, 1), attend="blocks")
    np.testing.assert_array_equal(
        run(config, params, board, cache=True, **options).tokens, run(config, params, board, **options).tokens
    )


def test_the_block_causal_cache_survives_given_blocks(config, params, board):
    """Blocks that are given are skipped, and their keys were last computed with masks before them."""
    tokens = board["tokens"].copy()
    tokens[:, 11:18] = 9
    options = dict(block=3, steps=2, attend="blocks")
    plain = run(config, params, board | {"tokens": tokens}, **options)
    cached = run(config, params, board | {"tokens": tokens}, cache=True, **options)
    np.testing.assert_array_equal(cached.tokens, plain.tokens)


def test_block_causal_blocks_do_not_see_what_follows(config, params, board):
    other = board["tokens"].copy()
    other[:, 14:] = 9
    options = dict(block=6, steps=3, attend="blocks")
    first, second = (run(config, params, board | {"tokens": t}, **options).tokens for t in (board["tokens"], other))
    np.testing.assert_array_equal(first[:2, :14], second[:2, :14])


def test_a_dual_cache_renewed_every_pass_is_no_cache(config, params, board):
    plain = run(config, params, board, steps=3).tokens
    np.testing.assert_array_equal(run(config, params, board, steps=3, cache=True, refresh=1).tokens, plain)


def test_guidance_with_a_cache(config, params, board):
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    options = dict(
        unconditional=other, unconditional_start=board["start"], guidance_scale=2.0, steps=2, attend="blocks"
    )
    np.testing.assert_array_equal(
        run(config, params, board, cache=True, **options).tokens, run(config, params, board, **options).tokens
    )


def test_numbers_are_data(config, params, board):
    """New steps, thresholds, temperatures, scales, schedules, intervals of renewal and prompt lengths compile nothing."""
    keys = jax.random.split(jax.random.key(2), 3)
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)

    def once(start, first, **numbers):
        place = board | dict(start=np.array(start), first=np.array(first), unconditional_start=np.array(start))
        run(config, params, place, unconditional=other, key=keys, cache=True, **numbers)

    numbers = dict(
        steps=3, threshold=0.9, factor=0.5, edit_threshold=0.9, remask=0.1, temperature=0.5, refresh=2,
        guidance_scale=2.0, guidance_final=1.0, guidance_interval=(0.0, 0.5), guidance_refresh=3,
    )  # fmt: skip
    once([0, 5, 3], [8, 8, 8], **numbers)
    before = sampler._decode._cache_size()
    for name, number in numbers.items():
        once([0, 5, 3], [8, 8, 8], **(numbers | {name: (0.25, 0.75) if name == "guidance_interval" else number * 2}))
    once([2, 4, 1], [7, 8, 6], **numbers)
    assert sampler._decode._cache_size() == before
    budgets = [dict(entropy_budget=0.5), dict(entropy_budget=2.0)]
    sizes = [run(config, params, board, **budget) and sampler._decode._cache_size() for budget in budgets]
    assert sizes[0] == sizes[1]


def test_every_pass_is_reported(config, params, board):
    frames = []
    decoded = run(config, params, board, steps=3, on_pass=frames.append)
    jax.effects_barrier()
    assert [int(frame.passes) for frame in frames] == list(range(1, int(decoded.passes) + 1))
    masked = [int((np.asarray(frame.tokens) == config.mask_id).sum()) for frame in frames]
    assert masked == sorted(masked, reverse=True) and masked[-1] == 0
    np.testing.assert_array_equal(frames[-1].tokens, decoded.tokens)


def test_editing_replaces_a_token_the_model_now_rejects(config, params, board):
    plain = run(config, params, board, steps=6)
    edited = run(config, params, board, steps=6, edit_threshold=0.2)
    # Writing again later in the same block is what only an edit does.
    assert (edited.tokens != plain.tokens).any()
    never = run(config, params, board, steps=6, edit_threshold=1.0)
    np.testing.assert_array_equal(never.tokens, plain.tokens)


def test_remasking_takes_doubtful_tokens_back_and_ends_in_time(config, params, board):
    frames = []
    options = dict(block=15, steps=8, remask=0.4)
    decoded = run(config, params, row_of(board, 0), on_pass=frames.append, **options)
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
    none = run(config, params, row_of(board, 0), block=15, steps=8, remask=0.0)
    np.testing.assert_array_equal(none.tokens, run(config, params, row_of(board, 0), block=15, steps=8).tokens)


@pytest.mark.parametrize("rule", ["cap", "rescale", "confidence"])
def test_remdm_masks_at_random_and_ends_in_time(rule, config, params, board):
    """8 passes of a block of 15; how many come back follows sigma, which is 0 after the last pass."""
    frames = []
    keys = jax.random.split(jax.random.key(8), 40)
    rows = {name: np.repeat(array[:1], 40, 0) for name, array in board.items()}
    options = dict(block=15, steps=8, remask=0.3, remask_rule=rule)
    decoded = run(config, params, rows, key=keys, on_pass=frames.append, **options)
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
    again = run(config, params, rows, key=keys, **options)
    np.testing.assert_array_equal(again.tokens, decoded.tokens)
    alone = run(config, params, row_of(rows, 3), key=keys[3:4], **options)
    np.testing.assert_array_equal(alone.tokens[0], decoded.tokens[3])


def test_nothing_to_do(config, params):
    given = np.full((2, 5), 9, np.int32)
    decoded = run(config, params, dict(tokens=given), steps=1)
    np.testing.assert_array_equal(decoded.tokens, given)
    assert decoded.passes == 0
    assert run(config, params, dict(tokens=np.zeros((0, 5), np.int32)), steps=1).tokens.size == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "expected at least one, got none"),
        (dict(steps=0), "steps: expected at least 1, got 0"),
        (dict(steps=2, block=0), "block: expected an int of at least 1, got 0"),
        (dict(threshold=0.5, remask=0.5), "remask: expected steps with it"),
        (dict(steps=2, remask=0.5, remask_rule="most"), "remask_rule: expected one of"),
        (dict(steps=2, remask=0.5, remask_rule="cap"), "a key with a random remask_rule"),
        (dict(steps=2, attend="left"), "attend: expected 'all' or 'blocks', got 'left'"),
        (dict(steps=2, guidance_scale=2.0), "guidance_scale: expected one with `unconditional`"),
        (dict(steps=2, guidance_interval=(0, 1)), "guidance_interval: expected a guidance_scale"),
        (dict(steps=2, guidance_refresh=2), "guidance_refresh: expected a guidance_scale"),
        (dict(steps=2, guidance_final=2.0), "guidance_final: expected a guidance_scale"),
        (dict(steps=2, guidance_remask=0.5, guidance_scale=np.ones(5)), r"guidance_scale: expected a scalar, \[3\] or"),
        (dict(steps=2, logit_bias=np.ones(5)), r"logit_bias: expected shape \[53\], got \[5\]"),
        (dict(steps=2, temperature=1.0), "temperature, key: expected both or neither"),
        (dict(steps=2, temperature=1.0, key=jax.random.key(0)), "key: expected a key for each of 3 rows"),
        (dict(steps=2, tokens=np.zeros(5, np.int32)), r"tokens: expected shape \[B, L\]"),
        (dict(steps=2, unconditional=np.zeros((3, 5)), guidance_scale=1.0), "unconditional: expected tokens' shape"),
    ],
)
def test_bad_arguments(options, message, config, params, board):
    with pytest.raises(ValueError, match=message):
        run(config, params, board, **options)
