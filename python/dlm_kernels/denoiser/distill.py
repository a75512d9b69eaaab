"""Step distillation: a student learns to do in one pass what its teacher does in several."""

import functools

import jax
import jax.numpy as jnp

from dlm_kernels import lm_head_scores, masked_cross_entropy, masks, unmask_topk
from dlm_kernels.denoiser import checkpoint, data, model, train


def run(settings, teacher, out, *, teacher_steps, student_steps, seed_texts=None, report=None):
    """Trains a copy of the checkpoint `teacher` into directory `out`: 32 -> 8, then with that as the teacher 8 -> 2, and so on.

    A row of settings.length tokens takes the teacher teacher_steps passes and the student student_steps. Stops, saves and
    resumes as `train.run` does. Returns the student's parameters. Raises ValueError where the steps do not divide.
    """
    if student_steps < 1 or teacher_steps % student_steps or teacher_steps == student_steps:
        raise ValueError(
            f"teacher_steps: expected a multiple of student_steps {student_steps}, above it, got {teacher_steps}"
        )
    config, params, _ = checkpoint.load(teacher, dtype=jnp.float32)
    objective = functools.partial(student_loss, passes=teacher_steps // student_steps, teacher_steps=teacher_steps)
    return train.run(
        config, settings, out, initial=teacher, objective=objective, given=params, seed_texts=seed_texts, report=report
    )


def student_loss(config, settings, params, teacher, tokens, key, *, passes, teacher_steps):
    """Cross-entropy of what the teacher drew over `passes` steps, by the student who sees the state before the first.

        noisy = corrupt(tokens)
        drawn = teacher_draw(teacher, noisy)                                    # each token from the step that revealed it
        return mean(-log_softmax(head(hidden_states(params, noisy)))[drawn] where masked)

    A draw from the teacher in the place of its distribution: in expectation, over draws, this is the forward KL divergence from
    teacher to student, plus a constant, and needs no [.., V] array. Source: SDTT (Deschenaux and Gulcehre 2024), whose
    divergence is reversed.
    """
    for_noise, for_draw = jax.random.split(key)
    noisy, masked, _ = train.corrupt(tokens, for_noise, config.mask_id, tokens.shape[1])
    document = masks.packed(data.segments(tokens, config.eos_id).astype(jnp.int32))
    options = dict(mask=document, implementation=settings.implementation)
    drawn = teacher_draw(config, teacher, noisy, for_draw, passes=passes, teacher_steps=teacher_steps, **options)
    hidden = model.hidden_states(config, params, noisy, **options)
    weights = masked / masked.sum()
    head = model.head_weight(config, params)
    return masked_cross_entropy(hidden, head, drawn, weights, implementation=settings.implementation)


def teacher_draw(config, params, tokens, key, *, passes, teacher_steps, mask, implementation=None):
    """A token for every mask in `tokens` [B, L]: sampled at the step that reveals it, and for those left at the last.

    The teacher reveals L / teacher_steps tokens a step, those surest first. Returns int32 [B, L], the given tokens among them.
    """
    quota = -(-tokens.shape[1] // teacher_steps)
    for step in range(passes):
        active = tokens == config.mask_id
        hidden = model.hidden_states(config, params, tokens, mask=mask, implementation=implementation)
        scores = lm_head_scores(
            hidden,
            model.head_weight(config, params),
            temperature=1.0,
            key=jax.random.fold_in(key, step),
            active=active,
            banned_tokens=jnp.asarray([config.mask_id, config.pad_id]),
            implementation=implementation,
        )
        revealed = unmask_topk(tokens, scores, mask_id=config.mask_id, num_unmask=quota, implementation=implementation)
        drawn = jnp.where(active, scores.token, tokens)
        tokens = revealed.tokens
    return jax.lax.stop_gradient(drawn)
