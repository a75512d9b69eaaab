"""A sampler's inner step on logits: score every masked position, commit the most confident."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import dlm_kernels
from bench import harness, oracles, peers
from bench.harness import Case

MASK = 0
VOCABULARY = {
    "DiffuLLaMA": 32000,
    "MDLM": 50258,
    "LLaDA-8B": 126464,
    "SDAR-4B": 151936,
    "LLaDA2-mini": 157184,
    "DiffusionGemma": 262144,
}


def case(
    name,
    rows,
    v,
    dtype="float32",
    *,
    guided=False,
    temperature=0.0,
    ranked=False,
    threshold=None,
    masked=1.0,
    from_torch=False,
    **options,
):
    """logits [1, R, V]; `masked` is the share of rows that still are.

    from_torch: beside the others' times that of `dlm_kernels.torch`.
    """
    rule = dict(num_unmask=max(1, rows // 4)) if threshold is None else dict(threshold=threshold)
    guidance = dict(guidance_scale=2.5) if guided else {}
    key = jax.random.key(7) if temperature else None

    def inputs(rng):
        streams = [(logits_by_rank if ranked else logits)(rng, rows, v)]
        if guided:
            # Nearly what the model says with the prompt: streams that disagree would saturate every confidence at 1.
            streams.append(streams[0] + 0.3 * rng.standard_normal((rows, v), "float32"))
        streams = tuple(jnp.asarray(stream, dtype)[None] for stream in streams)
        tokens = np.where(rng.permutation(rows) < masked * rows, MASK, 1)
        return (*streams, jnp.asarray(tokens, jnp.int32)[None])

    def oracle(*arrays):
        stream = oracles.mix(*arrays[:2], 2.5) if guided else arrays[0]
        return oracles.unmask(stream[0], np.asarray(arrays[-1][0]), MASK, **rule)[None]

    def step(*arrays, implementation, temperature=temperature):
        stream = dict(unconditional=arrays[1]) if guided else {}
        return dlm_kernels.unmask_step(
            arrays[0],
            arrays[-1],
            mask_id=MASK,
            temperature=temperature,
            key=key if temperature else None,
            implementation=implementation,
            **stream,
            **guidance,
            **rule,
        ).tokens

    def committed(output, *arrays):
        """Of draws of another generator: 0 where as many masks as asked for are tokens now, and all else is as it was."""
        before, after = np.asarray(arrays[-1]), harness.as_numpy(output)
        changed = before != after
        return float(changed.sum() != rule["num_unmask"] or (before[changed] != MASK).any() or not (after[changed] < v).all())

    drawn = committed if temperature else None
    if threshold is not None:
        how = dict(mask_id=MASK, threshold=threshold)
        published = {"Fast-dLLM": functools.partial(peers.fast_dllm_step, **how)}
        to_compile = functools.partial(peers.threshold_step, **how)
    else:
        one, two = peers.llada_step, functools.partial(peers.llada_guided_step, scale=2.5)
        llada = functools.partial(two if guided else one, mask_id=MASK, temperature=temperature, **rule)
        published = {
            "LLaDA float64": functools.partial(llada, precision="float64"),
            "LLaDA float32": functools.partial(llada, precision="float32"),
        }
        to_compile = published["LLaDA float32"]
    contenders = {each: peers.torch_peer(peers.no_grad(function), check=drawn) for each, function in published.items()}
    if "sweep" not in options:
        contenders["torch.compile"] = peers.torch_peer(to_compile, compiled=True, check=drawn)
    if ranked:
        greedy = harness.ours(step, temperature=0.0)[harness.OURS]
        is_greedy = lambda output, *arrays: harness.error(output, oracle(*arrays))  # noqa: E731
        contenders[harness.GREEDY] = dataclasses.replace(greedy, check=is_greedy)
    if from_torch:
        contenders[harness.FROM_TORCH] = peers.ours_from_torch("unmask_step", mask_id=MASK, **rule)
    extra = ", guided" * guided + f", temperature {temperature:g}" * bool(temperature) + ", half masked" * (masked < 1)
    extra += ", by rank" * ranked
    return Case(
        "unmask",
        f"{name}, {rows} x {v}, {dtype}{extra}{', threshold' if threshold is not None else ''}",
        inputs,
        harness.ours(step) | contenders,
        read=int((1 + guided) * masked * rows * v) * jnp.dtype(dtype).itemsize,
        dtype=dtype,
        oracle=None if temperature else oracle,
        sampled=lambda output: output.tokens if hasattr(output, "tokens") else output,
        # Shares of tokens: two confidences nearer than rounding may change places. With noise all of JAX's draws are the same.
        tolerance=0.02,
        **options,
    )


def logits(rng, rows, v):
    """As wide as a trained model's, with one token standing out by as much as its position is easy."""
    array = 2 * rng.standard_normal((rows, v), "float32")
    array[np.arange(rows), rng.integers(1, v, rows)] += rng.uniform(8, 20, rows).astype("float32")
    return array


def logits_by_rank(rng, rows, v):
    """A row's k-th most likely token has probability in proportion to k ** -a, a in 1 ... 2.5, as the shipped model's first 100.

    Where noise is added this is what differs from `logits`: how many tokens are near enough to the first to win.
    """
    return rng.permuted(-rng.uniform(1, 2.5, (rows, 1)) * np.log(np.arange(1, v + 1)), axis=1).astype("float32")


def cases():
    kinds = (dict(), dict(guided=True), dict(temperature=1.0), dict(guided=True, temperature=1.0), dict(threshold=0.9))
    return [
        case("LLaDA-8B", 128, 126464, from_torch=True, quick=True, headline=True),
        case("LLaDA-8B", 128, 126464, guided=True, quick=True, headline=True),
        case("LLaDA-8B", 128, 126464, temperature=1.0, headline=True),
        case("LLaDA-8B", 128, 126464, temperature=1.0, ranked=True, headline=True),
        case("LLaDA-8B", 128, 126464, guided=True, temperature=1.0),
        case("LLaDA-8B", 128, 126464, masked=0.5),
        case("LLaDA-8B", 128, 126464, threshold=0.9, headline=True),
        case("LLaDA-8B", 128, 126464, "bfloat16", headline=True),
        *(case(name, 32, v, sweep=("vocabulary, 32 rows", v)) for name, v in VOCABULARY.items()),
        *(case("LLaDA-8B", rows, 126464, sweep=("rows, vocabulary 126464", rows)) for rows in (1, 16, 512)),
        # Gigabytes of logits.
        *(
            case(name, rows, VOCABULARY[name], "bfloat16", full=True, **kind)
            for name in ("DiffuLLaMA", "LLaDA-8B", "DiffusionGemma")
            for rows in (2048, 8192)
            for kind in kinds
        ),
    ]


test_unmask, pytest_generate_tests = harness.microbenchmark(cases)
