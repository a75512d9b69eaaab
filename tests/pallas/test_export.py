"""The operations exported for the TPU on a machine without one carry the Pallas kernels."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dlm_kernels
from dlm_kernels.denoiser import model, sampler
from dlm_kernels.denoiser.config import DenoiserConfig
from dlm_kernels.pallas_kernels import chips

LOGITS = jax.ShapeDtypeStruct((2, 8, 1000), jnp.float32)
HIDDEN, WEIGHT = jax.ShapeDtypeStruct((2, 8, 64), jnp.float32), jax.ShapeDtypeStruct((1000, 64), jnp.float32)
NARROW, NARROW_WEIGHT = jax.ShapeDtypeStruct((2, 8, 48), jnp.float32), jax.ShapeDtypeStruct((1000, 48), jnp.float32)
TOKENS, PER_TOKEN = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), jnp.float32)
STEP = dict(mask_id=999, num_unmask=2, threshold=0.9)
QUERY, KEY = jax.ShapeDtypeStruct((2, 48, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 96, 2, 64), jnp.bfloat16)
MATRICES = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 64, 48), (5, 64, 48), (5, 48, 64))]
PAIRS = [jax.ShapeDtypeStruct((2, 8, 3), dtype) for dtype in (jnp.int32, jnp.float32)]
OPERATIONS = {
    "attention": (dlm_kernels.attention, (QUERY, KEY, KEY)),
    "attention to a cache": (
        lambda q, k, v, n: dlm_kernels.attention(q, k, v, mask=dlm_kernels.masks.cache(48, n), logits_soft_cap=30.0),
        (QUERY, KEY, KEY, jax.ShapeDtypeStruct((2,), jnp.int32)),
    ),
    "attention's gradient": (
        jax.grad(lambda q, k, v: dlm_kernels.attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)),
        (QUERY, KEY, KEY),
    ),
    "combine_guidance": (dlm_kernels.combine_guidance, (jax.ShapeDtypeStruct((3, 2, 8, 1000), jnp.float32), jnp.ones(3))),
    "score_tokens": (lambda x: dlm_kernels.score_tokens(x, temperature=0.5, key=jax.random.key(0)), (LOGITS,)),
    "unmask_step": (lambda x, tokens: dlm_kernels.unmask_step(x, tokens, **STEP), (LOGITS, TOKENS)),
    "lm_head_scores": (
        lambda h, u, w: dlm_kernels.lm_head_scores(h, w, unconditional_hidden=u, guidance_scale=2.0),
        (HIDDEN, HIDDEN, WEIGHT),
    ),
    "masked_cross_entropy": (dlm_kernels.masked_cross_entropy, (HIDDEN, WEIGHT, TOKENS, PER_TOKEN)),
    "masked_cross_entropy and its gradient": (
        jax.grad(dlm_kernels.masked_cross_entropy, (0, 1)),
        (HIDDEN, WEIGHT, TOKENS, PER_TOKEN),
    ),
    "masked_divergence": (dlm_kernels.masked_divergence, (HIDDEN, WEIGHT, NARROW, NARROW_WEIGHT, PER_TOKEN)),
    "masked_divergence and its gradient": (
        jax.grad(dlm_kernels.masked_divergence, (0, 1)),
        (NARROW, NARROW_WEIGHT, HIDDEN, WEIGHT, PER_TOKEN),
    ),
    "truncate_logits": (lambda x: dlm_kernels.truncate_logits(x, top_p=0.9, top_k=50), (LOGITS,)),
    "mix_experts": (dlm_kernels.mix_experts, (HIDDEN, *MATRICES, *PAIRS)),
    "mix_guidance": (lambda c, u: dlm_kernels.mix_guidance(c, u, 1.5), (LOGITS, LOGITS)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_tpu_takes_pallas(name):
    function, arrays = OPERATIONS[name]
    choices = dlm_kernels.explain(function, *arrays)
    assert choices and all(choice.implementations["tpu"] == "pallas" for choice in choices)
    exported = export.export(jax.jit(function), platforms=["tpu"])(*arrays)
    kernels = re.findall(r'kernel_name = "(\w+)"', exported.mlir_module())
    for choice in choices:
        assert any(name.startswith(choice.kernel) for name in kernels), (choice, kernels)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_on_several_tpus(name, axis):
    """Where types say how arrays are split each device's part takes the kernels; where the compiler is to split, which cannot split
    them, it is given XLA's code.
    """
    function, arrays = OPERATIONS[name]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis,), devices=jax.devices()[:2])

    def split(array):
        batch = array.shape.index(2) if 2 in array.shape else len(array.shape)
        spec = PartitionSpec(*[None] * batch, "data") if 2 in array.shape else PartitionSpec()
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    module = export.export(jax.jit(function), platforms=["tpu"])(*map(split, arrays)).mlir_module()
    assert "mhlo.num_partitions = 2" in module
    kernels = re.findall(r'kernel_name = "(\w+)"', module)
    if axis == AxisType.Auto:
        assert not kernels and "CustomSPMDPartitioning" not in module
    else:
        for choice in dlm_kernels.explain(function, *arrays):
            assert any(name.startswith(choice.kernel) for name in kernels), (choice, kernels)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_users_settings_for_all_of_jax(name):
    """Neither 64 bits nor a precision, of which a TPU has one for bfloat16, reach into a kernel."""
    function, arrays = OPERATIONS[name]
    plain = export.export(jax.jit(function), platforms=["tpu"])(*arrays).mlir_module()
    with jax.enable_x64(True), jax.default_matmul_precision("high"):
        module = export.export(jax.jit(lambda *arrays: function(*arrays)), platforms=["tpu"])(*arrays).mlir_module()
    assert re.findall(r'kernel_name = "(\w+)"', module) == re.findall(r'kernel_name = "(\w+)"', plain)


def test_decoding_exported_for_the_tpu_carries_every_kernel_of_a_step():
    config = DenoiserConfig(layers=1, d_model=32, heads=2, kv_heads=1, head_size=16, ffn=64, vocab=300)
    params = model.init(config, jax.random.key(0))
    tokens = jnp.full((2, 12), config.mask_id, jnp.int32)

    def kernels(**options):
        def decode(params, tokens):
            return sampler.decode(config, params, tokens, block=6, steps=3, threshold=0.9, **options)

        module = export.export(jax.jit(decode), platforms=["tpu"])(params, tokens).mlir_module()
        return set(re.findall(r'kernel_name = "(\w+)"', module))

    assert kernels() == {"attention_forward", "lm_head_scores", "lm_head_scores_finish", "unmask_topk"}
    assert kernels(top_p=0.9) == {"attention_forward", "truncate_logits", "score_tokens", "unmask_topk"}


def test_pallas_where_it_is_asked_for():
    score = jax.jit(lambda x: dlm_kernels.score_tokens(x, implementation="pallas"))
    assert 'kernel_name = "score_tokens"' in export.export(score, platforms=["tpu"])(LOGITS).mlir_module()
    with pytest.raises(ValueError, match="implementation='pallas' cannot run score_tokens on cpu: Only interpret mode"):
        score(jnp.zeros(LOGITS.shape))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_tpu_with_too_little_memory_takes_xla(monkeypatch, name):
    monkeypatch.setattr(chips, "kind", lambda: "TPU v4")
    function, arrays = OPERATIONS[name]
    choices = dlm_kernels.explain(function, *arrays)
    assert choices and all("tpu" not in choice.implementations for choice in choices)
    assert all(choice.refused["pallas"] == "it takes more VMEM than a TPU v4 has" for choice in choices)


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def attention_of_many(query, key, ends):
    return dlm_kernels.attention(query, key, key, mask=dlm_kernels.masks.KeyIntervals(ends, ends))


@pytest.mark.parametrize("backward", [False, True])
def test_what_scalar_memory_does_not_hold_takes_xla(backward):
    """Of 8 rows of 128 Ki keys with bounds of their own a schedule would have more tiles than it may; of one it has not."""
    function = jax.grad(lambda *x: attention_of_many(*x).astype(jnp.float32).sum()) if backward else attention_of_many
    for batch, kernels in ((1, "pallas"), (8, None)):
        query, key = (array(batch, 2**17, n, 128, dtype=jnp.bfloat16) for n in (8, 2))
        choices = dlm_kernels.explain(function, query, key, array(batch, 2**17))
        assert [choice.implementations.get("tpu") for choice in choices] == [kernels] * len(choices), choices


def test_rules_that_scalar_memory_does_not_hold_take_xla():
    scores = dlm_kernels.TokenScores(*(array(50_001, 32, dtype=d) for d in (jnp.int32, *[jnp.float32] * 3)))
    (choice,) = dlm_kernels.explain(
        lambda tokens, scores: dlm_kernels.unmask_topk(tokens, scores, mask_id=0, num_unmask=1), array(50_001, 32), scores
    )
    assert choice.refused["pallas"] == "it has the rules of all rows in scalar memory, at most 50000 rows, not 50001"


def test_a_vocabulary_that_vmem_does_not_hold_takes_xla():
    """For top_p the weights of a row are there too."""

    def choice(vocabulary, **options):
        logits = array(1, 8, vocabulary, dtype=jnp.bfloat16)
        return dlm_kernels.explain(lambda x: dlm_kernels.truncate_logits(x, **options), logits)[0]

    for vocabulary, options in ((2**18, dict(top_p=0.9)), (300_000, dict(top_k=9))):
        assert choice(vocabulary, **options).implementations["tpu"] == "pallas"
    assert choice(300_000, top_p=0.9).refused["pallas"] == "VMEM holds no 16 rows of a vocabulary of 300000"


def test_experts_that_do_not_fit():
    def choice(width, rows=1, inner=128):
        gate = array(2, width, inner, dtype=jnp.bfloat16)
        arrays = array(rows, width, dtype=jnp.bfloat16), gate, gate, array(2, inner, width, dtype=jnp.bfloat16)
        pairs = array(rows, 8), array(rows, 8, dtype=jnp.float32)
        (found,) = dlm_kernels.explain(dlm_kernels.mix_experts, *arrays, *pairs)
        return found

    assert choice(8192).implementations["tpu"] == "pallas"
    assert choice(16384).refused["pallas"] == "VMEM holds no 128 columns of experts of width 16384"
    assert choice(28672, inner=64).refused["pallas"] == "VMEM holds no 128 columns of experts of width 28672"
    assert choice(64, 2**27).refused["pallas"] == "it sorts pairs by their expert and place in 32 bits"


def test_a_chip_is_known_by_each_of_its_names(monkeypatch):
    for name, topology in (("TPU v5p", "v5p"), ("TPU v5", "v5p"), ("TPU v5e", "v5e"), ("TPU v6e", "v6e"), ("TPU7", "tpu7x")):
        monkeypatch.setattr(chips, "kind", lambda name=name: name)
        assert chips.chip().topology.startswith(topology)
    monkeypatch.setattr(chips, "kind", lambda: "TPU of a year to come")
    assert chips.chip() == chips.UNKNOWN and chips.refuse_chip() is None


def test_a_width_whose_gradients_do_not_fit():
    """They keep more of a tile of the weight than the loss does, whose kernel takes it."""
    hidden, weight = (jax.ShapeDtypeStruct((*shape, 32768), jnp.bfloat16) for shape in ((2, 8), (1000,)))
    loss, gradients = dlm_kernels.explain(jax.grad(dlm_kernels.masked_cross_entropy, (0, 1)), hidden, weight, TOKENS, PER_TOKEN)
    assert loss.implementations["tpu"] == "pallas" and "tpu" not in gradients.implementations
    assert gradients.refused["pallas"] == "VMEM holds no 128 rows of a weight of width 32768"
