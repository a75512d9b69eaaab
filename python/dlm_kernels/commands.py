"""What each command of `dlm-kernels` does with its options, which cli.py reads."""

import contextlib
import dataclasses
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import rich.console

import dlm_kernels
from dlm_kernels import cpu_kernels
from dlm_kernels.denoiser import (
    chat,
    checkpoint,
    classifier,
    compare,
    correct,
    data,
    distill,
    evaluate,
    generate,
    html,
    implementations,
    limits,
    mechanisms,
    plot,
    progress,
    train,
    view,
)
from dlm_kernels.denoiser.config import DenoiserConfig
from dlm_kernels.ops import dispatch

# Of `dlm-kernels generate`, handed to denoiser.generate as they are, where given.
GENERATE_OPTIONS = (
    "block", "steps", "threshold", "factor", "entropy_budget", "edit_threshold", "edit_passes", "remask", "remask_rule",
    "confidence", "temperature", "top_p", "top_k", "seed", "guidance", "negative_prompt", "style", "adaptive", "guidance_final",
    "guidance_interval", "guidance_refresh", "eos_bias", "exact", "attend", "cache", "refresh", "drafts", "noise_budget",
    "implementation",
)  # fmt: skip


def _check_file(option, path):
    """Before the work whose result is to be in it."""
    if path is not None and (not path or os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
        raise ValueError(f"{option}: expected a file in a folder that is there, got {path}")


def _load(name, learnt_masks=True):
    """A published checkpoint as it is stored, which in float32 would take twice the memory; one of ours in float32."""
    directory = checkpoint.find(name)
    dtype = None if checkpoint.published(directory) else jnp.float32
    return checkpoint.load(directory, dtype=dtype, learnt_masks=learnt_masks)


def _prompt(options):
    """Of `generate` the prompt or the text to fill. Raises ValueError, before the model is there, for what does not go together."""
    if (options.prompt is None) == (options.infill is None):
        raise ValueError("expected a prompt or --infill, one of them")
    if options.infill is not None and not generate.HOLE.search(options.infill):
        raise ValueError(f"--infill: expected a hole such as <mask:20> in it, got {options.infill!r}")
    prompt = options.prompt if options.infill is None else options.infill
    if generate.HOLE.search(prompt) and (options.length is not None or options.exact):
        raise ValueError("--length, --exact: expected none with holes such as <mask:20>, which say their length")
    _check_file("--html", options.html)
    if generate.HOLE.search(prompt) and options.chat:
        raise ValueError("--chat: expected a turn, which is answered behind it, got holes such as <mask:20>")
    return prompt


@contextlib.contextmanager
def _of_options(argument, names):
    """What is said of `argument` within is said of the options that it comes from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(f"^{argument}: ", f"{names}: ", str(error))) from None


def _told(options, model):
    """What of its options `generate` hands to denoiser.generate, by the names that they have there."""
    if options.html is not None and not model[0].learnt_masks:
        raise ValueError("--html: expected a model that one token at a time is written by too, got a DiffusionGemma")
    if options.drafts is not None and options.html is not None:
        raise ValueError("--drafts, --html: expected one of them; the page shows every step")
    named = {name: getattr(options, name) for name in GENERATE_OPTIONS if getattr(options, name) is not None}
    if options.drafts is None and options.noise_budget is None and not checkpoint.published(checkpoint.find(options.model)):
        named.setdefault("temperature", 1.0)
    named["length"] = next(n for n in (options.length, options.block, 64) if n is not None)
    with _of_options("text", "--ban"):
        named["banned"] = [token for text in options.ban for token in generate.tokens_with(model[2], text)]
    named["required"] = options.require
    if options.classifier is not None:
        scale = 10.0 if options.classifier_scale is None else options.classifier_scale
        named |= dict(classifier=classifier.load(options.classifier, model[0]), classifier_scale=scale)
    elif options.classifier_scale is not None:
        raise ValueError("--classifier-scale: expected a --classifier with it, got none")
    if options.drafter is not None:
        drafter = _load(options.drafter)
        if drafter[0] != model[0] and model[0].learnt_masks:  # of others `generate` says that nobody drafts for them
            theirs, ours = (dataclasses.asdict(config) for config in (drafter[0], model[0]))
            apart = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if theirs[name] != ours[name]]
            raise ValueError(f"--drafter: expected a student of the model's shape, got {'; '.join(apart)}")
        named["drafter"] = drafter[1]
    return named


def run_generate(options):
    prompt = _prompt(options)
    model = _load(options.model, learnt_masks=False)
    named = _told(options, model)
    console = rich.console.Console()
    if options.chat:
        prompt = chat.turn(model[2], prompt)
    watched = console.is_terminal and not options.json and options.html is None and options.drafts is None
    shown = view.View(model[0], model[2], console) if watched else None
    frames = []
    on_pass = shown and shown.on_pass if options.html is None else frames.append

    def work():
        with dispatch.recording() as choices:
            return generate.generate(model, [prompt], on_pass=on_pass, **named), choices

    result, choices = shown.watch(work) if shown else view.in_background(work).result()
    if options.html is not None:
        html.write(options.html, model, prompt, result, frames, named)
    numbers = {
        "tokens": result.tokens,
        "passes": result.passes,
        "tokens_per_pass": round(result.tokens_per_pass, 3),
        "seconds": round(result.seconds, 4),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "compile_seconds": round(result.compile_seconds, 2),
        "implementation": implementations.recorded(choices),
    }
    text = result.answers[0] if options.chat else result.texts[0]
    if options.json:
        print(json.dumps(numbers | {"text": text}, indent=2))
        return
    print(text)
    print(
        f"{result.tokens} tokens in {result.passes} passes ({result.tokens_per_pass:.1f} per pass), "
        f"{result.seconds:.2f} s, {result.tokens_per_second:.0f} tokens/s",
        file=sys.stderr,
    )


def run_classify(options):
    _check_file("out", options.out)
    texts = [[text for _, text, _ in data.read(paths)] for paths in (options.wanted, options.unwanted)]
    found, right = classifier.fit(_load(options.model), *texts, length=options.length, implementation=options.implementation)
    classifier.save(options.out, found)
    print(f"{right:.1%} of the rows that it was fitted to right")


def run_correct(options):
    told = dict(threshold=options.threshold, passes=options.passes, implementation=options.implementation)
    fixed, changes, passes = correct.correct_text(_load(options.model), options.text, **told)
    print(fixed)
    print(f"{len(changes)} tokens replaced in {passes} passes" + "".join(f"; {a!r} by {b!r}" for a, b in changes), file=sys.stderr)


def run_info(options):
    config, params, _ = _load(options.model, learnt_masks=False)
    device = jax.devices()[0]
    print(f"dlm_kernels {dlm_kernels.__version__}, jax {jax.__version__}")
    print(f"device: {device.device_kind} ({device.platform}), {len(jax.devices())} of them")
    if not cpu_kernels.unavailable():
        print(f"instruction set of the CPU kernels: {cpu_kernels.isa()}")
    print(f"model: {sum(x.size for x in params.values()) / 1e6:.1f} million parameters, {config.layers} layers")
    for name, implementation in implementations.taken(config, params).items():
        print(f"{name}: {options.implementation or implementation}")


def _settings(options, *more):
    """Of what `train` and `distill` are both told, and of the options `more`."""
    names = ("rows", "length", "learning_rate", "steps", "minutes", "seed", "implementation", *more)
    return train.TrainConfig(**{name: getattr(options, name) for name in names})


def run_train(options):
    settings = _settings(options, "block_share", "uniform_share", "error_share")
    seed_texts = options.texts and data.read(options.texts)
    with progress.Bar(options.out) as shown:
        initial = options.initial and checkpoint.find(options.initial)
        config = None if options.layers is None else DenoiserConfig(layers=options.layers)
        train.run(config, settings, options.out, initial=initial, seed_texts=seed_texts, report=shown)


def _held_out(paths):
    """The texts to measure on: of --held-out, or of the standard library."""
    if paths is not None:
        return [text for _, text, _ in data.read(paths)]
    return [text for _, text, held_out in data.files() if held_out]


def run_distill(options):
    teacher = checkpoint.find(options.model)
    initial = options.initial and checkpoint.find(options.initial)
    steps = {name: getattr(options, name) for name in ("teacher_steps", "student_steps", "temperature", "guidance", "on_policy")}
    settings = _settings(options)
    seed_texts = options.texts and data.read(options.texts)
    # A model of one's own texts says nothing of the standard library.
    texts = None if options.texts and options.held_out is None else _held_out(options.held_out)
    if texts is not None:
        config, tokenizer = checkpoint.described(teacher)
        with _of_options("texts", "--held-out"):  # before the run, after which it would be too late
            evaluate.stream_of((config, None, tokenizer), texts, options.length + 1)
    with progress.Bar(options.out) as shown:
        student = distill.run(settings, teacher, options.out, initial=initial, seed_texts=seed_texts, report=shown, **steps)
    if texts is None:
        return
    loaded = checkpoint.load(teacher, dtype=jnp.float32)
    first = checkpoint.load(initial, dtype=jnp.float32)[1] if initial else loaded[1]
    told = dict(length=options.length, implementation=options.implementation)
    before, after = distill.distance(loaded, (first, student), texts, **steps, **told)
    print(f"nats a token from the teacher, on held-out text: {before:.3f} before, {after:.3f} now")


def run_evaluate(options):
    compared = options.by_steps or options.decoding or options.control
    if options.steps is not None and compared:
        raise ValueError("--steps: expected none of --decoding, --by-steps and --control with it, which have their own")
    steps = 4 if options.steps is None else options.steps
    limits.counts(steps=steps, prompts=options.prompts, **({} if options.files is None else {"files": options.files}))
    _check_file("--plot", options.plot)
    for name, value in (("--plot", options.plot), ("--students", options.students)):
        if value is not None and not options.by_steps:
            raise ValueError(f"{name}: expected --by-steps with it, got none")
    if options.markdown and not compared:
        raise ValueError("--markdown: expected --decoding, --by-steps or --control with it, whose rows it prints")
    with _of_options("texts", "--held-out, --files"):
        _evaluate(options, _held_out(options.held_out)[: options.files], steps, compared)


def _evaluate(options, texts, steps, compared):
    if not compared:
        numbers = evaluate.report(
            _load(options.model), texts, steps=steps, implementation=options.implementation,
            report=lambda name, number: print(f"{name}: {json.dumps(number)}", file=sys.stderr, flush=True),
        )  # fmt: skip
        print(json.dumps(numbers, indent=2))
        return
    teacher = _load(options.model)
    models = {"teacher": teacher} | students(teacher, ["renoise"] if options.control else options.students)
    measure, head, line = compare.decoding, compare.DECODING_HEAD, compare.line
    if options.by_steps:
        measure, head = compare.by_steps, compare.STEPS_HEAD
    elif options.control:
        measure, head, line = mechanisms.control, mechanisms.HEAD, mechanisms.line
    # Minutes pass before the last row; without --markdown the rows are progress, and the result JSON.
    to = sys.stdout if options.markdown else sys.stderr
    print(head, file=to, flush=True)
    rows = measure(
        models, texts, prompts=options.prompts, implementation=options.implementation,
        report=lambda row: print(line(row), file=to, flush=True),
    )  # fmt: skip
    if options.plot is not None:
        checkpoint.write_atomic(options.plot, plot.steps_svg(rows).encode())
    if not options.markdown:
        print(json.dumps(rows, indent=2))


def students(teacher, names):
    """{name: model} of those to compare with it; None: those of the shipped model's that are students of this one too."""
    if names and "teacher" in names:
        raise ValueError("--students: expected another name than teacher, which is the model's")
    known = compare.STUDENTS if names is None else names
    models = {name: checkpoint.load(checkpoint.find(name), dtype=jnp.float32, learnt_masks=True) for name in known}
    fit = {n for n, model in models.items() if model[0] == teacher[0] and compare.same_tokenizer(model, teacher)}
    return {name: model for name, model in models.items() if names is not None or name in fit}
