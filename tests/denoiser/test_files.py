"""What a published checkpoint's files may hold beside what is usual: several ends, several dtypes, a tokenizer's own opening; and
what is said of files that are cut or hold something else.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import processors

from dlm_kernels import cli
from dlm_kernels.denoiser import chat, checkpoint, data, generate, model, pretrained

DREAM = dict(
    model_type="Dream", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
    vocab_size=300, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False, mask_token_id=2, pad_token_id=1, eos_token_id=1,
)  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (300, 16), "model.norm.weight": (16,), "lm_head.weight": (300, 16),
    "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,), "self_attn.q_proj.weight": (16, 16),
    "self_attn.k_proj.weight": (8, 16), "self_attn.v_proj.weight": (8, 16), "self_attn.o_proj.weight": (16, 16),
    "self_attn.q_proj.bias": (16,), "self_attn.k_proj.bias": (8,), "self_attn.v_proj.bias": (8,), "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, texts):
    tokenizer = data.train_tokenizer([text for _, text, _ in texts], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, {})
    return tmp_path


def write(folder, dtypes, **config):
    """dtypes: how a name ends -> its dtype, where it is not bfloat16."""
    (folder / "config.json").write_text(json.dumps(DREAM | config))
    random, arrays = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        array = random.normal(size=shape) * shape[-1] ** -0.5
        dtype = next((dtype for end, dtype in dtypes.items() if name.endswith(end)), jnp.bfloat16)
        arrays[name if name in ("lm_head.weight",) or name.startswith("model.") else f"model.layers.0.{name}"] = array.astype(dtype)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")


def test_several_ids_may_end_a_text(folder):
    write(folder, {}, eos_token_id=[1, 7], pad_token_id=None)
    config, params, tokenizer = loaded = checkpoint.load(folder)
    assert (config.pad_id, config.eos_id, config.ends) == (1, 1, (7,))
    assert chat.ends(config, tokenizer) == [1, 7]
    made = generate.generate(loaded, ["def"], length=6, steps=6, block=6, logit_bias={7: 100.0})
    assert made.decoded.tokens[0, -6:].tolist() == [7, 1, 1, 1, 1, 1]
    described = checkpoint.described(folder)[0]
    assert type(described).from_dict(json.loads(json.dumps(described.to_dict()))) == described
    with pytest.raises(ValueError, match=r"config.json: ends: expected token ids in \[0, 300\), got 300"):
        pretrained.described("there", DREAM | dict(eos_token_id=[1, 300]))


@pytest.mark.parametrize("wide", ["lm_head.weight", "bias", "norm.weight", "embed_tokens.weight"])
def test_files_of_two_dtypes_come_in_the_embeddings(wide, folder):
    write(folder, {wide: np.float32})
    config, params, _ = checkpoint.load(folder)
    assert {x.dtype for x in params.values()} == {jnp.dtype(jnp.float32 if wide.startswith("embed") else jnp.bfloat16)}
    assert model.hidden_states(config, params, np.array([[3, 4, 5]], np.int32)).dtype == params["embed"].dtype


def test_a_text_begins_as_the_tokenizer_has_it(folder):
    """Once: a chat's turn spells the opening itself."""
    loaded = config, params, tokenizer = checkpoint.load(folder)
    plain = generate.canvas(config, tokenizer, ["def add", "x"], 4)
    tokenizer.add_special_tokens(["<bos>", "<end>"])
    bos, end = (tokenizer.token_to_id(name) for name in ("<bos>", "<end>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <end>", special_tokens=[("<bos>", bos), ("<end>", end)]
    )
    opened = generate.canvas(config, tokenizer, ["def add", "<bos>x"], 4)
    np.testing.assert_array_equal(opened.start, plain.start - 1)
    for row, begin in enumerate(opened.start):
        assert opened.tokens[row].tolist() == [*plain.tokens[row, 1 : begin + 1], bos, *plain.tokens[row, begin + 1 :]]
    styled = generate.canvas(config, tokenizer, ["def add"], 4, "y = 1\n")
    words = tokenizer.encode("y = 1\n", add_special_tokens=False).ids
    assert styled.tokens[0, styled.start[0] : styled.start[0] + styled.style].tolist() == [bos, *words]
    made = generate.generate(loaded, ["def add"], length=4, steps=1, negative_prompt="x", guidance=2.0)
    assert made.texts[0].startswith("def add")


MALFORMED = {
    ("config.json", json.dumps(DREAM | dict(rope_parameters=[1]))): "config.json: ",
    ("config.json", json.dumps(DREAM | dict(num_attention_heads=0))): "config.json: ",
    ("config.json", json.dumps(DREAM | dict(num_hidden_layers="1"))): "config.json: layers: expected an int of at least 1, got '1'",
    ("config.json", json.dumps(dict(model_type="diffusion_gemma", text_config="x"))): "config.json: ",
    ("config.json", "[1]"): r"config.json: expected a JSON object, got \[1\]",
    ("model.safetensors.index.json", '{"weight_map": {'): "model.safetensors.index.json: Expecting",
    ("model.safetensors.index.json", "[]"): r"model.safetensors.index.json: expected a JSON object, got \[\]",
    ("model.safetensors.index.json", "{}"): "model.safetensors.index.json: expected a weight_map from names to files, got None",
    ("model.safetensors.index.json", '{"weight_map": {"x": 1}}'): "index.json: expected a weight_map .* got {'x': 1}",
}


@pytest.mark.parametrize("file, content", MALFORMED)
def test_malformed_files_are_named(file, content, folder, capsys):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=MALFORMED[file, content]):
        checkpoint.load(folder)
    assert cli.main(["generate", "x", "--model", str(folder)]) == 2
    assert str(folder / file) in capsys.readouterr().err
