"""What a denoiser is worth on held-out text: bits per byte, holes filled right, errors corrected, functions that parse."""

import ast
import codeop
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels import masked_cross_entropy
from dlm_kernels.denoiser import correct, data, losses, sampler
from dlm_kernels.denoiser import model as denoiser

LEAST = 64 * 128  # tokens that `correction` asks for: who measures more beside it looks first, before minutes of work


def bits_per_byte(model, texts, *, block_size=None, rows=8, length=256, draws=4, seed=1, implementation=None):
    """The bound on -log2 p of the texts, over their UTF-8 bytes.

        loss(...) is nats per token; nats * tokens / log(2) / bytes

    model: (config, params, tokenizer). Averages `draws` stratified maskings of every row of `length` tokens. block_size: that
    of `losses.block_loss`, for decoding block after block, where 1 is autoregression, exact and in need of one draw only;
    None is `losses.loss`, whole rows. Returns a float.
    """
    config, params, _ = model
    stream = stream_of(model, texts, rows * length)
    count = len(stream) // length // rows * rows
    batches = stream[: count * length].reshape(-1, rows, length)

    @jax.jit
    def value(tokens, key):
        if block_size is None:
            return losses.loss(config, params, tokens, key, implementation=implementation)
        return losses.block_loss(config, params, tokens, key, block_size, implementation=implementation)

    key = jax.random.key(seed)
    nats = np.mean(
        [
            float(value(batch, jax.random.fold_in(key, draws * i + draw)))
            for i, batch in enumerate(batches)
            for draw in range(draws)
        ]
    )
    return float(nats) * len(stream) / np.log(2) / sum(len(text.encode()) for text in texts)


def stream_of(model, texts, least):
    """The texts' tokens, as `data.stream` has them. Raises ValueError where there are fewer than `least`."""
    config, _, tokenizer = model
    stream = data.stream(tokenizer, texts, config.eos_id)
    if len(stream) < least:
        raise ValueError(f"texts: expected at least {least} tokens, got {len(stream)}")
    return stream


def rows_of(stream, count, length, random):
    """int32 [count, length]: what stands at as many random places of `stream`. ValueError where it is not longer than a row."""
    if len(stream) <= length:
        raise ValueError(f"texts: expected more than {length} tokens, got {len(stream)}")
    begins = random.integers(0, len(stream) - length, count)
    return np.stack([stream[begin : begin + length] for begin in begins])


def infilling(model, texts, *, cases=64, hole=8, length=128, steps=4, seed=1, **options):
    """{"token_accuracy", "exact_match"} of holes of `hole` tokens in the middle of rows of `length` held-out tokens.

    All cases are one batch, decoded greedily in `steps` passes; options go to `sampler.decode`.
    """
    config, params, _ = model
    stream = stream_of(model, texts, length + 1)
    random = np.random.default_rng(seed)
    rows = rows_of(stream, cases, length, random)
    at = (length - hole) // 2
    holes = slice(at, at + hole)
    board = rows.copy()
    board[:, holes] = config.mask_id
    decoded = sampler.decode(config, params, board, block=hole, first=at, steps=steps, **options)
    right = np.asarray(decoded.tokens)[:, holes] == rows[:, holes]
    return {"token_accuracy": float(right.mean()), "exact_match": float(right.all(1).mean())}


def correction(model, texts, *, share=0.03, threshold=0.9, rows=64, length=128, seed=1, **options):
    """What `correct.correct` does to rows of held-out text, of whose tokens a `share` was replaced by tokens from elsewhere in it.

    {"repaired": of the wrong tokens, "noticed": likewise, changed at all, "damaged": of the right ones, changed}.
    """
    config, params, _ = model
    stream = stream_of(model, texts, max(rows * length, length + 1))
    random = np.random.default_rng(seed)
    right = rows_of(stream, rows, length, random)
    given = np.where(random.random(right.shape) < share, random.permutation(stream)[: right.size].reshape(right.shape), right)
    wrong = given != right
    if not wrong.any():
        raise ValueError(f"share: expected enough of {right.size} tokens to replace one, got {share}")
    made = np.asarray(correct.correct(config, params, given, threshold=threshold, **options).tokens)
    return {
        "repaired": float((made == right)[wrong].mean()),
        "noticed": float((made != given)[wrong].mean()),
        "damaged": float((made != right)[~wrong].mean()),
    }


def left_to_right_bits(model, tokens, last, *, implementation=None):
    """-log2 p per token of the `last` tokens of each row [B, L], by a model that reads from left to right; pads are not seen."""
    config, params, _ = model
    b, length = tokens.shape
    start = (tokens != config.pad_id).argmax(1)
    shifted = np.full_like(tokens, config.pad_id)
    for row, begin in enumerate(start):
        shifted[row, : length - begin] = tokens[row, begin:]
    column = np.arange(length) + start[:, None]
    scored = (column >= length - last) & (column < length) & (shifted != config.pad_id)

    nats = _left_to_right_nats(config, params, jnp.asarray(shifted), jnp.asarray(scored, jnp.float32), implementation)
    return float(nats) / np.log(2) / int(scored.sum())


@functools.partial(jax.jit, static_argnums=(0, 4))
def _left_to_right_nats(config, params, tokens, weights, implementation):
    """-log p of each token given those before it, times its weight, summed."""
    masked = jnp.full_like(tokens, config.mask_id)
    hidden = losses.block_states(config, params, masked, tokens, 1, implementation=implementation)
    return masked_cross_entropy(hidden, denoiser.head_weight(config, params), tokens, weights, implementation=implementation)


def parse_share(texts, *, unfinished=False):
    """The share of `texts` that Python's own parser takes; with `unfinished` also those that are the beginning of what it would.

    It takes an empty text too, which here counts as none: there is nothing in it that could be right.
    """
    parse = functools.partial(codeop.compile_command, symbol="exec") if unfinished else ast.parse
    parsed = 0
    for text in texts:
        try:
            parse(text)
        except (SyntaxError, ValueError, OverflowError):  # ValueError: a null byte
            continue
        parsed += bool(text.strip())
    return parsed / len(texts)


def held_out_headers(texts, most):
    """The first lines of top-level functions of the held-out texts, as prompts. ValueError where there is none."""
    found = []
    for text in texts:
        for unit in data.units(text):
            line = unit.splitlines()[0]
            if line.startswith("def ") and line.endswith(":"):
                found.append(line)
    if not found:
        raise ValueError("texts: expected a top-level function among them, got none")
    return found[:most]


def report(model, texts, *, cases=256, steps=4, report=None, implementation=None):
    """Everything measured of the model itself, as a dict; holes of 1, 4 and 8 tokens are filled in at most `steps` passes.

    report(name, number) is called as they come. Raises ValueError for a model that attends by blocks, before anything is measured.
    """
    losses.check_blocks(model[0])
    stream_of(model, texts, LEAST)
    numbers = {}
    for name, number in _measured(model, texts, cases, steps, dict(implementation=implementation)):
        numbers[name] = number
        if report:
            report(name, number)
    return numbers


def _measured(model, texts, cases, steps, options):
    """(name, number) of one measure after the other."""
    yield "held_out_bytes", sum(len(text.encode()) for text in texts)
    yield "bits_per_byte", bits_per_byte(model, texts, **options)
    yield "autoregressive_bits_per_byte", bits_per_byte(model, texts, block_size=1, draws=1, **options)
    for size in (4, 16, 64):
        yield f"bits_per_byte_in_blocks_of_{size}", bits_per_byte(model, texts, block_size=size, draws=1, **options)
    for threshold in (0.7, 0.9):
        yield f"correction_at_{threshold}", correction(model, texts, threshold=threshold, **options)
    for hole in (1, 4, 8):
        yield f"hole_of_{hole}", infilling(model, texts, cases=cases, hole=hole, steps=min(hole, steps), **options)
