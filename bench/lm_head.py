"""The LM head with the statistics of its logits: a matrix product whose result nobody needs to keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import dlm_kernels
from bench import harness, machine, oracles, peers
from bench.harness import Case, Contender

SCALE = 2.5
ORACLE_ROWS = 256  # beyond it every n-th


def case(name, rows, d, v, dtype, guided=False, as_written=False, from_torch=False, **options):
    """hidden [1, R, D], weight [V, D]. as_written: against that alone, for it slows what takes turns with it.

    from_torch: beside the others' times that of `dlm_kernels.torch`.
    """
    step = max(1, rows // ORACLE_ROWS)

    def inputs(rng):
        hidden = (harness.normal(rng, (1, rows, d), dtype) for _ in range(1 + guided))
        # Logits of a standard deviation near 3.
        return (*hidden, harness.normal(rng, (v, d), dtype, 3 / d**0.5))

    def scores(*arrays, implementation):
        guidance = dict(unconditional_hidden=arrays[1], guidance_scale=SCALE) if guided else {}
        return tuple(dlm_kernels.lm_head_scores(arrays[0], arrays[-1], implementation=implementation, **guidance))

    contenders = harness.ours(scores)
    if machine.implementation() == "cpu":  # the others read the weight as it is
        contenders[harness.PACKED] = Contender(contenders[harness.OURS].function, _packed, once=True)
    contenders |= peers.of_torch(_torch_head, compiled=options.get("headline"))
    if dtype != "float32" and not guided and "sweep" not in options:
        # Where bfloat16 products are emulated, a user of torch would keep the weight in float32.
        contenders["torch in float32"] = peers.torch_peer(
            peers.no_grad(_torch_head), lambda *arrays: tuple(x.float() for x in arrays)
        )
    if from_torch:
        contenders[harness.FROM_TORCH] = peers.ours_from_torch("lm_head_scores")
    if as_written:
        contenders = {harness.OURS: contenders[harness.OURS], f"jnp, {dtype} logits": Contender(jax.jit(_jnp_head))}
    size = jnp.dtype(dtype).itemsize
    return Case(
        "lm_head",
        f"{name}, {rows} x {d} x {v}, {dtype}{', guided' if guided else ''}{', as written' if as_written else ''}",
        inputs,
        contenders,
        read=size * d * (v + rows * (1 + guided)),
        flops=2 * rows * d * v,
        dtype=dtype,
        oracle=functools.partial(_oracle, step),
        sampled=lambda scores: tuple(each[:, ::step] for each in scores),
        # Of the confidences, which are exponentials of logits; guidance in the logits' dtype rounds more than in hidden space.
        tolerance=1e-3 if dtype == "float32" else 0.1,
        **options,
    )


def _packed(*arrays):
    return *arrays[:-1], dlm_kernels.pack_lm_head(arrays[-1])


def _torch_head(*arrays):
    """Guidance, where there is some, on logits: both products, as samplers have it."""
    logits = arrays[0] @ arrays[-1].T
    if len(arrays) == 3:
        unconditional = arrays[1] @ arrays[-1].T
        logits = unconditional + SCALE * (logits - unconditional)
    return peers.statistics(logits)


def _jnp_head(hidden, weight):
    """What one writes first: the product has its operands' dtype, where "jnp" asks XLA for float32."""
    logits = (hidden @ weight.T).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    return logits.argmax(-1).astype(jnp.int32), p.max(-1), -(p * log_p).sum(-1), logsumexp


def _oracle(step, *arrays):
    """Guidance in hidden space, which the head's linearity makes the same."""
    streams = [array[:, ::step] for array in arrays[:-1]]
    hidden = oracles.mix(*streams, SCALE) if len(streams) == 2 else np.asarray(streams[0], np.float64)
    return oracles.scores(oracles.head(hidden, arrays[-1]))


def cases():
    return [
        case("LLaDA-8B slice", 128, 4096, 32768, "bfloat16", from_torch=True, quick=True, headline=True),
        case("LLaDA-8B slice", 128, 4096, 32768, "bfloat16", guided=True, headline=True),
        case("LLaDA-8B slice", 128, 4096, 32768, "bfloat16", as_written=True, headline=True),
        case("LLaDA-8B slice", 128, 4096, 32768, "float32", headline=True),
        case("LLaDA-8B slice", 128, 4096, 32768, "float32", guided=True),
        case("LLaDA-8B", 32, 4096, 126464, "bfloat16", full=True),
        case("SDAR-4B", 4, 2560, 151936, "float32"),
        case("MDLM", 256, 768, 50258, "float32"),
        *(case("LLaDA-8B slice", rows, 4096, 32768, "bfloat16", sweep=("rows, 4096 x 32768", rows)) for rows in (1, 16, 512)),
        *(case("width 1024", 64, 1024, v, "bfloat16", sweep=("vocabulary, 64 x 1024", v)) for v in (32000, 126464, 262144)),
        *(
            case(name, rows, d, v, "bfloat16", guided=guided, full=True)
            for name, d, v in (("LLaDA-8B", 4096, 126464), ("SDAR-4B", 2560, 151936), ("DiffusionGemma", 2816, 262144))
            for rows in (128, 2048, 8192)
            for guided in (False, True)
        ),
    ]


test_lm_head, pytest_generate_tests = harness.microbenchmark(cases)
