"""What a denoiser learns by: the loss over masks at every ratio, the one of blocks, and that over random tokens."""

import jax
import jax.numpy as jnp

from dlm_kernels import masked_cross_entropy, masks, soft_embedding
from dlm_kernels.denoiser import data, half, model

GOLDEN = 0.618034  # multiples of it, modulo 1, spread evenly


def corrupt(tokens, key, mask_id, block_size):
    """Masks exactly k of the n tokens of each block of each row, k uniform on 1..n and spread evenly over the blocks.

    tokens int32 [B, L]; block_size an int or a traced scalar, L for whole rows. Returns the masked tokens, which are masked,
    bool [B, L], and their block's ratio k / n, float32 [B, L].
    """
    b, length = tokens.shape
    for_ratio, for_place = jax.random.split(key)
    position = jnp.arange(length)
    block = position // block_size
    size = jnp.minimum((block + 1) * block_size, length) - block * block_size
    spread = jnp.arange(b)[:, None] / b + block * GOLDEN
    count = jnp.floor((jax.random.uniform(for_ratio, ()) + spread) % 1.0 * size).astype(jnp.int32) + 1
    draw = jax.random.uniform(for_place, (b, length))
    before = (block[:, None] == block) & (draw[:, None, :] < draw[:, :, None])
    before |= (block[:, None] == block) & (draw[:, None, :] == draw[:, :, None]) & (position < position[:, None])
    masked = before.sum(-1) < count
    return jnp.where(masked, mask_id, tokens), masked, count / size


def with_errors(tokens, noisy, masked, key, share, special):
    """Replaces about `share` of the tokens that `corrupt` left visible by tokens from elsewhere in the batch.

    Of a row's columns a share of 2 share, evenly spaced from a random one on, is checked: every other one of these is replaced
    where it is visible, so that the model learns both to keep and to reject. special: ids, which are never written, nor
    replaced. Returns the tokens and which are checked, bool [B, L], never a masked one. Source: LLaDA2.1's token-to-token editing.
    """
    b, length = tokens.shape
    for_offset, for_parity, for_other = jax.random.split(key, 3)
    # The columns where this passes a whole number: spacing of any length, and at most 2 share L + 1 of them.
    passed = jnp.floor(jnp.arange(length + 1) * (2 * share) + jax.random.uniform(for_offset, (b, 1))).astype(jnp.int32)
    checked = (passed[:, 1:] > passed[:, :-1]) & ~masked & ~jnp.isin(tokens, special)
    parity = jax.random.randint(for_parity, (b, 1), 0, 2)
    other = jax.random.permutation(for_other, tokens.reshape(-1)).reshape(b, length)
    replaced = checked & (passed[:, 1:] % 2 == parity) & ~jnp.isin(other, special)
    return jnp.where(replaced, other, noisy), checked


def loss(config, params, tokens, key, *, least_ratio=0.0, error_share=0.0, implementation=None):
    """The bound on -log p per token, in nats, of packed rows [B, L]: cross-entropy of the masked tokens over the masked ratio.

        noisy, masked, ratio = corrupt(tokens)
        nll = -log_softmax(head(hidden_states(noisy)))[tokens]
        return sum(nll[masked] / ratio[masked]) / (B * L)

    least_ratio: ratios below it weigh as if they were it. The few tokens of such rows would otherwise carry the gradient of
    a whole row each; 0 is the bound itself. error_share: see `with_errors`; what it checks is learnt with weight 1, and with any
    the value is no bound. Source: MDLM, LLaDA.
    """
    b, length = tokens.shape
    noisy, masked, ratio = corrupt(tokens, key, config.mask_id, length)
    # Of what is visible: the ends of all documents would tell the model which masks are end-of-text, and the value be no bound.
    document = masks.packed(data.segments(noisy, config.eos_id).astype(jnp.int32))
    weights = masked / (jnp.maximum(ratio, least_ratio) * (b * length))
    # Evenly spread counts add up to at most this many, so the head sees half of the rows, in an array of fixed size.
    most = (b + 1) * length // 2 + b
    if error_share:
        special = jnp.array([config.pad_id, config.eos_id, config.mask_id])
        noisy, checked = with_errors(tokens, noisy, masked, jax.random.fold_in(key, 1), error_share, special)
        weights += checked / (b * length)
        masked |= checked
        most += b * (int(2 * error_share * length) + 2)  # one more than there can be, for rounding in float32
    most = min(most, b * length)
    hidden = model.hidden_states(config, params, noisy, mask=document, implementation=implementation)
    (index,) = jnp.nonzero(masked.reshape(-1), size=most, fill_value=b * length)
    hidden, targets, weights = (
        x.reshape(b * length, *x.shape[2:]).at[index].get(mode="fill", fill_value=0)[None]
        for x in (hidden, tokens, weights)
    )
    return masked_cross_entropy(
        hidden, model.head_weight(config, params), targets, weights, implementation=implementation
    )


def check_blocks(config):
    """Raises ValueError for a model that `block_states` does not compute: of a block of its own it sees the masks behind, too."""
    if config.block_size is not None:
        got = f"one that attends by its own, of {config.block_size}"
        raise ValueError(f"config: expected a model that attends to all, which blocks of any size can be asked of, got {got}")


def block_loss(config, params, tokens, key, block_size, *, least_ratio=0.0, implementation=None):
    """`loss` where a block is denoised given the clean blocks before it and nothing after: block 1 is autoregression.

    All blocks of a row are learnt from at once: the model reads [noisy; clean] rows under `masks.block_diffusion`.
    block_size: an int or a traced scalar. Source: BD3-LM (Arriola et al. 2025).
    """
    noisy, masked, ratio = corrupt(tokens, key, config.mask_id, block_size)
    hidden = block_states(config, params, noisy, tokens, block_size, implementation=implementation)
    weights = masked / (jnp.maximum(ratio, least_ratio) * tokens.size)
    return masked_cross_entropy(
        hidden, model.head_weight(config, params), tokens, weights, implementation=implementation
    )


def block_states(config, params, noisy, clean, block_size, *, implementation=None):
    """The states of every block of `noisy` [B, L], given the blocks of `clean` before its own: [B, L, d_model].

    Raises ValueError where the config has a block_size.
    """
    check_blocks(config)
    length = clean.shape[1]
    column = jnp.arange(length, dtype=jnp.int32)
    hidden = model.hidden_states(
        config,
        params,
        jnp.concatenate([noisy, clean], axis=1),
        positions=jnp.tile(column, 2)[None],
        mask=masks.block_diffusion(length, block_size),
        implementation=implementation,
    )
    if not config.shifted:
        return hidden[:, :length]
    # What a block's first token is told by is the column before, which by then is clean.
    begins = (column % block_size == 0) & (column > 0)
    return jnp.where(begins[:, None], hidden[:, length:], hidden[:, :length])


def uniform_loss(config, params, tokens, key, *, implementation=None):
    """Cross-entropy of every token where some are random: what `renoise.decode` asks of a model, which no mask tells where.

        noisy = where(uniform() < ratio, random tokens, tokens)                 # a ratio a row, spread evenly over 0-100%
        soft = soft_embedding(hidden_states(noisy), embed)                      # in every other row; zeros in the others
        return mean(-log_softmax(head(hidden_states(self_conditioned(noisy, soft))))[tokens])

    packed rows [B, L]; config.self_conditioning. No gradient flows through soft. Source: DiffusionGemma's fine-tuning.
    """
    b, length = tokens.shape
    for_ratio, for_place, for_token, for_rows = jax.random.split(key, 4)
    ratio = (jax.random.uniform(for_ratio, ()) + jnp.arange(b)[:, None] / b) % 1.0
    random = jax.random.randint(for_token, (b, length), 0, config.vocab)
    noisy = jnp.where(jax.random.uniform(for_place, (b, length)) < ratio, random, tokens)
    # Of what is given, as in `loss`.
    document = masks.packed(data.segments(noisy, config.eos_id).astype(jnp.int32))
    options = dict(mask=document, implementation=implementation)
    head, embedded = model.head_weight(config, params), half.look_up(params["embed"], noisy)
    first = model.hidden_states(config, params, noisy, **options)
    soft = soft_embedding(first, head, embedding=params["embed"], implementation=implementation)
    # Neighbouring ratios take turns, whichever rows begin.
    turn = (jnp.arange(b) + jax.random.randint(for_rows, (), 0, 2)) % 2 == 0
    soft = jnp.where(turn[:, None, None], jax.lax.stop_gradient(soft), 0)
    embedded = model.self_conditioned(config, params, embedded, soft, implementation)
    hidden = model.hidden_states(config, params, noisy, embedded=embedded, **options)
    weights = jnp.full(tokens.shape, 1 / tokens.size)
    return masked_cross_entropy(hidden, head, tokens, weights, implementation=implementation)
