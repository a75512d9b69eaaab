"""The command `dlm-kernels`."""

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import sys

# Of `dlm-kernels generate`, handed to denoiser.generate as they are, where given.
GENERATE_OPTIONS = (
    "block", "steps", "threshold", "factor", "entropy_budget", "edit_threshold", "remask", "remask_rule", "confidence",
    "temperature", "seed", "guidance", "negative_prompt", "style", "adaptive", "guidance_final", "guidance_interval",
    "guidance_refresh", "eos_bias", "exact", "attend", "cache", "refresh", "drafts", "noise_budget", "implementation",
)  # fmt: skip


def main(arguments=None):
    """Runs one subcommand; returns the exit status: 2 for an error in what was asked for, 130 for Ctrl-C, each with one line."""
    options = _parser().parse_args(arguments)
    try:
        _check_implementation(options.implementation)
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read, `head` say, has enough. What is left in the buffer would be said to be lost when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stopped:
        print(f"dlm-kernels: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"dlm-kernels: {str(error) or 'not enough memory'}", file=sys.stderr)
        return 2
    return 0


def _check_implementation(name):
    """Refuses kernels for another kind of machine, which would only say so when they are called."""
    import jax

    needed, here = {"cpu": "cpu", "triton": "gpu", "pallas": "tpu"}.get(name), jax.default_backend()
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if needed not in (None, here) and not interpreted:
        raise ValueError(f"--implementation: expected one for this machine's {here}, got {name}, which is for a {needed}")


def _check_file(option, path):
    """Before the work whose result is to be in it."""
    if path is not None and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
        raise ValueError(f"{option}: expected a file in a folder that is there, got {path}")


def _unescaped(text):
    """What a shell has no easy way to write: \\n and \\t in a text are a newline and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _parser():
    parser = argparse.ArgumentParser(prog="dlm-kernels", description="Block-parallel text generation by denoising.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, summary):
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        added.add_argument("--implementation", choices=("cpu", "triton", "pallas", "xla"), help="kernels to insist on")
        return added

    generate = command("generate", _generate, "continue a prompt, or fill its holes")
    _model(generate)
    add = generate.add_argument
    texts = dict(metavar="TEXT", type=_unescaped)
    add("prompt", nargs="?", type=_unescaped, help="text to continue; \\n and \\t in it, and in any TEXT, are a newline and a tab")
    holes = "text with holes: <mask:20> is one of 20 tokens, <mask:20@3> one under guidance 3"
    add("--infill", help=holes, **texts)
    add("--chat", action="store_true", help="make the prompt a user's turn, as LLaDA's or Dream's instruction-tuned models read it")
    add("--length", type=int, help="tokens to add at most (default: one block)")
    add("--exact", action="store_true", default=None, help="exactly --length tokens")
    add("--block", type=int, default=64, help="tokens decoded together (default: %(default)s)")
    add("--steps", type=int, help="passes per block at most (default: a quarter of the block)")
    add("--threshold", type=float, help="commit all tokens more certain than this")
    add("--factor", type=float, help="commit by Fast-dLLM's factor rule")
    add("--entropy-budget", type=float, help="commit the most certain while their entropies sum to this")
    add("--edit-threshold", type=float, help="replace committed tokens where the model is this sure of another")
    add("--remask", type=float, metavar="SHARE", help="mask this share of doubtful tokens anew after each pass")
    rules = ("least", "cap", "rescale", "confidence")
    add("--remask-rule", choices=rules, help="the least certain, or ReMDM's rules of strength --remask")
    add("--confidence", help="probability (the default), margin, neg_entropy or random")
    heat = "0 is greedy (default: 1; 0 with --drafts and for published models; 0.8 with --noise-budget)"
    add("--temperature", type=float, help=heat)
    add("--seed", type=int)
    add("--ban", action="append", default=[], help="use no token that contains TEXT", **texts)
    add("--require", action="append", default=[], help="write TEXT, where it is likeliest", **texts)
    add("--eos-bias", type=float, help="added to end-of-text's logit: below 0 for longer texts, above for shorter")
    add("--style", help="read TEXT before the prompt; guidance then strengthens what it changes", **texts)
    add("--guidance", type=float, help="guidance scale; 1, the default, is none")
    add("--negative-prompt", help="what guidance draws away from (default: no prompt)", **texts)
    add("--adaptive", type=float, metavar="SHARE", help="guide away from this share of doubtful tokens masked anew")
    add("--guidance-final", type=float, help="the scale that guidance is nearing as a block fills")
    add("--guidance-refresh", type=int, metavar="N", help="run the unconditional stream in every Nth pass of a block only")
    add("--guidance-interval", type=float, nargs=2, help="guide while the share of a block that is masked is in it")
    add("--classifier", metavar="FILE", help="draw towards what it takes for wanted; see dlm-kernels classify")
    add("--classifier-scale", type=float, help="how many times the log of its probability counts (default: 10)")
    add("--attend", choices=("all", "blocks"), help="what a token sees: the whole canvas, or the blocks so far")
    add("--cache", action="store_true", default=None, help="keep keys and values, compute the block only")
    add("--refresh", type=int, help="passes between renewals of the cache (default: once a block)")
    add("--drafts", type=int, help="check this many guessed steps in each pass: the same text in fewer passes")
    add("--drafter", metavar="DIR", help="a student that guesses for the model; needs --drafts")
    add("--noise-budget", type=float, metavar="NATS", help="decode from random tokens; for renoise or what --uniform-share trained")
    add("--html", metavar="FILE", help="write a page that replays the passes beside one token at a time")
    add("--json", action="store_true", help="print numbers and text as JSON")

    correct = command("correct", _correct, "replace the tokens of a text that the model rejects")
    _model(correct)
    about = "\\n and \\t in it are a newline and a tab; what is in <keep>...</keep> stays"
    correct.add_argument("text", type=_unescaped, help=about)
    correct.add_argument("--threshold", type=float, default=0.7, help="how sure of another token (default: %(default)s)")
    correct.add_argument("--passes", type=int, default=8, help="at most (default: %(default)s)")

    classify = command("classify", _classify, "fit a classifier of wanted texts, for generate --classifier")
    _model(classify)
    classify.add_argument("out", help="file to write")
    for name in ("--wanted", "--unwanted"):
        classify.add_argument(name, nargs="+", required=True, metavar="FILE", help="UTF-8 texts")
    classify.add_argument("--length", type=int, default=64, help="tokens that it judges at once (default: %(default)s)")

    info = command("info", _info, "tell the device, the instruction set and the implementation of each operation")
    _model(info)

    train = command("train", _train, "train a denoiser on the standard library of this Python")
    train.add_argument("out", help="directory of the checkpoint; a run that was stopped goes on from there")
    train.add_argument("--layers", type=int, help="of the model (default: 4, or those of --initial)")
    _run(train, length=256, learning_rate=2e-3)
    train.add_argument("--block-share", type=float, default=0.0, help="share of updates on block-causal denoising")
    train.add_argument("--uniform-share", type=float, default=0.0, help="share of updates on random tokens for --noise-budget")
    train.add_argument("--error-share", type=float, default=0.0, help="share of visible tokens to replace and correct")
    train.add_argument("--initial", metavar="DIR", help="a checkpoint to start from")

    distill = command("distill", _distill, "teach a copy of a denoiser to decode in fewer passes")
    _model(distill)
    distill.add_argument("out", help="directory of the student; a run that was stopped goes on from there")
    distill.add_argument(
        "--teacher-steps", type=int, default=32, help="passes of the teacher over a span (default: %(default)s)"
    )
    distill.add_argument("--student-steps", type=int, default=8, help="of the student (default: %(default)s)")
    distill.add_argument("--guidance", type=float, default=1.0, help="scale of the teacher's guidance, learnt too (default: none)")
    distill.add_argument("--temperature", type=float, default=0.0, help="of the teacher's decoding (default: greedy)")
    own = "share of updates on what the student itself has decoded so far (default: %(default)s)"
    distill.add_argument("--on-policy", type=float, default=0.5, metavar="SHARE", help=own)
    distill.add_argument("--initial", metavar="DIR", help="a student to start from (default: the teacher itself)")
    _run(distill, length=128, learning_rate=3e-4)

    evaluate = command("evaluate", _evaluate, "measure held-out bits per byte and infilling")
    _model(evaluate)
    evaluate.add_argument("--steps", type=int, default=4, help="passes to fill a hole (default: %(default)s)")
    instead = evaluate.add_mutually_exclusive_group()
    instead.add_argument("--decoding", action="store_true", help="compare ways to decode instead, on held-out headers")
    instead.add_argument("--by-steps", action="store_true", help="compare the model and --students at 32, 8 and 2 passes")
    instead.add_argument("--control", action="store_true", help="measure each mechanism of control, without and with it")
    evaluate.add_argument("--markdown", action="store_true", help="print a table of these in Markdown, row by row")
    evaluate.add_argument("--plot", metavar="FILE", help="draw --by-steps into an SVG file")
    known = "of the model's tokenizer (default: student-8 and student-2, those that are of the model's shape too)"
    evaluate.add_argument("--students", nargs="*", metavar="DIR", help=known)
    evaluate.add_argument("--prompts", type=int, default=8, help="how many headers (default: %(default)s)")
    evaluate.add_argument("--files", type=int, default=None, help="use this many held-out files only")
    return parser


def _run(command, *, length, learning_rate):
    """How long `train` and `distill` run, and on what."""
    add = command.add_argument
    add("--minutes", type=float, help="how long the run takes, compiling included; this or --steps")
    add("--steps", type=int, help="updates of the run; a run that had all its steps goes on for more")
    add("--rows", type=int, default=16, help="texts an update (default: %(default)s)")
    add("--length", type=int, default=length, help="tokens of each (default: %(default)s)")
    add("--learning-rate", type=float, default=learning_rate, help="its peak (default: %(default)s)")
    add("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")


def _model(command):
    command.add_argument(
        "--model",
        metavar="DIR",
        help="a checkpoint, or student-8, student-2 or renoise, which come with the package (default: their teacher)",
    )


def _load(options):
    from dlm_kernels.denoiser import checkpoint

    return _load_from(options.model or checkpoint.SHIPPED)


def _load_from(name):
    """A published checkpoint as it is stored, which in float32 would take twice the memory; one of ours in float32."""
    import jax.numpy as jnp

    from dlm_kernels.denoiser import checkpoint

    directory = checkpoint.find(name)
    return checkpoint.load(directory, dtype=None if checkpoint.published(directory) else jnp.float32)


def _generate(options):
    from rich.console import Console

    from dlm_kernels.denoiser import chat, checkpoint, classifier, generate, html, implementations, view

    if (options.prompt is None) == (options.infill is None):
        raise ValueError("expected a prompt or --infill, one of them")
    if options.infill is not None and not generate.HOLE.search(options.infill):
        raise ValueError(f"--infill: expected a hole such as <mask:20> in it, got {options.infill!r}")
    _check_file("--html", options.html)
    model = _load(options)
    if options.drafts is not None and options.html:
        raise ValueError("--drafts, --html: expected one of them; the page shows every step")
    named = {name: getattr(options, name) for name in GENERATE_OPTIONS if getattr(options, name) is not None}
    if options.drafts is None and options.noise_budget is None:
        published = options.model is not None and checkpoint.published(checkpoint.find(options.model))
        named.setdefault("temperature", 0.0 if published else 1.0)
    named["length"] = options.block if options.length is None else options.length
    named["banned"] = [token for text in options.ban for token in generate.tokens_with(model[2], text)]
    named["required"] = options.require
    if options.classifier:
        scale = 10.0 if options.classifier_scale is None else options.classifier_scale
        named |= dict(classifier=classifier.load(options.classifier, model[0]), classifier_scale=scale)
    elif options.classifier_scale is not None:
        raise ValueError("--classifier-scale: expected a --classifier with it, got none")
    if options.drafter:
        drafter = _load_from(options.drafter)
        if drafter[0] != model[0]:
            raise ValueError(f"--drafter: expected a student of the model's shape {model[0]}, got {drafter[0]}")
        named["drafter"] = drafter[1]
    console = Console()
    prompt = options.prompt if options.infill is None else options.infill
    if options.chat:
        prompt = chat.turn(model[2], prompt)
    watched = console.is_terminal and not (options.json or options.html or options.drafts is not None)
    shown = view.View(model[0], model[2], console) if watched else None
    frames = []
    on_pass = frames.append if options.html else shown and shown.on_pass

    def work():
        return generate.generate(model, [prompt], on_pass=on_pass, **named)

    result = shown.watch(work) if shown else work()
    if options.html:
        html.write(options.html, model, prompt, result, frames, named)
    used = implementations.taken(*model[:2], options.block)
    if options.implementation:
        used = dict.fromkeys(used, options.implementation)
    numbers = {
        "tokens": result.tokens,
        "passes": result.passes,
        "tokens_per_pass": round(result.tokens_per_pass, 3),
        "seconds": round(result.seconds, 4),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "compile_seconds": round(result.compile_seconds, 2),
        "implementation": used,
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


def _classify(options):
    from dlm_kernels.denoiser import classifier

    _check_file("out", options.out)
    texts = ([_text(name) for name in names] for names in (options.wanted, options.unwanted))
    found, right = classifier.fit(_load(options), *texts, length=options.length, implementation=options.implementation)
    classifier.save(options.out, found)
    print(f"{right:.1%} of the rows that it was fitted to right")


def _text(name):
    try:
        return pathlib.Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, got {error}") from None


def _correct(options):
    from dlm_kernels.denoiser import correct

    limits = dict(threshold=options.threshold, passes=options.passes, implementation=options.implementation)
    fixed, changes, passes = correct.correct_text(_load(options), options.text, **limits)
    print(fixed)
    print(f"{len(changes)} tokens replaced in {passes} passes" + "".join(f"; {a!r} by {b!r}" for a, b in changes), file=sys.stderr)


def _info(options):
    import jax

    import dlm_kernels
    from dlm_kernels.denoiser import implementations

    config, params, _ = _load(options)
    device = jax.devices()[0]
    print(f"dlm_kernels {dlm_kernels.__version__}, jax {jax.__version__}")
    print(f"device: {device.device_kind} ({device.platform}), {len(jax.devices())} of them")
    if importlib.util.find_spec("dlm_kernels._cpu"):
        from dlm_kernels import _cpu

        print(f"instruction set of the CPU kernels: {_cpu.isa()}")
    print(f"model: {sum(x.size for x in params.values()) / 1e6:.1f} million parameters, {config.layers} layers")
    for name, implementation in implementations.taken(config, params, every=True).items():
        print(f"{name}: {options.implementation or implementation}")


def _train(options):
    from dlm_kernels.denoiser import checkpoint, progress, train
    from dlm_kernels.denoiser.config import DenoiserConfig

    settings = train.TrainConfig(
        rows=options.rows,
        length=options.length,
        learning_rate=options.learning_rate,
        block_share=options.block_share,
        uniform_share=options.uniform_share,
        error_share=options.error_share,
        steps=options.steps,
        minutes=options.minutes,
        seed=options.seed,
        implementation=options.implementation,
    )
    with progress.Bar(options.out) as shown:
        initial = options.initial and checkpoint.find(options.initial)
        config = None if options.layers is None else DenoiserConfig(layers=options.layers)
        train.run(config, settings, options.out, initial=initial, report=shown)


def _distill(options):
    import jax.numpy as jnp

    from dlm_kernels.denoiser import checkpoint, data, distill, progress, train

    teacher = checkpoint.find(options.model or checkpoint.SHIPPED)
    initial = options.initial and checkpoint.find(options.initial)
    steps = {name: getattr(options, name) for name in ("teacher_steps", "student_steps", "temperature", "guidance", "on_policy")}
    settings = train.TrainConfig(
        rows=options.rows,
        length=options.length,
        learning_rate=options.learning_rate,
        steps=options.steps,
        minutes=options.minutes,
        seed=options.seed,
        implementation=options.implementation,
    )
    with progress.Bar(options.out) as shown:
        student = distill.run(settings, teacher, options.out, initial=initial, report=shown, **steps)
    loaded = checkpoint.load(teacher, dtype=jnp.float32)
    first = checkpoint.load(initial or teacher, dtype=jnp.float32)[1]
    texts = [text for _, text, held_out in data.files() if held_out]
    told = dict(length=options.length, implementation=options.implementation)
    before, after = distill.distance(loaded, (first, student), texts, **steps, **told)
    print(f"nats a token from the teacher, on held-out text: {before:.3f} before, {after:.3f} now")


def _evaluate(options):
    from dlm_kernels.denoiser import checkpoint, compare, data, evaluate, limits, mechanisms, plot

    limits.counts(steps=options.steps, prompts=options.prompts, **({} if options.files is None else {"files": options.files}))
    _check_file("--plot", options.plot)
    if options.plot and not options.by_steps:
        raise ValueError("--plot: expected --by-steps with it, whose rows it draws")
    texts = [text for _, text, held_out in data.files() if held_out][: options.files]
    if not (options.by_steps or options.decoding or options.control):
        numbers = evaluate.report(_load(options), texts, steps=options.steps, implementation=options.implementation)
        print(json.dumps(numbers, indent=2))
        return
    teacher = _load(options)
    models = {"teacher": teacher} | _students(teacher, ["renoise"] if options.control else options.students)
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
    if options.plot:
        checkpoint.write_atomic(options.plot, plot.steps_svg(rows).encode())
    if not options.markdown:
        print(json.dumps(rows, indent=2))


def _students(teacher, names):
    """{name: model} of those to compare with it; None: those of the shipped model's that are students of this one too."""
    import jax.numpy as jnp

    from dlm_kernels.denoiser import checkpoint, compare

    if names and "teacher" in names:
        raise ValueError("--students: expected another name than teacher, which is the model's")
    known = compare.STUDENTS if names is None else names
    models = {name: checkpoint.load(checkpoint.find(name), dtype=jnp.float32) for name in known}
    fit = {n for n, model in models.items() if model[0] == teacher[0] and compare.same_tokenizer(model, teacher)}
    return {name: model for name, model in models.items() if names is not None or name in fit}


if __name__ == "__main__":
    sys.exit(main())
