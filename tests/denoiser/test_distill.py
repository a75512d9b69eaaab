"""The teacher's states are those of its passes, the loss is the divergence from them, and a student comes closer to its teacher."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels.denoiser import checkpoint, data, distill, model, train

states = jax.jit(distill.teacher_states, static_argnums=0, static_argnames=("passes", "temperature"))


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(config, params, tokens):
    return model.hidden_states(config, params, tokens)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_p(config, params, hidden):
    return log_softmax(np.asarray(hidden, np.float64) @ np.asarray(model.head_weight(config, params), np.float64).T)


def test_the_target_is_the_state_at_the_pass_that_reveals_it(config, params, random):
    """Rows with 7 and 5 masks, 2 and 1 revealed a pass, 3 passes: what is left then has the last pass's states."""
    tokens = random.integers(3, config.vocab, (2, 10)).astype(np.int32)
    tokens[0, 2:9] = tokens[1, 1:6] = config.mask_id
    quota = np.array([2, 1], np.int32)
    ours = np.asarray(states(config, params, tokens, None, passes=3, quota=quota, temperature=0.0, mask=None))
    for row in range(2):
        board = tokens[row].copy()
        for step in range(3):
            hidden = np.asarray(hidden_states(config, params, board[None]))[0]
            p = log_p(config, params, hidden)
            p[:, [config.mask_id, config.pad_id]] = -np.inf
            todo = [c for c in range(10) if board[c] == config.mask_id]
            shown = todo if step == 2 else sorted(todo, key=lambda c: -p[c].max())[: quota[row]]
            for c in shown:
                np.testing.assert_allclose(ours[row, c], hidden[c], rtol=2e-4, atol=2e-5)
                board[c] = p[c].argmax()


def test_a_teacher_with_a_temperature_draws_anew_in_each_pass(config, params, monkeypatch):
    """Of three passes the last reveals nothing."""
    given, reveal = [], distill.reveal

    def watched(*arguments, **options):
        given.append((options["temperature"], *jax.random.key_data(options["key"]).tolist()))
        return reveal(*arguments, **options)

    monkeypatch.setattr(distill, "reveal", watched)
    tokens, options = np.full((1, 6), config.mask_id, np.int32), dict(passes=3, quota=np.array([1]), mask=None)
    distill.teacher_states(config, params, tokens, jax.random.key(0), temperature=0.7, **options)
    assert len(set(given)) == 2 and {temperature for temperature, *_ in given} == {0.7}


def test_states_a_student_meets(config):
    """Of a span of n tokens k n / 4 are masked; every other span is the end of its row, half of it at least; k is spread evenly."""
    tokens = jnp.full((400, 24), 7, jnp.int32)
    noisy, span = (np.asarray(x) for x in distill.student_state(tokens, jax.random.key(3), config.mask_id, 4))
    masked, size = noisy == config.mask_id, span.sum(1)
    assert not (masked & ~span).any()
    count = masked.sum(1)
    done = [(-(-k * size // 4) == count) for k in (1, 2, 3, 4)]
    assert np.any(done, axis=0).all()
    wide = size >= 8  # there the four counts differ
    shares = np.array([d[wide].mean() for d in done])
    np.testing.assert_allclose(shares, 0.25, atol=0.08)
    whole = done[3] & wide
    for row in np.flatnonzero(whole):
        begin = masked[row].argmax()
        assert masked[row, begin : begin + size[row]].all() and count[row] == size[row]
        assert row % 2 == 0 or begin + size[row] == 24
    assert set(size[::2]) == set(range(1, 25)) and set(size[1::2]) == set(range(12, 25))
    sparse = noisy[done[1] & wide]
    assert len({tuple(row == config.mask_id) for row in sparse}) == len(sparse)


@pytest.mark.parametrize("taken", [0, 2])
def test_the_states_it_leads_itself_to(taken, config, params, random):
    """Spans of 9 and 3 in 4 steps: 3 and 1 tokens a pass, the surest, whatever stood there; the rest is as given."""
    key = next(k for k in jax.random.split(jax.random.key(0), 40) if jax.random.randint(k, (), 0, 4) == taken)
    tokens = random.integers(3, config.vocab, (2, 12)).astype(np.int32)
    span = np.arange(12) >= np.array([[3], [9]])
    ours = jax.jit(distill.own_state, static_argnums=0, static_argnames="student_steps")(
        config, params, tokens, span, key, student_steps=4, mask=None
    )
    for row, quota in enumerate((3, 1)):
        board = np.where(span[row], config.mask_id, tokens[row])
        for _ in range(taken):
            p = log_p(config, params, hidden_states(config, params, board[None]))[0]
            p[:, [config.mask_id, config.pad_id]] = -np.inf
            for c in sorted(np.flatnonzero(board == config.mask_id), key=lambda c: -p[c].max())[:quota]:
                board[c] = p[c].argmax()
        np.testing.assert_array_equal(ours[row], board)


def test_a_share_of_the_states_is_its_own(config, params, random):
    """With everything on policy the loss depends on what the student writes, and no more on where `student_state` masks."""
    tokens = jnp.asarray(random.integers(3, config.vocab, (4, 12)), jnp.int32)
    steps = dict(teacher_steps=4, student_steps=2)
    settings = train.TrainConfig(steps=1)
    loss = jax.jit(functools.partial(distill.student_loss, config, settings), static_argnames=(*steps, "on_policy"))
    student = {name: x * 1.1 for name, x in params.items()}
    for seed in range(6):
        key = jax.random.key(seed)
        _, span = distill.student_state(tokens, jax.random.split(key)[0], config.mask_id, 2)
        # Another text in the span, with ends of documents: what is read around it stays.
        other = jnp.where(jnp.arange(12) % 3 == 1, config.eos_id, (tokens + 5) % 50 + 3)
        other = jnp.where(span, other, tokens)
        own = [loss(student, params, t, key, on_policy=1.0, **steps) for t in (tokens, other)]
        np.testing.assert_allclose(*own, rtol=1e-6)
        given = [loss(student, params, t, key, on_policy=0.0, **steps) for t in (tokens, other)]
        left = (distill.student_state(tokens, jax.random.split(key)[0], config.mask_id, 2)[0] == config.mask_id) == span
        assert left.all() or abs(given[0] - given[1]) > 1e-4
    with pytest.raises(ValueError, match=r"on_policy: expected a number in \[0, 1\], got 1.5"):
        distill.run(settings, None, None, on_policy=1.5, **steps)


def test_every_other_row_begins_with_a_document():
    stream = np.concatenate([np.arange(10, 17), [1], np.arange(20, 50), [1], np.arange(60, 100), [1]]).astype(np.int32)
    rows = distill.Rows([stream, stream + 100], 4, 5, 3, 1)
    begins, others = set(), set()
    for step in range(60):
        found = rows[step]
        assert found.shape == (4, 5)
        np.testing.assert_array_equal(found, distill.Rows([stream, stream + 100], 4, 5, 3, 1)[step])
        begins |= set(found[1::2, 0].tolist())
        others |= set(found[::2, 0].tolist())
    # The second stream has no end of a document, and so one beginning.
    assert begins == {10, 20, 60, 110} and len(others) > 20


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_loss_is_the_divergence_from_the_teacher(guidance, config, params, random):
    tokens = jnp.asarray(random.integers(3, config.vocab, (4, 12)), jnp.int32)
    key = jax.random.key(11)
    noisy, span = distill.student_state(tokens, jax.random.split(key)[0], config.mask_id, 2)
    quota = -(-np.asarray(span.sum(1)) // 4)
    guided = {} if guidance == 1 else dict(guidance=guidance, prompt=~span)
    target = states(config, params, noisy, None, passes=2, quota=quota, temperature=0.0, mask=None, **guided)
    student = {name: x * 1.1 for name, x in params.items()}
    p = log_p(config, params, target)
    q = log_p(config, student, hidden_states(config, student, noisy))
    masked = np.asarray(noisy) == config.mask_id
    expected = (np.exp(p) * (p - q)).sum(-1)[masked].mean()
    assert masked.sum() > 8 and expected > 0.01
    steps = dict(teacher_steps=4, student_steps=2, guidance=guidance)
    loss = functools.partial(distill.student_loss, config, train.TrainConfig(steps=1), **steps)
    np.testing.assert_allclose(jax.jit(loss)(student, params, tokens, key), expected, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_student_learns_from_its_teacher_alone(temperature, saved, tmp_path, texts):
    """The teacher is random, so what it says is nowhere in the texts; on states it never saw the student is nearer to the
    teacher's two passes than the teacher's own first pass is."""
    settings = train.TrainConfig(rows=8, length=16, steps=80, learning_rate=1e-2, average=0.9, weight_decay=0.0)
    steps = dict(teacher_steps=4, student_steps=2, temperature=temperature)
    distill.run(settings, saved, tmp_path, seed_texts=texts, **steps)
    config, student, tokenizer = checkpoint.load(tmp_path, dtype=jnp.float32)
    teacher_config, teacher, teacher_tokenizer = checkpoint.load(saved, dtype=jnp.float32)
    assert config == teacher_config and tokenizer.to_str() == teacher_tokenizer.to_str()
    (stream, _) = train.prepare(config, texts, tokenizer)[1]
    rows = jnp.asarray(stream[: 16 * 16].reshape(16, 16))
    loss = jax.jit(lambda params, key: distill.student_loss(config, settings, params, teacher, rows, key, **steps))
    keys = jax.random.split(jax.random.key(99), 10)
    before, after = (np.mean([loss(params, key) for key in keys]) for params in (teacher, student))
    assert after < 0.92 * before
    texts = [text for _, text, _ in texts]
    both = distill.distance((config, teacher, tokenizer), (teacher, student), texts, rows=8, length=16, draws=4, **steps)
    assert both[1] < 0.95 * both[0]
    # It goes on with the same teacher and steps alone.
    checkpoint.save(tmp_path / "other", config, student, tokenizer)
    with pytest.raises(ValueError, match="^teacher_steps: expected 4, with which the run in .* began, got 8$"):
        distill.run(settings, saved, tmp_path, **steps | dict(teacher_steps=8))
    with pytest.raises(ValueError, match="^teacher: expected one whose embedding's SHA-256 begins with .* began, got one whose"):
        distill.run(settings, tmp_path / "other", tmp_path, **steps)
    with pytest.raises(ValueError, match="^teacher_steps: expected 4, with which the run in .* began, got None$"):
        train.run(None, settings, tmp_path)


def test_the_distance_of_a_teacher_from_itself(saved):
    """Of one that is asked for a single pass; guided, it is another's."""
    model = checkpoint.load(saved, dtype=jnp.float32)
    options = dict(rows=4, length=16, draws=2, teacher_steps=2, student_steps=2, on_policy=0.5)
    assert distill.distance(model, (model[1],), ["x = 1\n" * 30], **options)[0] == pytest.approx(0, abs=1e-5)
    assert distill.distance(model, (model[1],), ["x = 1\n" * 30], guidance=2.0, **options)[0] > 0.01


def test_guided_states_are_mixed_with_those_without_the_prompt(config, params, random):
    """One pass: scale * with + (1 - scale) * without, where the prompt is masked and nothing else."""
    tokens = random.integers(3, config.vocab, (2, 10)).astype(np.int32)
    tokens[:, 4:8] = config.mask_id
    prompt = np.zeros((2, 10), bool)
    prompt[:, :4] = True
    options = dict(passes=1, quota=np.array([1, 1]), temperature=0.0, mask=None)
    ours = states(config, params, tokens, None, guidance=2.5, prompt=prompt, **options)
    with_, without = (hidden_states(config, params, t) for t in (tokens, np.where(prompt, config.mask_id, tokens)))
    np.testing.assert_allclose(ours, 2.5 * with_ - 1.5 * without, rtol=1e-4, atol=1e-4)


def test_a_student_learns_guidance(saved, tmp_path, texts):
    """Alone, without a second stream, it is nearer to the guided teacher than the teacher without guidance is."""
    settings = train.TrainConfig(rows=8, length=16, steps=120, learning_rate=3e-3, average=0.9, weight_decay=0.0)
    steps = dict(teacher_steps=2, student_steps=2, guidance=3.0)
    student = distill.run(settings, saved, tmp_path, seed_texts=texts, **steps)
    config, teacher, tokenizer = checkpoint.load(saved, dtype=jnp.float32)
    (stream, _) = train.prepare(config, texts, tokenizer)[1]
    rows = jnp.asarray(stream[: 16 * 16].reshape(16, 16))
    loss = jax.jit(lambda params, key: distill.student_loss(config, settings, params, teacher, rows, key, **steps))
    keys = jax.random.split(jax.random.key(99), 10)
    before, after = (np.mean([loss(params, key) for key in keys]) for params in (teacher, student))
    assert after < 0.9 * before


@pytest.mark.parametrize("steps", [(8, 3), (8, 8), (2, 8)])
def test_steps_must_divide(steps, saved, tmp_path):
    with pytest.raises(ValueError, match="teacher_steps: expected a multiple of student_steps"):
        distill.run(None, saved, tmp_path, teacher_steps=steps[0], student_steps=steps[1])


@pytest.mark.parametrize(
    "steps, message",
    [((8, 0), "student_steps: .* got 0"), ((0, 8), "teacher_steps: .* got 0"), ((-8, 8), "teacher_steps: .* got -8"),
     ((16.0, 8), "teacher_steps: .* got 16.0"), ((8, 0.5), "student_steps: .* got 0.5")],
)  # fmt: skip
def test_steps_are_counts(steps, message, saved, tmp_path):
    settings = train.TrainConfig(steps=1, rows=2, length=16)
    with pytest.raises(ValueError, match=message.replace(".*", "expected an int of at least 1,")):
        distill.run(settings, saved, tmp_path / "out", teacher_steps=steps[0], student_steps=steps[1])


def test_a_student_is_of_its_teachers_shape_and_tokenizer(saved, tmp_path):
    """And is not written over it."""
    few, steps = train.TrainConfig(steps=1, rows=2, length=16), dict(teacher_steps=4, student_steps=2)
    config, params, tokenizer = checkpoint.load(saved)
    with pytest.raises(ValueError, match="teacher: expected another directory than the one that is written"):
        distill.run(few, saved, saved / ".." / saved.name, **steps)
    smaller = dataclasses.replace(config, layers=1)
    shapes = model.parameter_shapes(smaller)
    checkpoint.save(tmp_path / "smaller", smaller, {name: params[name] for name in shapes}, tokenizer)
    checkpoint.save(tmp_path / "foreign", config, params, data.train_tokenizer(["def f():"], 300))
    for student in (tmp_path / "smaller", tmp_path / "foreign"):
        with pytest.raises(ValueError, match=f"initial: expected a student of the config and tokenizer of .*, got {student}"):
            distill.run(few, saved, tmp_path / "out", initial=student, **steps)
    with pytest.raises(ValueError, match="out: expected a directory without a model"):
        distill.run(few, saved, tmp_path / "smaller", **steps)


def test_a_token_that_is_pad_and_end_at_once_may_be_revealed(config, params, random):
    """As Dream's and LLaDA's is: a student would else never learn to end."""
    both = dataclasses.replace(config, pad_id=9, eos_id=9)
    hidden = jnp.broadcast_to(1e3 * params["embed"][9], (1, 4, config.d_model))
    tokens = np.full((1, 4), config.mask_id, np.int32)
    revealed = distill.reveal(both, params, tokens, hidden, np.array([4], np.int32))
    np.testing.assert_array_equal(revealed, np.full((1, 4), 9))
