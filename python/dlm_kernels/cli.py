"""The command `dlm-kernels`."""

import argparse
import importlib.util
import json
import sys


def main(arguments=None):
    """Runs one subcommand; returns the exit status. An error in what was asked for is one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"dlm-kernels: {error}", file=sys.stderr)
        return 2
    return 0


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
    generate.add_argument("prompt", nargs="?", help="text to continue")
    generate.add_argument("--infill", metavar="TEXT", help="text with holes: <mask:20> is one of 20 tokens")
    generate.add_argument("--length", type=int, default=None, help="tokens to add at most (default: one block)")
    generate.add_argument("--block", type=int, default=64, help="tokens decoded together (default: %(default)s)")
    generate.add_argument("--steps", type=int, help="passes per block at most (default: a quarter of the block)")
    generate.add_argument("--threshold", type=float, help="commit all tokens more certain than this")
    generate.add_argument("--factor", type=float, help="commit by Fast-dLLM's factor rule")
    generate.add_argument(
        "--entropy-budget", type=float, help="commit the most certain while their entropies sum to this"
    )
    generate.add_argument(
        "--edit-threshold", type=float, help="replace committed tokens the model is this sure to reject"
    )
    generate.add_argument("--confidence", default="probability", help="probability, margin, neg_entropy or random")
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1 is none")
    generate.add_argument("--negative-prompt", help="what guidance draws away from (default: no prompt)")
    generate.add_argument(
        "--attend", choices=("all", "blocks"), default="all", help="the whole canvas, or blocks so far"
    )
    generate.add_argument("--cache", action="store_true", help="keep keys and values, compute the block only")
    generate.add_argument("--refresh", type=int, default=1_000_000, help="passes between renewals of the cache")
    generate.add_argument("--json", action="store_true", help="print numbers and text as JSON")

    info = command("info", _info, "tell the device, the instruction set and the implementation of each operation")
    _model(info)

    train = command("train", _train, "train a denoiser on the standard library of this Python")
    train.add_argument("out", help="directory of the checkpoint; a run that was stopped goes on from there")
    train.add_argument("--minutes", type=float)
    train.add_argument("--steps", type=int)
    train.add_argument("--layers", type=int, default=4)
    train.add_argument("--rows", type=int, default=16)
    train.add_argument("--length", type=int, default=256)
    train.add_argument("--learning-rate", type=float, default=2e-3)
    train.add_argument("--block-share", type=float, default=0.0, help="share of updates on block-causal denoising")
    train.add_argument("--initial", metavar="DIR", help="a checkpoint to start from")
    train.add_argument("--seed", type=int, default=0)

    evaluate = command("evaluate", _evaluate, "measure held-out bits per byte and infilling")
    _model(evaluate)
    evaluate.add_argument("--steps", type=int, default=4, help="passes to fill a hole of 8 tokens")
    evaluate.add_argument("--files", type=int, default=None, help="use this many held-out files only")
    return parser


def _model(command):
    command.add_argument("--model", metavar="DIR", help="a checkpoint (default: the one that comes with the package)")


def _load(options):
    import jax.numpy as jnp

    from dlm_kernels.denoiser import checkpoint

    return checkpoint.load(options.model or checkpoint.SHIPPED, dtype=jnp.float32)


def _generate(options):
    from rich.console import Console

    from dlm_kernels.denoiser import generate, view

    if (options.prompt is None) == (options.infill is None):
        raise ValueError("expected a prompt or --infill, one of them")
    model = _load(options)
    named = {
        name: getattr(options, name)
        for name in (
            "block", "steps", "threshold", "factor", "entropy_budget", "edit_threshold", "confidence", "temperature",
            "seed", "guidance", "negative_prompt", "attend", "cache", "refresh", "implementation",
        )
    }  # fmt: skip
    named["length"] = options.block if options.length is None else options.length
    console = Console()
    shown = view.View(model[0], model[2], console) if console.is_terminal and not options.json else None
    prompt = options.prompt if options.infill is None else options.infill

    def work():
        return generate.generate(model, [prompt], on_pass=shown and shown.on_pass, **named)

    result = shown.watch(work) if shown else work()
    used = generate.implementations(model[0], options.block)
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
    if options.json:
        print(json.dumps(numbers | {"text": result.texts[0]}, indent=2))
        return
    if shown:
        console.print(shown.render(*result.decoded))
    else:
        print(result.texts[0])
    print(
        f"{result.tokens} tokens in {result.passes} passes ({result.tokens_per_pass:.1f} per pass), "
        f"{result.seconds:.2f} s, {result.tokens_per_second:.0f} tokens/s",
        file=sys.stderr,
    )


def _info(options):
    import jax

    import dlm_kernels
    from dlm_kernels.denoiser import generate

    config, params, _ = _load(options)
    device = jax.devices()[0]
    print(f"dlm_kernels {dlm_kernels.__version__}, jax {jax.__version__}")
    print(f"device: {device.device_kind} ({device.platform}), {len(jax.devices())} of them")
    if importlib.util.find_spec("dlm_kernels._cpu"):
        from dlm_kernels import _cpu

        print(f"instruction set of the CPU kernels: {_cpu.isa()}")
    print(f"model: {sum(x.size for x in params.values()) / 1e6:.1f} million parameters, {config.layers} layers")
    for name, implementation in generate.implementations(config).items():
        print(f"{name}: {implementation}")


def _train(options):
    from dlm_kernels.denoiser import progress, train
    from dlm_kernels.denoiser.config import DenoiserConfig

    settings = train.TrainConfig(
        rows=options.rows,
        length=options.length,
        learning_rate=options.learning_rate,
        block_share=options.block_share,
        steps=options.steps,
        minutes=options.minutes,
        seed=options.seed,
        implementation=options.implementation,
    )
    with progress.Bar(options.out) as shown:
        train.run(DenoiserConfig(layers=options.layers), settings, options.out, initial=options.initial, report=shown)


def _evaluate(options):
    from dlm_kernels.denoiser import data, evaluate

    texts = [text for _, text, held_out in data.files() if held_out][: options.files]
    numbers = evaluate.report(_load(options), texts, steps=options.steps, implementation=options.implementation)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    sys.exit(main())
