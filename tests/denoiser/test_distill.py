"""The teacher's draws follow its steps, the loss is the divergence, and a student comes closer to its teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.denoiser import checkpoint, distill, model, train

PASSES = dict(passes=2, teacher_steps=4)


draw = jax.jit(distill.teacher_draw, static_argnums=0, static_argnames=("passes", "teacher_steps"))


@functools.partial(jax.jit, static_argnums=(0, 3))
def softmax(config, params, tokens, banned):
    logits = model.hidden_states(config, params, tokens) @ model.head_weight(config, params).T
    return jax.nn.softmax(logits.at[..., jnp.asarray(banned, jnp.int32)].set(-jnp.inf))


def probabilities(config, params, tokens, banned):
    return np.asarray(softmax(config, params, tokens, banned), np.float64)


def test_each_token_is_drawn_at_the_step_that_reveals_it(config, params):
    """8 masks, 2 revealed a step: the rest must follow the distribution given the two, not the first one."""
    tokens = jnp.full((1, 8), config.mask_id, jnp.int32).at[0, 0].set(9)
    first = probabilities(config, params, tokens, (config.mask_id, config.pad_id))[0]
    rows = jnp.tile(tokens, (4000, 1))
    once = np.asarray(draw(config, params, rows, jax.random.key(1), mask=None, passes=1, teacher_steps=4))
    twice = np.asarray(draw(config, params, rows, jax.random.key(1), mask=None, **PASSES))
    assert (once[:, 0] == 9).all() and (twice[:, 0] == 9).all()
    for place in range(1, 8):
        share = np.bincount(once[:, place], minlength=config.vocab) / len(once)
        np.testing.assert_allclose(share, first[place], atol=0.04)
    # One key: the first step's draws are the same, and two of them stay.
    kept = (once == twice)[:, 1:].sum(1)
    assert (kept >= 2).all() and kept.mean() < 6


def test_the_loss_is_cross_entropy_of_the_draw(config, params, random):
    tokens = jnp.asarray(random.integers(3, config.vocab, (3, 8)), jnp.int32)
    # No row is masked whole here: all its positions would be equally sure, and the first by rounding alone.
    key = jax.random.key(11)
    for_noise, for_draw = jax.random.split(key)
    noisy, masked, _ = train.corrupt(tokens, for_noise, config.mask_id, 8)
    drawn = draw(config, params, noisy, for_draw, mask=None, **PASSES)
    student = {name: x * 1.1 for name, x in params.items()}
    log_p = np.log(probabilities(config, student, noisy, ()))
    picked = np.take_along_axis(log_p, np.asarray(drawn)[..., None], 2)[..., 0]
    settings = train.TrainConfig(steps=1)
    value = jax.jit(functools.partial(distill.student_loss, config, settings, **PASSES))(student, params, tokens, key)
    np.testing.assert_allclose(value, -picked[np.asarray(masked)].mean(), rtol=1e-5)


def test_a_student_learns_from_its_teacher_alone(saved, tmp_path, texts):
    """The teacher is random, so what it says is nowhere in the texts; on draws it never saw the student does better than the
    teacher itself, which looks at the first of the two steps only."""
    settings = train.TrainConfig(rows=8, length=16, steps=80, learning_rate=1e-2, average=0.9, weight_decay=0.0)
    distill.run(settings, saved, tmp_path, teacher_steps=4, student_steps=2, seed_texts=texts)
    config, student, tokenizer = checkpoint.load(tmp_path, dtype=jnp.float32)
    teacher_config, teacher, teacher_tokenizer = checkpoint.load(saved, dtype=jnp.float32)
    assert config == teacher_config and tokenizer.to_str() == teacher_tokenizer.to_str()
    (stream, _) = train.prepare(config, texts, tokenizer)[1]
    rows = jnp.asarray(stream[: 16 * 16].reshape(16, 16))
    loss = jax.jit(lambda params, key: distill.student_loss(config, settings, params, teacher, rows, key, **PASSES))
    keys = jax.random.split(jax.random.key(99), 10)
    before, after = (np.mean([loss(params, key) for key in keys]) for params in (teacher, student))
    assert after < before - 0.05


@pytest.mark.parametrize("steps", [(8, 3), (8, 8), (2, 8), (8, 0)])
def test_steps_must_divide(steps, saved, tmp_path):
    with pytest.raises(ValueError, match="teacher_steps: expected a multiple of student_steps"):
        distill.run(None, saved, tmp_path, teacher_steps=steps[0], student_steps=steps[1])
