"""Published models as they are spoken to: tokenizers from their own files, turns, and what ends an answer."""

import json

import jax
import numpy as np
import pytest
from tokenizers import AddedToken, pre_tokenizers

from dlm_kernels import cli
from dlm_kernels.denoiser import chat, checkpoint, data, generate, model, sampler
from dlm_kernels.denoiser.config import DenoiserConfig

LLADA = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CONFIG = DenoiserConfig(layers=1, d_model=32, heads=2, kv_heads=1, head_size=16, ffn=64, vocab=320, pad_id=1, eos_id=1)


@pytest.fixture(scope="module")
def answering(texts):
    """(config, params, tokenizer) of random weights, the tokenizer with LLaDA's tokens of a chat and the head wider than it."""
    tokenizer = data.train_tokenizer([text for _, text, _ in texts], 300)
    tokenizer.add_special_tokens([AddedToken(token) for token in LLADA])
    assert max(tokenizer.get_vocab().values()) == 303
    return CONFIG, model.init(CONFIG, jax.random.key(0)), tokenizer


def test_a_tokenizer_of_vocab_and_merges(tmp_path):
    """As Dream's repository has it. The pieces of Qwen2: digits one by one, contractions, a space with the word after it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "' s"]
    vocab = {token: i for i, token in enumerate([*letters, *(merge.replace(" ", "") for merge in merges)])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<tool>": False}
    told = {
        str(len(vocab) + i): {"content": token, "special": hidden, "normalized": False, "lstrip": False, "rstrip": False}
        for i, (token, hidden) in enumerate(special.items())
    }
    # 10 before 9 as a string.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": dict(sorted(told.items()))}))
    tokenizer = chat.tokenizer(tmp_path)
    text = "hello hello's 12<|im_start|>\n<tool>é"
    tokens = tokenizer.encode(text).tokens
    assert tokens == ["hello", "Ġhello", "'s", "Ġ", "1", "2", "<|im_start|>", "Ċ", "<tool>", "Ã", "©"]
    ids = tokenizer.encode(text).ids
    assert [ids[6], ids[8]] == [len(vocab) + 1, len(vocab) + 3]
    assert tokenizer.decode(ids) == text.replace("<|im_start|>", "")
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids
    told[str(len(vocab) + 9)] = told.pop(str(len(vocab) + 3))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": told}))
    with pytest.raises(ValueError, match=rf"<tool> would have the id {len(vocab) + 3}, and has {len(vocab) + 9}"):
        chat.tokenizer(tmp_path)


def test_turns_and_ends(answering):
    config, _, tokenizer = answering
    ids = tokenizer.encode(chat.turn(tokenizer, "add two")).ids
    assert [tokenizer.id_to_token(i) for i in ids if i >= 300] == [
        LLADA[0], LLADA[1], LLADA[2], LLADA[3], LLADA[1], LLADA[2]
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "user\n\nadd twoassistant\n\n"
    assert chat.ends(config, tokenizer) == [config.eos_id, 303]
    own = checkpoint.load()
    assert chat.ends(own[0], own[2]) == [own[0].eos_id]
    with pytest.raises(ValueError, match="chat: expected a model with one of the tokens"):
        chat.turn(own[2], "add two")


@pytest.mark.parametrize(
    "mask, before",
    [
        ("<|MASK|>", ""),
        ("|<MASK>|", "system\nYou are a helpful assistant.\n"),
        ("<|mask|>", "system\nYou are a helpful assistant.\n"),
    ],
)
def test_turns_of_qwen_and_its_kin(mask, before, texts):
    """SDAR's, Fast-dLLM v2's and Dream's tokenizers differ in what they call the mask."""
    tokenizer = data.train_tokenizer([text for _, text, _ in texts], 300)
    tokenizer.add_special_tokens([AddedToken(token) for token in ("<|im_start|>", "<|im_end|>", mask)])
    ids = tokenizer.encode(chat.turn(tokenizer, "add {two}")).ids
    assert tokenizer.decode(ids) == before + "user\nadd {two}\nassistant\n"
    assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 1 + bool(before)
    assert chat.ends(CONFIG, tokenizer) == [1, tokenizer.token_to_id("<|im_end|>")]


def test_turns_of_llada2(texts):
    tokenizer = data.train_tokenizer([text for _, text, _ in texts], 300)
    tokenizer.add_special_tokens([AddedToken(token) for token in ("<role>", "</role>", "<|role_end|>")])
    ids = tokenizer.encode(chat.turn(tokenizer, "add {two}")).ids
    assert tokenizer.decode(ids) == "SYSTEMdetailed thinking offHUMANadd {two}ASSISTANT"
    assert ids.count(tokenizer.token_to_id("<|role_end|>")) == 2 and ids.count(tokenizer.token_to_id("<role>")) == 3
    assert chat.ends(CONFIG, tokenizer) == [1, tokenizer.token_to_id("<|role_end|>")]


def test_an_answer_ends_with_its_turn(answering):
    """Of a model that would write nothing but the end of a turn: it ends the row, unless a length is asked for."""
    tokenizer = answering[2]
    prompt = chat.turn(tokenizer, "add two")
    made = generate.generate(answering, [prompt], length=8, block=8, steps=8, logit_bias={303: 100.0})
    assert made.answers == [""] and made.texts == ["user\n\nadd twoassistant\n\n"]
    assert made.decoded.tokens[0, -8:].tolist() == [303] + [CONFIG.pad_id] * 7
    for options in (dict(prompts=[prompt], exact=True), dict(prompts=["x = <mask:8>\n"])):
        made = generate.generate(answering, length=8, block=8, steps=8, logit_bias={303: 100.0}, **options)
        assert not np.isin(made.decoded.tokens[0], [303]).any(where=made.decoded.revealed[0] >= 0)
        assert made.texts[0].endswith(made.answers[0])
    longer = generate.generate(answering, [prompt], length=8, block=8, steps=8, eos_bias=-100.0, logit_bias={303: 50.0})
    assert not np.isin(longer.decoded.tokens[0, -8:], [1, 303]).any()


def test_ids_without_a_text_are_not_sampled(answering):
    made = generate.generate(answering, ["def"], length=64, block=64, steps=4, temperature=50.0, seed=1, exact=True)
    assert made.decoded.tokens.max() <= 303
    # The last one that has a text may come.
    made = generate.generate(answering, ["def"], length=8, block=8, steps=8, temperature=1.0, logit_bias={303: 100.0})
    assert made.decoded.tokens[0, -8] == 303


def test_a_rule_alone_is_rehearsed_in_one_pass(answering, monkeypatch):
    passes, decode = [], sampler.decode

    def counted(*arguments, **options):
        decoded = decode(*arguments, **options)
        passes.append(int(decoded.passes))
        return decoded

    monkeypatch.setattr(sampler, "decode", counted)
    for rule in (dict(threshold=0.999), dict(factor=1e-3), dict(entropy_budget=0.0)):
        generate.generate(answering, ["def"], length=8, block=8, **rule)
    compiled = sampler._decode._cache_size()
    generate.generate(answering, ["def"] * 2, length=8, block=8, threshold=np.array([0.999, 0.999]))
    assert passes == [1, 8] * 4 and sampler._decode._cache_size() == compiled + 1


def test_the_command_answers(answering, tmp_path, capsys):
    config, params, tokenizer = answering
    checkpoint.save(tmp_path, config, params, tokenizer)
    arguments = ["--model", str(tmp_path), "--block", "4", "--steps", "2", "--temperature", "0", "--json"]
    assert cli.main(["generate", "--chat", "add two", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)["text"]
    assert cli.main(["generate", chat.turn(tokenizer, "add two"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "user\n\nadd twoassistant\n\n" + answer
    assert cli.main(["generate", "--chat", "add two", *arguments[2:]]) == 2
    assert "chat: expected a model with one of the tokens" in capsys.readouterr().err


def test_broken_files_are_named(answering, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sedd"}))
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(ValueError, match=f"{tmp_path}: its tokenizer cannot be read"):
        checkpoint.load(tmp_path)
    answering[2].save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="model_type: expected one of llada, .*, llada2_moe, .*, got sedd"):
        checkpoint.load(tmp_path)
