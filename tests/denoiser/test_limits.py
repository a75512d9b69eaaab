"""What is no sensible argument is refused by name, before anything is computed: from Python, and in one line by the command."""

import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_kernels import cli
from dlm_kernels.denoiser import checkpoint, compare, correct, generate, limits, train
from dlm_kernels.denoiser.config import DenoiserConfig

NAN = float("nan")


def test_numbers_and_counts():
    limits.numbers(0, 1, a=0, b=1.0, c=np.array([0.5, 1]), d=(0.1, np.float32(1)), e=None, f=jnp.asarray(NAN))
    jax.jit(lambda x: limits.numbers(0, a=x, b=(x, 1.0)))(-1.0)  # traced: not known
    for value in (-0.1, 1.1, NAN, np.array([0.5, 2]), (0.1, 2.0), "0.5"):
        with pytest.raises(ValueError, match=r"a: expected a number in \[0, 1\], got "):
            limits.numbers(0, 1, a=value)
    with pytest.raises(ValueError, match="a: expected at least 0, got inf"):
        limits.numbers(0, a=float("inf"))
    with pytest.raises(ValueError, match="a: expected a finite number, got -inf"):
        limits.numbers(a=-float("inf"))
    for value in (1e39, -1e39, np.array([1, 1e39])):
        with pytest.raises(ValueError, match="a: expected a finite number, got "):  # of float32, in which all is computed
            limits.numbers(a=value)
    limits.counts(a=1)
    limits.counts(a=np.int64(1), b=np.uint8(2))
    for value in (0, 1.0, None, np.int64(0), np.float32(1)):
        with pytest.raises(ValueError, match="a: expected an int of at least 1, got "):
            limits.counts(a=value)
    limits.whole(0, a=0, b=np.int64(5), c=None, d=np.array([1, 2]), e=jnp.asarray(1), f=2**31 - 1)
    for value in (2.5, np.float32(1), 2**31, np.array([1, 2**40])):
        with pytest.raises(ValueError, match="a: expected a whole number of at most 2147483647, got "):
            limits.whole(0, a=value)
    with pytest.raises(ValueError, match="a: expected a whole number of at most 2147483647, got 10000000000"):
        limits.counts(a=10**10)
    limits.ids(5, a=[0, np.int32(4)])
    with pytest.raises(ValueError, match=r"a: expected token ids in \[0, 5\), got 4$"):
        limits.ids(5, a=4)
    for value in (-1, 5, 10**10, "a", 1.0):
        with pytest.raises(ValueError, match=r"a: expected token ids in \[0, 5\), got "):
            limits.ids(5, a=[1, value])


GENERATE = {
    "--length 0": "length: expected an int of at least 1, got 0",
    "--block -1": "block: expected an int of at least 1, got -1",
    "--threshold nan": "threshold: expected a finite number, got nan",
    "--edit-threshold nan": "edit_threshold: expected a finite number, got nan",
    "--steps 10000000000": "steps: expected a whole number of at most 2147483647, got 10000000000",
    "--factor -1": "factor: expected at least 0, got -1.0",
    "--entropy-budget -1": "entropy_budget: expected at least 0, got -1.0",
    "--remask 2": "remask: expected a number in [0, 1], got 2.0",
    "--remask-rule cap": "remask_rule: expected remask with it, got none",
    "--temperature -1": "temperature: expected at least 0, got -1.0",
    "--seed -1": "seed: expected a number in [0, 4294967295], got -1",
    "--seed 99999999999999999999999": "seed: expected a number in [0, 4294967295], got 99999999999999999999999",
    "--ban ''": "--ban: expected at least one character, got ''",
    "--ban return --require 'return a'": "required: expected texts without a banned token, got 'return a'",
    "--guidance nan": "guidance: expected a finite number, got nan",
    "--guidance 2 --guidance-final nan": "guidance_final: expected a finite number, got nan",
    "--guidance 2 --guidance-interval nan 1": "guidance_interval: expected a finite number, got [nan, 1.0]",
    "--guidance 2 --guidance-interval 1 0": "guidance_interval: expected low at most high, got [1.0, 0.0]",
    "--guidance 2 --guidance-refresh 0": "guidance_refresh: expected at least 1, got 0",
    "--guidance 2 --adaptive -1": "adaptive: expected a number in [0, 1], got -1.0",
    "--guidance 2 --adaptive 0.5 --negative-prompt y": "adaptive, negative_prompt: expected one of them, got both",
    "--negative-prompt y": "negative_prompt: expected a guidance other than 1 with it, got 1",
    "--adaptive 0.5": "adaptive: expected a guidance other than 1 with it, got 1",
    "--guidance-refresh 2": "guidance_refresh: expected a guidance other than 1 with it, got 1",
    "--guidance-interval 0 1": "guidance_interval: expected a guidance other than 1 with it, got 1",
    "--cache --refresh 0": "refresh: expected at least 1, got 0",
    "--refresh 4": "refresh: expected a cache of keys that grow old, cache=True with attend='all', got cache=False, attend='all'",
    "--cache --attend blocks --refresh 4": "refresh: expected a cache of keys that grow old, cache=True with attend='all', "
    "got cache=True, attend='blocks'",
    "--drafts 0": "drafts: expected an int of at least 1, got 0",
    "--noise-budget -1": "noise_budget: expected at least 0, got -1.0",
    "--noise-budget 1 --temperature 0": "temperature: expected above 0 with a noise_budget, got 0",
    "--implementation pallas": "--implementation: expected one for this machine's cpu, got pallas, which is for a tpu",
    "--classifier nowhere": "No such file or directory: nowhere",
    "--html no/where.html": "--html: expected a file in a folder that is there, got no/where.html",
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="speaks of a CPU")
@pytest.mark.parametrize("arguments", GENERATE)
def test_generate(arguments, command):
    assert command("generate", "x", "--block", "6", *shlex.split(arguments)) == (2, "", f"dlm-kernels: {GENERATE[arguments]}\n")


OTHERS = {
    "generate --infill 'no hole'": "--infill: expected a hole such as <mask:20> in it, got 'no hole'",
    "generate --infill '<mask:0>'": "prompts: expected a hole of at least one token in each, got '<mask:0>'",
    "generate '<mask:99999999999999999999>'": "prompts: expected marks <mask:n> or <mask:n@scale>, got '<mask:9999",
    f"generate '<mask:3@1{'0' * 47}>'": f"prompts: <mask:3@1{'0' * 47}>: expected a finite number, got 1e+47",
    "generate --chat 'a<mask:3>b'": "--chat: expected a turn, which is answered behind it, got holes such as <mask:20>",
    "generate --infill '<mask:2><mask:4@x>'": "prompts: expected marks <mask:n> or <mask:n@scale>, got '<mask:4@x>'",
    "generate \udcff": "prompts: expected a text of Unicode characters, got '\\udcff'",
    "correct \udcff": "text: expected a text of Unicode characters, got '\\udcff'",
    "generate --infill '<mask:>'": "--infill: expected a hole such as <mask:20> in it, got '<mask:>'",
    "generate --infill '<mask:9000000000000000>'": "not enough memory",
    "correct x --threshold nan": "threshold: expected a finite number, got nan",
    "correct x --passes -1": "passes: expected at least 0, got -1",
    "classify out --wanted TEXT --unwanted TEXT --length 0": "length: expected an int of at least 1, got 0",
    "classify out --wanted nowhere --unwanted TEXT": "[Errno 2] No such file or directory: 'nowhere'",
    "train out --steps 1 --texts nowhere": "[Errno 2] No such file or directory: 'nowhere'",
    "train out --steps 1 --texts BYTES": "BYTES: expected UTF-8, got 'utf-8' codec can't decode byte 0xff",
    "distill out --steps 1 --held-out TEXT": "--held-out: expected at least 129 tokens, got ",
    "evaluate --held-out TEXT": "--held-out, --files: expected at least 8192 tokens, got ",
    "evaluate --decoding --held-out TEXT": "--held-out, --files: expected a top-level function among them, got none",
    "evaluate --held-out folder": "folder: expected files in it that end in .py, .txt, .md, got none",
    "classify out --wanted BYTES --unwanted TEXT": "BYTES: expected UTF-8, got 'utf-8' codec can't decode byte 0xff",
    "train out --steps 0": "steps: expected an int of at least 1, got 0",
    "train out --steps -1": "steps: expected an int of at least 1, got -1",
    "train out --minutes 0": "minutes: expected at least 0.001, got 0.0",
    "train out --steps 1 --rows 0": "rows: expected an int of at least 1, got 0",
    "train out --steps 1 --layers 0": "layers: expected an int of at least 1, got 0",
    "train out --steps 1 --learning-rate nan": "learning_rate: expected at least 0, got nan",
    "train out --steps 1 --block-share 0.7 --uniform-share 0.7": "block_share, uniform_share: expected at most 1 together, got 1.4",
    "train TEXT --steps 1": "out: expected a directory, got the file TEXT",
    "distill out --steps 1 --guidance nan": "guidance: expected a finite number, got nan",
    "distill out --steps 1 --temperature -1": "temperature: expected at least 0, got -1.0",
    "classify folder --wanted TEXT --unwanted TEXT": "out: expected a file in a folder that is there, got folder",
    "evaluate --plot no/where.svg": "--plot: expected a file in a folder that is there, got no/where.svg",
    "evaluate --prompts 0": "prompts: expected an int of at least 1, got 0",
    "evaluate --files 0": "files: expected an int of at least 1, got 0",
    "evaluate --steps 0": "steps: expected an int of at least 1, got 0",
}


@pytest.mark.parametrize("arguments", OTHERS)
def test_other_commands(arguments, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEXT").write_text("x = 1\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe")
    status, out, err = command(*shlex.split(arguments))
    assert (status, out) == (2, "") and f"dlm-kernels: {OTHERS[arguments]}" in err and "Traceback" not in err


def test_files_that_are_no_checkpoints(command, saved, tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text("nothing")
        with pytest.raises(ValueError, match=name):
            checkpoint.load(tmp_path)
    status, _, err = command("generate", "x", "--block", "6", "--classifier", str(tmp_path / "config.json"))
    assert status == 2 and err.startswith(f"dlm-kernels: {tmp_path}/config.json: ") and err.count("\n") == 1


def test_measures_exclude_each_other(command):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--by-steps", "--decoding"])


PYTHON = [
    (dict(prompts="x"), "prompts: expected a list of texts, got 'x'"),
    (dict(prompts=["x", "<mask:2>"]), "prompts: expected <mask:n> in all of them or in none, got both"),
    (dict(required="abc"), "required: expected a list of texts, got 'abc'"),
    (dict(banned=5), "banned: expected token ids in [0, 300), got 5"),
    (dict(banned=[10**10]), "banned: expected token ids in [0, 300), got 10000000000"),
    (dict(banned=range(3, 300), exact=True), "banned: expected to leave a token that may be written, got all of them"),
    (dict(logit_bias={5: "a"}), "logit_bias: expected finite numbers, got 'a' for token 5"),
    (dict(logit_bias=[0.0] * 300), "logit_bias: expected a dict from token ids to numbers"),
    (dict(eos_bias=1e39), "eos_bias: expected a finite number, got 1e+39"),
    (dict(seed=0.5), "seed: expected a whole number of at most 4294967295, got 0.5"),
    (dict(steps=2.5), "steps: expected a whole number of at most 2147483647, got 2.5"),
    (dict(cache=True, refresh=1.5), "refresh: expected a whole number"),
    (dict(guidance=2.0, guidance_refresh=1.5), "guidance_refresh: expected a whole number"),
    (dict(guidance=2.0, guidance_interval=0.5), "guidance_interval: expected a pair (low, high), got 0.5"),
    (dict(guidance=2.0, guidance_interval=(0, 0.5, 1)), "guidance_interval: expected a pair (low, high), got (0, 0.5, 1)"),
    (dict(noise_budget=0.1, drafts=2), "drafts: goes with steps and greedy decoding alone, got ['noise_budget']"),
    (dict(drafts=2, top_p=0.5), "drafts: goes with steps and greedy decoding alone, got ['top_p']"),
    (dict(noise_budget=0.1, top_k=5), "noise_budget: goes with steps and temperature alone, got ['top_k']"),
    (dict(drafts=2, temperature=1.0), "drafts: goes with steps and greedy decoding alone, got ['temperature']"),
    *((dict([(name, 1)]), f"{name}: expected {source} in its place, of which") for name, source in generate.MADE.items()),
    *((dict([(name, None)]), f"{name}: expected {ours} in its place, got {name}") for name, ours in generate.THEIRS.items()),
    (dict(treshold=0.9), "treshold: expected an option of generate or of sampler.decode, got treshold"),
    (dict(calm=0.1), "calm: expected noise_budget with it, got none"),
]


@pytest.mark.parametrize("options, message", PYTHON)
def test_generate_from_python(options, message, saved):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate.generate(checkpoint.load(saved, dtype=jnp.float32), **({"prompts": ["x"]} | options))


@pytest.mark.parametrize("model", ["student-8", {"embed": 1}, (1, 2)])
def test_what_is_no_loaded_model(model):
    expected = f"model: expected (config, params, tokenizer), as `checkpoint.load` gives, got {type(model).__name__}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        generate.generate(model, ["x"])


def test_numpys_integers_are_counts(saved):
    model = checkpoint.load(saved, dtype=jnp.float32)
    counts = dict(length=6, block=6, steps=3)
    made, same = (generate.generate(model, ["x"], **{n: kind(x) for n, x in counts.items()}) for kind in (int, np.int32))
    assert made.texts == same.texts and made.passes == same.passes


SPELLED = [
    (dict(prompts=["x = <|mask|>"]), "prompts: expected a text without <|mask|>, got one with it"),
    (dict(style="<|pad|>"), "style: expected a text without <|pad|>"),
    (dict(negative_prompt="<|mask|>", guidance=2.0), "negative_prompt: expected a text without <|mask|>"),
    (dict(required=["<|mask|>"]), "required: expected a text without <|mask|>"),
    (dict(required=["<|eos|>"]), "required: expected texts without a banned token, got '<|eos|>'"),
]


@pytest.mark.parametrize("options, message", SPELLED)
def test_special_tokens_that_a_published_tokenizer_finds_in_texts(options, message, saved):
    config, params, tokenizer = checkpoint.load(saved, dtype=jnp.float32)
    tokenizer.encode_special_tokens = False
    with pytest.raises(ValueError, match=re.escape(message)):
        generate.generate((config, params, tokenizer), **({"prompts": ["x"]} | options))


def test_special_tokens_spelled_in_a_prompt_are_text(saved):
    model = checkpoint.load(saved, dtype=jnp.float32)
    assert generate.generate(model, ["x = '<|mask|>'"], length=4, block=4, steps=2).texts[0].startswith("x = '<|mask|>'")


def test_what_is_a_default_is_as_if_not_given(saved):
    model, options = checkpoint.load(saved, dtype=jnp.float32), dict(length=6, block=6, steps=3)
    plain = generate.generate(model, ["x"], drafts=1, **options).texts
    given = dict(cache=False, attend="all", confidence="probability", remask_rule="least", threshold=None, logit_bias=None)
    assert generate.generate(model, ["x"], drafts=1, **options, **given).texts == plain


def test_from_python(saved):
    model = checkpoint.load(saved, dtype=jnp.float32)
    with pytest.raises(ValueError, match="length: expected an int of at least 1, got -5"):
        generate.generate(model, ["x"], length=-5)
    with pytest.raises(ValueError, match="threshold: expected a finite number, got nan"):
        correct.correct(*model[:2], np.zeros((1, 4), np.int32), threshold=NAN)
    with pytest.raises(ValueError, match="length: expected an int of at least 1, got 0"):
        train.TrainConfig(steps=1, length=0)
    with pytest.raises(ValueError, match="heads: expected an int of at least 1, got 0"):
        DenoiserConfig(heads=0)
    with pytest.raises(ValueError, match=r"models: expected \['student-2', 'student-8'\] among them"):
        compare.decoding({"teacher": model}, ["def f(a):\n    return a\n"], decoders=compare.DECODERS)
