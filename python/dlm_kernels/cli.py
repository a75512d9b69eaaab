"""The command `dlm-kernels`: its arguments, and what it says where they do not fit."""

import argparse
import os
import re
import signal
import sys
import threading


def main(arguments=None):
    """Runs one subcommand; returns the exit status: 2 for an error in what was asked for, 130 for Ctrl-C, each with one line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever called, `>&-`
            setattr(sys, name, open(os.devnull, "w"))
    options = _parser().parse_args(arguments)
    try:
        _check_implementation(options.implementation)
        from dlm_kernels import commands  # not for --help, which needs none of it

        getattr(commands, f"run_{options.command}")(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read, `head` say, has enough. What is left in the buffer would be said to be lost when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stopped:
        print(f"dlm-kernels: {str(stopped) or 'stopped'}", file=sys.stderr, flush=True)
        # Python's own end would take XLA down under the thread that computes.
        if any(thread.name == "decoding" for thread in threading.enumerate()):
            os._exit(128 + signal.SIGINT)
        return 128 + signal.SIGINT
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"dlm-kernels: {str(error) or 'not enough memory'}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"dlm-kernels: not enough memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def _check_implementation(name):
    """Refuses kernels for another kind of machine, which would only say so when they are called."""
    import jax

    needed, here = {"cpu": "cpu", "triton": "gpu", "pallas": "tpu"}.get(name), jax.default_backend()
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if needed not in (None, here) and not interpreted:
        raise ValueError(f"--implementation: expected one for this machine's {here}, got {name}, which is for a {needed}")


OWN = "UTF-8 files, and folders, of which all *.py, *.txt and *.md are read"


def _unescaped(text):
    """What a shell has no easy way to write: \\n and \\t in a text are a newline and a tab, and \\\\ is a backslash."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)


def _parser():
    parser = argparse.ArgumentParser(prog="dlm-kernels", description="Block-parallel text generation by denoising.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def command(name, summary):
        added = commands.add_parser(name, help=summary, description=summary)
        added._negative_number_matcher = re.compile(r"-\.?\d")  # as from Python 3.14 on; before, -1e4 is taken for an option
        added.add_argument("--implementation", choices=("cpu", "triton", "pallas", "xla"), help="kernels to insist on")
        return added

    generate = command("generate", "continue a prompt, or fill its holes")
    _model(generate)
    add = generate.add_argument
    texts = dict(metavar="TEXT", type=_unescaped)
    add("prompt", nargs="?", type=_unescaped, help="text to continue; \\n, \\t and \\\\ in any TEXT: newline, tab, backslash")
    holes = "text with holes: <mask:20> is one of 20 tokens, <mask:20@3> one under guidance 3"
    add("--infill", help=holes, **texts)
    add("--chat", action="store_true", help="make the prompt a user's turn, as published instruction-tuned models read it")
    add("--length", type=int, help="tokens to add at most (default: --block, or 64); DiffusionGemma fills canvases")
    add("--exact", action="store_true", default=None, help="exactly --length tokens")
    add("--block", type=int, help="tokens decoded together (default: 64, or the model's own block or canvas; 8 of Fast-dLLM v2's)")
    add("--steps", type=int, help="passes per block at most (default: block / 4; of models of blocks by threshold; from noise 48)")
    add("--threshold", type=float, help="commit all tokens more certain than this")
    add("--factor", type=float, help="commit by Fast-dLLM's factor rule")
    add("--entropy-budget", type=float, help="commit the most certain while their entropies sum to this")
    add("--edit-threshold", type=float, help="replace committed tokens where the model is this sure of another")
    add("--edit-passes", type=int, help="with --edit-threshold: passes more over a full block, at most, until one edits nothing")
    add("--remask", type=float, metavar="SHARE", help="mask this share of doubtful tokens anew after each pass")
    rules = ("least", "cap", "rescale", "confidence")
    add("--remask-rule", choices=rules, help="the least certain, or ReMDM's rules of strength --remask")
    add("--confidence", help="probability (the default), margin, neg_entropy or random")
    heat = "0 is greedy (default: 1; 0 with --drafts and for published models; 0.8 from noise)"
    add("--temperature", type=float, help=heat)
    add("--top-p", type=float, help="choose among the most likely tokens, whose probabilities sum to this")
    add("--top-k", type=int, help="choose among this many of the most likely tokens")
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
    trained = "renoise, what --uniform-share trained, DiffusionGemma"
    add("--noise-budget", type=float, metavar="NATS", help=f"decode from random tokens; for {trained}")
    add("--html", metavar="FILE", help="write a page that replays the passes beside one token at a time")
    add("--json", action="store_true", help="print numbers and text as JSON")

    correct = command("correct", "replace the tokens of a text that the model, trained with --error-share, rejects")
    _model(correct)
    about = "\\n, \\t and \\\\ in it are a newline, a tab and a backslash; what is in <keep>...</keep> stays"
    correct.add_argument("text", type=_unescaped, help=about)
    correct.add_argument("--threshold", type=float, default=0.7, help="how sure of another token (default: %(default)s)")
    correct.add_argument("--passes", type=int, default=8, help="at most (default: %(default)s)")

    classify = command("classify", "fit a classifier of wanted texts, for generate --classifier")
    _model(classify)
    classify.add_argument("out", help="file to write")
    for name in ("--wanted", "--unwanted"):
        classify.add_argument(name, nargs="+", required=True, metavar="PATH", help=OWN)
    classify.add_argument("--length", type=int, default=64, help="tokens that it judges at once (default: %(default)s)")

    info = command("info", "tell the device, the instruction set and the implementation of each operation")
    _model(info)

    train = command("train", "train a denoiser on the standard library of this Python, or on --texts")
    train.add_argument("out", help="directory of the checkpoint; a run that was stopped goes on from there")
    train.add_argument("--layers", type=int, help="of the model (default: 4, or those of --initial)")
    _run(train, length=256, learning_rate=2e-3)
    train.add_argument("--block-share", type=float, default=0.0, help="share of updates on block-causal denoising")
    train.add_argument("--uniform-share", type=float, default=0.0, help="share of updates on random tokens for --noise-budget")
    train.add_argument("--error-share", type=float, default=0.0, help="share of visible tokens to replace and correct")
    train.add_argument("--initial", metavar="DIR", help="a checkpoint to start from")

    distill = command("distill", "teach a copy of a denoiser to decode in fewer passes")
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
    apart = f"what to measure the student on: {OWN} (default: the standard library's held-out files; none with --texts)"
    distill.add_argument("--held-out", nargs="+", metavar="PATH", help=apart)

    evaluate = command("evaluate", "measure held-out bits per byte and infilling")
    _model(evaluate)
    evaluate.add_argument("--steps", type=int, help="passes to fill a hole (default: 4)")
    instead = evaluate.add_mutually_exclusive_group()
    instead.add_argument("--decoding", action="store_true", help="compare ways to decode instead, on held-out headers")
    instead.add_argument("--by-steps", action="store_true", help="compare the model and --students at 32, 8 and 2 passes")
    instead.add_argument("--control", action="store_true", help="measure each mechanism of control, without and with it")
    evaluate.add_argument("--markdown", action="store_true", help="print a table of these in Markdown, row by row")
    evaluate.add_argument("--plot", metavar="FILE", help="draw --by-steps into an SVG file")
    known = "of --by-steps, of the model's tokenizer (default: student-8 and student-2, those that are of the model's shape too)"
    evaluate.add_argument("--students", nargs="*", metavar="DIR", help=known)
    evaluate.add_argument("--prompts", type=int, default=8, help="how many headers (default: %(default)s; 64 take minutes)")
    apart = f"what to measure on, which no training has read: {OWN} (default: the standard library's held-out files)"
    evaluate.add_argument("--held-out", nargs="+", metavar="PATH", help=apart)
    evaluate.add_argument("--files", type=int, default=None, help="held-out files to use (default: all)")
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
    add("--texts", nargs="+", metavar="PATH", help=f"what to learn from, all of it: {OWN} (default: the standard library)")


def _model(command):
    command.add_argument(
        "--model",
        metavar="DIR",
        help="a checkpoint, or student-8, student-2 or renoise, which come with the package (default: their teacher)",
    )


if __name__ == "__main__":
    sys.exit(main())
