"""Published checkpoints in miniature, under their own names and layout, against a forward pass written from their source.

8 heads of 3 would do for attention, but RoPE needs an even head size: 4 of 6, or of 8 where it may be another than theirs of the
width. Two layers, so that a cache can be stale.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dlm_kernels import cli, masks
from dlm_kernels.denoiser import checkpoint, data, generate, model, pretrained, sampler, speculative

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
SDAR = dict(
    model_type="sdar", hidden_size=D, head_dim=8, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
    intermediate_size=FFN, vocab_size=VOCAB, rope_theta=1000000, rms_norm_eps=1e-6, tie_word_embeddings=False, hidden_act="silu",
    attention_bias=False, rope_scaling=None, sliding_window=None, use_sliding_window=False, eos_token_id=1, block_size=4,
    mask_token_id=2,
)  # fmt: skip
# As the 1.5B, whose head is its embedding.
FAST_DLLM = dict(
    model_type="Fast_dLLM_Qwen", hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
    intermediate_size=FFN, vocab_size=VOCAB, rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=True, hidden_act="silu",
    layer_types=["full_attention"] * LAYERS, sliding_window=131072, use_sliding_window=False, eos_token_id=1, bd_size=8,
    mask_token_id=2,
)  # fmt: skip
SDAR_MOE = SDAR | dict(
    model_type="sdar_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True,
    decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
LLADA_MOE = dict(
    model_type="llada", hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
    dense_intermediate_size=FFN, expert_intermediate_size=12, shared_expert_intermediate_size=None, vocab_size=VOCAB,
    rope_theta=50000, rms_norm_eps=1e-5, tie_word_embeddings=False, hidden_act="silu", rope_scaling=None, attention_bias=False,
    clip_qkv=None, num_experts=8, num_experts_per_tok=3, norm_topk_prob=None, qk_layernorm=True, moe_layer_freq=[1] * LAYERS,
    moe_router_enable_expert_bias=False, moe_router_score_function="softmax", partial_rotary_factor=1, routed_scaling_factor=1,
    router_num_group=None, router_topk_group=None, pad_token_id=1, eos_token_id=1, mask_token_id=2,
)  # fmt: skip
# Half of a head turns; one layer is dense, the other has 3 groups of 4 experts, 2 of them kept, and a shared one.
LLADA2 = dict(
    model_type="llada2_moe", hidden_size=D, head_dim=8, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
    intermediate_size=FFN, vocab_size=VOCAB, rope_theta=600000, rms_norm_eps=1e-6, tie_word_embeddings=False, hidden_act="silu",
    rope_scaling=None, use_sliding_window=False, partial_rotary_factor=0.5, use_qk_norm=True, use_qkv_bias=False, use_bias=False,
    norm_head=False, num_experts=12, num_experts_per_tok=3, moe_intermediate_size=12, num_shared_experts=2, n_group=3,
    topk_group=2, first_k_dense_replace=1, routed_scaling_factor=2.5, score_function="sigmoid", norm_topk_prob=True,
    moe_router_enable_expert_bias=True, block_size=8, pad_token_id=1, mask_token_id=2,
)  # fmt: skip
# What it says of groups does not divide its experts: nothing reads it.
DELETE, INSERT = 4, 5
LLADA22 = LLADA2 | dict(expert_capacity=5, n_group=7, topk_group=4, delete_token_id=DELETE, split_token_id=INSERT)
GIVEN = {
    "llada": LLADA, "llada_moe": LLADA_MOE, "dream": DREAM, "sdar": SDAR, "fast_dllm": FAST_DLLM, "sdar_moe": SDAR_MOE,
    "llada2": LLADA2, "llada22": LLADA22,
}  # fmt: skip
MIXED = {"llada_moe": 0, "sdar_moe": 0, "llada2": 1, "llada22": 1}  # how many layers are dense
BIASES, SHIFTED = ("dream", "fast_dllm"), ("dream", "fast_dllm")
NORMS = dict.fromkeys(("llada_moe", "sdar", "sdar_moe"), ("self_attn.q_norm", "self_attn.k_norm"))
NORMS["llada2"] = NORMS["llada22"] = ("attention.query_layernorm", "attention.key_layernorm")
BLOCK = {
    "llada": dict(
        prefix="model.transformer.blocks.{}.", norm="attn_norm", q="q_proj", k="k_proj", v="v_proj", o="attn_out",
        norm2="ff_norm", gate="ff_proj", up="up_proj", down="ff_out",
    ),
    "qwen": dict(
        prefix="model.layers.{}.", norm="input_layernorm", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
        o="self_attn.o_proj", norm2="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
    ),
    "llada2": dict(
        prefix="model.layers.{}.", norm="input_layernorm", qkv="attention.query_key_value", o="attention.dense",
        norm2="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
    ),
}  # fmt: skip
BLOCK["llada22"] = BLOCK["llada2"]
ENDS = {
    "llada": ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out"),
    "qwen": ("model.embed_tokens", "model.norm", "lm_head"),
    "llada2": ("model.word_embeddings", "model.norm", "lm_head"),
}
ENDS["llada22"] = ENDS["llada2"]
BARRED = {"llada22": [2, DELETE, INSERT]}  # what is never written, of others the mask alone
bidirectional = pytest.mark.parametrize("published", ["llada", "dream"], indirect=True)
by_blocks = pytest.mark.parametrize("published", ["sdar", "fast_dllm", "llada2"], indirect=True)


def names_of(kind):
    return (BLOCK[kind], ENDS[kind]) if kind in BLOCK else (BLOCK["qwen"], ENDS["qwen"])


def tensors(kind, random):
    """Random weights as torch's Linear holds them, [out, in]; norms away from 1, so that a mixed-up name shows."""
    names, (embed, norm, head) = names_of(kind)
    size = GIVEN[kind].get("head_dim", D // HEADS)
    queries, keys = HEADS * size, (HEADS if kind == "llada" else 2) * size
    attention = dict(q=(queries, D), k=(keys, D), v=(keys, D), o=(D, queries))
    if "qkv" in names:
        attention = dict(qkv=(queries + 2 * keys, D), o=(D, queries))
    found = {}
    for i in range(LAYERS):
        prefix = names["prefix"].format(i)
        for part, shape in (attention | (_swiglu(FFN) if is_dense(kind, i) else {})).items():
            found[f"{prefix}{names[part]}.weight"] = random.normal(size=shape) * 2 * shape[1] ** -0.5
            if kind in BIASES and part in "qkv":
                found[f"{prefix}{names[part]}.bias"] = random.normal(size=shape[0])
        for part in ("norm", "norm2"):
            found[f"{prefix}{names[part]}.weight"] = random.uniform(0.5, 1.5, D)
        found |= {f"{prefix}{name}.weight": random.uniform(0.5, 1.5, size) for name in NORMS.get(kind, ())}
        if not is_dense(kind, i):
            found |= mixture(GIVEN[kind], f"{prefix}mlp.", random)
    untied = [] if GIVEN[kind].get("tie_word_embeddings") else [head]
    found |= {f"{name}.weight": random.normal(size=(VOCAB, D)) for name in [embed, *untied]}
    found[f"{norm}.weight"] = random.uniform(0.5, 1.5, D)
    if "delete_token_id" in GIVEN[kind]:  # often chosen
        found[f"{head}.weight"][[DELETE, INSERT]] *= 2.5
    return {name: x.astype(np.float32) for name, x in found.items()}


def _swiglu(width):
    return dict(gate=(width, D), up=(width, D), down=(D, width))


def is_dense(kind, layer):
    return layer < MIXED.get(kind, LAYERS)


def mixture(config, prefix, random):
    """A layer's experts, all of them parameters of their own."""
    width = config.get("moe_intermediate_size", config.get("expert_intermediate_size"))
    count, shared = config["num_experts"], config.get("num_shared_experts", 0)
    named = {f"experts.{e}": width for e in range(count)} | ({"shared_experts": shared * width} if shared else {})
    found = {f"{prefix}gate.weight": random.normal(size=(count, D)) * 2 * D**-0.5}
    if shared:
        found[f"{prefix}gate.expert_bias"] = random.normal(size=count) * 0.2
    for name, of_one in named.items():
        for part, shape in _swiglu(of_one).items():
            found[f"{prefix}{name}.{part}_proj.weight"] = random.normal(size=shape) * 2 * shape[1] ** -0.5
    return found


def mixed(config, w, prefix, h):
    """h [L, D] through a layer's experts, token by token, as modeling_llada2_moe.py, modeling_lladamoe.py and Qwen3's have it."""

    def swiglu(x, name):
        gate, up, down = (w[f"{prefix}{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        y = gate @ x
        return down @ (y / (1 + np.exp(-y)) * (up @ x))

    out = np.zeros_like(h)
    capacity, block = config.get("expert_capacity"), np.arange(len(h)) // config.get("block_size", len(h))
    if capacity:
        rank = 1 / (1 + np.exp(-h @ w[f"{prefix}gate.weight"].T)) + w[f"{prefix}gate.expert_bias"]
        wanted = np.stack([rank[block == block[at]].max(0) for at in range(len(h))])
        admitted = np.argsort(np.argsort(-wanted, -1), -1) < capacity
    for at, x in enumerate(h):
        found = w[f"{prefix}gate.weight"] @ x
        if capacity:
            scores = 1 / (1 + np.exp(-found))
            rank = np.where(admitted[at], scores + w[f"{prefix}gate.expert_bias"], -np.inf)
        elif "n_group" in config:
            scores = 1 / (1 + np.exp(-found))
            rank = (scores + w[f"{prefix}gate.expert_bias"]).reshape(config["n_group"], -1)
            best = np.argsort(-np.sort(rank)[:, -2:].sum(-1))[: config["topk_group"]]
            rank = np.where(np.isin(np.arange(len(rank)), best)[:, None], rank, -np.inf).reshape(-1)
        else:
            scores = rank = np.exp(found - found.max()) / np.exp(found - found.max()).sum()
        chosen = np.argsort(-rank)[: config["num_experts_per_tok"]]
        for e in chosen:
            share = scores[e] * config.get("routed_scaling_factor", 1)
            if config["norm_topk_prob"]:
                share = share / scores[chosen].sum()
            out[at] += share * swiglu(x, f"experts.{e}")
        if config.get("num_shared_experts"):
            out[at] += swiglu(x, "shared_experts")
    return out


def logits(kind, config, weights, tokens):
    """[L, V] of one row, float64: the published forward pass, positions seeing all, or their block of positions and those before.

    Dream's and Fast-dLLM v2's are of the position before.
    """
    names, (embed, norm, head) = names_of(kind)
    eps, theta, size = config["rms_norm_eps"], config["rope_theta"], config.get("head_dim", D // HEADS)
    w = {name: x.astype(np.float64) for name, x in weights.items()}
    head = head if f"{head}.weight" in w else embed
    block = np.arange(len(tokens)) // config.get("block_size", config.get("bd_size", len(tokens)))

    def rms(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    turned = int(size * config.get("partial_rotary_factor", 1))
    angle = np.arange(len(tokens))[:, None] * theta ** (-np.arange(0, turned, 2) / turned)
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rope(x):
        x, rest = x[..., :turned], x[..., turned:]
        x = x * cos + np.concatenate([-x[..., turned // 2 :], x[..., : turned // 2]], -1) * sin
        return np.concatenate([x, rest], -1)

    x = w[f"{embed}.weight"][tokens]
    for i in range(LAYERS):
        part = {name: names["prefix"].format(i) + theirs for name, theirs in names.items()}
        h = rms(x, part["norm"])
        if "qkv" in part:
            q, k, v = np.split(linear(h, part["qkv"]).reshape(len(tokens), -1, size), [HEADS, HEADS + 2], axis=1)
        else:
            q, k, v = (linear(h, part[name]).reshape(len(tokens), -1, size) for name in "qkv")
        if kind in NORMS:
            q, k = (rms(y, names["prefix"].format(i) + name) for y, name in zip((q, k), NORMS[kind]))
        q, k = rope(q), rope(k)
        k, v = (np.repeat(y, HEADS // y.shape[1], axis=1) for y in (k, v))
        scores = np.where(block[:, None] >= block, np.einsum("tnh,snh->nts", q, k) * size**-0.5, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + linear(np.einsum("nts,snh->tnh", p, v).reshape(len(tokens), -1), part["o"])
        h = rms(x, part["norm2"])
        if is_dense(kind, i):
            gate = linear(h, part["gate"])
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, part["up"]), part["down"])
        else:
            x = x + mixed(config, w, f"{names['prefix'].format(i)}mlp.", h)
    found = linear(rms(x, norm), head)
    return np.concatenate([found[:1], found[:-1]]) if kind in SHIFTED else found


@pytest.fixture(scope="module", params=GIVEN)
def published(request, tmp_path_factory, texts):
    """(kind, config.json, tensors, directory); the shifted ones' in two shards, the others' in one file."""
    kind = request.param
    config = GIVEN[kind]
    folder = tmp_path_factory.mktemp(kind)
    weights = tensors(kind, np.random.default_rng(4))
    (folder / "config.json").write_text(json.dumps(config))
    data.train_tokenizer([text for _, text, _ in texts], VOCAB).save(str(folder / "tokenizer.json"))
    if kind not in SHIFTED:
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


@bidirectional
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
    """Of the tempered distribution, but LLaDA's and LLaDA-MoE's of the model's own."""
    kind, given, weights, folder = published
    config, params, _ = checkpoint.load(folder)
    tokens = np.full((1, 8), 2, np.int32)
    tokens[0, :4] = np.random.default_rng(1).integers(3, VOCAB, 4)
    decoded = sampler.decode(
        config, params, tokens, block=4, first=4, steps=4, temperature=0.5, key=jax.random.split(jax.random.key(0), 1)
    )
    (at,) = np.flatnonzero(decoded.revealed[0] == 0)
    found = logits(kind, given, weights, tokens[0])[at] / (1.0 if kind in ("llada", "llada_moe") else 0.5)
    found[BARRED.get(kind, [2])] = -np.inf
    p = np.exp(found - found.max())
    np.testing.assert_allclose(decoded.confidence[0, at], (p / p.sum())[decoded.tokens[0, at]], rtol=1e-4)


@bidirectional
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


def decoded_by_blocks(kind, config, weights, board, part, threshold, banned, edit_threshold=np.inf, edit_passes=0):
    """`board` [L] as SDAR's and Fast-dLLM v2's own loops fill it, greedily, and the forward passes they take but for SDAR's of a
    finished block, which a block's first pass here is too.

    They go through the model's blocks, within them through parts of `part`, and write all above the threshold, at least one; to
    Fast-dLLM v2 a finished block tells the first token of the next. LLaDA2.1 also edits what an earlier pass wrote, and goes on
    when the block is full.
    """
    written = board == 2
    board, passes, size = board.copy(), 0, config.get("block_size", config.get("bd_size"))

    def guess(end):
        found = logits(kind, config, weights, board[:end])
        found[:, [*BARRED.get(kind, [2]), *banned]] = -np.inf
        p = np.exp(found - found.max(-1, keepdims=True))
        return found.argmax(-1), (p / p.sum(-1, keepdims=True)).max(-1)

    for begin in range(0, len(board), part):
        if kind == "fast_dllm" and begin % size == 0 and board[begin] == 2:
            board[begin], passes = guess(begin + 1)[0][begin], passes + 1
        places, more = np.arange(len(board)) // part == begin // part, edit_passes
        open_before = (places & (board == 2)).any()
        while open_before and ((places & (board == 2)).any() or more > 0):
            token, sure = guess(begin // size * size + size)
            token, sure = (np.pad(x, (0, len(board) - len(x))) for x in (token, sure))
            todo = places & (board == 2)
            edited = places & written & ~todo & (sure > edit_threshold) & (token != board)
            chosen = todo & ((sure > threshold) | (np.arange(len(board)) == np.where(todo, sure, -1).argmax()))
            if not todo.any():
                more = more - 1 if edited.any() else 0
            board, passes = np.where(chosen | edited, token, board), passes + 1
    return board, passes


@pytest.mark.parametrize("published", ["llada2"], indirect=True)
def test_edits_go_on_when_a_block_is_full(published):
    """LLaDA2.1's loop: one row runs into the end of its passes in a block, in the other all edits end before."""
    kind, given, weights, folder = published
    config, params, _ = checkpoint.load(folder)
    tokens = np.full((2, 24), 2, np.int32)
    for row, seed in enumerate((0, 7)):
        tokens[row, :7] = np.random.default_rng(seed).integers(3, VOCAB, 7)
    options = dict(block=8, threshold=0.5, edit_threshold=0.8, first=7, cache=True)

    def looped(row, edit_passes):
        return decoded_by_blocks(kind, given, weights, tokens[row], 8, 0.5, [], 0.8, edit_passes)

    expected, passes = zip(looped(0, 3), looped(1, 3))
    assert looped(0, 30)[1] > passes[0] and looped(1, 30)[1] == passes[1]
    edited = sampler.decode(config, params, tokens, edit_passes=3, **options)
    np.testing.assert_array_equal(edited.tokens, expected)
    for row in range(2):  # beside a row that is given
        alone = np.where(np.arange(2)[:, None] == row, tokens, expected)
        assert sampler.decode(config, params, alone, edit_passes=3, **options).passes == passes[row]
    for end in (expected[0][12], 77):  # one that stays, and one that edits replace
        hits = (np.array(expected) == end) & (tokens == 2)
        ended = sampler.decode(config, params, tokens, edit_passes=3, stop_at=end, **options).tokens
        np.testing.assert_array_equal(ended, np.where(np.cumsum(hits, 1) - hits > 0, config.pad_id, expected))
        assert hits.any() == (end != 77)
    unedited = sampler.decode(config, params, tokens, **options).tokens
    np.testing.assert_array_equal(unedited, [looped(row, 0)[0] for row in range(2)])


def moved_by_blocks(kind, config, weights, board, threshold, edit_threshold, edit_passes):
    """`board` [L] as LLaDA2.2's loop fills it, greedily, whose edits delete and insert; the passes of each block, and the edits.

    Like its own `_joint_decode_block`, but that it never writes the mask, and ends in place of changing a token at random where it
    comes back to what it has written before.
    """
    board, passes, size, made_of = board.copy(), [], config["block_size"], {DELETE: 0, INSERT: 0}
    written = board == 2
    for begin in range(0, len(board), size):
        own, after, step = slice(begin, begin + size), 0, 0
        prompt, original, there = ~written[own], written[own], written[own].any()
        ended = not there
        while not ended:
            old = board[own].copy()
            found = logits(kind, config, weights, board[: begin + size])[own]
            found[:, 2] = -np.inf
            p = np.exp(found - found.max(-1, keepdims=True))
            token, sure = found.argmax(-1), (p / p.sum(-1, keepdims=True)).max(-1)
            todo = (old == 2) & ~prompt
            open_still = (todo & original).any()
            after = 0 if open_still else after + 1
            last = step >= size + edit_passes if open_still else after >= edit_passes
            need = open_still + (todo & ~original).sum()
            chosen = todo & (sure > threshold)
            if chosen.sum() < need:
                chosen = todo & (np.argsort(np.argsort(np.where(todo, -sure, 1), kind="stable")) < need)
            edited = ~todo & ~prompt & (sure > edit_threshold) & (token != old)
            if last:
                chosen = todo
                found[:, [DELETE, INSERT]] = -np.inf
                token = np.where(np.isin(token, [DELETE, INSERT]), found.argmax(-1), token)
            made = []
            for place, new in enumerate(np.where(chosen | edited, token, old)):
                pair = (new, original[place])
                if new in made_of and not prompt[place]:
                    made_of[new] += 1
                    pair = () if new == DELETE else (2, False, old[place], original[place])
                made += zip(pair[::2], pair[1::2])
            made = (made + [(2, False)] * size)[:size]
            board[own], original = [token for token, _ in made], np.array([first for _, first in made])
            step += 1
            ended = last or ((board[own] == old).all() and not (board[own] == 2).any())
        passes += [step] * int(there)
    return board, passes, made_of


@pytest.mark.parametrize("published", ["llada22"], indirect=True)
@pytest.mark.parametrize("threshold, edit_threshold, edit_passes", [(0.9, 0.0, 1), (0.2, 0.0, 4), (0.2, 0.8, 30)])
def test_edits_delete_and_insert(threshold, edit_threshold, edit_passes, published):
    """Prompts that end within a block; the last settings' edits end before they have to."""
    kind, given, weights, folder = published
    config, params, _ = checkpoint.load(folder)
    tokens, start, first = np.full((2, 32), 2, np.int32), np.array([0, 8]), np.array([13, 11])
    edits = dict(threshold=threshold, edit_threshold=edit_threshold, edit_passes=edit_passes)
    looped = []
    for row, (begin, hole) in enumerate(zip(start, first)):
        tokens[row, :begin] = config.pad_id
        tokens[row, begin:hole] = np.random.default_rng(row).integers(6, VOCAB, hole - begin)
        looped.append(moved_by_blocks(kind, given, weights, tokens[row, begin:], **edits))
    assert all(sum(made_of[i] for _, _, made_of in looped) > 0 for i in (DELETE, INSERT))
    asked = dict(block=8, start=start, first=first, **edits)
    decoded = sampler.decode(config, params, tokens, **asked)
    for row, begin in enumerate(start):
        np.testing.assert_array_equal(decoded.tokens[row, begin:], looped[row][0])
    assert decoded.passes == sum(map(max, zip(*(passes for _, passes, _ in looped))))
    end = looped[0][0][18]  # in its second block; what stands behind an end moves until its block is done
    decoded = sampler.decode(config, params, tokens, cache=True, stop_at=end, **asked)
    for row, begin in enumerate(start):
        expected = looped[row][0]
        ended = np.cumsum((expected == end) & (tokens[row, begin:] == 2))
        np.testing.assert_array_equal(decoded.tokens[row, begin:], np.where(ended - (expected == end) > 0, config.pad_id, expected))


@by_blocks
def test_blocks_are_decoded_as_published(published):
    """Rows of two lengths, one of whose prompts ends with a block; with a cache and without."""
    kind, given, weights, folder = published
    config, params, _ = checkpoint.load(folder)
    tokens = np.full((2, 24), 2, np.int32)
    start, first = np.array([8, 0]), np.array([15, 8])
    for row, random in enumerate((np.random.default_rng(2), np.random.default_rng(3))):
        tokens[row, : start[row]] = config.pad_id
        tokens[row, start[row] : first[row]] = random.integers(3, VOCAB, first[row] - start[row])
    options = dict(block=4, threshold=0.5, start=start, first=first)
    plain = sampler.decode(config, params, tokens, **options)
    for row, begin in enumerate(start):
        expected, _ = decoded_by_blocks(kind, given, weights, tokens[row, begin:], 4, 0.5, [])
        np.testing.assert_array_equal(plain.tokens[row, begin:], expected)
    np.testing.assert_array_equal(sampler.decode(config, params, tokens, cache=True, **options).tokens, plain.tokens)
    if kind == "sdar":  # two blocks at once
        options["block"] = 8
    else:
        unconditional = dict(unconditional=np.where(tokens == 1, 1, 2), unconditional_start=start)
        options |= unconditional | dict(guidance_scale=2.0, guidance_refresh=2)
    np.testing.assert_array_equal(
        sampler.decode(config, params, tokens, cache=True, **options).tokens,
        sampler.decode(config, params, tokens, **options).tokens,
    )


@pytest.mark.parametrize("published", ["sdar", "fast_dllm", "llada2", "llada22"], indirect=True)
def test_generation_is_the_projects_own_by_default(published):
    """The last block is filled, and the cache is that of the model's blocks whichever part of them is decoded at once."""
    kind, given, weights, folder = published
    loaded = checkpoint.load(folder)
    made = generate.generate(loaded, ["def add("], length=9, cache=True, exact=True)
    board = made.board.tokens[0, made.board.start[0] :]
    size = given.get("block_size", given.get("bd_size"))
    assert len(board) % size == 0 and 9 <= made.tokens < 9 + size
    part, threshold = {"sdar": (4, 0.85), "fast_dllm": (8, 0.9), "llada2": (8, 0.95), "llada22": (8, 0.5)}[kind]
    expected, passes = decoded_by_blocks(kind, given, weights, board, part, threshold, [1])
    np.testing.assert_array_equal(made.decoded.tokens[0, made.board.start[0] :], expected)
    assert made.passes == passes


@pytest.mark.parametrize("published", ["sdar"], indirect=True)
def test_drafts_in_blocks_are_lossless(published):
    kind, given, weights, folder = published
    config, params, _ = checkpoint.load(folder)
    tokens = np.full((1, 16), 2, np.int32)
    tokens[0, :7] = np.random.default_rng(2).integers(3, VOCAB, 7)
    expected, passes = decoded_by_blocks(kind, given, weights, tokens[0], 4, 2.0, [])  # one token a pass
    drafted = speculative.decode(config, params, tokens, block=4, steps=4, drafts=1, first=7)
    np.testing.assert_array_equal(drafted.tokens[0], expected)
    assert drafted.passes < passes == drafted.steps[0] == 9


def test_sizes_and_ids_that_a_config_leaves_out():
    """As published: none of the config.json has the mask, and SDAR's and LLaDA2's have no block size."""
    published = {name: x for name, x in (SDAR | dict(vocab_size=151936)).items() if name not in ("block_size", "mask_token_id")}
    config = pretrained.described("there", published | dict(eos_token_id=151643))
    assert (config.block_size, config.mask_id, config.pad_id, config.eos_id) == (4, 151669, 151643, 151643)
    assert config.qk_norm and not config.shifted and not config.qkv_bias
    published = {name: x for name, x in (FAST_DLLM | dict(vocab_size=151936)).items() if name not in ("bd_size", "mask_token_id")}
    config = pretrained.described("there", published | dict(eos_token_id=151645, layer_types=None))
    assert (config.block_size, config.mask_id, config.pad_id, config.eos_id) == (32, 151665, 151645, 151645)
    assert config.shifted and config.qkv_bias and not config.qk_norm
    left_out = ("block_size", "mask_token_id", "norm_topk_prob", "use_qkv_bias", "norm_head")
    published = {name: x for name, x in (LLADA2 | dict(vocab_size=157184)).items() if name not in left_out}
    config = pretrained.described("there", published | dict(pad_token_id=156892))
    assert (config.block_size, config.mask_id, config.pad_id, config.eos_id) == (32, 156895, 156892, 156892)
    del published["pad_token_id"]
    assert pretrained.described("there", published | dict(eos_token_id=156892)) == config


@pytest.mark.parametrize("kind", GIVEN)
def test_null_in_a_config_is_as_absent(kind):
    """So their configuration classes write what is not set. LLaDA's width of the FFN is then a multiple of the model's."""
    given = GIVEN[kind] | dict(vocab_size=157184, embedding_size=157184, mlp_ratio=4)
    left_out = ("bd_size", "block_size", "layer_types", "mlp_hidden_size", "num_shared_experts")
    left_out += ("eos_token_id",) if kind.startswith("llada2") else ("mask_token_id",) if kind not in ("llada", "dream") else ()
    absent = pretrained.described("there", {name: x for name, x in given.items() if name not in left_out})
    assert pretrained.described("there", given | dict.fromkeys(left_out)) == absent
    assert kind != "llada" or absent.ffn == 4 * D


@pytest.mark.parametrize("kind", [kind for kind in GIVEN if kind != "llada"])
def test_a_config_that_transformers_5_wrote(kind):
    moved = {name: GIVEN[kind][name] for name in ("rope_theta", "partial_rotary_factor") if name in GIVEN[kind]}
    given = {name: x for name, x in GIVEN[kind].items() if name not in moved}
    given |= dict(rope_parameters=moved | dict(rope_type="default"))
    assert pretrained.described("there", given) == pretrained.described("there", GIVEN[kind])
    with pytest.raises(ValueError, match="config.json: rope_type: expected default, .* got yarn"):
        pretrained.described("there", given | dict(rope_parameters=moved | dict(rope_type="yarn")))


@by_blocks
def test_what_does_not_fit_blocks_is_refused(published):
    kind, _, _, folder = published
    loaded = config, params, _ = checkpoint.load(folder)
    tokens, size = np.full((1, 24), 2, np.int32), config.block_size
    with pytest.raises(ValueError, match=f"block: expected a divisor or a multiple of the model's block_size {size}, got 3"):
        sampler.decode(config, params, tokens, block=3, steps=1)
    with pytest.raises(ValueError, match="refresh: expected a cache of keys that grow old"):
        sampler.decode(config, params, tokens, block=size, steps=1, cache=True, refresh=2)
    other = dict(unconditional=tokens, unconditional_start=3, guidance_scale=2.0)
    with pytest.raises(ValueError, match=f"unconditional_start: expected a multiple of the block_size {size} from start "):
        sampler.decode(config, params, tokens, block=size, steps=1, cache=True, **other)
    options = dict(length=8, steps=2, guidance=2.0, exact=True)
    for away in (dict(negative_prompt="x"), dict(style="y = 1\n")):  # neither fills whole blocks beside the prompt
        plain, cached = (generate.generate(loaded, ["def add("], cache=cache, **away, **options) for cache in (False, True))
        np.testing.assert_array_equal(cached.decoded.tokens, plain.decoded.tokens)
    with pytest.raises(ValueError, match=f"mask: expected None or one interval a query, with the block_size {size}, got another"):
        model.hidden_states(config, params, tokens, mask=masks.block_diffusion(12, 4))
    if kind == "fast_dllm":
        with pytest.raises(ValueError, match="drafts: expected none for shifted logits in blocks of 8, got 1"):
            speculative.decode(config, params, tokens, block=8, steps=1, drafts=1)


@bidirectional
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


@bidirectional
def test_the_command_takes_a_published_directory(published, capsys):
    folder = str(published[3])
    arguments = ["generate", "def add(", "--block", "4", "--steps", "2", "--exact", "--json", "--model", folder]
    assert cli.main(arguments) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["tokens"] == 4 and numbers["passes"] == 2 and numbers["text"].startswith("def add(")


def test_what_files_repeat_is_not_read(published, tmp_path):
    """A tied head, and the buffers of old versions of transformers."""
    kind, given, weights, _ = published
    tied, head = "tie_word_embeddings", "lm_head.weight"
    if kind == "llada":
        tied, head = "weight_tying", "model.transformer.ff_out.weight"
    more = dict.fromkeys([head, "model.layers.0.self_attn.rotary_emb.inv_freq"], np.ones(3, np.float32))
    safetensors.numpy.save_file(weights | more, tmp_path / "model.safetensors")
    assert "head" not in pretrained.load(tmp_path, given | {tied: True})


def test_what_is_not_computed_is_refused(published, tmp_path):
    kind, given, weights, folder = published
    wrong = {
        "llada": ("block_type", "sequential"), "dream": ("use_sliding_window", True), "sdar": ("attention_bias", True),
        "fast_dllm": ("layer_types", ["full_attention", "sliding_attention"]), "sdar_moe": ("norm_topk_prob", False),
        "llada2": ("norm_head", True), "llada22": ("score_function", "softmax"), "llada_moe": ("moe_layer_freq", [0, 1]),
    }[kind]  # fmt: skip
    with pytest.raises(ValueError, match=f"config.json: {wrong[0]}: expected .* got {re.escape(str(wrong[1]))}"):
        pretrained.load(folder, given | dict([wrong]))
    with pytest.raises(ValueError, match="config.json: expected 'rope_theta'"):
        pretrained.load(folder, {name: x for name, x in given.items() if name != "rope_theta"})
    width = "mlp_hidden_size" if kind == "llada" else "intermediate_size"
    expected = r"layers.0.gate: expected shape \(24, 41\), got \(24, 40\)"
    if MIXED.get(kind) == 0:
        width = "moe_intermediate_size" if kind == "sdar_moe" else "expert_intermediate_size"
        expected = r"layers.0.expert_gate: expected shape \(\d, 24, 41\), got \(\d, 24, 12\)"
    with pytest.raises(ValueError, match=expected):
        pretrained.load(folder, given | {width: 41})
    if kind == "llada2":
        with pytest.raises(ValueError, match=r"query_key_value.weight: expected 64 \+ 32 \+ 32 rows, got 64"):
            pretrained.load(folder, given | dict(head_dim=16))
        with pytest.raises(ValueError, match="num_experts_per_tok: expected at least 2, .* got 1"):
            pretrained.load(folder, given | dict(num_experts_per_tok=1))
        with pytest.raises(ValueError, match=r"experts.chosen: expected no more than .* got 9"):
            pretrained.load(folder, given | dict(num_experts_per_tok=9))
    if kind == "llada22":
        with pytest.raises(ValueError, match=r"experts.capacity: expected from the 3 of a token to all 12, and no groups, got 13"):
            pretrained.load(folder, given | dict(expert_capacity=13))
    fewer = {"n_layers" if kind == "llada" else "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    fewer |= dict(moe_layer_freq=[1])
    with pytest.raises(ValueError, match=r"expected what config.json tells of, got \d+ more, such as model.*\.1\.\w+"):
        pretrained.load(folder, given | fewer)
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
