"""Published models: the names of their parameters, and the config that their config.json tells of.

To add one: its names, and a function from its config.json to a DenoiserConfig that refuses what `model` does not compute.
"""

import dataclasses

from dlm_kernels.denoiser.config import DenoiserConfig
from dlm_kernels.denoiser.experts import Experts
from dlm_kernels.denoiser.gemma import GemmaConfig

# Our name -> theirs; {i} is the layer, {e} the expert. Their matrices are [out, in], ours [in, out].
LLADA = {
    "embed": "model.transformer.wte.weight",
    "final_norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
    "attention_norm": "model.transformer.blocks.{i}.attn_norm.weight",
    "query": "model.transformer.blocks.{i}.q_proj.weight",
    "key": "model.transformer.blocks.{i}.k_proj.weight",
    "value": "model.transformer.blocks.{i}.v_proj.weight",
    "query_bias": "model.transformer.blocks.{i}.q_proj.bias",
    "key_bias": "model.transformer.blocks.{i}.k_proj.bias",
    "value_bias": "model.transformer.blocks.{i}.v_proj.bias",
    "out": "model.transformer.blocks.{i}.attn_out.weight",
    "ffn_norm": "model.transformer.blocks.{i}.ff_norm.weight",
    "gate": "model.transformer.blocks.{i}.ff_proj.weight",
    "up": "model.transformer.blocks.{i}.up_proj.weight",
    "down": "model.transformer.blocks.{i}.ff_out.weight",
}
# Dream's, SDAR's and Fast-dLLM v2's.
QWEN = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{i}.input_layernorm.weight",
    "query": "model.layers.{i}.self_attn.q_proj.weight",
    "key": "model.layers.{i}.self_attn.k_proj.weight",
    "value": "model.layers.{i}.self_attn.v_proj.weight",
    "query_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "key_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "value_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "query_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "key_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "out": "model.layers.{i}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "gate": "model.layers.{i}.mlp.gate_proj.weight",
    "up": "model.layers.{i}.mlp.up_proj.weight",
    "down": "model.layers.{i}.mlp.down_proj.weight",
}
# LLaDA-MoE's, and SDAR's mixtures of experts.
QWEN_EXPERTS = QWEN | {
    "router": "model.layers.{i}.mlp.gate.weight",
    "expert_gate": "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
    "expert_up": "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    "expert_down": "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
}
LLADA2 = QWEN_EXPERTS | {
    "embed": "model.word_embeddings.weight",
    **dict.fromkeys(("query", "key", "value"), "model.layers.{i}.attention.query_key_value.weight"),  # one below the other
    "query_norm": "model.layers.{i}.attention.query_layernorm.weight",
    "key_norm": "model.layers.{i}.attention.key_layernorm.weight",
    "out": "model.layers.{i}.attention.dense.weight",
    "router_bias": "model.layers.{i}.mlp.gate.expert_bias",
    "shared_gate": "model.layers.{i}.mlp.shared_experts.gate_proj.weight",
    "shared_up": "model.layers.{i}.mlp.shared_experts.up_proj.weight",
    "shared_down": "model.layers.{i}.mlp.shared_experts.down_proj.weight",
}

_GEMMA_LAYER = "model.decoder.layers.{i}."
GEMMA = {
    "embed": "model.decoder.embed_tokens.weight",
    "final_norm": "model.decoder.norm.weight",
    "head": "lm_head.weight",
    "soft.ffn_norm": "model.decoder.self_conditioning.pre_norm.weight",
    "soft.gate": "model.decoder.self_conditioning.gate_proj.weight",
    "soft.up": "model.decoder.self_conditioning.up_proj.weight",
    "soft.down": "model.decoder.self_conditioning.down_proj.weight",
    "attention_norm": _GEMMA_LAYER + "input_layernorm.weight",
    "query": _GEMMA_LAYER + "self_attn.q_proj.weight",
    "key": _GEMMA_LAYER + "self_attn.k_proj.weight",
    "value": _GEMMA_LAYER + "self_attn.v_proj.weight",
    "query_norm": _GEMMA_LAYER + "self_attn.q_norm.weight",
    "key_norm": _GEMMA_LAYER + "self_attn.k_norm.weight",
    "out": _GEMMA_LAYER + "self_attn.o_proj.weight",
    "attention_out_norm": _GEMMA_LAYER + "post_attention_layernorm.weight",
    "ffn_norm": _GEMMA_LAYER + "pre_feedforward_layernorm.weight",
    "gate": _GEMMA_LAYER + "mlp.gate_proj.weight",
    "up": _GEMMA_LAYER + "mlp.up_proj.weight",
    "down": _GEMMA_LAYER + "mlp.down_proj.weight",
    "ffn_out_norm": _GEMMA_LAYER + "post_feedforward_layernorm_1.weight",
    "router_scale": _GEMMA_LAYER + "router.scale",
    "router": _GEMMA_LAYER + "router.proj.weight",
    "expert_scale": _GEMMA_LAYER + "router.per_expert_scale",
    "experts_norm": _GEMMA_LAYER + "pre_feedforward_layernorm_2.weight",
    **dict.fromkeys(("expert_gate", "expert_up"), _GEMMA_LAYER + "experts.gate_up_proj"),  # of each expert one below the other
    "expert_down": _GEMMA_LAYER + "experts.down_proj",
    "experts_out_norm": _GEMMA_LAYER + "post_feedforward_layernorm_2.weight",
    "out_norm": _GEMMA_LAYER + "post_feedforward_layernorm.weight",
    "scalar": _GEMMA_LAYER + "layer_scalar",
}
GEMMA_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")  # reads images


def llada_config(given):
    """LLaDA's config.json, a dict, as a DenoiserConfig. Source: GSAI-ML/LLaDA-8B-Base and -Instruct, LLaDA 1.5."""
    fixed = dict(
        block_type="llama", layer_norm_type="rms", activation_type="silu", rope=True, include_bias=False, alibi=False,
        scale_logits=False, input_emb_norm=False, attention_layer_norm=False,
    )  # fmt: skip
    _refuse(given, fixed)
    return DenoiserConfig(
        layers=given["n_layers"],
        d_model=given["d_model"],
        heads=given["n_heads"],
        kv_heads=given.get("n_kv_heads") or given["n_heads"],
        head_size=given["d_model"] // given["n_heads"],
        ffn=given.get("mlp_hidden_size") or given["mlp_ratio"] * given["d_model"],
        vocab=given.get("embedding_size") or given["vocab_size"],
        rope_theta=given["rope_theta"],
        rms_norm_eps=given["rms_norm_eps"],
        qk_norm=False,
        qkv_bias=bool(given.get("include_qkv_bias")),
        tie_embeddings=given["weight_tying"],
        mask_id=given["mask_token_id"],
        **_ends(given),
    )


def llada_moe_config(given):
    """LLaDA-MoE's config.json, a dict, as a DenoiserConfig. Source: inclusionAI/LLaDA-MoE-7B-A1B-Base and -Instruct.

    Its own code does not read norm_topk_prob: the weights of the chosen experts are never made to add up to 1.
    """
    fixed = dict(
        attention_bias=False, clip_qkv=None, qk_layernorm=True, partial_rotary_factor=1, routed_scaling_factor=1,
        moe_layer_freq=[1] * given["num_hidden_layers"], moe_router_enable_expert_bias=False, moe_router_score_function="softmax",
        shared_expert_intermediate_size=None, router_num_group=None, router_topk_group=None,
    )  # fmt: skip
    _refuse(given, fixed)
    experts = Experts(
        count=given["num_experts"], chosen=given["num_experts_per_tok"], ffn=given["expert_intermediate_size"], normalized=False
    )
    given = dict(num_key_value_heads=given["num_attention_heads"], intermediate_size=given["dense_intermediate_size"]) | given
    mask_id = given.get("mask_token_id", 156895)
    return _qwen_config(given, qk_norm=True, qkv_bias=False, experts=experts, mask_id=mask_id)


def dream_config(given):
    """Dream's config.json, a dict, as a DenoiserConfig. Source: Dream-org/Dream-v0-Base-7B and -Instruct-7B."""
    return _qwen_config(given, qk_norm=False, qkv_bias=True, shifted=True, mask_id=given["mask_token_id"])


def sdar_config(given):
    """SDAR's config.json, a dict, as a DenoiserConfig. Source: JetLM/SDAR-1.7B-Chat and its kin, SDAR's generate.py.

    Their own generate.py is told the size of the blocks and asks the tokenizer for the mask: where the config does not say them
    they are as of the checkpoints without a size in their names.
    """
    _refuse(given, dict(attention_bias=False))
    ids = dict(block_size=given.get("block_size", 4), mask_id=given.get("mask_token_id", 151669))
    return _qwen_config(given, qk_norm=True, qkv_bias=False, **ids)


def sdar_moe_config(given):
    """The config.json of SDAR's mixtures of experts. Source: JetLM/SDAR-30B-A3B-Chat, whose layers are Qwen3's."""
    _refuse(given, dict(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]))
    experts = Experts(count=given["num_experts"], chosen=given["num_experts_per_tok"], ffn=given["moe_intermediate_size"])
    return dataclasses.replace(sdar_config(given), experts=experts)


def llada2_config(given):
    """LLaDA2's config.json, a dict, as a DenoiserConfig. Source: inclusionAI/LLaDA2.0-mini and -flash, LLaDA2.1's.

    Where the config does not say them, the ids and the size of the blocks are those of their own code. LLaDA2.2 has an
    expert_capacity, and then no groups, whatever its config.json says of them; it may delete and insert.
    """
    fixed = dict(
        use_qk_norm=True, use_qkv_bias=False, use_bias=False, norm_head=False, norm_topk_prob=True, score_function="sigmoid",
        moe_router_enable_expert_bias=True, use_linear_attention=False,
    )  # fmt: skip
    _refuse(given, fixed)
    if given["num_experts_per_tok"] < 2:
        raise ValueError("num_experts_per_tok: expected at least 2, whose weights are shares of 1, got 1")
    width, capacity = given["moe_intermediate_size"], given.get("expert_capacity") or None
    grouped = dict(capacity=capacity) if capacity else dict(groups=given["n_group"], kept=given["topk_group"])
    experts = Experts(
        count=given["num_experts"],
        chosen=given["num_experts_per_tok"],
        ffn=width,
        router="sigmoid",
        **grouped,
        scale=given["routed_scaling_factor"],
        shared_ffn=width * (given.get("num_shared_experts") or 0),
        dense_layers=given["first_k_dense_replace"],
    )
    ids = dict(block_size=given.get("block_size", 32), mask_id=given.get("mask_token_id", 156895), threshold=0.95)
    if capacity:
        edits = dict(delete_id=given.get("delete_token_id", 156930), insert_id=given.get("split_token_id", 156931))
        ids |= dict(threshold=0.5, **edits)
    config = _qwen_config(given, qk_norm=True, qkv_bias=False, experts=experts, **ids)
    return dataclasses.replace(config, rotary_size=int(config.head_size * given["partial_rotary_factor"]))


def fast_dllm_config(given):
    """Fast-dLLM v2's config.json, a dict, as a DenoiserConfig. Source: Efficient-Large-Model/Fast_dLLM_v2_7B and _1.5B.

    The defaults are those of their own code, as the mask's id is only there.
    """
    ids = dict(block_size=given.get("bd_size", 32), mask_id=given.get("mask_token_id", 151665), threshold=0.9)
    return _qwen_config(given, qk_norm=False, qkv_bias=True, shifted=True, **ids)


def gemma_config(given):
    """DiffusionGemma's config.json, a dict, as a GemmaConfig. Source: google/diffusiongemma-26B-A4B-it, and transformers' defaults.

    The shape of a global layer's heads stands in two numbers of its own, or as later written in per_layer_config.
    """
    text = given["text_config"]
    fixed = dict(hidden_activation="gelu_pytorch_tanh", attention_bias=False, tie_word_embeddings=True)
    _refuse(text, fixed)
    _refuse(given, dict(tie_word_embeddings=True))
    if text.get("use_bidirectional_attention") == "all":
        raise ValueError("use_bidirectional_attention: expected a causal encoder, the only one computed here, got all")
    kinds = text["layer_types"]
    if len(kinds) != text["num_hidden_layers"] or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types: expected sliding_attention or full_attention for each layer, got {kinds}")
    near, everywhere = (text["rope_parameters"][kind] for kind in ("sliding_attention", "full_attention"))
    _refuse(near, dict(rope_type="default"))
    _refuse(everywhere, dict(rope_type="proportional", factor=1.0))
    global_layers = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    own = next((text.get("per_layer_config", {}).get(str(i)) for i in global_layers), None) or {}
    global_head_size = own.get("head_dim") or text["global_head_dim"]
    return GemmaConfig(
        layers=text["num_hidden_layers"],
        d_model=text["hidden_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_size=text["head_dim"],
        window=text["sliding_window"],
        rope_theta=near["rope_theta"],
        global_layers=global_layers,
        global_kv_heads=own.get("num_key_value_heads") or text.get("num_global_key_value_heads") or text["num_key_value_heads"],
        global_head_size=global_head_size,
        global_rope_theta=everywhere["rope_theta"],
        global_pairs=int(everywhere.get("partial_rotary_factor", 1.0) * global_head_size // 2),
        ffn=text["intermediate_size"],
        experts=Experts(count=text["num_experts"], chosen=text["top_k_experts"], ffn=text["moe_intermediate_size"]),
        vocab=text["vocab_size"],
        canvas=given["canvas_length"],
        soft_cap=text.get("final_logit_softcapping", 30.0),
        rms_norm_eps=text["rms_norm_eps"],
        # Behind a text it has learnt pads, which are banned only where they are no end of it: our filler is the end.
        **_ends(dict(eos_token_id=text["eos_token_id"])),
        mask_id=given.get("mask_token_id", 4),
    )


def _ends(given):
    """The pad, and what ends a text, which may be several ids. One that is not told is the other: Dream's configuration class has
    no other end, LLaDA2's config.json has the pad alone, and no pad is ever read.
    """
    told = given["pad_token_id"] if "eos_token_id" not in given else given["eos_token_id"]
    first, *more = told if isinstance(told, list) and told else [told]
    return dict(pad_id=given.get("pad_token_id", first), eos_id=first, ends=tuple(more))


def _qwen_config(given, **own):
    """What the config.json of models that come from Qwen, or are written like it, have in common, and what each adds of its own."""
    kinds = sorted(set(given.get("layer_types") or ["full_attention"]))
    only = dict(
        hidden_act="silu", rope_scaling=None, rope_type="default", use_sliding_window=False, layer_types=["full_attention"]
    )  # fmt: skip
    _refuse(given | dict(layer_types=kinds), only)
    return DenoiserConfig(
        layers=given["num_hidden_layers"],
        d_model=given["hidden_size"],
        heads=given["num_attention_heads"],
        kv_heads=given["num_key_value_heads"],
        head_size=given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"],
        ffn=given["intermediate_size"],
        vocab=given["vocab_size"],
        rope_theta=given["rope_theta"],
        rms_norm_eps=given["rms_norm_eps"],
        tie_embeddings=given["tie_word_embeddings"],
        **_ends(given),
        **own,
    )


ARCHITECTURES = {
    "llada": (llada_config, LLADA),
    "llada_moe": (llada_moe_config, QWEN_EXPERTS),
    "dream": (dream_config, QWEN),
    "sdar": (sdar_config, QWEN),
    "sdar_moe": (sdar_moe_config, QWEN_EXPERTS),
    "llada2_moe": (llada2_config, LLADA2),
    "fast_dllm_qwen": (fast_dllm_config, QWEN),
    "diffusion_gemma": (gemma_config, GEMMA),
}


def of(config):
    """The entry of ARCHITECTURES that a config.json names, or None for one of this package's own."""
    name = str(config.get("model_type")).lower()
    # Both call themselves so.
    return ARCHITECTURES.get("llada_moe" if name == "llada" and "num_experts" in config else name)


def _refuse(given, fixed):
    """Absent keys are as `model` has them; a value that it does not compute would only show as nonsense."""
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, the only one computed here, got {given[name]}")
