"""Step distillation: a student learns to do in one pass what its teacher does in several."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels import lm_head_scores, masked_divergence, masks, mix_guidance, unmask_topk
from dlm_kernels.denoiser import blocks, checkpoint, data, evaluate, limits, model, train


def run(
    settings, teacher, out, *,
    teacher_steps, student_steps, temperature=0.0, guidance=1.0, on_policy=0.5, initial=None, seed_texts=None,
    report=None,
):  # fmt: skip
    """Trains a copy of the checkpoint `teacher` into directory `out`: 32 -> 8, then with that as the teacher 8 -> 2, and so on.

    What takes the teacher teacher_steps passes takes the student student_steps; temperature is that of the teacher's decoding,
    guidance its scale: with one the student learns what guidance says and needs no second stream, and the steps may be equal.
    on_policy: see `student_loss`. initial: a student to start from in the place of the teacher's copy. Stops, saves, resumes and
    takes seed_texts as `train.run` does. Returns the student's parameters. Raises ValueError where the steps do not divide, a
    student differs from its teacher in its config or tokenizer, or the run in `out` began with another teacher or other numbers
    than these.
    """
    limits.counts(teacher_steps=teacher_steps, student_steps=student_steps)
    if teacher_steps % student_steps or (teacher_steps == student_steps and guidance == 1):
        raise ValueError(
            f"teacher_steps: expected a multiple of student_steps {student_steps}, above it, got {teacher_steps}"
        )
    limits.numbers(guidance=guidance)
    limits.numbers(0, temperature=temperature)
    limits.numbers(0, 1, on_policy=on_policy)
    if pathlib.Path(teacher).resolve() == pathlib.Path(out).resolve():
        raise ValueError(f"teacher: expected another directory than the one that is written, got {out}")
    config, params, tokenizer = checkpoint.load(teacher, dtype=jnp.float32, learnt_masks=True)
    if initial is not None:
        its, own = checkpoint.described(initial)
        if its != config or own.to_str() != tokenizer.to_str():
            raise ValueError(f"initial: expected a student of the config and tokenizer of {teacher}, got {initial}")
    told = dict(
        teacher_steps=teacher_steps, student_steps=student_steps, temperature=temperature, guidance=guidance, on_policy=on_policy
    )  # fmt: skip
    return train.run(
        config, settings, out,
        initial=initial or teacher, objective=functools.partial(student_loss, **told), given=params,
        told=told | {"teacher": train.fingerprint(params)}, batches=Rows, seed_texts=seed_texts,
        report=report,
    )  # fmt: skip


def distance(teacher, students, texts, *, rows=16, length=128, draws=8, seed=1, implementation=None, **options):
    """[`student_loss` of each of the students' parameters], on the same states of held-out texts; options as it takes them.

    teacher: (config, params, tokenizer). Where students lead themselves to states, each is led to its own.
    """
    config, params, tokenizer = teacher
    settings = train.TrainConfig(steps=1, implementation=implementation)
    stream = data.stream(tokenizer, texts, config.eos_id)
    tokens = evaluate.rows_of(stream, rows, length, np.random.default_rng(seed))
    loss = jax.jit(lambda student, key: student_loss(config, settings, student, params, tokens, key, **options))
    keys = jax.random.split(jax.random.key(seed), draws)
    return [float(np.mean([loss(student, key) for key in keys])) for student in students]


class Rows:
    """`data.Batches` in which every other row begins with a document, as what a prompt opens does."""

    def __init__(self, streams, rows, length, seed, eos_id):
        self.batches, self.seed = data.Batches(streams, rows, length, seed), seed
        self.begins = [(i, begin) for i, s in enumerate(streams) for begin in _begins(s[: -length], eos_id)]

    def __getitem__(self, step):
        rows = self.batches[step]
        draw = np.random.default_rng([self.seed, step]).integers(len(self.begins), size=len(rows) // 2)
        for row, (i, begin) in zip(rows[1::2], (self.begins[n] for n in draw)):
            row[:] = self.batches.streams[i][begin : begin + len(row)]
        return rows


def _begins(stream, eos_id):
    return [0, *(np.flatnonzero(stream == eos_id) + 1).tolist()]


def student_loss(
    config, settings, params, teacher, tokens, key, *,
    teacher_steps, student_steps, temperature=0.0, guidance=1.0, on_policy=0.0,
):  # fmt: skip
    """The divergence of the student, who sees a state once, from the teacher, who decodes on from it for several passes.

        noisy, span = student_state(tokens) or, in a share on_policy of the updates, own_state(params, tokens, span)
        target = teacher_states(teacher, noisy, ...)                            # each token's, from the pass that revealed it
                                                                                # guided away from what it says without the rest
        p, q = softmax(head(target)), softmax(head(hidden_states(params, noisy)))
        return mean(KL(p || q) where masked)

    At temperature 0 what the teacher reveals, and so the target, follows from the state: the student can learn it. Source: SDTT
    (Deschenaux and Gulcehre 2024), whose teacher samples and whose divergence is reversed; the student's own states as in
    Agarwal et al. 2024.
    """
    for_noise, for_draw = jax.random.split(key)
    noisy, span = student_state(tokens, for_noise, config.mask_id, student_steps)
    # Where documents end within the span is what a decoder does not know.
    document = masks.packed(data.segments(jnp.where(span, config.mask_id, tokens), config.eos_id).astype(jnp.int32))
    options = dict(mask=document, implementation=settings.implementation)
    if on_policy:
        for_own, for_steps = jax.random.split(jax.random.fold_in(key, 2))
        own = functools.partial(own_state, config, student_steps=student_steps, **options)
        noisy = jax.lax.cond(
            jax.random.uniform(for_own) < on_policy, lambda: own(params, tokens, span, for_steps), lambda: noisy
        )
    target = teacher_states(
        config, teacher, noisy, for_draw, passes=teacher_steps // student_steps,
        quota=-(-span.sum(1) // teacher_steps), temperature=temperature,
        guidance=guidance, prompt=None if guidance == 1 else ~span, **options,
    )  # fmt: skip
    hidden = model.hidden_states(config, params, noisy, **options)
    masked = noisy == config.mask_id
    return masked_divergence(
        hidden, model.head_weight(config, params), target, model.head_weight(config, teacher),
        masked / jnp.maximum(masked.sum(), 1), implementation=settings.implementation,
    )  # fmt: skip


def student_state(tokens, key, mask_id, student_steps):
    """A state that a student meets: a span of each row decoded for some of its steps, everything around it given.

    tokens int32 [B, L]. The span's length is uniform on 1..L and so is its place, or in every other row uniform on L/2..L and at
    the row's end (a prompt to go on from); of its n tokens k n / student_steps are masked, rounded up, k uniform on
    1..student_steps and the tokens anywhere in it. Returns the masked tokens and the span, bool [B, L].
    """
    b, length = tokens.shape
    for_length, for_place, for_count, for_order = jax.random.split(key, 4)
    prompted = jnp.arange(b) % 2 == 1
    size = jax.random.randint(for_length, (b,), jnp.where(prompted, (length + 1) // 2, 1), length + 1)
    begin = jnp.floor(jax.random.uniform(for_place, (b,)) * (length - size + 1)).astype(jnp.int32)
    begin = jnp.where(prompted, length - size, begin)
    left = jax.random.randint(for_count, (b,), 1, student_steps + 1)
    column = jnp.arange(length)
    inside = (begin[:, None] <= column) & (column < (begin + size)[:, None])
    draw = jnp.where(inside, jax.random.uniform(for_order, (b, length)), 2.0)
    rank = jnp.argsort(jnp.argsort(draw, axis=1), axis=1)
    masked = rank < (-(-(left * size) // student_steps))[:, None]
    return jnp.where(masked, mask_id, tokens), inside


def own_state(config, params, tokens, span, key, *, student_steps, mask, implementation=None):
    """A state that the student brings itself to: `span` decoded by it, greedily, for 0 to student_steps - 1 of its steps.

    How many is one number for all rows, drawn. Its errors are then among what it learns to go on from.
    """
    params = jax.lax.stop_gradient(params)
    quota = -(-span.sum(1) // student_steps)

    def one_pass(_, tokens):
        hidden = model.hidden_states(config, params, tokens, mask=mask, implementation=implementation)
        return reveal(config, params, tokens, hidden, quota, implementation=implementation)

    taken = jax.random.randint(key, (), 0, student_steps)
    return jax.lax.fori_loop(0, taken, one_pass, jnp.where(span, config.mask_id, tokens))


def reveal(config, params, tokens, hidden, quota, *, implementation=None, **sampling):
    """`tokens` [B, L] with quota[b] of each row's masks replaced, those surest first."""
    scores = lm_head_scores(
        hidden, model.head_weight(config, params), active=tokens == config.mask_id,
        banned_tokens=blocks.banned_ids(config), implementation=implementation, **sampling,
    )  # fmt: skip
    return unmask_topk(tokens, scores, mask_id=config.mask_id, num_unmask=quota, implementation=implementation).tokens


def teacher_states(
    config, params, tokens, key, *, passes, quota, temperature, mask, guidance=1.0, prompt=None, implementation=None
):
    """Hidden states [B, L, D], of every mask in `tokens` [B, L] at the pass that reveals it, and at the last for those left.

    The teacher reveals quota[b] tokens a pass, those surest first, greedily or, at a temperature, sampled. With `prompt`, bool
    [B, L], it is guided with that scale, away from what it says where the prompt is masked.
    """
    kept = None
    for step in range(passes):
        active = tokens == config.mask_id
        hidden = model.hidden_states(config, params, tokens, mask=mask, implementation=implementation)
        if prompt is not None:
            without = jnp.where(prompt, config.mask_id, tokens)
            other = model.hidden_states(config, params, without, mask=mask, implementation=implementation)
            hidden = mix_guidance(hidden, other, guidance, implementation=implementation)
        kept = hidden if kept is None else jnp.where(active[..., None], hidden, kept)
        if step == passes - 1:
            break
        sampling = dict(temperature=temperature, key=jax.random.fold_in(key, step)) if temperature else {}
        tokens = reveal(config, params, tokens, hidden, quota, implementation=implementation, **sampling)
    return jax.lax.stop_gradient(kept)
