"""Between texts and tokens: the one way in which what a model reads is encoded, and what each token shows of a text."""

import itertools


def encoding(config, tokenizer, name, text):
    """The tokenizer's Encoding of `text`, which came as the argument `name`. Only special tokens that it spells itself are in it.

    Raises ValueError for what is no text, and where it spells the mask or the pad, which would be a hole or nobody's.
    """
    try:
        made = tokenizer.encode(text, add_special_tokens=False)
    except TypeError:  # what the library raises for half a surrogate pair too, as which a shell's broken UTF-8 comes
        raise ValueError(f"{name}: expected a text of Unicode characters, got {text!r}") from None
    spelled = set(made.ids) & ({config.mask_id, config.pad_id} - {config.eos_id})
    if spelled:
        raise ValueError(f"{name}: expected a text without {tokenizer.id_to_token(min(spelled))}, got one with it")
    return made


def encode(config, tokenizer, name, text):
    """The ids of `encoding`."""
    return encoding(config, tokenizer, name, text).ids


def opening(tokenizer):
    """The ids with which the tokenizer itself begins every text: Gemma's `<bos>`, which its models have always read."""
    made = tokenizer.encode("a")
    return [token for token, special in itertools.takewhile(lambda pair: pair[1], zip(made.ids, made.special_tokens_mask))]


def opened(opening, ids):
    """`ids` behind those of the `opening`, unless they begin with them."""
    return ids if ids[: len(opening)] == opening else opening + ids


def words(tokenizer, ids):
    """What each token adds to the text: put together, `tokenizer.decode(ids)`.

    A character whose bytes are several tokens comes with the last of them; a special token shows nothing.
    """
    found, unfinished = [], []
    for token in ids:
        unfinished.append(token)
        word = tokenizer.decode(unfinished)
        found.append(word)
        if word.endswith("\ufffd"):
            found[-1] = ""
        else:
            unfinished = []
    if unfinished:
        found[-1] = tokenizer.decode(unfinished)
    return found
