"""Decoding from random tokens against a plain Python loop, and the loss that makes a model for it.

Rows are ragged (prompts of 5 and 3, a given token among the holes), and blocks of 6 divide 16 holes into 6, 6, 4.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import cli, masks
from dlm_kernels.denoiser import checkpoint, generate, losses, model, renoise, train
from dlm_kernels.denoiser.config import DenoiserConfig
from dlm_kernels.ops import dispatch


@pytest.fixture(scope="module")
def conditioned(config, params):
    """The tiny model, and a path for the soft embedding that is strong enough to change what it says."""
    config = dataclasses.replace(config, self_conditioning=True)
    fresh = jax.jit(model.init, static_argnums=0)(config, jax.random.key(1))
    params = fresh | params
    down = jax.random.normal(jax.random.key(2), params["soft.down"].shape)
    return config, params | {"soft.down": down, "soft.gate": 3 * params["soft.gate"]}


@pytest.fixture(scope="module")
def board(config):
    random = np.random.default_rng(8)
    tokens = np.full((2, 21), config.mask_id, np.int32)
    tokens[:, :5] = random.integers(3, config.vocab, (2, 5))
    tokens[1, :2] = config.pad_id
    tokens[1, 13] = 17
    return dict(tokens=tokens, start=np.array([0, 2]), first=5, key=jax.random.split(jax.random.key(4), 2))


def naive(config, params, tokens, start, key, *, steps, budget, calm, temperature=(0.8, 0.4), block=6, first=5):
    """One row; returns it and the passes of each block."""
    tokens, holes, passes = tokens.copy(), tokens == config.mask_id, []
    head = np.asarray(model.head_weight(config, params), np.float64)

    def draw(kind, index, step, stream, *shape):
        k = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, index), step), stream)
        return np.asarray(jax.random.randint(k, shape, 0, config.vocab) if kind == "token" else jax.random.gumbel(k, shape))

    for index, begin in enumerate(range(first, len(tokens), block)):
        end = min(begin + block, len(tokens))
        # A window at the edge reaches back, and what is drawn for it is drawn for all of its columns.
        window = slice(min(begin, len(tokens) - block), min(begin, len(tokens) - block) + block)
        inside = np.flatnonzero(holes & (np.arange(len(tokens)) >= begin) & (np.arange(len(tokens)) < end))
        tokens[inside] = draw("token", index, 0, 0, block)[inside - window.start]
        soft, best = np.zeros((block, config.d_model), np.float32), None
        for step in range(steps):
            t = temperature[0] + (temperature[1] - temperature[0]) * step / steps
            embedded = np.array(params["embed"])[tokens]
            embedded[window] = model.self_conditioned(config, params, embedded[None, window], soft[None])[0]
            columns = np.arange(len(tokens), dtype=np.int32)[None]
            seen = masks.KeyIntervals(np.full_like(columns, start), np.full_like(columns, end))
            hidden = model.hidden_states(
                config, params, tokens[None], embedded=jnp.asarray(embedded[None]), positions=columns - start, mask=seen
            )
            logits = np.asarray(hidden, np.float64)[0, window] @ head.T

            def softmax(x):
                p = np.exp(x - x.max(-1, keepdims=True))
                return p / p.sum(-1, keepdims=True)

            soft = (softmax(logits / t) @ np.asarray(params["embed"], np.float64)).astype(np.float32)
            logits[:, [config.mask_id, config.pad_id]] = -np.inf
            logits = logits[inside - window.start]
            p = softmax(logits / t)
            entropy = -(p * np.log(np.where(p == 0, 1, p))).sum(-1)
            noise = draw("gumbel", index, step, 1, block, config.vocab)[inside - window.start]
            sample = (logits / t + noise).argmax(-1)
            fresh = draw("token", index, step, 2, block)[inside - window.start]
            order = np.argsort(entropy, kind="stable")
            accepted = order[np.cumsum(entropy[order]) - entropy[order] <= budget]
            fresh[accepted] = sample[accepted]
            tokens[inside] = fresh
            if (best is not None and (best == logits.argmax(-1)).all() and entropy.mean() <= calm) or step == steps - 1:
                tokens[inside] = logits.argmax(-1)
                break
            best = logits.argmax(-1)
        passes.append(step + 1)
    return tokens, passes


CALM = dict(steps=9, budget=100.0, calm=10.0, temperature=(0.2, 0.1))


@pytest.mark.parametrize("rules", [dict(steps=4, budget=1.0, calm=0.005), CALM])
def test_against_the_plain_loop(rules, conditioned, board):
    """The second is of a model that soon stays with what it wrote, and the rows stop at different passes."""
    config, params = conditioned
    if rules is CALM:
        params = {name: x * 0.1 if name.endswith((".out", ".down")) else x for name, x in params.items()}
    decoded = jax.tree.map(np.asarray, renoise.decode(config, params, block=6, **board, **rules))
    expected = [
        naive(config, params, board["tokens"][row], board["start"][row], board["key"][row], **rules) for row in range(2)
    ]
    np.testing.assert_array_equal(decoded.tokens, [tokens for tokens, _ in expected])
    # Rows open a block together, so it takes as long as the slower.
    assert decoded.passes == sum(map(max, zip(*(passes for _, passes in expected))))
    if rules is CALM:
        assert decoded.passes < 27
    given = board["tokens"] != config.mask_id
    assert (decoded.revealed[given] == -1).all() and (decoded.confidence[~given] <= 1).all()


def test_a_row_does_not_depend_on_its_batch(conditioned, board):
    config, params = conditioned
    options = dict(block=6, **CALM)
    together = renoise.decode(config, params, **board, **options).tokens
    for row in range(2):
        alone = {name: x if name == "first" else x[row : row + 1] for name, x in board.items()}
        np.testing.assert_array_equal(renoise.decode(config, params, **alone, **options).tokens[0], together[row])


def test_what_follows_a_stop_is_padding_and_numbers_are_data(config, params, board):
    """Without self-conditioning too."""
    alone = {name: x if name == "first" else x[:1] for name, x in board.items()}
    free = np.asarray(renoise.decode(config, params, block=6, steps=3, stop_at=-1, **alone).tokens)[0]
    before = renoise._decode._cache_size()
    stop_at = int(free[7])
    stopped = renoise.decode(config, params, block=6, steps=5 - 2, budget=0.1, stop_at=stop_at, **alone)
    at = int(np.flatnonzero(free[5:] == stop_at)[0]) + 5
    np.testing.assert_array_equal(stopped.tokens[0, : at + 1], free[: at + 1])
    assert (np.asarray(stopped.tokens)[0, at + 1 :] == config.pad_id).all() and stopped.passes < 9
    renoise.decode(config, params, block=6, steps=2, budget=5.0, temperature=(1.0, 0.1), stop_at=3, **alone)
    assert renoise._decode._cache_size() == before


def test_every_pass_is_reported(config, params, board):
    frames = []
    decoded = renoise.decode(config, params, block=6, steps=3, on_pass=frames.append, **board)
    jax.effects_barrier()
    assert [int(frame.passes) for frame in frames] == list(range(1, 10))
    np.testing.assert_array_equal(frames[-1].tokens, decoded.tokens)
    # A token was written in the pass that last changed it.
    boards = np.stack([board["tokens"], *(frame.tokens for frame in frames)])
    changed = boards[1:] != boards[:-1]
    last, holes = len(changed) - 1 - changed[::-1].argmax(0), board["tokens"] == config.mask_id
    np.testing.assert_array_equal(np.asarray(decoded.revealed)[holes], last[holes])
    assert not np.isin(last[holes], [2, 5, 8]).all()


def test_columns_from_stop_on_are_nobodys(config, params, board):
    """Two of them would be the last block's."""
    made = []
    for filler in (config.mask_id, 9):
        wide = np.concatenate([board["tokens"], np.full((2, 4), filler, np.int32)], axis=1)
        made.append(np.asarray(renoise.decode(config, params, block=6, steps=3, stop=21, **(board | {"tokens": wide})).tokens))
        assert (made[-1][:, 21:] == filler).all() and (made[-1][:, :21] != config.mask_id).all()
    np.testing.assert_array_equal(made[0][:, :21], made[1][:, :21])


def test_a_block_settles_in_its_second_pass_at_the_earliest(config, params, board):
    """Of a model that says the same everywhere, and so what it said in the block before."""
    same = params | {"final_norm": params["final_norm"] * 0}
    assert renoise.decode(config, same, block=6, steps=9, calm=10.0, **board).passes == 3 * 2


def test_generate_cools_to_half_its_temperature(saved, monkeypatch):
    given, decode = [], renoise.decode

    @functools.wraps(decode)  # whose signature tells `generate` what goes with it
    def told(*arguments, **options):
        given.append(options["temperature"])
        return decode(*arguments, **options)

    monkeypatch.setattr(renoise, "decode", told)
    for temperature in (None, 0.5):
        options = dict(length=6, block=6, steps=2, noise_budget=0.5, temperature=temperature)
        generate.generate(checkpoint.load(saved, dtype=jnp.float32), ["def add("], **options)
    assert set(given) == {(0.8, 0.4), (0.5, 0.25)}


def test_a_model_trained_on_noise_restores_a_text(tmp_path, texts):
    """Four tokens of a text it knows are random: what it writes there is right far more often than the noise, 1 of 300."""
    small = DenoiserConfig(layers=2, d_model=32, heads=2, kv_heads=1, head_size=16, ffn=48, vocab=300)
    settings = train.TrainConfig(
        rows=8, length=16, steps=250, learning_rate=1e-2, average=0.9, uniform_share=1.0, weight_decay=0.0
    )
    train.run(small, settings, tmp_path, seed_texts=texts)
    config, params, tokenizer = checkpoint.load(tmp_path, dtype=jnp.float32)
    assert config.self_conditioning and float(jnp.abs(params["soft.down"]).max()) > 0
    row = train.prepare(config, texts, tokenizer)[1][0][16:32]
    tokens = np.tile(row, (48, 1))  # of 8 rows alone a quarter to three quarters come out right, as the key has it
    tokens[np.arange(48)[:, None], 4 + np.arange(48)[:, None] % 8 + np.arange(4)] = config.mask_id
    keys = jax.random.split(jax.random.key(0), 48)
    made = np.asarray(renoise.decode(config, params, tokens, block=16, steps=12, budget=0.1, key=keys).tokens)
    assert (made == row)[tokens == config.mask_id].mean() > 0.25


def test_the_loss_is_that_of_the_naive_code(conditioned, random):
    """Documents are told apart by the ends that are still there: by all of them, the model would be told which tokens are ends."""
    config, params = conditioned
    tokens = jnp.asarray(random.integers(3, config.vocab, (4, 9)), jnp.int32).at[:, 4].set(config.eos_id)
    key = jax.random.key(5)
    found, gradient = jax.value_and_grad(lambda params: losses.uniform_loss(config, params, tokens, key))(params)
    for_ratio, for_place, for_token, for_rows = jax.random.split(key, 4)
    ratio = (jax.random.uniform(for_ratio, ()) + jnp.arange(4)[:, None] / 4) % 1.0
    noisy = jnp.where(
        jax.random.uniform(for_place, (4, 9)) < ratio, jax.random.randint(for_token, (4, 9), 0, config.vocab), tokens
    )
    assert 0 < (noisy != tokens).sum() < 36 and 0 < (noisy[:, 4] != config.eos_id).sum() < 4
    document = jnp.cumsum(noisy == config.eos_id, 1) - (noisy == config.eos_id)
    seen = dict(mask=masks.packed(document.astype(jnp.int32)))
    first = int(jax.random.randint(for_rows, (), 0, 2))
    soft = jax.nn.softmax(model.hidden_states(config, params, noisy, **seen) @ model.head_weight(config, params).T)
    soft = soft @ params["embed"]
    soft = soft.at[1 - first :: 2].set(0)

    def naive(params):
        """`soft` is a constant."""
        embedded = model.self_conditioned(config, params, params["embed"][noisy], soft)
        logits = model.hidden_states(config, params, noisy, embedded=embedded, **seen) @ model.head_weight(config, params).T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()

    expected, slope = jax.value_and_grad(naive)(params)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient["embed"], slope["embed"], rtol=1e-3, atol=1e-4 * np.abs(slope["embed"]).max())


def test_an_implementation_asked_for_is_that_of_every_operation(conditioned, board):
    """Of 16 bits, for which the gated layer of the soft embedding is a kernel's on a CPU unless one is asked for."""
    config, params = conditioned[0], jax.tree.map(lambda x: x.astype(jnp.bfloat16), conditioned[1])
    with dispatch.recording() as choices:
        renoise.decode(config, params, **board, block=6, steps=2, implementation="xla")
        losses.uniform_loss(config, params, jnp.asarray(board["tokens"]), jax.random.key(0), implementation="xla")
    assert {choice.kernel for choice in choices} >= {"attention_forward", "lm_head_scores", "unmask_topk"}
    assert all(choice.implementations == {"default": "xla"} for choice in choices)


def test_the_command(saved, capsys):
    def run(*more):
        options = ("--block", "6", "--length", "12", "--steps", "5", "--json", "--exact", "--model", str(saved))
        status = cli.main(["generate", "def add(", "--noise-budget", "0.5", *options, *more])
        captured = capsys.readouterr()
        return status, captured.err or json.loads(captured.out)

    (status, first), (_, again), (_, other) = run("--seed", "1"), run("--seed", "1"), run("--seed", "2")
    assert status == 0 and first["tokens"] == 12 and 4 <= first["passes"] <= 10
    assert first["text"] == again["text"] != other["text"]
    assert run("--threshold", "0.5") == (2, "dlm-kernels: noise_budget: goes with steps and temperature alone, got ['threshold']\n")


def test_bad_arguments(config, params, board):
    for options, message in [
        (dict(steps=0), "steps: expected at least 1, got 0"),
        (dict(block=0), "block: expected an int of at least 1, got 0"),
        (dict(key=jax.random.key(0)), "key: expected a key for each of 2 rows"),
        (dict(temperature=0.8), "temperature: expected two numbers"),
        (dict(temperature=(0.0, 0.0)), "temperature: expected above 0, got 0.0"),
        (dict(tokens=board["tokens"][0]), r"tokens: expected shape \[B, L\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            renoise.decode(config, params, **({"block": 6} | board | options))
