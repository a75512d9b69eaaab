"""A tiny random model: what it says means nothing, but every mechanism around it is the real one."""

import jax
import numpy as np
import pytest

from dlm_kernels import cli
from dlm_kernels.denoiser import checkpoint, data, model, sampler
from dlm_kernels.denoiser.config import DenoiserConfig

TEXTS = [
    ("a.py", "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n" * 40, False),
    ("b.py", "class Stack:\n    def push(self, x):\n        self.items.append(x)\n" * 40, False),
    ("c.py", "def mul(a, b):\n    return a * b\n" * 40, True),
]


@pytest.fixture(scope="session")
def config():
    # Two layers: with one a key would depend on its own token alone, and no cache could be stale.
    return DenoiserConfig(layers=2, d_model=24, heads=4, kv_heads=2, head_size=6, ffn=40, vocab=53)


@pytest.fixture(scope="session")
def params(config):
    """Attention is sharpened and the mask's own embedding shrunk until predictions differ from position to position."""
    return sharp(config, jax.jit(model.init, static_argnums=0)(config, jax.random.key(7)))


def sharp(config, params):
    scale = {"query_norm": 2, "key_norm": 2, "out": 3, "down": 3, "embed": 3}
    params = {name: x * scale.get(name.rsplit(".", 1)[-1], 1) for name, x in params.items()}
    return params | {"embed": params["embed"].at[config.mask_id].multiply(0.1)}


@pytest.fixture(scope="session")
def texts():
    """What stands in for the standard library: [(name, text, held out?)]."""
    return TEXTS


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A checkpoint directory with a real tokenizer."""
    tokenizer = data.train_tokenizer([text for _, text, _ in TEXTS], 300)
    config = DenoiserConfig(
        layers=2, d_model=24, heads=4, kv_heads=2, head_size=6, ffn=40, vocab=tokenizer.get_vocab_size()
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(
        folder, config, sharp(config, jax.jit(model.init, static_argnums=0)(config, jax.random.key(3))), tokenizer
    )
    return folder


@pytest.fixture(scope="session")
def board(config):
    """Three left-padded rows of 23: prompts of 8, 3 and 5 tokens, the last with text after its holes."""
    random = np.random.default_rng(5)
    tokens = np.full((3, 23), config.mask_id, np.int32)
    for row, (start, end) in enumerate([(0, 8), (5, 8), (3, 8)]):
        tokens[row, :start] = config.pad_id
        tokens[row, start:end] = random.integers(3, config.vocab, end - start)
    tokens[2, 12:17] = random.integers(3, config.vocab, 5)
    return dict(tokens=tokens, start=np.array([0, 5, 3]), first=np.array([8, 8, 8]))


@pytest.fixture
def run(config, params):
    """Decodes a board, or one row of it alone."""

    def run(board, row=None, **options):
        if row is not None:
            board = {name: array[row : row + 1] for name, array in board.items()}
        return jax.tree.map(np.asarray, sampler.decode(config, params, **({"block": 6} | board | options)))

    return run


@pytest.fixture
def command(saved, capsys):
    """Runs the command on that checkpoint: (status, what it printed, what it said on stderr)."""

    def run(*arguments):
        status = cli.main([*arguments, *(["--model", str(saved)] if arguments[0] != "train" else [])])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def random():
    return np.random.default_rng(11)
