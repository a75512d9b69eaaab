"""Lossless speculative decoding: several future steps are drafted, and one batched pass checks them all."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_kernels import lm_head_scores, unmask_topk
from dlm_kernels.denoiser import blocks, limits, model


class Speculated(NamedTuple):
    tokens: jax.Array  # int32 [B, L]
    passes: jax.Array  # int32, batched passes made
    steps: jax.Array  # int32 [B], the steps that each row has come: what stepwise decoding makes as passes


def decode(
    config, params, tokens, *, block, steps, drafts, drafter=None, start=0, first=0, stop=None, banned_tokens=None,
    stop_at=None, implementation=None,
):  # fmt: skip
    """What `sampler.decode(block=block, steps=steps)` decides, token for token, in fewer passes.

        states = [tokens, guess after 1 step, ..., guess after drafts steps]
        following = [step(state) for state in states]                           # one batched forward pass
        while following[i] == states[i + 1]: i += 1                             # a right guess: its own step is true too
        tokens = following[i]

    The guess after j steps is what the last true state's scores would commit in j steps, had they stayed as they were; or, given
    `drafter`, the parameters of a student of the same shape, what its scores of the new true state would: one pass of it more,
    over B rows, for all guesses. Scores that are equal but for rounding may go either way, for a wider batch may round differently:
    so all scores are on a canvas where nothing at all is given.
    drafts: guesses per pass, static; each widens the batch by B rows. The other arguments are as in `sampler.decode`, greedy.
    Returns Speculated. Raises ValueError for arguments that do not fit. Source: FreeDave (Wu and Zhang 2025).
    """
    tokens = limits.canvas(tokens)
    limits.counts(block=block, drafts=drafts)
    limits.whole(1, steps=steps)
    if blocks.leads(config):
        raise ValueError(f"drafts: expected none for shifted logits in blocks of {config.block_size}, got {drafts}")
    columns = blocks.row_columns(config, tokens, start, first, stop)
    banned = blocks.banned_ids(config, banned_tokens)
    static = (config, min(block, tokens.shape[1]), drafts + 1, implementation)
    return _decode(static, params, drafter, tokens, columns, jnp.asarray(steps, jnp.int32), banned, stop_at)


@functools.partial(jax.jit, static_argnums=0)
def _decode(static, params, drafter, tokens, columns, steps, banned, stop_at):
    config, block, states, implementation = static
    b, length = tokens.shape
    rows = b * states
    hole = blocks.holes(config, tokens, columns)
    # Rows are (row, state) from here on: every array per row is repeated for its states.
    hole, start, first, stop = (
        jnp.repeat(x, states, 0) for x in (hole, *(columns[n] for n in ("start", "first", "stop")))
    )
    place, one_each = model.within(start, stop, length), model.within(start[::states], stop[::states], length)
    depth = jnp.tile(jnp.arange(states), b)

    def block_of(board):
        return blocks.next_block(hole & (board == config.mask_id), first, block)

    def quota(todo, step):
        return -(-todo // jnp.maximum(steps - step, 1))

    def commit(board, scores, at, inside, count):
        window = model.read_window(board, at, block)
        result = unmask_topk(
            window, scores, mask_id=config.mask_id, num_unmask=count, candidates=inside, implementation=implementation
        )
        board = model.write_window(board, result.tokens, at)
        return blocks.end_rows(config, stop_at, board, hole)

    def score(params, board, place, at, todo):
        hidden = model.read_window(model.hidden_states(config, params, board, **place, implementation=implementation), at, block)
        head = model.head_weight(config, params)
        return lm_head_scores(hidden, head, active=todo, banned_tokens=banned, implementation=implementation)

    def one_pass(carry):
        board, index, step, done, passes = carry  # index, step: of the true state's block
        current = jnp.repeat(block_of(board)[::states], states)
        step = jnp.where(current == index, step, 0)
        # A row that is through stays as it is: it has no mask left to commit.
        at, inside = blocks.window(hole, first, block, jnp.minimum(current, length // block))
        todo = inside & (model.read_window(board, at, block) == config.mask_id)
        scores = score(params, board, place, at, todo)
        following = commit(board, scores, at, inside, quota(todo.sum(1), step + depth))
        # State i + 1 is true if it is what follows state i, which is true; a step has to have happened in this very block.
        board_ = board.reshape(b, states, length)
        agrees = (following.reshape(b, states, length)[:, :-1] == board_[:, 1:]).all(-1)
        agrees &= (block_of(board) == current).reshape(b, states)[:, 1:]
        right = jnp.cumprod(agrees, axis=1).sum(1)  # [B], how many guesses
        last = jnp.arange(b) * states + right
        moved = todo.reshape(b, states, block).any((1, 2))
        done += jnp.where(moved, right + 1, 0)
        step = jnp.repeat(step[::states] + right, states)

        # From the last true state: one step of it is the new true state, more of it are the new guesses.
        def from_last(x):
            return jnp.repeat(x[last], states, 0)

        left, count = from_last(todo).sum(1), jnp.zeros(rows, jnp.int32)
        for ahead in range(states):
            count += jnp.where(depth >= ahead, quota(left - count, step + ahead), 0)
        scores, board, inside = jax.tree.map(from_last, (scores, board, inside))
        if drafter is not None:
            sure = quota(left, step)
            board = commit(board, scores, at, inside, sure)
            todo = inside & (model.read_window(board, at, block) == config.mask_id)
            drafted = score(drafter, board[::states], one_each, at[::states], todo[::states])
            scores, count = jax.tree.map(lambda x: jnp.repeat(x, states, 0), drafted), count - sure
        board = commit(board, scores, at, inside, count)
        return board, current, step + 1, done, passes + 1

    board = jnp.repeat(tokens, states, 0)
    zero = jnp.zeros(rows, jnp.int32)
    before = (board, zero - length, zero, jnp.zeros(b, jnp.int32), jnp.int32(0))
    board, _, _, done, passes = jax.lax.while_loop(
        lambda c: (block_of(c[0])[::states] < length).any(), one_pass, before
    )
    return Speculated(board[::states], passes, done)
