"""Attention of the models in use: full squares, blocks against a cache, masks, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import dlm_kernels
from bench import harness, oracles, peers
from bench.harness import Case, Contender
from dlm_kernels import masks

# Query heads, kv heads, head size.
HEADS = {
    "LLaDA-8B": (32, 32, 128),
    "Dream-7B": (28, 4, 128),
    "SDAR-4B": (32, 8, 128),
    "LLaDA2-mini": (16, 4, 128),
    "DiffusionGemma local": (16, 8, 256),
    "DiffusionGemma global": (16, 2, 512),
    "MDLM": (12, 12, 64),
}
MASKS = {
    # Half of the row is padding.
    "padded": lambda t, s: masks.padding(jnp.array([s // 2]), t, s),
    "block-causal 32": lambda t, s: masks.block_causal(t, 32, key_length=s, offset=s - t),
    "BD3 16": lambda t, s: masks.block_diffusion(t // 2, 16),
    "window 256": lambda t, s: masks.sliding_window(t, 128, 128, key_length=s),
}
# The oracle's logits of one head; beyond it computes every n-th query.
ORACLE_LOGITS = 1 << 22


@functools.cache
def intervals(mask, t, s):
    """The mask, and the int32 [T, 2 or 4] bounds of its runs."""

    # One program: op by op, every operation of every shape would be compiled.
    @jax.jit
    def build():
        built = MASKS[mask](t, s)
        return built, masks.bounds(built, s)[0]

    built, bounds = build()
    return built, np.asarray(bounds)


def keys_seen(bounds, s):
    """bool [S]: those that any query sees."""
    edges = np.zeros(s + 1, int)
    np.add.at(edges, bounds[:, ::2], 1)
    np.add.at(edges, bounds[:, 1::2], -1)
    return edges[:-1].cumsum() > 0


def case(model, t, s, dtype, mask=None, backward=False, batch=1, from_torch=False, **options):
    """[B, T, N, H] against [B, S, K, H]. from_torch: beside the others' times that of `dlm_kernels.torch`."""
    n, k, h = HEADS[model]
    built, bounds = intervals(mask, t, s) if mask else (None, np.array([[0, s]] * t))
    seen, read_keys = int((bounds[:, 1::2] - bounds[:, ::2]).sum()), int(keys_seen(bounds, s).sum())
    # Where all queries see the same first keys, as of a padded row, peers are given those alone and need no mask.
    length = int(bounds[0, 1]) if bounds.shape[1] == 2 and (bounds == [0, bounds[0, 1]]).all() else None
    step = max(1, t * s // ORACLE_LOGITS)

    # Made when a contender first asks: the larger ones of a full run take a gigabyte.
    @functools.cache
    def boolean():
        with jax.ensure_compile_time_eval():
            return built.as_boolean(s) if length is None else None

    def inputs(rng):
        shapes = [(batch, t, n, h), (batch, s, k, h), (batch, s, k, h)] + [(batch, t, n, h)] * backward
        return tuple(jnp.asarray(rng.standard_normal(shape, "float32"), dtype) for shape in shapes)

    def oracle(query, key, value):
        with jax.ensure_compile_time_eval():
            visible = None if mask is None else np.asarray(built.as_boolean(s)[0, 0, ::step])
        return oracles.attention(query[:, ::step], key, value, visible)

    def forward(query, key, value, implementation):
        return dlm_kernels.attention(query, key, value, mask=built, implementation=implementation)

    def of_seen(attend):
        return lambda query, key, value, *others: attend(query, key[:, :length], value[:, :length], *others)

    def jitted(attend):
        return jax.jit(of_seen(lambda *arrays: attend(*arrays, mask=boolean())))

    jax_forwards = {
        "jax.nn": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
        "cuDNN": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
        "tokamax": peers.tokamax_attention,
    }
    contenders = harness.ours(forward)
    for name, attend in jax_forwards.items():
        contenders[name] = Contender(jitted(attend), missing=peers.why_no_attention(name))
    sdpa = of_seen(peers.sdpa)
    if backward:
        contenders = {
            name: Contender(jax.jit(_gradient(contender.function)), missing=contender.missing)
            for name, contender in contenders.items()
        }
        contenders["torch"] = peers.torch_peer(_torch_gradient(sdpa), peers.with_mask(boolean))
    else:
        contenders["torch"] = peers.torch_peer(peers.no_grad(sdpa), peers.with_mask(boolean))
        if mask is not None:
            contenders["FlexAttention"] = peers.flex_peer(bounds, s)
        if from_torch:
            contenders[harness.FROM_TORCH] = peers.ours_from_torch("attention")
    # Forward has two products and its gradients four; what a kernel computes anew to keep less is its own affair.
    flops = 4 * batch * seen * n * h * (3 if backward else 1)
    size = jnp.dtype(dtype).itemsize
    return Case(
        "attention",
        f"{model}, {f'{batch} x ' * (batch > 1)}{t} x {s}, {dtype}{', ' + mask if mask else ''}{', backward' if backward else ''}",
        inputs,
        contenders,
        read=size * batch * h * (t * n * (1 + backward) + 2 * read_keys * k),
        written=size * batch * h * (t * n + 2 * s * k * backward),
        flops=flops,
        dtype=dtype,
        oracle=None if backward else oracle,
        sampled=lambda out: out if backward else out[:, ::step],
        tolerance=2e-5 if dtype == "float32" else 2e-2,
        **options,
    )


def _gradient(forward):
    def run(query, key, value, dout):
        return jax.vjp(forward, query, key, value)[1](dout)

    return run


def _torch_gradient(forward):
    def run(query, key, value, dout, mask=None):
        arrays = [x.detach().requires_grad_() for x in (query, key, value)]
        forward(*arrays, mask).backward(dout)
        return tuple(x.grad for x in arrays)

    return run


def cases():
    keys, lengths = (512, 2048, 8192, 32768), (512, 1024, 2048)
    return [
        case("LLaDA-8B", 1024, 1024, "bfloat16", from_torch=True, headline=True, quick=True),
        case("LLaDA-8B", 1024, 1024, "float32", headline=True),
        case("LLaDA-8B", 128, 1024, "bfloat16", headline=True),
        case("LLaDA-8B", 32, 2048, "bfloat16", headline=True, quick=True),
        case("Dream-7B", 512, 512, "bfloat16"),
        case("SDAR-4B", 4, 4096, "bfloat16"),
        case("LLaDA2-mini", 32, 2048, "bfloat16"),
        case("DiffusionGemma local", 256, 1280, "bfloat16"),
        case("DiffusionGemma global", 256, 2048, "bfloat16"),
        case("MDLM", 1024, 1024, "float32"),
        *(case("LLaDA-8B", 1024, 1024, "bfloat16", mask, headline=mask[:2] in ("pa", "bl")) for mask in MASKS),
        case("MDLM", 1024, 1024, "float32", backward=True, quick=True, headline=True),
        case("MDLM", 1024, 1024, "float32", "BD3 16", backward=True),
        case("LLaDA-8B", 512, 512, "bfloat16", backward=True, headline=True),
        *(case("SDAR-4B", 32, s, "bfloat16", sweep=("keys, 32 queries", s)) for s in keys),
        *(case("LLaDA2-mini", t, t, "bfloat16", sweep=("length, square", t)) for t in lengths),
        *(case("LLaDA2-mini", 32, 2048, "bfloat16", batch=b, sweep=("batch, 32 x 2048", b)) for b in (2, 8)),
        # Where one head's logits fill the memory of a CPU.
        *(
            case(model, t, s, "bfloat16", mask, full=True)
            for model in ("LLaDA-8B", "SDAR-4B")
            for t, s in ((4096, 4096), (8192, 8192), (32768, 32768))
            for mask in (None, "padded", "block-causal 32", "BD3 16")
        ),
        *(
            case(model, t, s, "bfloat16", mask, full=True)
            for model in ("LLaDA-8B", "Dream-7B", "DiffusionGemma global")
            for t in (32, 128, 256)
            for s in (4096, 8192, 32768)
            for mask in (None, "padded")
        ),
        *(case("LLaDA-8B", t, t, "bfloat16", mask, backward=True, full=True) for t in (4096, 8192) for mask in (None, "BD3 16")),
    ]


test_attention, pytest_generate_tests = harness.microbenchmark(cases)
