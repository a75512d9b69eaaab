"""What a denoiser is worth on held-out text: bits per byte, holes filled right, functions that parse."""

import ast
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels import masked_cross_entropy, masks
from dlm_kernels.denoiser import correct, data, generate, sampler, train
from dlm_kernels.denoiser import model as denoiser


def bits_per_byte(model, texts, *, block_size=None, rows=8, length=256, draws=4, seed=1, implementation=None):
    """The bound on -log2 p of the texts, over their UTF-8 bytes.

        loss(...) is nats per token; nats * tokens / log(2) / bytes

    model: (config, params, tokenizer). Averages `draws` stratified maskings of every row of `length` tokens. block_size: that
    of `train.block_loss`, for decoding block after block, where 1 is autoregression, exact and in need of one draw only;
    None is `train.loss`, whole rows. Returns a float.
    """
    config, params, tokenizer = model
    stream = data.stream(tokenizer, texts, config.eos_id)
    count = len(stream) // length // rows * rows
    if count == 0:
        raise ValueError(f"texts: expected at least {rows * length} tokens, got {len(stream)}")
    batches = stream[: count * length].reshape(-1, rows, length)

    @jax.jit
    def value(tokens, key):
        if block_size is None:
            return train.loss(config, params, tokens, key, implementation=implementation)
        return train.block_loss(config, params, tokens, key, block_size, implementation=implementation)

    key = jax.random.key(seed)
    nats = np.mean(
        [
            float(value(batch, jax.random.fold_in(key, draws * i + draw)))
            for i, batch in enumerate(batches)
            for draw in range(draws)
        ]
    )
    return float(nats) * len(stream) / np.log(2) / sum(len(text.encode()) for text in texts)


def infilling(model, texts, *, cases=64, hole=8, length=128, steps=4, seed=1, **options):
    """{"token_accuracy", "exact_match"} of holes of `hole` tokens in the middle of rows of `length` held-out tokens.

    All cases are one batch, decoded greedily in `steps` passes; options go to `sampler.decode`.
    """
    config, params, tokenizer = model
    stream = data.stream(tokenizer, texts, config.eos_id)
    random = np.random.default_rng(seed)
    begins = random.integers(0, len(stream) - length, cases)
    rows = np.stack([stream[begin : begin + length] for begin in begins])
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
    config, params, tokenizer = model
    stream = data.stream(tokenizer, texts, config.eos_id)
    random = np.random.default_rng(seed)
    begins = random.integers(0, len(stream) - length, rows)
    right = np.stack([stream[begin : begin + length] for begin in begins])
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


# Ways to write 64 tokens. The first is autoregressive decoding by the same model: it sees what stands before, one token a pass.
DECODERS = {
    "one token at a time": dict(block=1, steps=1, attend="blocks", cache=True),
    "blocks of 16, 4 passes": dict(block=16, steps=4, attend="blocks", cache=True),
    "64 passes": dict(block=64, steps=64),
    "32 passes": dict(block=64, steps=32),
    "32 steps, 3 drafts": dict(block=64, steps=32, drafts=3),
    "8 passes": dict(block=64, steps=8),
    "8 passes, dual cache": dict(block=64, steps=8, cache=True),
    "2 passes": dict(block=64, steps=2),
}


def decoding(model, prompts, *, length=64, decoders=DECODERS, **options):
    """{decoder: {"passes", "tokens_per_pass", "tokens_per_second", "parse_share"}} at batch 1, greedy, over all prompts.

    parse_share: of the texts, their last and perhaps unfinished line left out, how many Python's parser takes.
    """
    table = {}
    for name, decoder in decoders.items():
        made = [generate.generate(model, [p], length=length, exact=True, **decoder, **options) for p in prompts]
        passes, tokens, seconds = (sum(getattr(m, n) for m in made) for n in ("passes", "tokens", "seconds"))
        table[name] = {
            "passes": passes / len(made),
            "tokens_per_pass": round(tokens / passes, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "parse_share": parse_share([m.texts[0].rpartition("\n")[0] for m in made]),
        }
    return table


# Ways to write from left to right, with keys and values cached; the second is in blocks of 16, 4 passes each.
IN_ORDER = {
    "left to right": dict(block=1, steps=1, attend="blocks", cache=True),
    "blocks of 16": dict(block=16, steps=4, attend="blocks", cache=True),
}


def by_steps(models, texts, *, steps=(32, 8, 2), prompts=64, cases=256, length=64, repeats=3, implementation=None):
    """What a model and its students write in few passes: a list of dicts, a row for each model and number of steps.

    The first rows are the first model's, IN_ORDER: one token a pass, and block after block.

    models: {name: model}. parse_share: of `length` tokens after each of the held-out headers, greedy, one block. hole_of_8 and
    hole_of_4: see `infilling`, in as many passes as there are tokens at most. teacher_bits_per_token: how probable the first model
    finds what was written, from left to right; low is fluent, or repetitive, which distinct_share tells: the share of a text's
    tokens that are the first of their kind. tokens_per_second: at batch 1, the best of `repeats` runs.
    """
    headers = held_out_headers(texts, prompts)
    options = dict(implementation=implementation)
    bits = {name: bits_per_byte(made_by, texts, **options) for name, made_by in models.items()}
    judge, *_ = models
    ways = [(judge, name, way) for name, way in IN_ORDER.items()]
    ways += [(name, count, dict(block=length, steps=count)) for name in models for count in steps]
    rows = []
    for name, count, way in ways:
        write = functools.partial(generate.generate, models[name], length=length, exact=True, **way, **options)
        made = write(headers)
        written = made.decoded.tokens[:, -length:].tolist()
        row = {
            "model": name,
            "steps": count,
            "passes": made.passes,
            "tokens_per_second": max(write(headers[:1]).tokens_per_second for _ in range(repeats)),
            "parse_share": parse_share([text.rpartition("\n")[0] for text in made.texts]),
            "teacher_bits_per_token": left_to_right_bits(models[judge], made.decoded.tokens, length, **options),
            "distinct_share": float(np.mean([len(set(tokens)) / len(tokens) for tokens in written])),
        }
        if count not in IN_ORDER:
            row["bits_per_byte"] = bits[name]
            for hole in (8, 4):
                fill = dict(cases=cases, hole=hole, steps=min(count, hole))
                row[f"hole_of_{hole}"] = infilling(models[name], texts, **fill, **options)
        rows.append(row)
    return rows


def table(rows):
    """The rows of `by_steps` in Markdown."""
    head = "| model | passes | tokens/s | bits/byte | hole of 4 | hole of 8 | parses | bits/token | distinct |"
    lines = [head, "|---" * 9 + "|"]
    for row in rows:
        holes = [row.get(f"hole_of_{hole}") for hole in (4, 8)]
        filled = [f"{h['token_accuracy']:.1%} / {h['exact_match']:.1%}" if h else "–" for h in holes]
        bits = f"{row['bits_per_byte']:.3f}" if "bits_per_byte" in row else "–"
        name = f"{row['model']}, {row['steps']}" if row["steps"] in IN_ORDER else row["model"]
        cells = [name, row["passes"], f"{row['tokens_per_second']:.0f}", bits, *filled, f"{row['parse_share']:.0%}"]
        cells += [f"{row['teacher_bits_per_token']:.2f}", f"{row['distinct_share']:.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


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

    @jax.jit
    def nats(tokens, weights):
        # One block each: the noisy half is all masks, the clean half what stands before.
        hidden = denoiser.hidden_states(
            config, params, jnp.concatenate([jnp.full_like(tokens, config.mask_id), tokens], axis=1),
            positions=jnp.tile(jnp.arange(length, dtype=jnp.int32), 2)[None],
            mask=masks.block_diffusion(length, 1), implementation=implementation,
        )[:, :length]  # fmt: skip
        head = denoiser.head_weight(config, params)
        return masked_cross_entropy(hidden, head, tokens, weights, implementation=implementation)

    return float(nats(jnp.asarray(shifted), jnp.asarray(scored, jnp.float32))) / np.log(2) / int(scored.sum())


def parse_share(texts):
    """The share of `texts` that Python's own parser takes."""
    parsed = 0
    for text in texts:
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):  # ValueError: a null byte
            continue
        parsed += 1
    return parsed / len(texts)


def held_out_headers(texts, most):
    """The first lines of top-level functions of the held-out texts, as prompts."""
    found = []
    for text in texts:
        for unit in data.units(text):
            line = unit.splitlines()[0]
            if line.startswith("def ") and line.endswith(":"):
                found.append(line)
    return found[:most]


def report(model, texts, *, cases=256, steps=4, implementation=None):
    """Everything measured of the model itself, as a dict; holes of 1, 4 and 8 tokens are filled in at most `steps` passes."""
    options = dict(implementation=implementation)
    numbers = {
        "held_out_bytes": sum(len(text.encode()) for text in texts),
        "bits_per_byte": bits_per_byte(model, texts, **options),
        "autoregressive_bits_per_byte": bits_per_byte(model, texts, block_size=1, draws=1, **options),
    }
    for threshold in (0.7, 0.9):
        numbers[f"correction_at_{threshold}"] = correction(model, texts, threshold=threshold, **options)
    for hole in (1, 4, 8):
        numbers[f"hole_of_{hole}"] = infilling(model, texts, cases=cases, hole=hole, steps=min(hole, steps), **options)
    return numbers
