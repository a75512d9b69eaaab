"""Step distillation: a student learns to do in one pass what its teacher does in several."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels import lm_head_scores, masks, mix_guidance, unmask_topk
from dlm_kernels.denoiser import checkpoint, data, divergence, model, train


def run(
    settings, teacher, out, *, teacher_steps, student_steps, temperature=0.0, guidance=1.0, seed_texts=None, report=None
):
    """Trains a copy of the checkpoint `teacher` into directory `out`: 32 -> 8, then with that as the teacher 8 -> 2, and so on.

    What takes the teacher teacher_steps passes takes the student student_steps; temperature is that of the teacher's decoding,
    guidance its scale: with one the student learns what guidance says and needs no second stream, and the steps may be equal.
    Stops, saves and resumes as `train.run` does. Returns the student's parameters. Raises ValueError where the steps do not
    divide.
    """
    if student_steps < 1 or teacher_steps % student_steps or (teacher_steps == student_steps and guidance == 1):
        raise ValueError(
            f"teacher_steps: expected a multiple of student_steps {student_steps}, above it, got {teacher_steps}"
        )
    config, params, _ = checkpoint.load(teacher, dtype=jnp.float32)
    objective = functools.partial(
        student_loss, teacher_steps=teacher_steps, student_steps=student_steps, temperature=temperature, guidance=guidance
    )
    return train.run(
        config, settings, out, initial=teacher, objective=objective, given=params, seed_texts=seed_texts, report=report
    )


def student_loss(
    config, settings, params, teacher, tokens, key, *, teacher_steps, student_steps, temperature=0.0, guidance=1.0
):
    """The divergence of the student, who sees a state once, from the teacher, who decodes on from it for several passes.

        noisy, span = student_state(tokens)
        target = teacher_states(teacher, noisy, ...)                            # each token's, from the pass that revealed it
                                                                                # guided away from what it says without the rest
        p, q = softmax(head(target)), softmax(head(hidden_states(params, noisy)))
        return mean(KL(p || q) where masked)

    At temperature 0 what the teacher reveals, and so the target, follows from the state: the student can learn it. Source: SDTT
    (Deschenaux and Gulcehre 2024), whose teacher samples and whose divergence is reversed.
    """
    for_noise, for_draw = jax.random.split(key)
    noisy, span = student_state(tokens, for_noise, config.mask_id, student_steps)
    document = masks.packed(data.segments(tokens, config.eos_id).astype(jnp.int32))
    options = dict(mask=document, implementation=settings.implementation)
    target = teacher_states(
        config, teacher, noisy, for_draw, passes=teacher_steps // student_steps,
        quota=-(-span.sum(1) // teacher_steps), temperature=temperature,
        guidance=guidance, prompt=None if guidance == 1 else ~span, **options,
    )  # fmt: skip
    hidden = model.hidden_states(config, params, noisy, **options)
    masked = (noisy == config.mask_id).reshape(-1)
    return divergence.divergence(
        hidden.reshape(-1, config.d_model), model.head_weight(config, params),
        target.reshape(-1, config.d_model), model.head_weight(config, teacher),
        masked / jnp.maximum(masked.sum(), 1),
    )  # fmt: skip


def student_state(tokens, key, mask_id, student_steps):
    """A state that a student meets: a span of each row decoded for some of its steps, everything around it given.

    tokens int32 [B, L]. The span's length is uniform on 1..L, its place too, or at the row's end in every other row (a prompt to
    go on from); of its n tokens k n / student_steps are masked, rounded up, k uniform on 1..student_steps and the tokens anywhere
    in it. Returns the masked tokens and the span, bool [B, L].
    """
    b, length = tokens.shape
    for_length, for_place, for_count, for_order = jax.random.split(key, 4)
    size = jax.random.randint(for_length, (b,), 1, length + 1)
    begin = jnp.floor(jax.random.uniform(for_place, (b,)) * (length - size + 1)).astype(jnp.int32)
    begin = jnp.where(jnp.arange(b) % 2, length - size, begin)
    left = jax.random.randint(for_count, (b,), 1, student_steps + 1)
    column = jnp.arange(length)
    inside = (begin[:, None] <= column) & (column < (begin + size)[:, None])
    draw = jnp.where(inside, jax.random.uniform(for_order, (b, length)), 2.0)
    rank = jnp.argsort(jnp.argsort(draw, axis=1), axis=1)
    masked = rank < (-(-(left * size) // student_steps))[:, None]
    return jnp.where(masked, mask_id, tokens), inside


def teacher_states(
    config, params, tokens, key, *, passes, quota, temperature, mask, guidance=1.0, prompt=None, implementation=None
):
    """Hidden states [B, L, D], of every mask in `tokens` [B, L] at the pass that reveals it, and at the last for those left.

    The teacher reveals quota[b] tokens a pass, those surest first, greedily or, at a temperature, sampled. With `prompt`, bool
    [B, L], it is guided with that scale, away from what it says where the prompt is masked.
    """
    kept = None
    head = model.head_weight(config, params)
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
        scores = lm_head_scores(
            hidden, head, active=active, banned_tokens=jnp.asarray([config.mask_id, config.pad_id]),
            implementation=implementation, **sampling,
        )  # fmt: skip
        tokens = unmask_topk(
            tokens, scores, mask_id=config.mask_id, num_unmask=quota, implementation=implementation
        ).tokens
    return jax.lax.stop_gradient(kept)
