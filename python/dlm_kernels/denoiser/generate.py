"""From text to text: canvases of prompts and holes, decoded and measured."""

import dataclasses
import functools
import inspect
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels.denoiser import blocks, chat, control, experts, limits, renoise, sampler, speculative
from dlm_kernels.denoiser.text import encode, opened, opening

HOLE = re.compile(r"<mask:(\d{1,18})(?:@(-?(?:\d+\.?\d*|\.\d+)))?>")  # how many tokens, and under which guidance scale
ALL = {"threshold": 0.0, "factor": 1e6, "entropy_budget": 1e6}  # by which a rule commits all in one pass
# Options of `sampler.decode` that `generate` makes itself, and from what.
MADE = {
    "banned_tokens": "banned", "stop_at": "exact", "start": "prompts", "first": "prompts", "stop": "length", "key": "seed",
    "unconditional": "negative_prompt", "unconditional_start": "negative_prompt", "guidance_scale": "guidance",
    "guidance_remask": "adaptive", "budget": "noise_budget", "config": "model", "params": "model", "tokens": "prompts",
}  # fmt: skip
KNOWN = {name for decode in (sampler.decode, renoise.decode) for name in inspect.signature(decode).parameters}
# Options of the generate of LLaDA, LLaDA2, Dream and SDAR, and of transformers, and what is asked for here.
THEIRS = {
    "gen_length": "length", "max_new_tokens": "length", "block_length": "block", "denoising_steps": "steps of each block",
    "cfg_scale": "guidance, theirs + 1,", "remasking": "confidence", "alg": "confidence", "confidence_threshold": "threshold",
    "editing_threshold": "edit_threshold", "max_post_steps": "edit_passes", "logits_eos_inf": "banned",
}  # fmt: skip
HEAT = 0.8  # the temperature of the first of the steps from random tokens
BUDGET = 0.1  # DiffusionGemma's, in nats
BUCKET = 32  # prompts are padded to a multiple of it, so that their length compiles nothing


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Rows of given tokens and holes, padded on the left to one length."""

    tokens: np.ndarray  # int32 [B, L]
    start: np.ndarray  # int32 [B], the first column that is not padding
    first: np.ndarray  # int32 [B], the first hole: blocks are counted from here
    guidance: np.ndarray  # float32 [B, L], the scale that a hole's own mark gives, elsewhere NaN
    style: int  # tokens up to its end, with which each row begins


@dataclasses.dataclass(frozen=True)
class Generation:
    texts: list[str]  # prompt and all
    answers: list[str]  # from the first hole on: what continues a prompt, without it
    board: Canvas  # what was decoded, required texts in it
    decoded: blocks.Decoded | speculative.Speculated  # NumPy arrays
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


def canvas(config, tokenizer, prompts, length, style="", *, least=1, before=0):
    """Each prompt, after `style`, with holes for its marks, and `length` holes after it where it has none; for a model that attends
    by blocks, or of canvases, as many more as fill its last.

    A mark is `<mask:n>`, or `<mask:n@scale>`. least: columns at least; before: columns at least in front of each row's first hole.
    """

    def read(piece):
        if "<mask:" in piece:
            raise ValueError(f"prompts: expected marks <mask:n> or <mask:n@scale>, got {piece[piece.index('<mask:') :][:40]!r}")
        return encode(config, tokenizer, "prompts", piece)

    ahead, own_opening = encode(config, tokenizer, "style", style), opening(tokenizer)
    rows, scales = [], []
    for prompt in prompts:
        piece, *marked = HOLE.split(prompt)
        given = read(piece)
        row = opened(own_opening, ahead + given)
        behind = len(row) - len(given)
        own = [np.nan] * len(row)
        for holes, scale, piece in zip(marked[::3], marked[1::3], marked[2::3]):
            given = read(piece)
            limits.numbers(**{f"prompts: <mask:{holes}@{scale}>": scale and float(scale)})
            row += [config.mask_id] * int(holes) + given
            own += [np.nan if scale is None else float(scale)] * int(holes) + [np.nan] * len(given)
        # Such a model has seen whole blocks only; canvases begin behind the prompt.
        fills = -(len(row) + length) % (config.block_size or 1) if config.learnt_masks else -length % config.canvas
        added = 0 if marked else length + fills
        if marked and config.mask_id not in row:
            raise ValueError(f"prompts: expected a hole of at least one token in each, got {prompt!r}")
        if marked and experts.together(config.experts) and len(row) % config.block_size:
            whole = f"whole blocks of {config.block_size} tokens, which choose experts together"
            raise ValueError(f"prompts: expected text and holes of {whole}, got {len(row)} tokens")
        rows.append(row + [config.mask_id] * added)
        scales.append(own + [np.nan] * added)
    least = max(least, *(before + len(row) - row.index(config.mask_id) for row in rows))
    tokens = _padded(rows, config.pad_id, np.int32, least)
    start = np.array([tokens.shape[1] - len(row) for row in rows], np.int32)
    first = (tokens == config.mask_id).argmax(1).astype(np.int32)
    return Canvas(tokens, start, first, _padded(scales, np.nan, np.float32, least), behind if ahead else 0)


def _padded(rows, filler, dtype, least):
    """[B, L] of lists, filled up on the left; L is a multiple of BUCKET and no less than `least`."""
    width = -(-max(least, *map(len, rows)) // BUCKET) * BUCKET
    return np.array([[filler] * (width - len(row)) + row for row in rows], dtype)


def without_prompt(config, canvas, ids=None):
    """The unconditional stream's canvas and starts: `ids` in the place of what is given before the first hole.

    None masks all that is given, which is LLaDA's unconditional input. Pads stay pads: nobody sees them.
    """
    tokens, start = canvas.tokens.copy(), canvas.start.copy()
    for row, (begin, hole) in enumerate(zip(canvas.start, canvas.first)):
        if ids is None:
            tokens[row, begin:] = config.mask_id
            continue
        start[row] = hole - len(ids)
        tokens[row, :hole] = config.pad_id
        tokens[row, start[row] : hole] = ids
    return tokens, start


def generate(
    model,
    prompts,
    *,
    length=64,
    block=None,
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

    model: (config, params, tokenizer) as `checkpoint.load` gives. prompts: a list of texts, with `<mask:n>` in all of them or in
    none: such are filled there with exactly n tokens each, others continued by at most `length` tokens, until end-of-text or the
    end of a turn; an instruction-tuned model answers a prompt of `chat.turn`. block, steps and options (threshold, top_p, cache,
    ...): see `sampler.decode`; by default block is 64, and with no rule at all steps is block / 4. A model that attends by blocks
    fills its last one, and is decoded by default as in its project: SDAR and LLaDA2 a whole block at once and above a threshold of
    0.85 and 0.95, Fast-dLLM v2, whose logits are shifted, by 8 tokens and 0.9; DiffusionGemma fills whole canvases, from random
    tokens, with a noise_budget of 0.1. temperature: 0, the default, is greedy. guidance: a scale above 1 draws away from what the
    model says without the prompt, or with negative_prompt, or, given `adaptive`, with that share of its own least certain tokens
    masked anew; the tokens of `<mask:n@scale>` have that scale of their own. style: text that is read before each prompt and is no
    part of the result; under guidance, what it draws away from is the prompt without it. banned: token ids. required: texts that
    are written where they are likeliest before anything else, one after the other, see `control.require`; then the length is exact.
    logit_bias: {token id: what to add to its logit}; eos_bias: likewise for end-of-text, so that texts get longer (below 0) or
    shorter. exact: no end-of-text before `length`. drafts, drafter: speculate, see `speculative.decode`; it goes with steps alone.
    noise_budget: decode from random tokens, see `renoise.decode`, in 48 steps unless they are given, from temperature, then above 0
    and by default 0.8, to half of it. Returns Generation; the first, compiling run is not in its seconds. Raises ValueError for
    options that do not fit, FloatingPointError where the scores of what was written are NaN.
    """
    config, params, tokenizer = _checked(model)
    _check(prompts, required, options)
    if block is None:
        block = _usual_block(config)
    if noise_budget is None and not config.learnt_masks:
        noise_budget = BUDGET
    limits.counts(block=block, length=length)
    limits.whole(1, steps=steps)  # the rehearsal has its own
    limits.whole(0, 2**32 - 1, seed=seed)
    limits.numbers(0, temperature=temperature, noise_budget=noise_budget)
    limits.numbers(0, 1, adaptive=adaptive)
    limits.numbers(guidance=guidance, eos_bias=eos_bias)
    if noise_budget is not None and temperature == 0:
        raise ValueError("temperature: expected above 0 with a noise_budget, got 0")
    marked = any(HOLE.search(prompt) for prompt in prompts)
    # A draw is of a place in the block's window: one as narrow as the canvas happens to be would draw otherwise in a wider one.
    if not marked and config.block_size is None and config.learnt_masks:
        block = min(block, length)
    steps, options = _with_defaults(config, block, steps, drafts, noise_budget, options)
    away = None
    if negative_prompt is not None:
        away = opened(opening(tokenizer), encode(config, tokenizer, "negative_prompt", negative_prompt))
    board = canvas(config, tokenizer, prompts, length, style or "", least=block, before=len(away or []))
    guided = guidance != 1 or options.get("guidance_final") is not None or not np.isnan(board.guidance).all()
    given = {
        "temperature": temperature or None, "guidance": None if guidance == 1 else guidance, "logit_bias": logit_bias,
        "eos_bias": eos_bias or None, "on_pass": on_pass, "drafts": drafts, "drafter": drafter, "noise_budget": noise_budget,
        "<mask:n@scale>": None if np.isnan(board.guidance).all() else True, **options,
    }  # fmt: skip
    if not config.learnt_masks:  # where a text is likeliest, masks tell
        given["required"] = required or None
    if noise_budget is not None and temperature is None:
        temperature = HEAT
    decode, its_own = _decoder(config, temperature, given)
    ends = chat.ends(config, tokenizer)
    banned = _banned(config, tokenizer, banned, ends if exact or required or marked else (), bool(temperature))
    board = _with_required(model, board, required, banned, options.get("implementation"))
    options |= _draws(temperature, seed, len(prompts), options)
    if guided:
        options |= _guidance(config, board, guidance, adaptive, away)
        # A cache holds whole blocks, from both streams' starts on: without one the text is the same.
        if not blocks.whole_apart(config, board.start, options.get("unconditional_start", board.start)):
            options.pop("cache", None)
    else:
        of_guidance = {name: options.get(name) for name in ("guidance_interval", "guidance_refresh")}
        for name, option in (of_guidance | dict(adaptive=adaptive, negative_prompt=negative_prompt)).items():
            if option is not None:
                raise ValueError(f"{name}: expected a guidance other than 1 with it, got 1")
    options |= _bias(config, logit_bias, eos_bias, ends)
    options |= dict(block=block, start=board.start, first=board.first, stop_at=np.array(ends, np.int32))
    options |= dict(banned_tokens=np.array(banned, np.int32)) | its_own
    decoded, seconds, compile_seconds = _measured(functools.partial(decode, config, params, board.tokens), steps, on_pass, options)
    hole = board.tokens == config.mask_id
    if drafts is None and np.isnan(decoded.confidence[hole]).any():
        raise FloatingPointError("the model's scores are NaN: by its weights, or by a guidance or a bias beyond all measure")
    made = hole & (decoded.tokens != config.pad_id)
    return Generation(
        answers=[tokenizer.decode(row[hole:].tolist()) for hole, row in zip(board.first, decoded.tokens)],
        texts=[tokenizer.decode(row[begin + board.style :].tolist()) for begin, row in zip(board.start, decoded.tokens)],
        board=board,
        decoded=decoded,
        tokens=int(made.sum()),
        passes=int(decoded.passes),
        seconds=seconds,
        compile_seconds=compile_seconds,
    )


def _usual_block(config):
    """How many positions a model of this kind is decoded by at once."""
    if not config.learnt_masks:
        return config.canvas
    if config.block_size is None:
        return 64
    return math.gcd(8, config.block_size) if config.shifted else config.block_size


def _with_defaults(config, block, steps, drafts, noise_budget, options):
    """(steps, options): by what a model of this kind is decoded where no rule is given; without options that say nothing."""
    # As if not given: some goes with nothing that is.
    plain = sampler.decode.__kwdefaults__
    options = {n: x for n, x in options.items() if x is not None and not (isinstance(x, (str, bool)) and x == plain.get(n))}
    if noise_budget is not None:
        return 48 if steps is None else steps, options
    if steps is not None or any(options.get(rule) is not None for rule in ALL):
        return steps, options
    if config.block_size is not None and drafts is None:
        return None, options | dict(threshold=config.threshold)
    return max(block // 4, 1), options


def _draws(temperature, seed, rows, options):
    """Of `sampler.decode`'s options what something random asks for, {} where nothing is."""
    if not temperature and "remask_rule" not in options and options.get("confidence") != "random":
        return {}
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))
    return dict(temperature=temperature or None, key=keys)


def _bias(config, logit_bias, eos_bias, ends):
    """Of `sampler.decode`'s options the bias, {} where there is none. ends: ids that end a text."""
    if logit_bias is None and not eos_bias:
        return {}
    bias = control.logit_bias(config, {} if logit_bias is None else logit_bias)
    bias[ends] += eos_bias
    return dict(logit_bias=bias)


def _measured(decode, steps, on_pass, options):
    """(what decode(steps=steps, **options) gives, as NumPy arrays, the seconds it took, those of compiling it before)."""
    viewer = _viewer(on_pass)
    if on_pass is not None:
        options = options | dict(on_pass=viewer)
    asked = time.perf_counter()
    # Numbers of passes are data: this compiles the very loop that is measured next.
    viewer.shows = False
    rules = {rule: np.full(np.shape(options[rule]), most) for rule, most in ALL.items() if options.get(rule) is not None}
    jax.block_until_ready(decode(**options | (rules if steps is None else {"steps": 1})))
    jax.effects_barrier()
    ready = time.perf_counter()
    viewer.shows = True
    decoded = decode(**options | ({} if steps is None else {"steps": steps}))
    decoded = jax.tree.map(np.asarray, jax.block_until_ready(decoded))
    end = time.perf_counter()
    jax.effects_barrier()
    return decoded, end - ready, ready - asked


class _Viewer:
    """Calls on_pass for the passes that are measured, not for those of the rehearsal."""

    def __init__(self, on_pass):
        self.on_pass, self.shows = on_pass, False

    def __call__(self, decoded):
        if self.shows:
            self.on_pass(decoded)


# The same one for the same function: a loop is compiled for the function that it calls.
_viewer = functools.lru_cache(maxsize=8)(_Viewer)


def _checked(model):
    if not isinstance(model, (list, tuple)) or len(model) != 3:
        raise ValueError(f"model: expected (config, params, tokenizer), as `checkpoint.load` gives, got {type(model).__name__}")
    return model


def _check(prompts, required, options):
    """Raises ValueError for what is no list of texts, prompts with and without holes at once, and options made here or unknown."""
    limits.texts(prompts=prompts, required=required)
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    # End-of-text is banned for all rows or none.
    if len({HOLE.search(prompt) is None for prompt in prompts}) > 1:
        raise ValueError("prompts: expected <mask:n> in all of them or in none, got both")
    for name in MADE.keys() & {name for name, option in options.items() if option is not None}:
        raise ValueError(f"{name}: expected {MADE[name]} in its place, of which it is made, got {name}")
    for name in options.keys() - KNOWN:
        expected = f"{THEIRS[name]} in its place" if name in THEIRS else "an option of generate or of sampler.decode"
        raise ValueError(f"{name}: expected {expected}, got {name}")


def _decoder(config, temperature, given):
    """The decoder, and the options that it alone takes. Raises ValueError where something of `given` does not go with it."""
    if given["drafts"] is not None and config.learnt_masks:
        name, company, decode = "drafts", "steps and greedy decoding", speculative.decode
        own = dict(drafts=given["drafts"], drafter=given["drafter"])
    elif given["noise_budget"] is not None:
        name, company, decode = "noise_budget", "steps and temperature", renoise.decode
        own = dict(budget=given["noise_budget"], temperature=(temperature, temperature / 2))
    elif given["drafter"] is not None:
        raise ValueError("drafter: expected drafts with it, got none")
    elif given.get("calm") is not None:
        raise ValueError("calm: expected noise_budget with it, got none")
    else:
        return sampler.decode, {}
    fits = {name, *inspect.signature(decode).parameters}
    more = [other for other, option in given.items() if option is not None and other not in fits]
    if more:
        raise ValueError(f"{name if config.learnt_masks else 'DiffusionGemma'}: goes with {company} alone, got {more}")
    return decode, own


def _banned(config, tokenizer, banned, ends, sampled):
    """`banned`, checked, with `ends`, and for sampling the ids without a text too."""
    limits.ids(config.vocab, banned=banned)
    banned = [*banned, *ends]
    if {*range(config.vocab)} <= {*banned, *np.asarray(blocks.banned_ids(config)).tolist()}:
        raise ValueError("banned: expected to leave a token that may be written, got all of them")
    # No training has lowered these: LLaDA's and Dream's heads are wider than their vocabularies.
    return [*banned, *(range(max(tokenizer.get_vocab().values()) + 1, config.vocab) if sampled else ())]


def _with_required(model, board, required, banned, implementation):
    """The canvas with the texts `required` written into it."""
    config, params, tokenizer = model
    phrases = [encode(config, tokenizer, "required", text) for text in required]
    for at, (text, phrase) in enumerate(zip(required, phrases)):
        if set(phrase) & set(banned):
            raise ValueError(f"required: expected texts without a banned token, got {text!r}")
        tokens = control.require(
            config, params, board.tokens, phrase, start=board.start, later=[len(other) for other in phrases[at + 1 :]],
            implementation=implementation,
        )  # fmt: skip
        board = dataclasses.replace(board, tokens=tokens)
    return board


def _guidance(config, board, guidance, adaptive, away):
    """Of `sampler.decode`'s options the scale, and what the unconditional stream reads. away: None, or ids."""
    if adaptive is not None and away is not None:
        raise ValueError("adaptive, negative_prompt: expected one of them, got both")
    own = ~np.isnan(board.guidance)
    options = dict(guidance_scale=np.where(own, board.guidance, np.float32(guidance)) if own.any() else guidance)
    if adaptive is not None:
        return options | dict(guidance_remask=adaptive)
    if board.style and away is None:
        return options | dict(unconditional=board.tokens, unconditional_start=board.start + board.style)
    tokens, start = without_prompt(config, board, away)
    return options | dict(unconditional=tokens, unconditional_start=start)


def tokens_with(tokenizer, text):
    """Ids of the tokens whose text contains `text`: banning them keeps it out, unless two tokens spell it together."""
    if not text:
        raise ValueError("text: expected at least one character, got ''")
    found = [i for i in sorted(tokenizer.get_vocab().values()) if text in tokenizer.decode([i])]
    if not found:
        raise ValueError(f"text: expected one that a single token contains, got {text!r}, which only several spell together")
    return found
