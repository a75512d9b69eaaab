"""DiffusionGemma in miniature, under its own names, against a forward pass and a loop written from transformers' source.

One local layer and one global one of other heads; prompts longer than the window; canvases of 6.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import AddedToken

from dlm_kernels import cli, soft_embedding
from dlm_kernels.denoiser import chat, checkpoint, data, gemma, generate, pretrained, renoise, sampler, speculative

D, VOCAB, WINDOW, CANVAS, EXPERTS, MASK = 24, 310, 5, 6, 4, 2
TEXT = dict(
    hidden_size=D, intermediate_size=20, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_global_key_value_heads=1, global_head_dim=16, num_experts=EXPERTS,
    top_k_experts=2, moe_intermediate_size=12, sliding_window=WINDOW, vocab_size=VOCAB, rms_norm_eps=1e-6, eos_token_id=1,
    hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=30.0, use_bidirectional_attention="vision",
    rope_parameters={
        "sliding_attention": dict(rope_type="default", rope_theta=1e4),
        "full_attention": dict(rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0.25),
    },
)  # fmt: skip
GIVEN = dict(model_type="diffusion_gemma", canvas_length=CANVAS, text_config=TEXT, mask_token_id=MASK)
NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2", "post_feedforward_layernorm",
)  # fmt: skip


def tensors():
    """Random weights as they are stored; small ones, so that no pass carries a rounding far."""
    random, found = np.random.default_rng(5), {}

    def matrix(*shape):
        return random.normal(size=shape) * 0.6 * shape[-1] ** -0.5

    def norm(*shape):
        return random.uniform(0.5, 1.5, shape)

    def geglu(prefix):
        shapes = dict(gate=(20, D), up=(20, D), down=(D, 20))
        return {f"{prefix}{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}

    for i, (size, kv_heads) in enumerate(((8, 2), (16, 1))):
        layer = f"model.decoder.layers.{i}."
        shapes = dict(q=(4 * size, D), k=(kv_heads * size, D), v=(kv_heads * size, D), o=(D, 4 * size))
        found |= {f"{layer}self_attn.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items() if (i, name) != (1, "v")}
        found |= {f"{layer}self_attn.{name}_norm.weight": norm(size) for name in "qk"} | geglu(f"{layer}mlp.")
        found |= {f"{layer}{name}.weight": norm(D) for name in NORMS}
        found |= {f"{layer}router.proj.weight": 3 * matrix(EXPERTS, D), f"{layer}router.scale": norm(D)}
        found[f"{layer}router.per_expert_scale"] = norm(EXPERTS)
        found |= {f"{layer}experts.gate_up_proj": matrix(EXPERTS, 24, D), f"{layer}experts.down_proj": matrix(EXPERTS, D, 12)}
        found[f"{layer}layer_scalar"] = found[f"model.encoder.language_model.layers.{i}.layer_scalar"] = np.array([0.8 + 0.3 * i])
    found |= geglu("model.decoder.self_conditioning.")
    found |= {f"model.decoder.{name}.weight": norm(D) for name in ("self_conditioning.pre_norm", "norm")}
    found["model.decoder.norm.weight"] *= 12  # logits that the cap bends
    found["model.decoder.embed_tokens.weight"] = matrix(VOCAB, D)
    found["model.encoder.vision_tower.std_bias"] = norm(3)
    return {name: x.astype(np.float32) for name, x in found.items()}


class Published:
    """The published forward passes, one row at a time, in float64."""

    def __init__(self, weights):
        self.w = {name.removeprefix("model.decoder."): x.astype(np.float64) for name, x in weights.items()}

    def norm(self, x, name=None):
        normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return normed if name is None else normed * self.w[f"{name}.weight"]

    def geglu(self, h, gate, up, down):
        g = h @ gate.T
        return (0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * (h @ up.T)) @ down.T

    def ffn(self, x, prefix, norm):
        return self.geglu(self.norm(x, norm), *(self.w[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down")))

    def experts(self, x, layer):
        router = self.norm(x) * self.w[f"{layer}router.scale"] * D**-0.5 @ self.w[f"{layer}router.proj.weight"].T
        p = softmax(router)
        h, out = self.norm(x, f"{layer}pre_feedforward_layernorm_2"), np.zeros_like(x)
        for at in range(len(x)):
            chosen = np.argsort(-p[at])[:2]
            for e in chosen:
                gate, up = np.split(self.w[f"{layer}experts.gate_up_proj"][e], 2)
                share = p[at, e] / p[at, chosen].sum() * self.w[f"{layer}router.per_expert_scale"][e]
                out[at] += share * self.geglu(h[at], gate, up, self.w[f"{layer}experts.down_proj"][e])
        return out

    def layers(self, x, first, before, sees):
        """x [T, D] at positions from `first` on; `before`: each layer's (key, value), [S, heads, size]; sees(layer) [T, S + T]."""
        own = []
        for i, (size, pairs, theta) in enumerate(((8, 4, 1e4), (16, 2, 1e6))):
            layer = f"layers.{i}."
            frequency = np.where(np.arange(size // 2) < pairs, theta ** (-np.arange(0, size, 2) / size), 0)
            angle = (first + np.arange(len(x)))[:, None, None] * np.concatenate([frequency] * 2)

            def turned(y, angle=angle):
                a, b = np.split(y, 2, axis=-1)
                return y * np.cos(angle) + np.concatenate([-b, a], -1) * np.sin(angle)

            h = self.norm(x, f"{layer}input_layernorm")
            heads = {n: h @ self.w[f"{layer}self_attn.{n}_proj.weight"].T for n in "qkv" if (i, n) != (1, "v")}
            q, k, v = (heads.get(n, heads["k"]).reshape(len(x), -1, size) for n in "qkv")
            q, k = (turned(self.norm(y, f"{layer}self_attn.{n}_norm")) for n, y in (("q", q), ("k", k)))
            own.append((k, self.norm(v)))
            keys, values = (np.repeat(np.concatenate(y), 4 // y[1].shape[1], axis=1) for y in zip(before[i], own[i]))
            scores = np.where(sees(i), np.einsum("tnh,snh->nts", q, keys), -np.inf)
            mixed = np.einsum("nts,snh->tnh", softmax(scores), values).reshape(len(x), -1)
            mixed = mixed @ self.w[f"{layer}self_attn.o_proj.weight"].T
            x = x + self.norm(mixed, f"{layer}post_attention_layernorm")
            dense = self.ffn(x, f"{layer}mlp.", f"{layer}pre_feedforward_layernorm")
            both = self.norm(dense, f"{layer}post_feedforward_layernorm_1")
            both = both + self.norm(self.experts(x, layer), f"{layer}post_feedforward_layernorm_2")
            x = (x + self.norm(both, f"{layer}post_feedforward_layernorm")) * self.w[f"{layer}layer_scalar"]
        return x, own

    def encoded(self, tokens):
        """Of each layer (key, value) of the causal encoder."""
        q, k = np.arange(len(tokens))[:, None], np.arange(len(tokens))
        nothing = [(np.zeros((0, heads, size)),) * 2 for size, heads in ((8, 2), (16, 1))]
        x = self.w["embed_tokens.weight"][tokens] * D**0.5
        return self.layers(x, 0, nothing, lambda i: (k <= q) & ((k > q - WINDOW) | (i == 1)))[1]

    def logits(self, before, canvas, soft):
        """[T, VOCAB] of a canvas behind the `before` encoded; soft: the probabilities of the pass before, or None."""
        embed, length = self.w["embed_tokens.weight"], len(before[0][0])
        x = embed[canvas] * D**0.5
        if soft is not None:
            x = x + self.ffn(soft @ embed * D**0.5, "self_conditioning.", "self_conditioning.pre_norm")
        # Of a local layer's cache the last WINDOW - 1 are left, for each token of the canvas.
        near = np.arange(length + len(canvas)) >= length - (WINDOW - 1)
        x, _ = self.layers(self.norm(x), length, before, lambda i: np.ones(len(near), bool) if i == 1 else near)
        return 30 * np.tanh(self.norm(x, "norm") @ embed.T / 30)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory, texts):
    """(tensors, the directory of a checkpoint of them)."""
    folder, weights = tmp_path_factory.mktemp("gemma"), tensors()
    (folder / "config.json").write_text(json.dumps(GIVEN))
    tokenizer = data.train_tokenizer([text for _, text, _ in texts], 300)
    tokenizer.add_special_tokens([AddedToken(token) for token in ("<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return weights, folder


def test_logits_are_those_of_the_published_forward_passes(published):
    """Of two passes, behind a prompt that is encoded in pieces, in a row with padding before it."""
    config, params, _ = checkpoint.load(published[1])
    random, theirs = np.random.default_rng(0), Published(published[0])
    tokens = random.integers(3, VOCAB, (1, 21)).astype(np.int32)
    start, at, end = (jnp.array([column]) for column in (2, 15, 21))
    encoded, canvas_states = (jax.jit(f, static_argnums=0) for f in (gemma.encoded, gemma.canvas_states))
    cache = gemma.empty_cache(config, 1, 21, jnp.float32)
    for begin in (2, 8, 12):
        cache = encoded(config, params, tokens[:, begin : begin + 6], cache, jnp.array([begin]), start=start)
    soft, before, p = jnp.zeros((1, 6, D)), theirs.encoded(tokens[0, 2:15]), None
    for _ in range(2):
        hidden, cache = canvas_states(config, params, tokens[:, 15:], soft, cache, at, start=start, end=end)
        ours = 30 * np.tanh(np.asarray(hidden[0], np.float64) @ np.asarray(params["embed"], np.float64).T / 30)
        expected = theirs.logits(before, tokens[0, 15:], p)
        assert np.linalg.norm(ours - expected) < 3e-6 * np.linalg.norm(expected)
        assert abs(expected).max() > 15
        soft = soft_embedding(hidden, params["embed"], temperature=0.6, logits_soft_cap=30.0)
        p = softmax(expected / 0.6)


def decoded(theirs, prompt, key, *, length, steps, budget, calm):
    """One row by the published loop, with this package's random numbers: (tokens, the passes of each canvas)."""
    written, passes = list(prompt), []
    for index in range(length // CANVAS):

        def draw(step, stream, *shape, index=index):
            k = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, index), step), stream)
            return np.array(jax.random.gumbel(k, shape) if len(shape) > 1 else jax.random.randint(k, shape, 0, VOCAB))

        before, canvas, p, best = theirs.encoded(np.array(written)), draw(0, 0, CANVAS), None, None
        for step in range(steps):
            t = 0.8 - 0.4 * step / steps
            found = theirs.logits(before, canvas, p) / t
            p = softmax(found)
            found[:, MASK] = -np.inf
            q = softmax(found)
            entropy = -(q * np.log(np.where(q == 0, 1, q))).sum(-1)
            order = np.argsort(entropy, kind="stable")
            accepted = order[np.cumsum(entropy[order]) - entropy[order] <= budget]
            sample = (found + draw(step, 1, CANVAS, VOCAB)).argmax(-1)
            canvas = draw(step, 2, CANVAS)
            canvas[accepted] = sample[accepted]
            stable, best = best is not None and (best == found.argmax(-1)).all(), found.argmax(-1)
            if stable and entropy.mean() <= calm:
                break
        passes.append(step + 1)
        written += best.tolist()
    return written[len(prompt) :], passes


CALM = dict(steps=9, budget=100.0, calm=10.0)


@pytest.mark.parametrize("rules", [dict(steps=4, budget=1.0, calm=0.005), CALM])
def test_decoding_agrees_with_the_published_loop(rules, published):
    """Prompts of 9 and 7 side by side, and three canvases: the encoder reads those that are done. In the second rows settle."""
    config, params, _ = checkpoint.load(published[1])
    weights = published[0]
    if rules is CALM:  # what the layers add is little, so that a token stays as it is
        params = {name: x * 0.02 if name.endswith((".attention_out_norm", ".out_norm")) else x for name, x in params.items()}
        quiet = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
        weights = {name: x * 0.02 if name.endswith(quiet) else x for name, x in weights.items()}
    tokens = np.full((2, 27), MASK, np.int32)
    tokens[:, :9] = np.random.default_rng(4).integers(3, VOCAB, (2, 9))
    tokens[1, :2] = config.pad_id
    start, keys = np.array([0, 2]), jax.random.split(jax.random.key(6), 2)
    ours = renoise.decode(config, params, tokens, block=CANVAS, start=start, first=9, key=keys, **rules)
    theirs = [decoded(Published(weights), tokens[row, start[row] : 9], keys[row], length=18, **rules) for row in range(2)]
    np.testing.assert_array_equal(ours.tokens[:, 9:], [written for written, _ in theirs])
    assert ours.passes == sum(map(max, zip(*(passes for _, passes in theirs))))
    assert (ours.passes < 3 * rules["steps"]) == (rules is CALM)


def test_a_turn_is_answered_in_whole_canvases(published, capsys):
    """From Python and by the command, which takes the project's budget and temperatures where none are given."""
    loaded = config, _, tokenizer = checkpoint.load(published[1])
    assert (config.pad_id, config.eos_id) == (1, 1) and chat.ends(config, tokenizer) == [1, tokenizer.token_to_id("<turn|>")]
    prompt = chat.turn(tokenizer, "add two")
    assert prompt == "<bos><|turn>user\nadd two<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    made = generate.generate(loaded, [prompt], length=7, steps=2, exact=True, noise_budget=0.1, temperature=0.8)
    assert (made.board.tokens == MASK).sum() == made.tokens == 12 and made.passes == 4
    asked = ["add two", "--chat", "--steps", "2", "--length", "7", "--exact", "--json"]
    arguments = ["generate", *asked, "--model", str(published[1])]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["text"] == made.answers[0]
    alone = "DiffusionGemma: goes with steps and temperature alone, got "
    for more, expected in {
        ("--threshold", "0.9"): alone + "['threshold']",
        ("--cache",): alone + "['cache']",
        ("--require", "x"): alone + "['required']",
        ("--drafts", "2", "--drafter", "student-8"): alone + "['drafts', 'drafter']",
        ("--html", "out.html"): "--html: expected a model that one token at a time is written by too, got a DiffusionGemma",
        ("--temperature", "0"): "temperature: expected above 0 with a noise_budget, got 0",
    }.items():
        assert cli.main([*arguments, *more]) == 2
        assert expected in capsys.readouterr().err


def test_what_asks_for_masks_refuses_it(published):
    loaded = config, params, _ = checkpoint.load(published[1])
    tokens = np.full((1, 9), MASK, np.int32)
    expected = "config: expected a model that has learnt masks, got a DiffusionGemma, which `generate` alone decodes"
    with pytest.raises(ValueError, match=expected):
        sampler.decode(config, params, tokens, block=3, steps=1)
    with pytest.raises(ValueError, match=expected):
        speculative.decode(config, params, tokens, block=3, steps=3, drafts=1)
    with pytest.raises(ValueError, match=r"DiffusionGemma: goes with steps and temperature alone, got \['<mask:n@scale>'\]"):
        generate.generate(loaded, ["x<mask:3@2>"])


@pytest.mark.parametrize(
    "arguments",
    [
        "train OUT --steps 1 --initial MODEL", "distill OUT --steps 1 --model MODEL", "generate x --drafts 2 --drafter MODEL",
        "evaluate --control --model MODEL", "evaluate --decoding --model MODEL", "evaluate --by-steps --students MODEL",
        "correct x --model MODEL",
    ],
)  # fmt: skip
def test_commands_that_ask_for_masks_refuse_it(arguments, published, tmp_path, capsys):
    named = dict(OUT=str(tmp_path / "out"), MODEL=str(published[1]))
    assert cli.main([named.get(word, word) for word in arguments.split()]) == 2
    said = capsys.readouterr()
    expected = "config: expected a model that has learnt masks, got a DiffusionGemma, which `generate` alone decodes"
    assert said.err.endswith(f"dlm-kernels: {expected}\n")
    assert said.out == "" and not (tmp_path / "out").exists()


def test_a_config_written_later_is_the_same(published):
    """Newer versions of transformers store what is a global layer's own in another place, and no cap, which is their default."""
    later = {name: x for name, x in TEXT.items() if not name.startswith(("global_", "num_global_", "final_logit"))}
    later |= dict(per_layer_config={"1": dict(head_dim=16, num_key_value_heads=1)})
    assert pretrained.described("there", GIVEN | dict(text_config=later)) == pretrained.described("there", GIVEN)
    nulls = dict.fromkeys(["per_layer_config", "final_logit_softcapping"])
    assert pretrained.described("there", GIVEN | dict(text_config=TEXT | nulls)) == pretrained.described("there", GIVEN)


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(use_bidirectional_attention="all"), "use_bidirectional_attention: expected a causal encoder"),
        (dict(hidden_activation="silu"), "hidden_activation: expected gelu_pytorch_tanh"),
        (dict(layer_types=["full_attention"]), "layer_types: expected sliding_attention or full_attention for each layer"),
        (dict(num_key_value_heads=3), "kv_heads, global_kv_heads: expected divisors of heads 4"),
        (dict(moe_intermediate_size=11), r"gate_up_proj: expected 11 \+ 11 rows, got 24"),
        (dict(top_k_experts=5), "experts.chosen: expected no more than"),
    ],
)
def test_what_is_not_computed_is_refused(change, expected, published):
    with pytest.raises(ValueError, match=expected):
        pretrained.load(published[1], GIVEN | dict(text_config=TEXT | change))


def test_an_encoder_of_its_own_is_refused(published, tmp_path):
    weights = dict(published[0])
    name = "model.encoder.language_model.layers.1.layer_scalar"
    weights[name] = weights[name] + 1
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name}: expected model.decoder.layers.1.layer_scalar's .*tied"):
        pretrained.load(tmp_path, GIVEN)
