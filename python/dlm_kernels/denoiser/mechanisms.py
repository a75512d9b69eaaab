"""What each mechanism of control changes in what is written after held-out function headers, without and with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels.denoiser import classifier, compare, data, evaluate, generate, losses, model

CLASS = """class Stack:
    def push(self, x):
        self.items.append(x)

    def pop(self):
        return self.items.pop()


"""
WANTED, UNWANTED = "asyncio", "tkinter"  # packages that the classifier tells apart


def control(models, texts, *, files=None, prompts=64, length=64, report=None, implementation=None):
    """A list of dicts, a row for each mechanism and measure: mechanism, measured, without (None where it has no meaning), with.

    models: {"teacher": model, "renoise": model}, of which the first is what all others change, and judges. All write `length`
    greedy tokens at most in a quarter as many passes, after each of the headers, in one batch; "renoise" as `generate` does by
    default. files: [(name, text, held out?)] for the classifier, default `data.files()`. report(row) is called as they come.
    Raises ValueError, before anything is written, where the models differ in shape or the texts are too short.
    """
    shape, other = dataclasses.replace(models["teacher"][0], self_conditioning=True), models["renoise"][0]
    if other != shape:
        raise ValueError(f"models: expected a renoise of the teacher's shape {shape}, got {other}")
    evaluate.stream_of(models["teacher"], texts, evaluate.LEAST)
    headers = evaluate.held_out_headers(texts, prompts)
    rows = []
    for values in _measured(models, texts, data.files() if files is None else files, headers, length, implementation):
        rows.append(dict(zip(("mechanism", "measured", "without", "with"), values)))
        if report:
            report(rows[-1])
    return rows


def _measured(models, texts, files, headers, length, implementation):
    """The values of one row after the other."""
    teacher, options = models["teacher"], dict(implementation=implementation)

    def written(**way):
        return generate.generate(teacher, headers, **dict(length=length, block=length, exact=True, **options) | way)

    def judged(name="teacher", **way):
        return compare.written(models, name, dict(block=length) | way, headers, length=length, **options)

    def share(text, made):
        return float(np.mean([text in whole.removeprefix(header) for whole, header in zip(made.texts, headers)]))

    free, *shorter = (written(exact=False, eos_bias=bias).tokens / len(headers) for bias in (0.0, 2.0, 4.0))
    for bias, tokens in zip((2, 4), shorter):
        yield f"`--eos-bias {bias}`", f"mean length in tokens, of {length}", free, tokens

    plain, numbers = judged()
    for mechanism, text, way in (
        ("`--style CLASS`, whose methods use `self`", "self", dict(style=CLASS)),
        ("`--negative-prompt self --guidance 2`", "self", dict(negative_prompt="self", guidance=2.0)),
        ("`--negative-prompt self --guidance 4`", "self", dict(negative_prompt="self", guidance=4.0)),
        ('`--require "return None"`', "return None", dict(required=["return None"])),
        ("`--ban self`", "self", dict(banned=generate.tokens_with(teacher[2], "self"))),
    ):
        yield mechanism, f"share of texts with `{text}`", share(text, plain), share(text, written(**way))

    half = length // 2
    marks = f"<mask:{length - half}@4><mask:{half}@1>"
    marked = [header + marks for header in headers]
    away = generate.generate(teacher, marked, block=length, negative_prompt="self", **options)
    for which, part in (("first", slice(-length, -half)), ("second", slice(-half, None))):
        shares = [
            float(np.mean(["self" in teacher[2].decode(row) for row in made.decoded.tokens[:, part].tolist()]))
            for made in (plain, away)
        ]
        yield f"`--negative-prompt self --infill HEADER{marks}`", f"share with `self` in the {which} half", *shares

    def package(name, held_out):
        return [text for path, text, out in files if path.startswith(f"{name}/") and out == held_out]

    fitted = dict(length=length, **options)
    found, _ = classifier.fit(teacher, package(WANTED, False), package(UNWANTED, False), **fitted)
    right = classifier.accuracy(teacher, found, package(WANTED, True), package(UNWANTED, True), **fitted)
    yield f"`classify`, {WANTED} against {UNWANTED}", "share of held-out rows right", None, right
    wanted = _probability(teacher, found, plain, **options)
    for scale in (10, 20):
        mechanism = f"`--classifier FILE --classifier-scale {scale}`"
        made, its = judged(classifier=found, classifier_scale=float(scale))
        yield mechanism, "mean probability of wanted", wanted, _probability(teacher, found, made, **options)
        yield mechanism, "bits/token", numbers["teacher_bits_per_token"], its["teacher_bits_per_token"]

    for threshold in (0.5, 0.7, 0.9):
        its = evaluate.correction(teacher, texts, threshold=threshold, **options)
        yield f"`correct --threshold {threshold}`", "share of wrong tokens repaired", None, its["repaired"]
        yield f"`correct --threshold {threshold}`", "share of right tokens changed", None, its["damaged"]

    mechanism = "`--model renoise --noise-budget 0.1`"
    made, its = judged("renoise", noise_budget=0.1)
    yield mechanism, "passes", plain.passes, made.passes
    yield mechanism, "bits/token", numbers["teacher_bits_per_token"], its["teacher_bits_per_token"]
    yield mechanism, "share of texts that parse", numbers["parse_share"], its["parse_share"]
    nats = _nats_under_noise(teacher, models["renoise"], texts, **options)
    yield "`--model renoise`", "nats/token where 0-100% are random", *nats


def _probability(loaded, found, made, *, implementation=None):
    """The classifier's mean probability of wanted, of whole texts."""
    config, params, _ = loaded
    tokens = made.decoded.tokens
    seen = tokens != config.pad_id
    start, length = jnp.asarray(seen.argmax(1), jnp.int32), tokens.shape[1]
    where = model.within(start, jnp.full_like(start, length), length)
    states = jax.jit(model.hidden_states, static_argnums=0, static_argnames="implementation")
    hidden = states(config, params, tokens, implementation=implementation, **where)
    return float(jnp.exp(classifier.log_p(found, hidden, seen)).mean())


def _nats_under_noise(teacher, renoise, texts, *, rows=64, length=128, seed=1, implementation=None):
    """`losses.uniform_loss` of both, on the same rows under the same noise; the teacher's soft embedding changes nothing."""
    config, params, tokenizer = renoise
    stream = data.stream(tokenizer, texts, config.eos_id)
    tokens = jnp.asarray(evaluate.rows_of(stream, rows, length, np.random.default_rng(seed)))
    loss = jax.jit(losses.uniform_loss, static_argnums=0, static_argnames="implementation")
    both = (params | teacher[1] | {"soft.down": jnp.zeros_like(params["soft.down"])}, params)
    return [float(loss(config, p, tokens, jax.random.key(seed), implementation=implementation)) for p in both]


HEAD = "| mechanism | what is measured | without | with |\n" + "|---" * 4 + "|"


def line(row):
    """A row of `control` in Markdown, below HEAD."""
    form = ".1%" if row["measured"].startswith("share") else "#.3g"
    values = ("–" if value is None else format(value, form) for value in (row["without"], row["with"]))
    return "| " + " | ".join((row["mechanism"], row["measured"], *values)) + " |"
