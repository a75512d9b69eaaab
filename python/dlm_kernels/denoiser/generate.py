"""From text to text: canvases of prompts and holes, decoded and measured."""

import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

import dlm_kernels
from dlm_kernels.denoiser import chat, control, limits, renoise, sampler, speculative

HOLE = re.compile(r"<mask:(\d+)(?:@(-?\d+(?:\.\d+)?))?>")  # how many tokens, and under which guidance scale
ALL = {"threshold": 0.0, "factor": 1e6, "entropy_budget": 1e6}  # by which a rule commits all in one pass
BUCKET = 32  # prompts are padded to a multiple of it, so that their length compiles nothing


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Rows of given tokens and holes, padded on the left to one length."""

    tokens: np.ndarray  # int32 [B, L]
    start: np.ndarray  # int32 [B], the first column that is not padding
    first: np.ndarray  # int32 [B], the first hole: blocks are counted from here
    guidance: np.ndarray  # float32 [B, L], the scale that a hole's own mark gives, elsewhere NaN


@dataclasses.dataclass(frozen=True)
class Generation:
    texts: list[str]  # prompt and all
    answers: list[str]  # from the first hole on: what continues a prompt, without it
    decoded: sampler.Decoded | speculative.Speculated  # NumPy arrays
    tokens: int  # generated, in all rows, padding after a stop left out
    passes: int
    seconds: float  # of decoding, compiled
    compile_seconds: float

    @property
    def tokens_per_pass(self):
        return self.tokens / max(self.passes, 1)

    @property
    def tokens_per_second(self):
        return self.tokens / self.seconds


def canvas(config, tokenizer, prompts, length, style=""):
    """Each prompt, after `style`, with holes for its marks, and `length` holes after it where it has none.

    A mark is `<mask:n>`, or `<mask:n@scale>`.
    """
    ahead = tokenizer.encode(style).ids
    rows, scales = [], []
    for prompt in prompts:
        pieces = HOLE.split(prompt)
        row = ahead + tokenizer.encode(pieces[0]).ids
        own = [np.nan] * len(row)
        for holes, scale, text in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
            given = tokenizer.encode(text, add_special_tokens=False).ids
            row += [config.mask_id] * int(holes) + given
            own += [np.nan if scale is None else float(scale)] * int(holes) + [np.nan] * len(given)
        added = 0 if len(pieces) > 1 else length
        rows.append(row + [config.mask_id] * added)
        scales.append(own + [np.nan] * added)
    tokens = _padded(rows, config.pad_id, np.int32)
    start = np.array([tokens.shape[1] - len(row) for row in rows], np.int32)
    first = (tokens == config.mask_id).argmax(1).astype(np.int32)
    return Canvas(tokens, start, first, _padded(scales, np.nan, np.float32))


def _padded(rows, filler, dtype):
    """[B, L] of lists, filled up on the left."""
    width = max(-(-max(map(len, rows)) // BUCKET) * BUCKET, BUCKET)
    return np.array([[filler] * (width - len(row)) + row for row in rows], dtype)


def without_prompt(config, tokenizer, canvas, prompt=None):
    """The unconditional stream's canvas and starts: `prompt` in the place of what is given before the first hole.

    None masks what is given there, which is LLaDA's unconditional input. Pads stay pads: nobody sees them.
    """
    tokens, start = canvas.tokens.copy(), canvas.start.copy()
    for row, (begin, hole) in enumerate(zip(canvas.start, canvas.first)):
        if prompt is None:
            tokens[row, begin:hole] = config.mask_id
            continue
        ids = tokenizer.encode(prompt).ids[-int(hole) :] if hole else []
        tokens[row, :hole] = config.pad_id
        tokens[row, hole - len(ids) : hole] = ids
        start[row] = hole - len(ids)
    return tokens, start


def generate(
    model,
    prompts,
    *,
    length=64,
    block=64,
    steps=None,
    temperature=None,
    seed=0,
    guidance=1.0,
    negative_prompt=None,
    adaptive=None,
    style=None,
    banned=(),
    required=(),
    logit_bias=None,
    eos_bias=0.0,
    exact=False,
    drafts=None,
    drafter=None,
    noise_budget=None,
    on_pass=None,
    **options,
):
    """Continues prompts, or fills their holes.

        config, params, tokenizer = model
        tokens = decode(config, params, encode(prompts) + [mask] * length, ...)
        return tokenizer.decode(tokens)

    model: (config, params, tokenizer) as `checkpoint.load` gives. prompts: texts; one with `<mask:n>` in it is filled there with
    exactly n tokens each, any other is continued by at most `length` tokens, until end-of-text or the end of a turn; an
    instruction-tuned model answers a prompt of `chat.turn`. block, steps and options
    (threshold, factor, cache, ...): see `sampler.decode`; with no rule at all steps is block / 4. temperature: 0, the default, is
    greedy. guidance: a scale above 1 draws away from what the model says without the prompt, or with negative_prompt, or, given
    `adaptive`, with that share of its own least certain tokens masked anew; the tokens of `<mask:n@scale>` have that scale of
    their own. style: text that is read before each prompt and is no part of the result; under guidance,
    what it draws away from is the prompt without it. banned: token ids. required: texts that are written where they are likeliest
    before anything else, see `control.require`; then the length is exact. logit_bias: {token id: what to add to its logit};
    eos_bias: likewise for end-of-text, so that texts get longer (below 0) or shorter. exact: no end-of-text before `length`.
    drafts, drafter: speculate, see `speculative.decode`; it goes with steps alone. noise_budget: decode from random tokens, see
    `renoise.decode`, in 48 steps unless they are given, from temperature, then above 0 and by default 0.8, to half of it.
    Returns Generation; the first, compiling run is not in its seconds. Raises ValueError for options that do not fit.
    """
    config, params, tokenizer = model
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    limits.counts(block=block, length=length)
    limits.numbers(1, steps=steps)  # the rehearsal below has its own
    limits.numbers(0, temperature=temperature, noise_budget=noise_budget)
    limits.numbers(0, 1, adaptive=adaptive)
    limits.numbers(0, 2**32 - 1, seed=seed)
    limits.numbers(guidance=guidance)
    prefix = len(tokenizer.encode(style).ids) if style else 0
    board = canvas(config, tokenizer, prompts, length, style or "")
    for text in required:
        phrase = tokenizer.encode(text).ids
        if set(phrase) & set(banned):
            raise ValueError(f"required: expected texts without a banned token, got {text!r}")
        tokens = control.require(
            config, params, board.tokens, phrase, start=board.start, implementation=options.get("implementation")
        )
        board = dataclasses.replace(board, tokens=tokens)
    if noise_budget is not None:
        if temperature == 0:
            raise ValueError("temperature: expected above 0 with a noise_budget, got 0")
        steps, temperature = 48 if steps is None else steps, 0.8 if temperature is None else temperature
    if steps is None and all(options.get(rule) is None for rule in ALL):
        steps = max(block // 4, 1)
    ends = chat.ends(config, tokenizer)
    if exact or required or any(HOLE.search(prompt) for prompt in prompts):
        banned = [*banned, *ends]
    random = options.get("remask") is not None and options.get("remask_rule", "least") != "least"
    if temperature:
        # Ids without a text, which no training has lowered: LLaDA's and Dream's heads are wider than their vocabularies.
        banned = [*banned, *range(max(tokenizer.get_vocab().values()) + 1, config.vocab)]
    if temperature or random:
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(len(prompts)))
        options |= dict(temperature=temperature or None, key=keys)
    own = ~np.isnan(board.guidance)
    if guidance != 1 or options.get("guidance_final") is not None or own.any():
        scale = np.where(own, board.guidance, np.float32(guidance)) if own.any() else guidance
        options |= dict(guidance_scale=scale) | _away_from(config, tokenizer, board, prefix, adaptive, negative_prompt)
    elif adaptive is not None or negative_prompt is not None:
        raise ValueError("adaptive, negative_prompt: expected a guidance other than 1 with them, got 1")
    biases = {} if logit_bias is None else dict(logit_bias)
    if eos_bias:
        biases |= {token: biases.get(token, 0.0) + eos_bias for token in ends}
    if biases:
        options["logit_bias"] = control.logit_bias(config, biases)
    viewer = _viewer(on_pass)
    if on_pass is not None:
        options["on_pass"] = viewer
    decode = sampler.decode
    if drafter is not None and drafts is None:
        raise ValueError("drafter: expected drafts with it, got none")
    if drafts is not None:
        given = [name for name, option in options.items() if option is not None and name != "implementation"]
        if given or steps is None:
            raise ValueError(f"drafts: goes with steps and greedy decoding alone, got {given or 'no steps'}")
        options = dict(drafts=drafts, drafter=drafter, implementation=options.get("implementation"))
        decode = speculative.decode
    if noise_budget is not None:
        given = [n for n, x in options.items() if x is not None and n not in ("key", "temperature", "on_pass", "implementation")]
        if given or drafts is not None:
            raise ValueError(f"noise_budget: goes with steps and temperature alone, got {given or 'drafts'}")
        options |= dict(budget=noise_budget, temperature=(temperature, temperature / 2))
        decode = renoise.decode
    options |= dict(block=block, start=board.start, first=board.first, stop_at=np.array(ends, np.int32))
    options |= dict(banned_tokens=np.array(banned, np.int32))
    asked = time.perf_counter()
    # Numbers of passes are data: this compiles the very loop that is measured next.
    viewer.shows = False
    rules = {rule: np.full(np.shape(options[rule]), most) for rule, most in ALL.items() if options.get(rule) is not None}
    rehearsal = options | (rules if steps is None else {"steps": 1})
    jax.block_until_ready(decode(config, params, board.tokens, **rehearsal))
    jax.effects_barrier()
    ready = time.perf_counter()
    viewer.shows = True
    decoded = decode(config, params, board.tokens, **(options | ({} if steps is None else {"steps": steps})))
    decoded = jax.tree.map(np.asarray, jax.block_until_ready(decoded))
    end = time.perf_counter()
    jax.effects_barrier()
    made = (board.tokens == config.mask_id) & (decoded.tokens != config.pad_id)
    return Generation(
        answers=[tokenizer.decode(row[hole:].tolist()) for hole, row in zip(board.first, decoded.tokens)],
        texts=[tokenizer.decode(row[begin + prefix :].tolist()) for begin, row in zip(board.start, decoded.tokens)],
        decoded=decoded,
        tokens=int(made.sum()),
        passes=int(decoded.passes),
        seconds=end - ready,
        compile_seconds=ready - asked,
    )


class _Viewer:
    """Calls on_pass for the passes that are measured, not for those of the rehearsal."""

    def __init__(self, on_pass):
        self.on_pass, self.shows = on_pass, False

    def __call__(self, decoded):
        if self.shows:
            self.on_pass(decoded)


# The same one for the same function: a loop is compiled for the function that it calls.
_viewer = functools.lru_cache(maxsize=8)(_Viewer)


def _away_from(config, tokenizer, board, prefix, adaptive, negative_prompt):
    """Of `sampler.decode`'s options what the unconditional stream reads. prefix: how many tokens are style."""
    if adaptive is not None and negative_prompt is not None:
        raise ValueError("adaptive, negative_prompt: expected one of them, got both")
    if adaptive is not None:
        return dict(guidance_remask=adaptive)
    if prefix and negative_prompt is None:
        return dict(unconditional=board.tokens, unconditional_start=board.start + prefix)
    tokens, start = without_prompt(config, tokenizer, board, negative_prompt)
    return dict(unconditional=tokens, unconditional_start=start)


def tokens_with(tokenizer, text):
    """Ids of the tokens whose text contains `text`: banning them keeps it out, unless two tokens spell it together."""
    if not text:
        raise ValueError("banned: expected texts of at least one character, got ''")
    return [i for i in range(tokenizer.get_vocab_size()) if text in tokenizer.decode([i])]


def implementations(config, block=64, length=128, dtype=jnp.float32, *, every=False):
    """{operation: implementation} that decoding takes on this machine's default device; with `every` all operations."""
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())

    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    heads, keys = ((1, n, k, config.head_size) for n, k in ((block, config.heads), (length, config.kv_heads)))
    row = shaped(1, length, dtype=jnp.int32)
    score = shaped(1, length, dtype=jnp.float32)
    calls = {
        "attention": (
            dlm_kernels.attention,
            (shaped(*heads), shaped(*keys), shaped(*keys)),
            dict(mask=dlm_kernels.masks.cache(block, length)),
        ),
        "mix_guidance": (
            dlm_kernels.mix_guidance,
            (shaped(1, block, config.d_model), shaped(1, block, config.d_model), 2.0),
            {},
        ),
        "lm_head_scores": (
            dlm_kernels.lm_head_scores,
            (shaped(1, block, config.d_model), shaped(config.vocab, config.d_model)),
            {},
        ),
        "unmask_topk": (
            dlm_kernels.unmask_topk,
            (row, dlm_kernels.TokenScores(row, score, score, score)),
            dict(mask_id=config.mask_id, num_unmask=1),
        ),
    }
    if every:
        hidden, weight = shaped(1, block, config.d_model), shaped(config.vocab, config.d_model)
        logits = shaped(1, block, config.vocab)
        tokens, positions = shaped(1, block, dtype=jnp.int32), shaped(1, block)
        attention, loss = calls["attention"], (dlm_kernels.masked_cross_entropy, (hidden, weight, tokens, positions), {})
        divergence = dlm_kernels.masked_divergence, (hidden, weight, hidden, weight, positions), {}
        calls |= {
            "gradient of attention": (jax.grad(lambda *x, mask: attention[0](*x, mask=mask).sum(), (0, 1, 2)), *attention[1:]),
            "combine_guidance": (dlm_kernels.combine_guidance, (shaped(2, *logits.shape), shaped(2)), {}),
            "score_tokens": (dlm_kernels.score_tokens, (logits,), {}),
            "unmask_step": (dlm_kernels.unmask_step, (logits, tokens), dict(mask_id=config.mask_id, num_unmask=1)),
            "masked_cross_entropy": loss,
            "gradient of masked_cross_entropy": (jax.grad(loss[0], (0, 1)), *loss[1:]),
            "masked_divergence": divergence,
            "gradient of masked_divergence": (jax.grad(divergence[0], (0, 1)), *divergence[1:]),
            "soft_embedding": (dlm_kernels.soft_embedding, (hidden, weight), {}),
        }
    taken = {}
    for name, (function, arguments, named) in calls.items():
        choices = dlm_kernels.explain(function, *arguments, **named)
        kernels = [choice.implementations.get(platform, choice.implementations["default"]) for choice in choices]
        taken[name] = ", ".join(dict.fromkeys(kernels))
    return taken
