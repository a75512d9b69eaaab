"""What must come comes, what is read but not wanted does not; each control's own limit gives the plain decoder back."""

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from dlm_kernels import cli
from dlm_kernels.denoiser import checkpoint, control, correct, generate, model


@pytest.fixture(scope="module")
def saved_model(saved):
    return checkpoint.load(saved, dtype=jnp.float32)


def test_a_required_phrase_goes_where_it_is_likeliest(config, params, random):
    """Against every place tried by hand; the holes are in two runs, the first too short, and row 1 is padded."""
    tokens = random.integers(3, config.vocab, (2, 14)).astype(np.int32)
    tokens[:, 4:6] = tokens[:, 7:13] = config.mask_id
    tokens[1, :3] = config.pad_id
    phrase = [9, 30, 12]
    placed = control.require(config, params, tokens, phrase, start=np.array([0, 3]))
    for row, start in enumerate([0, 3]):
        hidden = model.hidden_states(config, params, tokens[row : row + 1, start:])
        logits = np.asarray(hidden @ model.head_weight(config, params).T, np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = {at: sum(log_p[at - start + i, phrase[i]] for i in range(3)) for at in range(7, 11)}
        best = max(total, key=total.get)
        expected = tokens[row].copy()
        expected[best : best + 3] = phrase
        np.testing.assert_array_equal(placed[row], expected)
    with pytest.raises(ValueError, match="^required: expected a run of 7 holes in every row, got none in row 0"):
        control.require(config, params, tokens, [9] * 7, start=0 * tokens[:, 0])
    with pytest.raises(ValueError, match="^required: expected at least one token id"):
        control.require(config, params, tokens, [], start=0 * tokens[:, 0])


def test_a_required_phrase_leaves_room_for_those_that_follow(config, params, random):
    """Of 6 holes in a row, two phrases of 3 fill all: the first has two places, wherever else it were likelier."""
    unlike = 0
    for _ in range(6):
        tokens = random.integers(3, config.vocab, (1, 11)).astype(np.int32)
        tokens[:, 3:9] = config.mask_id
        phrase = random.integers(3, config.vocab, 3)
        found = {}
        for later in ((), (3,), (2, 1), (1,)):
            placed = control.require(config, params, tokens, phrase, start=[0], later=later)
            found[later] = int(np.flatnonzero((placed != tokens)[0])[0])
            (holes,) = np.nonzero(placed[0] == config.mask_id)
            assert len(holes) == 3 and (later != (3,) or np.ptp(holes) == 2)
        assert found[1,] == found[()]
        unlike += found[3,] != found[()]
    assert unlike
    with pytest.raises(ValueError, match=r"a run of 3 holes in every row, and after it of \[2, 2\], got none in row 0"):
        control.require(config, params, tokens, phrase, start=[0], later=[2, 2])


def test_room_is_found_or_not_without_trying_every_order(random):
    """As by trying them, where that is quick; and ten phrases for nine runs, none of which holds two, soon not."""

    def tried(runs, lengths):
        places = [i for i, run in enumerate(runs) if lengths and run >= lengths[0]]
        return not lengths or any(tried([*runs[:i], runs[i] - lengths[0], *runs[i + 1 :]], lengths[1:]) for i in places)

    found = set()
    for _ in range(500):
        runs, lengths = random.integers(0, 8, 3).tolist(), sorted(random.integers(1, 5, 4).tolist(), reverse=True)
        found.add(control._room(tuple(runs), tuple(lengths)))
        assert control._room(tuple(runs), tuple(lengths)) == tried(runs, lengths)
    assert found == {True, False}
    control._room.cache_clear()
    assert not control._room(tuple(range(20, 29)), tuple(range(23, 13, -1)))
    assert control._room.cache_info().misses < 2000


def test_required_texts_may_fill_all(saved_model):
    wanted = ["self.items", "return a", "class"]
    length = sum(len(saved_model[2].encode(text).ids) for text in wanted)
    made = generate.generate(saved_model, ["x"], length=length, required=wanted)
    assert made.tokens == 0 and all(text in made.texts[0] for text in wanted)


def test_required_texts_come_all(saved_model):
    wanted = ["self.items", "return a"]
    made = generate.generate(saved_model, ["def push("], length=24, block=24, steps=4, required=wanted)
    given = sum(len(saved_model[2].encode(text).ids) for text in wanted)
    assert made.tokens == 24 - given and all(text in made.texts[0] for text in wanted)
    plain = generate.generate(saved_model, ["def push("], length=24, block=24, steps=4, exact=True)
    assert not any(text in plain.texts[0] for text in wanted)


def test_end_of_text_bias_makes_texts_longer_or_shorter(saved_model):
    def tokens(bias):
        return generate.generate(saved_model, ["def add("], length=12, block=6, steps=3, eos_bias=bias).tokens

    assert tokens(-1e4) == 12 and tokens(1e4) == 1
    with pytest.raises(ValueError, match="eos_bias: expected a finite number, got -inf"):
        tokens(-float("inf"))
    with pytest.raises(ValueError, match="logit_bias: expected finite numbers, got -inf for token 1"):
        control.logit_bias(saved_model[0], {1: -float("inf")})
    with pytest.raises(ValueError, match=r"logit_bias: expected token ids in \[0, 300\), got 300"):
        control.logit_bias(saved_model[0].__class__(vocab=300), {300: 1.0})


@pytest.mark.parametrize("prompt, options", [("x", dict(exact=True)), ("x", dict(required=["return a"])), ("x<mask:12>", {})])
def test_what_has_a_length_keeps_it(prompt, options, saved_model):
    """However much end-of-text is wanted."""
    made = generate.generate(saved_model, [prompt], length=12, block=6, steps=3, eos_bias=1e4, **options)
    given = len(saved_model[2].encode("return a").ids) if "required" in options else 0
    assert made.tokens == 12 - given and not (made.decoded.tokens == saved_model[0].eos_id).any()


def test_style_is_read_and_not_written(saved_model):
    """With guidance 0 the stream without the style decides alone, so what comes is what comes without it."""
    options = dict(length=12, block=12, steps=4, exact=True)
    plain = generate.generate(saved_model, ["def add(", "x"], **options).texts
    styled = {
        scale: generate.generate(saved_model, ["def add(", "x"], style="class Stack:\n", guidance=scale, **options).texts
        for scale in (0.0, 1.0, 3.0)
    }
    assert styled[0.0] == plain
    assert styled[1.0] != plain and styled[3.0] != styled[1.0]
    for texts in styled.values():
        assert texts[0].startswith("def add(") and texts[1].startswith("x")


def test_a_negative_prompt_takes_the_prompts_place_and_is_drawn_away_from(saved_model):
    options = dict(length=12, block=12, steps=4, exact=True)
    unwanted = generate.generate(saved_model, ["class"], **options).texts[0].removeprefix("class")
    made = {
        scale: generate.generate(saved_model, ["def add("], guidance=scale, negative_prompt="class", **options).texts[0]
        for scale in (0.0, 4.0)
    }
    assert made[0.0] == "def add(" + unwanted
    assert made[4.0] != generate.generate(saved_model, ["def add("], **options).texts[0]


def test_a_negative_prompt_is_read_whole(saved_model):
    """With guidance 0 it alone decides, so what comes is what comes after it, however little the prompt's own row is padded."""
    options, negative = dict(length=6, block=6, steps=2), "class Stack:\n" * 12
    unwanted = generate.generate(saved_model, [negative], exact=True, **options).answers
    for prompts in (["<mask:6>"], ["<mask:6>", "x = 1\n" * 30 + "<mask:6>"]):
        made = generate.generate(saved_model, prompts, guidance=0.0, negative_prompt=negative, **options)
        assert made.answers[:1] == unwanted


def test_texts_are_encoded_one_way(saved_model):
    """A tokenizer that puts a token of its own in front: each row and stream begins with one, and no text within gets one."""
    config, params, tokenizer = saved_model
    plain, other = (tokenizer.from_str(tokenizer.to_str()) for _ in range(2))  # that read `<|eos|>` as what it spells
    other.post_processor = processors.TemplateProcessing(single="<|eos|> $A", special_tokens=[("<|eos|>", config.eos_id)])
    assert other.encode("x").ids[0] == config.eos_id
    spelled = generate.canvas(config, plain, ["<|eos|>classx<mask:2>y"], 3).tokens
    np.testing.assert_array_equal(generate.canvas(config, other, ["x<mask:2>y"], 3, "class").tokens, spelled)
    twice = [generate.canvas(config, other, [prompt], 3).tokens for prompt in ("x<mask:2>y", "<|eos|>x<mask:2>y")]
    np.testing.assert_array_equal(*twice)
    options = dict(length=6, block=6, steps=1, required=["self"], guidance=2.0)
    made = [
        generate.generate((config, params, t), [f"{opening}def"], negative_prompt=f"{opening}x", **options).decoded.tokens
        for t, opening in ((plain, "<|eos|>"), (other, ""))
    ]
    np.testing.assert_array_equal(*made)
    assert correct.correct_text((config, params, other), "a<keep>b</keep>", passes=0)[0] == "ab"


def test_the_command_takes_them(saved, capsys):
    words = ("--require", "return a", "--eos-bias", "-2", "--style", "class", "--guidance", "2", "--guidance-refresh", "2")
    arguments = ["generate", "x", "--model", str(saved), "--block", "12", "--steps", "2", *words, "--guidance-final", "1"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "return a" in text and text.startswith("x")
