"""Scoring tokens and unmasking the most confident: the inner step of a diffusion sampler."""

import inspect
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels.ops import checks, dispatch, sharding

# What every kernel that scores takes beside its logits; `sampling_operands` makes it.
SAMPLING = (
    ("temperature", "r"),
    ("key_data", "rw"),
    ("counter_row", "r"),
    ("noise", "rv"),
    ("active", "r"),
    ("banned", "m"),
)
SCORE = dispatch.Leaf(
    "unmask",
    "score_tokens",
    (
        ("logits", "rv"),
        ("unconditional", "rv"),
        ("guidance_scale", "r"),
        *SAMPLING,
    ),
    ("r", "r", "r", "r"),
    fold="r",
    sharded="r",
)
TOPK = dispatch.Leaf(
    "unmask",
    "unmask_topk",
    (
        *((name, "bl") for name in ("tokens", "proposal", "confidence", "entropy", "eligible", "editable")),
        *((name, "b") for name in ("num_unmask", "threshold", "factor", "entropy_budget", "edit_threshold")),
    ),
    ("bl", "bl", "b"),
    fold="b",
    sharded="b",
)
# Both in one: each row's tokens need the scores of all its positions, so logits that are split along L are brought together.
STEP = dispatch.Leaf(
    "unmask",
    "unmask_step",
    (
        *((name, letters.replace("r", "bl")) for name, letters in SCORE.operands),
        *((name, letters) for name, letters in TOPK.operands if name not in ("proposal", "confidence", "entropy")),
    ),
    TOPK.results,
    fold="b",
    sharded="b",
)
CONFIDENCES = ("probability", "margin", "neg_entropy", "random")


class TokenScores(NamedTuple):
    """What one pass over the vocabulary says of each position; each [B, L].

    token: int32, the greedy or sampled token; -1 where not active.
    confidence: float32; -inf where not active. entropy: float32, nats; +inf where not active.
    logsumexp: float32; -inf where not active.
    """

    token: jax.Array
    confidence: jax.Array
    entropy: jax.Array
    logsumexp: jax.Array


class UnmaskResult(NamedTuple):
    """tokens: int32 [B, L]. unmasked: bool [B, L], the positions that were masked and now are not. count: int32 [B], how many."""

    tokens: jax.Array
    unmasked: jax.Array
    count: jax.Array


def score_tokens(
    logits,
    *,
    unconditional=None,
    guidance_scale=None,
    confidence="probability",
    temperature=0.0,
    tempered_confidence=False,
    key=None,
    noise=None,
    active=None,
    banned_tokens=None,
    logits_soft_cap=None,
    implementation=None,
):
    """The token of every position and how sure the model is of it, in one pass over the vocabulary.

        logits = unconditional + guidance_scale * (logits - unconditional)      # with guidance; all in float32
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)           # with a cap
        logits[..., banned_tokens] = -inf
        token = argmax(logits)                                                  # or, at a temperature above 0:
        token = argmax(logits / temperature + jax.random.gumbel(key, logits.shape))
        p = softmax(logits)                                                     # of logits / temperature if tempered_confidence
        confidence = p[token]                                                   # "probability"
        confidence = top_k(p, 2)[0] - top_k(p, 2)[1]                            # "margin"
        confidence = sum(p * log(p))                                            # "neg_entropy"
        confidence = jax.random.uniform(jax.random.fold_in(key, 1), (B, L))     # "random"

    Arguments:
      logits: [B, L, V]; float32, bfloat16 or float16. unconditional: the same, mixed in with guidance_scale (scalar, [B] or [B, L];
        see `mix_guidance`); both or neither.
      confidence: LLaDA's "low_confidence" and Dream's "maskgit_plus" are "probability", LLaDA's "random" is "random", Dream's
        "topk_margin" and "entropy" are "margin" and "neg_entropy". Its alg "origin" is not here; its top_p and top_k are
        `truncate_logits`, before this.
      temperature: scalar, [B] or [B, L], traced or not; 0 is greedy. Above 0 it needs `key` or `noise`.
      tempered_confidence: take p from logits / temperature, as Dream and DiffusionGemma do; LLaDA does not.
      key: a JAX threefry key, or one per batch row [B], and then a row's samples do not depend on its batch. Of each pass its own,
        as jax.random.fold_in(key, step): the same key draws the same noise again.
      noise: float [B, L, V], a Gumbel draw to use instead of the key's (parity with other systems).
      active: bool [B, L]; rows where it is False are not read.
      banned_tokens: int [M] or a list of ints, ids never to be chosen; ids outside the vocabulary are ignored.
      implementation: "cpu", "triton", "pallas", "xla" or None.

    Returns TokenScores of [B, L] arrays. entropy and logsumexp are those of p's logits. Ties go to the lowest id. NaN or +inf in a
    row, or a row that is all -inf, gives confidence and entropy NaN for that row alone. Not differentiable.
    Raises ValueError for arguments that do not fit each other. Source: LLaDA generate.py, Dream generation_utils.py.
    """
    dispatch.check(implementation)
    operands, static = _score_operands(
        logits,
        unconditional=unconditional,
        guidance_scale=guidance_scale,
        confidence=confidence,
        temperature=temperature,
        tempered_confidence=tempered_confidence,
        key=key,
        noise=noise,
        active=active,
        banned_tokens=banned_tokens,
        logits_soft_cap=logits_soft_cap,
    )
    b, length, _ = operands["logits"].shape
    if 0 in (b, length):
        return empty_scores(b, length)
    return token_scores(dispatch.call(SCORE, implementation, operands, **static), confidence, key, active)


_OF_SCORES = inspect.signature(score_tokens).parameters.keys()


def _score_operands(logits, *, unconditional=None, guidance_scale=None, confidence="probability", tempered_confidence=False,
                    logits_soft_cap=None, **sampling):  # fmt: skip
    """SCORE's operands and static arguments, of those of `score_tokens`, which it checks."""
    logits = checks.floats("logits", logits, "BLV")
    b, length, v = logits.shape
    if v == 0:
        raise ValueError("logits: expected a vocabulary of at least 1, got shape " + str(list(logits.shape)))
    if (unconditional is None) != (guidance_scale is None):
        raise ValueError("unconditional, guidance_scale: expected both or neither")
    operands = sampling_operands(b, length, v, confidence, **sampling)
    operands |= dict(logits=logits, unconditional=None, guidance_scale=None)
    if unconditional is not None:
        unconditional = checks.floats("unconditional", unconditional, "BLV")
        checks.shaped("unconditional", unconditional, logits.shape, "the shape of logits")
        if unconditional.dtype != logits.dtype:
            raise ValueError(f"unconditional: expected dtype {logits.dtype} of logits, got {unconditional.dtype}")
        operands["unconditional"] = unconditional
        operands["guidance_scale"] = checks.per_row("guidance_scale", guidance_scale, b, length)
    return operands, dict(
        confidence="probability" if confidence == "random" else confidence,
        tempered_confidence=bool(tempered_confidence),
        logits_soft_cap=checks.soft_cap(logits_soft_cap),
    )


def sampling_operands(b, length, v, confidence, *, temperature=0.0, key=None, noise=None, active=None, banned_tokens=None):
    """Checks what `score_tokens` and `lm_head_scores` share, and gives what of it the kernels take."""
    checks.one_of("confidence", confidence, CONFIDENCES)
    operands = dict.fromkeys(dict(SAMPLING))
    if active is not None:
        active = checks.bools("active", active, "BL")
        operands["active"] = checks.shaped("active", active, (b, length), "batch, length")
    if banned_tokens is not None:
        operands["banned"] = checks.ids("banned_tokens", banned_tokens)
    if confidence == "random" and key is None:
        raise ValueError("key: expected a key for confidence='random', got None")
    if noise is not None:
        noise = checks.shaped("noise", checks.floats("noise", noise, "BLV"), (b, length, v), "the shape of the logits")
    of_key = None if key is None else counters(key, b, length)
    checks.not_negative("temperature", temperature)
    if isinstance(temperature, numbers.Real) and temperature == 0:
        return operands
    temperature = checks.per_row("temperature", temperature, b, length)
    operands["temperature"] = bounded(checks.library(temperature), temperature)
    if noise is not None:
        operands["noise"] = noise.astype(jnp.float32)
    elif of_key is not None:
        operands["key_data"], operands["counter_row"] = of_key
    else:
        raise ValueError(f"key, noise: expected one of them for temperature {temperature}, got neither")
    return operands


def bounded(xp, temperature):
    """A temperature that logits can be divided by: -inf / inf would be NaN, and by one near 0 what is finite would not stay so.
    xp: jax.numpy, numpy or torch.
    """
    return xp.where(temperature > 0, xp.clip(temperature, 1e-30, 1e30), temperature)


def counters(key, b, length):
    """Each position's key, and the row of that key's draw which is its own: uint32 [B, L, 2] and int32 [B, L]."""
    data = _key_data(key)
    if data.shape == (2,):
        return jnp.broadcast_to(data, (b, length, 2)), checks.arange(b * length).reshape(b, length)
    checks.shaped("key", data, (b, 2), "key data of a single key, or of one per batch row")
    return jnp.broadcast_to(data[:, None], (b, length, 2)), checks.broadcast(checks.arange(length), (b, length))


def _key_data(key):
    if not hasattr(key, "dtype"):
        got = type(key).__name__
        raise ValueError(f"key: expected a JAX key such as jax.random.key(0), or an array of one per row, got {got}")
    key = checks.array("key", key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.shape[-1:] != (2,):
            raise ValueError(f"key: expected a JAX threefry key, got {key.dtype} of shape {list(key.shape)}")
        return key
    if "fry" not in str(jax.random.key_impl(key)):
        raise ValueError(
            f"key: expected a threefry key, the only generator the kernels compute, got {jax.random.key_impl(key)}"
        )
    return jax.random.key_data(key)


def token_scores(results, confidence, key, active):
    token, sure, entropy, logsumexp = results
    if confidence == "random":
        sure = _random_in_place(sure, key, active)
    return TokenScores(token, sure, entropy, logsumexp)


@jax.jit  # in a program alone an array of no mesh can be split
def _random_in_place(sure, key, active=None):
    random = random_or_nan(jnp, sharding.split_as(sure, random_confidence(key, *sure.shape)), sure)
    return random if active is None else jnp.where(sharding.split_as(sure, active), random, -jnp.inf)


def random_confidence(key, b, length):
    def draw(data, shape):
        # A stream of its own: the rank must not depend on the noise that chose the token.
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, 1), shape, jnp.float32)

    data = _key_data(key)
    return draw(data, (b, length)) if data.ndim == 1 else jax.vmap(lambda row: draw(row, (length,)))(data)


def random_or_nan(xp, random, sure):
    """`random`, but NaN where the kernel's confidence is: such a row has no token to be sure of. xp: jax.numpy, or torch."""
    return xp.where(xp.isnan(sure), sure, random)


def empty_scores(b, length):
    zeros = jnp.zeros((b, length), jnp.float32)
    return TokenScores(zeros.astype(jnp.int32), zeros, zeros, zeros)


def unmask_topk(
    tokens,
    scores,
    *,
    mask_id,
    num_unmask=None,
    threshold=None,
    factor=None,
    entropy_budget=None,
    candidates=None,
    edit_threshold=None,
    implementation=None,
):
    """Commits the proposals of the most confident masked positions.

        eligible = (tokens == mask_id) & candidates
        order = sorted(eligible positions, key=lambda i: (-confidence[i], i))   # by entropy[i] with entropy_budget
        n = num_unmask                                                          # or
        n = max(1, sum(confidence[eligible] > threshold))                       # or
        n = leading ranks r = 1, 2, ... with confidence[order[r - 1]] >= 1 - factor / (r + 1), at least 1            # or
        n = leading ranks with sum(entropy[order[: r - 1]]) <= entropy_budget, at least 1
        tokens[order[:n]] = scores.token[order[:n]]

    Arguments:
      tokens: int [B, L]. scores: TokenScores of [B, L] (`score_tokens`, `lm_head_scores`, or a model's own).
      mask_id: the mask token, an int or a traced scalar.
      num_unmask, threshold, factor, entropy_budget: each a scalar or [B], traced or not; at least one. Given several, the
        greatest n holds, so num_unmask with threshold is LLaDA2's "all above the threshold, and at least k".
        entropy_budget changes the order, and so does not go with threshold or factor.
      candidates: bool [B, L], or a block (start, stop), each an int, a traced scalar or [B], stop exclusive.
      edit_threshold: scalar or [B]; candidates that hold another token than the mask take the proposal where confidence is
        above it (they count neither in `unmasked` nor in `count`).

    Returns UnmaskResult(tokens, unmasked, count). Ties go to the lower position; NaN confidence ranks last, with -inf. A row with
    nothing eligible is returned as it is. Raises ValueError for arguments that do not fit.
    Source: LLaDA get_num_transfer_tokens, Fast-dLLM (threshold, factor; where its own takes confidence at the threshold too, and
    by the factor one more where only the last rank fails), DiffusionGemma (entropy budget), LLaDA2.1 (edits).
    """
    dispatch.check(implementation)
    tokens = checks.ints("tokens", tokens, "BL")
    if not isinstance(scores, TokenScores):
        raise ValueError(f"scores: expected TokenScores, got {type(scores).__name__}")
    for name, array in scores._asdict().items():
        checks.shaped(f"scores.{name}", checks.array(f"scores.{name}", array), tokens.shape, "the shape of tokens")
    proposal = checks.ints("scores.token", scores.token, "BL")
    rules = dict(num_unmask=num_unmask, threshold=threshold, factor=factor, entropy_budget=entropy_budget)
    operands = _topk_operands(tokens, mask_id, candidates, rules, edit_threshold)
    if tokens.size == 0:
        return _nothing_unmasked(tokens)
    operands |= dict(
        proposal=proposal,
        confidence=scores.confidence.astype(jnp.float32),
        entropy=None if entropy_budget is None else scores.entropy.astype(jnp.float32),
    )
    return UnmaskResult(*dispatch.call(TOPK, implementation, operands))


def _topk_operands(tokens, mask_id, candidates, rules, edit_threshold):
    """TOPK's operands but for the scores, of arguments of `unmask_topk`, which it checks."""
    b, length = tokens.shape
    if all(rule is None for rule in rules.values()):
        raise ValueError(f"expected at least one of {', '.join(rules)}, got none")
    if rules["entropy_budget"] is not None and (rules["threshold"] is not None or rules["factor"] is not None):
        raise ValueError("entropy_budget: goes by entropy, so expected no threshold and no factor beside it")
    dtypes = dict(num_unmask=jnp.int32)
    rules = {
        name: None if rule is None else checks.per_row(name, rule, b, dtype=dtypes.get(name, jnp.float32))
        for name, rule in (rules | dict(edit_threshold=edit_threshold)).items()
    }
    allowed = _candidates(candidates, b, length)
    masked = tokens == checks.integer("mask_id", mask_id)
    editable = None if edit_threshold is None else ~masked & allowed
    return dict(tokens=tokens, eligible=masked & allowed, editable=editable, **rules)


def _nothing_unmasked(tokens):
    return UnmaskResult(tokens, jnp.zeros(tokens.shape, bool), jnp.zeros(tokens.shape[:1], jnp.int32))


def _candidates(candidates, b, length):
    if candidates is None:
        return checks.broadcast(np.array(True), (b, length))
    if isinstance(candidates, tuple):
        if len(candidates) != 2:
            raise ValueError(f"candidates: expected bool [B, L] or (start, stop), got a tuple of {len(candidates)}")
        start, stop = (checks.per_row("candidates", end, b, dtype=jnp.int32)[:, None] for end in candidates)
        position = checks.arange(length)
        return (start <= position) & (position < stop)
    return checks.shaped("candidates", checks.bools("candidates", candidates, "BL"), (b, length), "batch, length")


def unmask_step(
    logits,
    tokens,
    *,
    mask_id,
    num_unmask=None,
    threshold=None,
    factor=None,
    entropy_budget=None,
    candidates=None,
    edit_threshold=None,
    implementation=None,
    **scoring,
):
    """One sampler step on logits: score every position that may change, commit the most confident.

        scores = score_tokens(logits, active=(tokens == mask_id) & candidates, **scoring)
        return unmask_topk(tokens, scores, mask_id=mask_id, num_unmask=num_unmask, ...)

    Takes the arguments of both; see `score_tokens` (unconditional, guidance_scale, confidence, temperature, ...) and
    `unmask_topk` (the rules). `active` is the candidates that are masked, or with edit_threshold all candidates. Returns
    UnmaskResult. Raises ValueError as they do, and where `active` is given. Drop-in for the inner step of LLaDA's generate.py.
    On GPUs it takes a launch less than the two where rows are short enough for one program to merge, see `explain`.
    """
    dispatch.check(implementation)
    tokens = checks.ints("tokens", tokens, "BL")
    logits = checks.floats("logits", logits, "BLV")
    checks.shaped("tokens", tokens, logits.shape[:2], "batch and length of logits")
    if "active" in scoring:
        raise ValueError("active: unmask_step derives it from tokens and candidates; narrow `candidates` instead")
    if unknown := scoring.keys() - _OF_SCORES:
        raise TypeError(f"unmask_step() got an unexpected keyword argument {min(unknown)!r}")
    rules = dict(num_unmask=num_unmask, threshold=threshold, factor=factor, entropy_budget=entropy_budget)
    operands = _topk_operands(tokens, mask_id, candidates, rules, edit_threshold)
    active = operands["eligible"] if edit_threshold is None else operands["eligible"] | operands["editable"]
    of_scores, static = _score_operands(logits, active=active, **scoring)
    if tokens.size == 0:
        return _nothing_unmasked(tokens)
    operands |= of_scores
    if scoring.get("confidence") == "random":
        operands["random"] = scoring["key"]
        return UnmaskResult(*_score_and_unmask(implementation, operands, **static))
    return UnmaskResult(*dispatch.call_fused(STEP, _score_and_unmask, implementation, operands, **static))


def _score_and_unmask(implementation, operands, **static):
    """A step of two kernels. operands: STEP's, and the key of a random confidence where it is not that of the scores."""
    token, sure, entropy, _ = dispatch.call(SCORE, implementation, {name: operands[name] for name, _ in SCORE.operands}, **static)
    if "random" in operands:
        sure = _random_in_place(sure, operands["random"])
    scores = dict(confidence=sure, proposal=token, entropy=None if operands["entropy_budget"] is None else entropy)
    return dispatch.call(TOPK, implementation, {name: (operands | scores)[name] for name, _ in TOPK.operands})
