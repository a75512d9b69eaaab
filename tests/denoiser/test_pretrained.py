"""Published checkpoints in miniature, under their own names and layout, against a forward pass written from their source.

8 heads of 3 would do for attention, but RoPE needs an even head size: 4 of 6. Two layers, so that a cache can be stale.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dlm_kernels import cli
from dlm_kernels.denoiser import checkpoint, data, model, pretrained, sampler, speculative

LAYERS, D, HEADS, FFN, VOCAB = 2, 24, 4, 40, 300
LLADA = dict(
    model_type="llada", d_model=D, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=HEADS, mlp_hidden_size=FFN, vocab_size=VOCAB,
    embedding_size=VOCAB, rope_theta=500000.0, rms_norm_eps=1e-5, weight_tying=False, include_bias=False, include_qkv_bias=False,
    layer_norm_type="rms", activation_type="silu", block_type="llama", scale_logits=False, rope=True, rope_full_precision=True,
    mask_token_id=2, pad_token_id=1, eos_token_id=1,
)  # fmt: skip
DREAM = dict(
    model_type="Dream", hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
    intermediate_size=FFN, vocab_size=VOCAB, rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    hidden_act="silu", rope_scaling=None, use_sliding_window=False, mask_token_id=2, pad_token_id=1, eos_token_id=1,
)  # fmt: skip
BLOCK = {
    "llada": dict(
        prefix="model.transformer.blocks.{}.", norm="attn_norm", q="q_proj", k="k_proj", v="v_proj", o="attn_out",
        norm2="ff_norm", gate="ff_proj", up="up_proj", down="ff_out",
    ),
    "dream": dict(
        prefix="model.layers.{}.", norm="input_layernorm", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
        o="self_attn.o_proj", norm2="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
    ),
}  # fmt: skip
ENDS = {
    "llada": ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out"),
    "dream": ("model.embed_tokens", "model.norm", "lm_head"),
}


def tensors(kind, random):
    """Random weights as torch's Linear holds them, [out, in]; norms away from 1, so that a mixed-up name shows."""
    names, (embed, norm, head) = BLOCK[kind], ENDS[kind]
    keys = D if kind == "llada" else D // 2
    shapes = dict(q=(D, D), k=(keys, D), v=(keys, D), o=(D, D), gate=(FFN, D), up=(FFN, D), down=(D, FFN))
    found = {}
    for i in range(LAYERS):
        prefix = names["prefix"].format(i)
        for part, shape in shapes.items():
            found[f"{prefix}{names[part]}.weight"] = random.normal(size=shape) * 2 * shape[1] ** -0.5
            if kind == "dream" and part in "qkv":
                found[f"{prefix}{names[part]}.bias"] = random.normal(size=shape[0])
        for part in ("norm", "norm2"):
            found[f"{prefix}{names[part]}.weight"] = random.uniform(0.5, 1.5, D)
    found |= {f"{name}.weight": random.normal(size=(VOCAB, D)) for name in (embed, head)}
    found[f"{norm}.weight"] = random.uniform(0.5, 1.5, D)
    return {name: x.astype(np.float32) for name, x in found.items()}


def logits(kind, config, weights, tokens):
    """[L, V] of one row, float64: the published forward pass, all positions seeing all. Dream's are of the position before."""
    names, (embed, norm, head) = BLOCK[kind], ENDS[kind]
    eps, theta, size = config["rms_norm_eps"], config["rope_theta"], D // HEADS
    w = {name: x.astype(np.float64) for name, x in weights.items()}

    def rms(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    angle = np.arange(len(tokens))[:, None] * theta ** (-np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rope(x):
        return x * cos + np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = w[f"{embed}.weight"][tokens]
    for i in range(LAYERS):
        part = {name: names["prefix"].format(i) + theirs for name, theirs in names.items()}
        h = rms(x, part["norm"])
        q, k, v = (linear(h, part[name]).reshape(len(tokens), -1, size) for name in "qkv")
        q, k = rope(q), rope(k)
        k, v = (np.repeat(y, HEADS // y.shape[1], axis=1) for y in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) * size**-0.5
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + linear(np.einsum("nts,snh->tnh", p, v).reshape(len(tokens), -1), part["o"])
        h = rms(x, part["norm2"])
        gate = linear(h, part["gate"])
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, part["up"]), part["down"])
    found = linear(rms(x, norm), head)
    return found if kind == "llada" else np.concatenate([found[:1], found[:-1]])


@pytest.fixture(scope="module", params=["llada", "dream"])
def published(request, tmp_path_factory, texts):
    """(kind, config.json, tensors, directory); LLaDA's in one file, Dream's in two shards."""
    kind = request.param
    config = {"llada": LLADA, "dream": DREAM}[kind]
    folder = tmp_path_factory.mktemp(kind)
    weights = tensors(kind, np.random.default_rng(4))
    (folder / "config.json").write_text(json.dumps(config))
    data.train_tokenizer([text for _, text, _ in texts], VOCAB).save(str(folder / "tokenizer.json"))
    if kind == "llada":
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
    else:
        names, index = sorted(weights), {}
        for shard in range(2):
            file = f"model-{shard}.safetensors"
            safetensors.numpy.save_file({name: weights[name] for name in names[shard::2]}, folder / file)
            index |= dict.fromkeys(names[shard::2], file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return kind, config, weights, folder


def test_logits_are_those_of_the_published_forward_pass(published):
    kind, given, weights, folder = published
    config, params, _ = checkpoint.load(folder)
    tokens = np.random.default_rng(3).integers(0, VOCAB, 13).astype(np.int32)
    ours = model.hidden_states(config, params, tokens[None]) @ model.head_weight(config, params).T
    expected = logits(kind, given, weights, tokens)
    assert np.linalg.norm(ours[0] - expected) < 2e-6 * np.linalg.norm(expected)
    _, half, _ = checkpoint.load(folder, dtype=jnp.bfloat16)
    assert {x.dtype for x in half.values()} == {jnp.dtype(jnp.bfloat16)}
    assert checkpoint.published(folder) and not checkpoint.published(checkpoint.SHIPPED)


def test_decoding_agrees_with_the_published_logits(published):
    """One token a pass: the surest mask first, by the reference's logits, with prompts of two lengths side by side."""
    kind, given, weights, folder = published
    config, params, _ = checkpoint.load(folder)
    random = np.random.default_rng(9)
    tokens = np.full((2, 14), 2, np.int32)
    tokens[:, 3:8] = random.integers(3, VOCAB, (2, 5))
    tokens[0, :5] = config.pad_id
    tokens[1, :3] = config.pad_id
    start, first = np.array([5, 3]), np.array([8, 8])
    decoded = np.asarray(sampler.decode(config, params, tokens, block=6, steps=6, start=start, first=first).tokens)
    for row, begin in enumerate(start):
        board = tokens[row, begin:].copy()
        while (board == 2).any():
            found = logits(kind, given, weights, board)
            found[:, 2] = -np.inf
            p = np.exp(found - found.max(-1, keepdims=True))
            sure = np.where(board == 2, (p / p.sum(-1, keepdims=True)).max(-1), -1)
            board[sure.argmax()] = found[sure.argmax()].argmax()
        np.testing.assert_array_equal(decoded[row, begin:], board)
    alone = dict(tokens=tokens[:1], start=start[:1], first=first[:1], block=6, steps=6)
    drafted = speculative.decode(config, params, drafts=2, **alone)
    np.testing.assert_array_equal(drafted.tokens[0], decoded[0])


def test_confidence_at_a_temperature_is_as_in_the_published_code(published):
    """Dream's is of the tempered distribution, LLaDA's of the model's own."""
    kind, given, weights, folder = published
    config, params, _ = checkpoint.load(folder)
    tokens = np.full((1, 9), 2, np.int32)
    tokens[0, :4] = np.random.default_rng(1).integers(3, VOCAB, 4)
    decoded = sampler.decode(
        config, params, tokens, block=5, first=4, steps=5, temperature=0.5, key=jax.random.split(jax.random.key(0), 1)
    )
    (at,) = np.flatnonzero(decoded.revealed[0] == 0)
    found = logits(kind, given, weights, tokens[0])[at] / (0.5 if kind == "dream" else 1.0)
    found[2] = -np.inf
    p = np.exp(found - found.max())
    np.testing.assert_allclose(decoded.confidence[0, at], (p / p.sum())[decoded.tokens[0, at]], rtol=1e-4)


@pytest.mark.parametrize("options", [dict(attend="blocks"), dict(attend="all", refresh=1)])
def test_caches_are_exact(options, published):
    """Dream's first state of a block lies in the column before it, which is another block's."""
    config, params, _ = checkpoint.load(published[3])
    tokens = np.full((2, 17), 2, np.int32)
    tokens[:, :5] = np.random.default_rng(1).integers(3, VOCAB, (2, 5))
    tokens[0, 0] = config.pad_id
    plain = dict(block=4, steps=2, start=np.array([1, 0]), first=5, attend=options["attend"])
    np.testing.assert_array_equal(
        sampler.decode(config, params, tokens, cache=True, **plain | options).tokens,
        sampler.decode(config, params, tokens, **plain).tokens,
    )


def test_the_pad_may_be_the_end_of_text(published):
    """Both families pad with end-of-text, which a text must be able to end with."""
    config, params, _ = checkpoint.load(published[3])
    assert config.pad_id == config.eos_id == 1
    bias = np.zeros(VOCAB, np.float32)
    bias[1] = 100.0
    tokens = np.full((1, 8), 2, np.int32)
    tokens[0, 0] = 9
    decoded = sampler.decode(config, params, tokens, block=7, steps=7, first=1, stop_at=1, logit_bias=bias)
    np.testing.assert_array_equal(decoded.tokens[0, 1:], 1)


def test_the_command_takes_a_published_directory(published, capsys):
    folder = str(published[3])
    arguments = ["generate", "def add(", "--block", "4", "--steps", "2", "--exact", "--json", "--model", folder]
    assert cli.main(arguments) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["tokens"] == 4 and numbers["passes"] == 2 and numbers["text"].startswith("def add(")


def test_what_is_not_computed_is_refused(published, tmp_path):
    kind, given, weights, folder = published
    wrong = {"llada": ("block_type", "sequential"), "dream": ("use_sliding_window", True)}[kind]
    with pytest.raises(ValueError, match=f"config.json: {wrong[0]}: expected .* got {wrong[1]}"):
        pretrained.load(folder, given | dict([wrong]))
    with pytest.raises(ValueError, match="config.json: expected 'rope_theta'"):
        pretrained.load(folder, {name: x for name, x in given.items() if name != "rope_theta"})
    theta = "mlp_hidden_size" if kind == "llada" else "intermediate_size"
    with pytest.raises(ValueError, match=r"layers.0.gate: expected shape \(24, 41\), got \(24, 40\)"):
        pretrained.load(folder, given | {theta: 41})
    safetensors.numpy.save_file({name: x for name, x in weights.items() if "up_proj" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected a parameter model.*0.*up_proj.weight, got none"):
        pretrained.load(tmp_path, given)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="model.safetensors: "):
        pretrained.load(tmp_path, given)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors: .*o such file"):
        pretrained.load(tmp_path, given)
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match="expected a tokenizer.json"):
        checkpoint.load(tmp_path)
