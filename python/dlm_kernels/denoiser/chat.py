"""How published models are spoken to: the files of their tokenizers, the turns of a chat, and what ends one."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# A user's turn and the beginning of the answer, by a token that only such a model's tokenizer has, of those below it here. Sources:
# the chat templates of GSAI-ML/LLaDA-8B-Instruct, JetLM/SDAR-8B-Chat-b32, Efficient-Large-Model/Fast_dLLM_v2_7B and
# Dream-org/Dream-v0-Instruct-7B, the last two of which are one; LLaDA2's as dInfer and SGLang's documentation write it; Gemma 4's,
# whose tokenizer DiffusionGemma has.
TURNS = {
    "<|start_header_id|>": (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "<|role_end|>": (
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>{}<|role_end|><role>ASSISTANT</role>"
    ),
    "<|turn>": "<bos><|turn>user\n{}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",  # its channel for thought is empty
    "<|MASK|>": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ),
}
ENDS_OF_TURNS = ("<|eot_id|>", "<|im_end|>", "<|role_end|>", "<turn|>", "<|tool_response>")
# How Qwen2, from which Dream comes, cuts a text before it looks for byte pairs: contractions, words, single digits, the rest.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def turn(tokenizer, text):
    """The prompt by which an instruction-tuned model answers `text`. Raises ValueError for a tokenizer without a chat's tokens."""
    for mark, template in TURNS.items():
        if tokenizer.token_to_id(mark) is not None:
            return template.format(text)
    raise ValueError(f"chat: expected a model with one of the tokens {', '.join(TURNS)}, got one with none of them")


def ends(config, tokenizer):
    """Ids of the tokens that end a text: end-of-text, those of the config, and where the tokenizer has one the end of a turn."""
    known = (tokenizer.token_to_id(name) for name in ENDS_OF_TURNS)
    return list(dict.fromkeys([config.eos_id, *config.ends, *(token for token in known if token is not None)]))


def tokenizer(directory):
    """The tokenizer in a checkpoint's directory: of tokenizer.json, or as Dream has it of vocab.json and merges.txt.

    Raises ValueError where there is neither, or what is there is none.
    """
    path = directory / "tokenizer.json"
    if not path.exists() and not ((directory / "vocab.json").exists() and (directory / "merges.txt").exists()):
        raise ValueError(f"{directory}: expected a tokenizer.json, or a vocab.json and a merges.txt")
    try:
        return Tokenizer.from_file(str(path)) if path.exists() else _of_byte_pairs(directory)
    except Exception as error:  # what the library raises is no more special
        raise ValueError(f"{directory}: its tokenizer cannot be read: {error}") from None


def _of_byte_pairs(directory):
    made = Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    added = json.loads((directory / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    for token, told in sorted(added.items(), key=lambda item: int(item[0])):
        made.add_tokens([AddedToken(told["content"], special=told["special"], normalized=told["normalized"])])
        if made.token_to_id(told["content"]) != int(token):
            raise ValueError(f"{told['content']} would have the id {made.token_to_id(told['content'])}, and has {token}")
    return made
