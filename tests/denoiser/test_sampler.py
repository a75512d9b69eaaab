"""The compiled loop against a plain Python one, and the promises about rows, pads, holes, guidance and caches.

Rows are ragged on purpose (prompts of 3 to 8 tokens, holes inside), and block 6 divides no length here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import masks
from dlm_kernels.denoiser import checkpoint, generate, model, sampler

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


def naive(
    config, params, tokens, *, block, start, first, stop, unconditional=None, guidance_scale=None, top_p=None, top_k=None,
    temperature=0.0, key=None, **rules,
):  # fmt: skip
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
            p = softmax(logits / (temperature or 1))
            for row, likely in zip(logits, p):
                least = max(nucleus(likely, top_p), 0 if top_k is None else np.sort(likely)[-top_k])
                row[likely < least] = -np.inf
            p, choice = softmax(logits), logits
            if temperature:
                at = min(first + index * block, len(tokens) - block)
                choice = logits / temperature
                choice[at : at + block] += draw(key, index, step, (block, config.vocab))
            entropy = -(p * np.log(np.where(p == 0, 1, p))).sum(-1)
            by_entropy = "entropy_budget" in rules
            token = choice.argmax(-1)
            sure = np.take_along_axis(p, token[:, None], 1)[:, 0]
            order = sorted(todo, key=lambda c: (entropy[c] if by_entropy else -sure[c], c))
            for c in order[: quota(order, sure, entropy, step, **rules)]:
                tokens[c] = int(token[c])
            passes += 1
    return tokens, passes


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def nucleus(p, top_p):
    """The least probability that is kept."""
    ranked = np.sort(p)[::-1]
    return 0 if top_p is None else ranked[(np.cumsum(ranked) >= top_p).argmax()]


def draw(key, index, step, shape):
    return np.asarray(jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, index), step), shape), np.float64)


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


@pytest.mark.parametrize("rule", RULES)
def test_against_the_plain_loop(rule, run, config, params, board):
    decoded = run(board, **RULES[rule])
    expected = [
        naive(config, params, board["tokens"][row], block=6, start=start, first=8, stop=23, **RULES[rule])
        for row, start in enumerate([0, 5, 3])
    ]
    np.testing.assert_array_equal(decoded.tokens, [tokens for tokens, _ in expected])
    # Rows go through the blocks together, so a row may wait for the slowest, never longer.
    assert max(passes for _, passes in expected) <= decoded.passes <= sum(passes for _, passes in expected)


def test_guidance_against_the_plain_loop(run, config, params, board):
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    rules = dict(steps=3, guidance_scale=2.5)
    decoded = run(board, unconditional=other, unconditional_start=board["start"], **rules)
    for row, start in enumerate([0, 5, 3]):
        tokens = board["tokens"][row]
        expected, _ = naive(
            config, params, tokens, block=6, start=start, first=8, stop=23, unconditional=other[row], **rules
        )
        np.testing.assert_array_equal(decoded.tokens[row], expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(steps=4, top_p=0.6),
        dict(threshold=0.6, top_p=0.9, top_k=3),
        dict(entropy_budget=2.0, top_k=4),
        dict(steps=3, top_p=0.7, temperature=1.5),
        dict(steps=3, top_p=0.7, temperature=1.5, guidance_scale=2.5),
    ],
)
def test_truncation_against_the_plain_loop(options, run, config, params, board):
    keys = jax.random.split(jax.random.key(2), 3) if "temperature" in options else [None] * 3
    given = dict(key=keys) if "temperature" in options else {}
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    away = dict(unconditional=other, unconditional_start=board["start"]) if "guidance_scale" in options else {}
    decoded = run(board, **options, **given, **away)
    for row, start in enumerate([0, 5, 3]):
        place = dict(block=6, start=start, first=8, stop=23, key=keys[row], unconditional=other[row] if away else None)
        np.testing.assert_array_equal(decoded.tokens[row], naive(config, params, board["tokens"][row], **place, **options)[0])


def test_truncation_is_of_what_may_be_written(run, config, board):
    """Of a row's likeliest tokens, banned, nothing would be left."""
    plain = run(board, steps=1).tokens
    banned = np.unique(plain[board["tokens"] == config.mask_id])
    free = run(board, steps=1, banned_tokens=banned)
    made = run(board, steps=1, banned_tokens=banned, top_k=1)
    np.testing.assert_array_equal(made.tokens, free.tokens)
    assert (made.confidence == 1).all()


@pytest.mark.parametrize("guidance", [False, True])
def test_logit_bias(guidance, run, config, board):
    """A bias that is the same for every token changes nothing; one token's makes it come everywhere or nowhere."""
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)
    given = dict(unconditional=other, unconditional_start=board["start"], guidance_scale=2.0) if guidance else {}
    plain = run(board, steps=3, **given)
    even = run(board, steps=3, logit_bias=np.full(config.vocab, 2.0), **given)
    np.testing.assert_array_equal(even.tokens, plain.tokens)
    holes = board["tokens"] == config.mask_id
    bias = np.zeros(config.vocab)
    bias[7] = 1e4
    assert (run(board, steps=3, logit_bias=bias, **given).tokens[holes] == 7).all()
    common = np.bincount(plain.tokens[holes]).argmax()
    bias = np.zeros(config.vocab)
    bias[common] = -1e4
    assert not (run(board, steps=3, logit_bias=bias, **given).tokens[holes] == common).any()


@pytest.mark.parametrize(
    "options",
    [
        dict(threshold=0.3, edit_threshold=0.3),
        dict(steps=6, block=7, remask=0.5, attend="blocks", cache=True),
    ],
)
def test_a_row_does_not_depend_on_its_batch(options, run, board):
    keys = jax.random.split(jax.random.key(2), 3)
    together = run(board, temperature=0.8, key=keys, **options)
    for row in range(3):
        alone = run(board, row=row, temperature=0.8, key=keys[row : row + 1], **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_sampling_follows_the_key(run, board):
    keys = jax.random.split(jax.random.key(2), 3)
    first, again = (run(board, steps=3, temperature=1.0, key=keys).tokens for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = run(board, steps=3, temperature=1.0, key=jax.random.split(jax.random.key(3), 3)).tokens
    assert (first != other).sum() > 10


def test_a_random_order_of_greedy_tokens(run, saved, config, board):
    """Of the key alone: other keys, another order, in which of each pass's tokens each is the likeliest."""
    keys = jax.random.split(jax.random.key(2), 3)
    made = [run(board, steps=6, confidence="random", key=k) for k in (keys, keys, jax.random.split(jax.random.key(3), 3))]
    np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
    assert (made[0].revealed != made[2].revealed).any()
    one = [run(board, steps=1, **more).tokens for more in ({}, dict(confidence="random", key=keys))]
    np.testing.assert_array_equal(*one)
    model, options = checkpoint.load(saved, dtype=np.float32), dict(length=6, block=6, steps=6, confidence="random")
    orders = [generate.generate(model, ["x"], exact=True, seed=seed, **options).decoded.revealed for seed in (1, 2)]
    assert (orders[0] != orders[1]).any()


def test_each_block_draws_anew(config, params):
    """Without attention all positions have the same scores, so what differs from block to block is the draw."""
    fixed = {name: x * 0 if name.endswith(".out") else x for name, x in params.items()}
    holes, key = np.full((1, 12), config.mask_id, np.int32), jax.random.split(jax.random.key(2), 1)
    made = sampler.decode(config, fixed, holes, block=6, steps=1, temperature=1.0, key=key)
    assert (np.asarray(made.tokens[0, :6]) != np.asarray(made.tokens[0, 6:])).sum() > 2


def test_each_pass_draws_anew(config, params):
    """Likewise: what a later pass writes is not what the first would have."""
    fixed = {name: x * 0 if name.endswith(".out") else x for name, x in params.items()}
    holes, key = np.full((1, 12), config.mask_id, np.int32), jax.random.split(jax.random.key(2), 1)
    once, thrice = (sampler.decode(config, fixed, holes, block=12, steps=n, temperature=1.0, key=key) for n in (1, 3))
    later = np.asarray(thrice.revealed) > 0
    differs = np.asarray(once.tokens != thrice.tokens)
    assert later.sum() == 8 and differs[later].sum() > 2 and not differs[~later].any()


def test_left_padding_changes_nothing(run, board):
    keys = jax.random.split(jax.random.key(2), 3)
    plain = run(board, steps=3, temperature=0.8, key=keys).tokens
    # What a pad holds is no content either: here it is a word.
    wide = np.concatenate([np.full((3, 9), 17, np.int32), board["tokens"]], axis=1)
    moved = dict(tokens=wide, start=board["start"] + 9, first=board["first"] + 9)
    np.testing.assert_array_equal(run(moved, steps=3, temperature=0.8, key=keys).tokens[:, 9:], plain)


def test_columns_from_stop_on_are_nobodys(run, config, board):
    plain = run(board, steps=3).tokens
    wide = np.concatenate([board["tokens"], np.full((3, 4), config.mask_id, np.int32)], axis=1)
    decoded = run(board | {"tokens": wide}, stop=23, steps=3).tokens
    np.testing.assert_array_equal(decoded[:, :23], plain)
    assert (decoded[:, 23:] == config.mask_id).all()


@pytest.mark.parametrize("attend, cache", [("all", True), ("blocks", True)])
def test_what_is_given_stays_and_every_hole_is_filled(attend, cache, run, config, board):
    decoded = run(board, steps=2, attend=attend, cache=cache, banned_tokens=np.arange(10, 30))
    holes = board["tokens"] == config.mask_id
    np.testing.assert_array_equal(decoded.tokens[~holes], board["tokens"][~holes])
    chosen = decoded.tokens[holes]
    assert not np.isin(chosen, [config.mask_id, config.pad_id, *range(10, 30)]).any()
    np.testing.assert_array_equal(decoded.revealed[~holes], -1)
    assert ((0 <= decoded.revealed[holes]) & (decoded.revealed[holes] < decoded.passes)).all()
    assert ((0 < decoded.confidence[holes]) & (decoded.confidence[holes] <= 1)).all()


def test_a_row_stops_at_its_stop_token(run, config, board):
    """Every token is taken as the stop token once; what stands before it must be what decoding without a stop gives."""
    free = run(board, block=15, steps=15).tokens
    stopped = 0
    for stop_at in np.unique(free[0, 8:]):
        decoded = run(board, block=15, steps=15, stop_at=int(stop_at)).tokens[0]
        assert (decoded != config.mask_id).all()
        (ends,) = np.nonzero(decoded[8:] == stop_at)
        np.testing.assert_array_equal(decoded[8 + ends[0] + 1 :], config.pad_id)
        assert (decoded[8 : 8 + ends[0]] != config.pad_id).all()
        stopped += ends[0] < 14
    assert stopped > 0


def test_a_stop_ends_the_work(run, config, board):
    free = run(board, row=0, block=3, steps=3)
    stop_at = int(free.tokens[0, 8])
    stopped = run(board, row=0, block=3, steps=3, stop_at=stop_at)
    assert stopped.passes <= 3 < free.passes
    np.testing.assert_array_equal(stopped.tokens[0, 9:], config.pad_id)


def test_numbers_are_data(run, config, board):
    """New steps, thresholds, temperatures, scales, schedules, intervals of renewal and prompt lengths compile nothing."""
    keys = jax.random.split(jax.random.key(2), 3)
    other = np.where(board["tokens"] == config.mask_id, config.mask_id, 9)

    def once(start, first, **numbers):
        place = board | dict(start=np.array(start), first=np.array(first), unconditional_start=np.array(start))
        run(place, unconditional=other, key=keys, cache=True, **numbers)

    numbers = dict(
        steps=3, threshold=0.9, factor=0.5, edit_threshold=0.9, edit_passes=2, remask=0.1, temperature=0.5, refresh=2,
        guidance_scale=2.0, guidance_final=1.0, guidance_interval=(0.0, 0.5), guidance_refresh=3,
    )  # fmt: skip
    once([0, 5, 3], [8, 8, 8], **numbers)
    before = sampler._decode._cache_size()
    for name, number in numbers.items():
        once([0, 5, 3], [8, 8, 8], **(numbers | {name: (0.25, 0.75) if name == "guidance_interval" else number * 2}))
    once([2, 4, 1], [7, 8, 6], **numbers)
    once([0, 5, 3], [8, 8, 8], **(numbers | {"guidance_scale": 2, "temperature": np.float32(1), "steps": np.int64(3)}))
    assert sampler._decode._cache_size() == before
    for pair in (
        [dict(entropy_budget=0.5), dict(entropy_budget=2.0)],
        [dict(steps=3, top_p=0.5, top_k=2), dict(steps=3, top_p=1, top_k=np.int64(60))],
    ):
        sizes = [run(board, **options) and sampler._decode._cache_size() for options in pair]
        assert sizes[0] == sizes[1]


def test_every_pass_is_reported(run, config, board):
    frames = []
    decoded = run(board, steps=3, on_pass=frames.append)
    jax.effects_barrier()
    assert [int(frame.passes) for frame in frames] == list(range(1, int(decoded.passes) + 1))
    masked = [int((np.asarray(frame.tokens) == config.mask_id).sum()) for frame in frames]
    assert masked == sorted(masked, reverse=True) and masked[-1] == 0
    np.testing.assert_array_equal(frames[-1].tokens, decoded.tokens)


def test_one_viewer_is_compiled_for_once_and_shown_each_measured_pass(saved):
    model, frames = checkpoint.load(saved, dtype=np.float32), []
    options = dict(length=6, block=6, steps=3, exact=True, on_pass=frames.append)
    made = generate.generate(model, ["def add("], **options)
    compiled = sampler._decode._cache_size()
    assert [int(frame.passes) for frame in frames] == [1, 2, 3]
    again = generate.generate(model, ["def sub("], **options)
    assert len(frames) == made.passes + again.passes == 6
    assert sampler._decode._cache_size() == compiled


def test_nothing_to_do(run):
    given = np.full((2, 5), 9, np.int32)
    decoded = run(dict(tokens=given), steps=1)
    np.testing.assert_array_equal(decoded.tokens, given)
    assert decoded.passes == 0
    assert run(dict(tokens=np.zeros((0, 5), np.int32)), steps=1).tokens.size == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "expected at least one, got none"),
        (dict(steps=0), "steps: expected at least 1, got 0"),
        (dict(steps=2, block=0), "block: expected an int of at least 1, got 0"),
        (dict(threshold=0.5, remask=0.5), "remask: expected steps with it"),
        (dict(threshold=0.5, edit_passes=2), "edit_passes: expected an edit_threshold with it, got none"),
        (dict(threshold=0.5, edit_threshold=0.5, edit_passes=0), "edit_passes: expected at least 1, got 0"),
        (dict(steps=2, remask=0.5, remask_rule="most"), "remask_rule: expected one of"),
        (dict(steps=2, remask=0.5, remask_rule="cap"), "a key with a random remask_rule"),
        (dict(steps=2, confidence="random"), "a key with a random remask_rule or confidence"),
        (dict(steps=2, top_p=0.0), "top_p: expected a number above 0 and at most 1, got 0.0"),
        (dict(steps=2, top_p=95), "top_p: expected a number above 0 and at most 1, got 95"),
        (dict(steps=2, top_k=0), "top_k: expected at least 1, got 0"),
        (dict(steps=2, top_k=2.5), "top_k: expected a whole number"),
        (dict(steps=2, top_p=np.ones(5)), r"top_p: expected a scalar, shape \[3\]"),
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
def test_bad_arguments(options, message, run, board):
    with pytest.raises(ValueError, match=message):
        run(board, **options)
