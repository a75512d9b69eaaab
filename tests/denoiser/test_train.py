"""The training losses against brute force, what a step does with them, and settings."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import masks
from dlm_kernels.denoiser import checkpoint, data, losses, model, train
from dlm_kernels.denoiser.config import DenoiserConfig


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(config, params, tokens, mask):
    hidden = model.hidden_states(config, params, tokens[None], mask=mask)
    return jax.nn.log_softmax(hidden[0] @ model.head_weight(config, params).T)


def nll(config, params, tokens, targets, mask=None):
    """-log p of targets [L] at every position of tokens [L]."""
    log_p = np.asarray(log_probabilities(config, params, np.asarray(tokens, np.int32), mask), np.float64)
    return -log_p[np.arange(len(targets)), targets]


def test_the_bound_is_that_of_all_orders(config, params):
    """The mean of the loss over maskings is the mean over all 4! orders of the negative log likelihood.

    A document ends in the row, and where the mask hides that no position is told so.
    """
    row = np.array([9, config.eos_id, 31, 17], np.int32)
    known = {}
    for size in range(5):
        for chosen in itertools.combinations(range(4), size):
            noisy = row.copy()
            noisy[list(chosen)] = config.mask_id
            visible = masks.packed(data.segments(noisy[None], config.eos_id).astype(np.int32))
            known[chosen] = nll(config, params, noisy, row, visible)
    orders = [
        sum(known[tuple(sorted(order[i:]))][order[i]] for i in range(4)) for order in itertools.permutations(range(4))
    ]
    exact = np.mean(orders) / 4
    rows = jnp.tile(row, (64, 1))
    value = jax.jit(lambda key: losses.loss(config, params, rows, key))
    draws = np.array([value(jax.random.key(i)) for i in range(60)])
    assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(len(draws)) < 0.05 * exact


@pytest.mark.parametrize("block_size", [1, 3, 10])
def test_corrupt_masks_every_count_alike(block_size, config):
    """10 tokens: blocks of 3 leave a short last one."""
    tokens = jnp.full((40, 10), 7, jnp.int32)
    counts = {}
    for seed in range(30):
        noisy, masked, ratio = losses.corrupt(tokens, jax.random.key(seed), config.mask_id, block_size)
        np.testing.assert_array_equal(noisy == config.mask_id, masked)
        for begin in range(0, 10, block_size):
            block = slice(begin, begin + block_size)
            size = len(range(10)[block])
            count = np.asarray(masked[:, block]).sum(1)
            np.testing.assert_allclose(
                np.asarray(ratio[:, block]), np.repeat(count[:, None] / size, size, 1), rtol=1e-6
            )
            counts.setdefault((begin, size), []).extend(count)
    for (_, size), seen in counts.items():
        share = np.bincount(seen, minlength=size + 1) / len(seen)
        assert share[0] == 0
        np.testing.assert_allclose(share[1:], 1 / size, atol=0.02)


def test_errors_are_other_tokens_of_the_batch_and_checked_with_as_many_intact_ones(config, random):
    """A quarter of the visible tokens replaced: every other column is checked. 7 and the last id here are special."""
    special = jnp.array([7, config.vocab - 1])
    tokens = jnp.asarray(random.integers(3, config.vocab, (50, 40)), jnp.int32)
    noisy, masked, _ = losses.corrupt(tokens, jax.random.key(1), config.mask_id, 40)
    wrong, checked = (np.asarray(x) for x in losses.with_errors(tokens, noisy, masked, jax.random.key(2), 0.25, special))
    tokens, noisy, masked = (np.asarray(x) for x in (tokens, noisy, masked))
    changed = wrong != noisy
    assert not (changed & ~checked).any() and not (checked & masked).any() and not np.isin(tokens[checked], special).any()
    assert not np.isin(wrong[changed], special).any()
    visible = (~masked).sum()
    assert 0.4 < checked.sum() / visible < 0.6
    assert 0.2 < changed.sum() / visible < 0.3  # of the replacements 1 in 50 is the token itself
    assert 0.8 < (changed.sum(0) / np.maximum((~masked).sum(0), 1)).max() / 0.25 < 2.5  # no column is favoured


@pytest.mark.parametrize("share, expected", [(0.35, 0.7), (0.04, 0.08), (1e-12, 0.0), (0.5, 1.0)])
def test_the_share_of_errors_is_what_it_says(share, expected, config):
    """Of 40 columns without a mask at most 2 share * 40 + 1 a row, which is what `loss` has room for, are checked."""
    tokens = jnp.full((50, 40), 9, jnp.int32)
    _, checked = losses.with_errors(tokens, tokens, jnp.zeros(tokens.shape, bool), jax.random.key(2), share, jnp.array([0]))
    assert np.asarray(checked).mean() == pytest.approx(expected, abs=0.015)
    assert np.asarray(checked).sum(1).max() <= 2 * share * 40 + 1


def test_training_on_errors_rejects_them(config, params, tmp_path, texts):
    """After training the model prefers the true token to a wrong one in its place, far more often than without errors."""
    small = DenoiserConfig(layers=2, d_model=32, heads=2, kv_heads=1, head_size=16, ffn=48, vocab=300)
    right = {}
    for share in (0.0, 0.1):
        out = tmp_path / str(share)
        settings = train.TrainConfig(
            rows=8, length=16, steps=250, learning_rate=1e-2, average=0.9, error_share=share, weight_decay=0.0, seed=1
        )
        train.run(small, settings, out, seed_texts=texts)
        loaded, trained, tokenizer = checkpoint.load(out, dtype=jnp.float32)
        (stream, _) = train.prepare(loaded, texts, tokenizer)[1]
        rows = stream[: 16 * 16].reshape(16, 16)
        rows = np.tile(rows, (8, 1))
        place = np.arange(len(rows)), 4 + np.arange(len(rows)) // 16  # each row at each of 8 columns
        wrong = rows.copy()
        wrong[place] = np.roll(rows[place], 3)
        hidden = jax.jit(model.hidden_states, static_argnums=0)(loaded, trained, wrong)
        best = np.asarray((hidden @ model.head_weight(loaded, trained).T).argmax(-1))
        right[share] = (best == rows)[wrong != rows].mean()
    assert right[0.1] > 0.5 and right[0.1] > right[0.0] + 0.2, right


def test_loss_stays_within_documents(config, params):
    """The first of two documents reads nothing of the second, and the other way round."""
    rows = np.array([[9, 4, 31, 17, config.eos_id, 20, 8, 12, 5, 40]], np.int32)
    document = masks.packed(data.segments(rows, config.eos_id).astype(np.int32))
    hidden = jax.jit(functools.partial(model.hidden_states, config))
    plain = np.asarray(hidden(params, rows, mask=document))
    for changed, kept in ((slice(5, 10), slice(0, 5)), (slice(0, 4), slice(5, 10))):
        other = rows.copy()
        other[:, changed] = 33
        np.testing.assert_array_equal(np.asarray(hidden(params, other, mask=document))[:, kept], plain[:, kept])


def test_block_loss_of_single_tokens_is_autoregression(config, params):
    row = np.array([9, 4, 31, 17, 22, 6], np.int32)
    expected = []
    for i in range(6):
        seen = np.where(np.arange(6) < i, row, config.mask_id)
        expected.append(nll(config, params, seen, row, masks.block_causal(6, 1))[i])
    value = compiled_block_loss(config, params, row[None], jax.random.key(0), 1)
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)


def test_block_loss_of_one_block_is_the_loss(config, params, random):
    rows = jnp.asarray(random.integers(3, config.vocab, (3, 8)), jnp.int32)
    key = jax.random.key(4)
    whole = jax.jit(losses.loss, static_argnums=0)(config, params, rows, key)
    np.testing.assert_allclose(compiled_block_loss(config, params, rows, key, 8), whole, rtol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_block_loss_against_blocks_one_by_one(shifted, config, params, random):
    config = dataclasses.replace(config, shifted=shifted)
    rows = random.integers(3, config.vocab, (2, 7)).astype(np.int32)
    key = jax.random.key(4)
    noisy, masked, ratio = (np.asarray(x) for x in losses.corrupt(jnp.asarray(rows), key, config.mask_id, 3))
    total = 0.0
    for row, begin in itertools.product(range(2), (0, 3, 6)):
        block = slice(begin, begin + 3)
        # What comes after the block nobody in it sees.
        tokens = np.where(np.arange(7) < begin, rows[row], noisy[row])
        nats = nll(config, params, tokens, rows[row], masks.block_causal(7, 3))
        total += (nats * masked[row] / ratio[row])[block].sum()
    np.testing.assert_allclose(compiled_block_loss(config, params, rows, key, 3), total / 14, rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.loss, functools.partial(losses.block_loss, block_size=8)])
def test_no_ratio_counts_for_less_than_the_least(loss, config, params, random):
    rows = random.integers(3, config.vocab, (3, 8)).astype(np.int32)
    noisy, masked, _ = (np.asarray(x) for x in losses.corrupt(jnp.asarray(rows), jax.random.key(4), config.mask_id, 8))
    assert 0 < masked.sum() < 24
    total = sum((nll(config, params, noisy[row], rows[row]) * masked[row]).sum() for row in range(3))
    value = loss(config, params, jnp.asarray(rows), jax.random.key(4), least_ratio=1.0)
    np.testing.assert_allclose(value, total / 24, rtol=1e-5)


def test_every_checked_token_counts_once(config, params, random):
    """All that are visible, at this share."""
    rows, key = jnp.asarray(random.integers(3, config.vocab, (3, 8)), jnp.int32), jax.random.key(4)
    noisy, masked, ratio = losses.corrupt(rows, key, config.mask_id, 8)
    wrong, checked = losses.with_errors(rows, noisy, masked, jax.random.fold_in(key, 1), 0.5, jnp.arange(3))
    assert (masked | checked).all() and (wrong != noisy).any()
    weights = np.where(masked, 1 / ratio, 1)
    total = sum((nll(config, params, wrong[row], rows[row]) * weights[row]).sum() for row in range(3))
    np.testing.assert_allclose(losses.loss(config, params, rows, key, error_share=0.5), total / 24, rtol=1e-5)


compiled_block_loss = jax.jit(losses.block_loss, static_argnums=0)


def test_objectives_have_their_shares_and_blocks_every_size(config, monkeypatch):
    settings = train.TrainConfig(steps=1, length=24, block_share=0.5, uniform_share=0.3)
    drawn = [train._drawn_objective(settings, step) for step in range(2000)]
    for objective, share in ((train.block_objective, 0.5), (train.uniform_objective, 0.3), (train.whole_objective, 0.2)):
        assert abs(drawn.count(objective) / 2000 - share) < 0.05
    monkeypatch.setattr(losses, "block_loss", lambda config, params, tokens, key, size, **_: int(size))
    sizes = {train.block_objective(config, settings, None, None, None, jax.random.key(i)) for i in range(60)}
    assert sizes == {1, 2, 4, 8, 16}


def test_matrices_of_layers_go_by_muon_and_vectors_do_not_decay():
    params = {"embed": jnp.ones((4, 6)), "layers.0.up": jnp.ones((4, 6)), "final_norm": jnp.ones(6)}
    decayed = train.optimizer(settings := train.TrainConfig(steps=1, clip=1e9))
    updates, _ = decayed.update(jax.tree.map(jnp.zeros_like, params), decayed.init(params), params)
    for name, share in (("embed", settings.weight_decay), ("layers.0.up", settings.weight_decay), ("final_norm", 0)):
        np.testing.assert_allclose(updates[name], share, atol=1e-6)
    plain = train.optimizer(train.TrainConfig(steps=1, clip=1e9, weight_decay=0.0))
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    updates, _ = plain.update(gradients, plain.init(params), params)
    for name in ("embed", "final_norm"):  # Adam's first step
        np.testing.assert_allclose(updates[name], np.sign(gradients[name]), rtol=1e-4)
    sizes = np.linalg.svd(updates["layers.0.up"], compute_uv=False) / (0.2 * 6**0.5)
    assert (0.6 < sizes).all() and (sizes < 1.3).all()


def test_each_step_draws_anew(config):
    settings, params = train.TrainConfig(steps=9), {"embed": jnp.ones((2, 3))}

    def objective(config, train, params, given, tokens, key):
        return jax.random.uniform(key) + 0 * params["embed"].sum()

    def value(step):
        state = {"params": params, "average": params, "optimizer": train.optimizer(settings).init(params)}
        return float(train.train_step(config, settings, objective, jax.tree.map(jnp.copy, state), None, None, step, 0.0)[1])

    assert value(0) == value(0) != value(1)


def test_the_schedule_ends_at_zero():
    settings = train.TrainConfig(steps=10, learning_rate=1.0, warmup=0.1)
    rates = [train.schedule(settings, share) for share in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and abs(rates[-1]) < 1e-12
    assert np.argmax(rates) == 10 and max(rates) > 0.9


def test_the_average_forgets_a_random_start(config):
    """A step keeps 1 / 10 of it at first, later more, and at most what the settings say."""
    settings = train.TrainConfig(steps=9, average=0.15, weight_decay=0.0)

    def objective(config, train, params, given, tokens, key):
        return (params["embed"] ** 2).sum()

    params = {"embed": jnp.ones((2, 3))}
    state = {"params": params, "average": params, "optimizer": train.optimizer(settings).init(params)}
    state, expected = jax.tree.map(jnp.copy, state), params["embed"]
    for step, keep in enumerate((0.1, 0.15, 0.15)):
        state, _ = train.train_step(config, settings, objective, state, None, None, step, 0.5)
        expected = keep * expected + (1 - keep) * state["params"]["embed"]
        np.testing.assert_allclose(state["average"]["embed"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "given",
    [{name: float("nan")} for name in ("weight_decay", "clip", "warmup", "average", "least_ratio")]
    + [dict(average=2.0), dict(clip=0.0), dict(steps=1.5), dict(seed=1.5), dict(seed=-1)]
    + [dict(implementation="abc"), dict(implementation="cudnn")],
)
def test_settings_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}: expected"):
        train.TrainConfig(**dict(steps=1) | given)


def test_settings_say_what_is_wrong():
    with pytest.raises(ValueError, match="steps, minutes: expected one of them, got None and None"):
        train.TrainConfig()
    with pytest.raises(ValueError, match=r"error_share: expected a number in \[0, 0.5\], got 0.7"):
        train.TrainConfig(steps=1, error_share=0.7)
    assert json.dumps(DenoiserConfig().to_dict())
