"""Trains a denoiser: absorbing masks at every ratio, Muon, and a state on disk that a kill at any moment leaves whole."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels.denoiser import checkpoint, data, limits, losses, model
from dlm_kernels.denoiser.config import DenoiserConfig
from dlm_kernels.ops import dispatch

DEFAULT = DenoiserConfig(layers=4)  # of a run that is given no other
# The settings that a run keeps to its end, whoever goes on with it; the others may change.
LEARNS = ("rows", "length", "seed", "least_ratio", "block_share", "uniform_share", "error_share")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    rows: int = 16
    length: int = 256
    learning_rate: float = 2e-3
    warmup: float = 0.03  # share of the run
    weight_decay: float = 0.1
    clip: float = 1.0
    least_ratio: float = 0.1  # see `losses.loss`
    block_share: float = 0.0  # share of the updates that are `losses.block_loss`, at a random block size
    uniform_share: float = 0.0  # share of the updates that are `losses.uniform_loss`, which makes a model for `renoise.decode`
    error_share: float = 0.0  # share of the visible tokens that the other updates replace, see `losses.with_errors`
    average: float = 0.999  # what a step keeps of the parameters' running average, which is what a checkpoint holds
    seed: int = 0
    # One of the two ends the run, and the learning rate falls to zero by it. One that goes on for longer has the rate of its share
    # of the longer run, and so begins anew high up.
    steps: int | None = None
    minutes: float | None = None
    save_every: float = 120.0  # seconds
    implementation: str | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps, minutes: expected one of them, got {self.steps} and {self.minutes}")
        limits.counts(rows=self.rows, length=self.length)
        limits.counts(**({} if self.steps is None else {"steps": self.steps}))
        limits.numbers(0.001, minutes=self.minutes)
        limits.numbers(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay, save_every=self.save_every)
        limits.numbers(1e-6, clip=self.clip)
        limits.numbers(0, 1, warmup=self.warmup, least_ratio=self.least_ratio, average=self.average)
        limits.whole(0, 2**32 - 1, seed=self.seed)
        limits.numbers(0, 0.5, error_share=self.error_share)
        limits.numbers(0, 1, block_share=self.block_share, uniform_share=self.uniform_share)
        both = self.block_share + self.uniform_share
        if both > 1:
            raise ValueError(f"block_share, uniform_share: expected at most 1 together, got {both}")
        dispatch.check(self.implementation, dispatch.PACKAGES.keys() - {"cudnn"})  # which has attention alone, no loss


def optimizer(train):
    """Muon for the layers' matrices and Adam for the rest, the stacked matrices of experts among it, with decoupled weight decay;
    without the learning rate, which the loop gives each step as data, because it may follow the clock.

    Muon's updates are scaled to the size of Adam's, so that one learning rate serves both. Source: Jordan et al. 2024,
    Liu et al. 2025.
    """
    import optax
    import optax.contrib

    def kinds(params):
        return {name: "matrix" if name.startswith("layers.") and x.ndim == 2 else "other" for name, x in params.items()}

    def like_adam(updates, params):
        return jax.tree.map(lambda u: 0.2 * max(u.shape) ** 0.5 * u, updates)

    def axes(updates):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)

    matrix = optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=axes), optax.stateless(like_adam))
    return optax.chain(
        optax.clip_by_global_norm(train.clip),
        optax.partition({"matrix": matrix, "other": optax.scale_by_adam(b1=0.9, b2=0.95)}, kinds),
        optax.add_decayed_weights(train.weight_decay, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )


def whole_objective(config, train, params, given, tokens, key):
    """What `train_step` descends on: `losses.loss`. given: what else an objective needs; nothing here."""
    options = dict(least_ratio=train.least_ratio, error_share=train.error_share, implementation=train.implementation)
    return losses.loss(config, params, tokens, key, **options)


def block_objective(config, train, params, given, tokens, key):
    """`losses.block_loss` at a block size drawn from the powers of two up to the length."""
    for_loss, for_block = jax.random.split(key)
    size = 2 ** jax.random.randint(for_block, (), 0, int(train.length).bit_length())
    options = dict(least_ratio=train.least_ratio, implementation=train.implementation)
    return losses.block_loss(config, params, tokens, for_loss, size, **options)


def uniform_objective(config, train, params, given, tokens, key):
    return losses.uniform_loss(config, params, tokens, key, implementation=train.implementation)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3,))
def train_step(config, train, objective, state, given, tokens, step, learning_rate):
    """One update. state = {"params", "average", "optimizer"}; everything random in it follows from the seed and the step."""
    key = jax.random.fold_in(jax.random.key(train.seed), step)
    value, gradients = jax.value_and_grad(lambda p: objective(config, train, p, given, tokens, key))(state["params"])
    updates, moments = optimizer(train).update(gradients, state["optimizer"], state["params"])
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], updates)
    # A young average forgets faster, or it would remember the random start.
    keep = jnp.minimum(train.average, (1.0 + step) / (10.0 + step))
    average = jax.tree.map(lambda a, p: a + (1 - keep) * (p - a), state["average"], params)
    return {"params": params, "average": average, "optimizer": moments}, value


def schedule(train, done):
    """The learning rate when a share `done` of the run is over: a linear warm-up, then a cosine to zero."""
    warm = min(1.0, done / train.warmup) if train.warmup else 1.0
    return train.learning_rate * warm * 0.5 * (1 + np.cos(np.pi * min(1.0, done)))


def _drawn_objective(train, step):
    draw = np.random.default_rng([train.seed, step]).random()
    if draw < train.block_share:
        return block_objective
    return uniform_objective if draw < train.block_share + train.uniform_share else whole_objective


def _texts(seed_texts):
    """What a run learns from: by default the standard library. Raises ValueError for what is not of that form."""
    found = list(data.files() if seed_texts is None else seed_texts)
    for text in found:
        if not isinstance(text, (list, tuple)) or len(text) != 3 or not isinstance(text[1], str):
            raise ValueError(f"seed_texts: expected (name, text, held out?) of each, as `data.read` gives, got {text!r:.80}")
    return found


def prepare(config, seed_texts=None, tokenizer=None):
    """(tokenizer, training streams) of the standard library, or of `seed_texts` [(name, text, held out?)]."""
    train_texts = [text for _, text, held_out in (data.files() if seed_texts is None else seed_texts) if not held_out]
    if tokenizer is None:
        least = 256 + 3
        if config.vocab < least:
            raise ValueError(f"vocab: expected at least {least}, of all bytes and the special tokens, got {config.vocab}")
        ids = config.pad_id, config.eos_id, config.mask_id
        if ids != (0, 1, 2):
            raise ValueError(f"pad_id, eos_id, mask_id: expected (0, 1, 2), as of `data.train_tokenizer`, got {ids}")
        tokenizer = data.literal(data.train_tokenizer(train_texts, config.vocab))
    whole = data.stream(tokenizer, train_texts, config.eos_id)
    in_units = data.stream(tokenizer, [unit for text in train_texts for unit in data.units(text)], config.eos_id)
    return tokenizer, [whole, in_units]


class _Stop:
    """While it holds, Ctrl-C and SIGTERM only set `asked`, so that a step ends and is saved; a second one acts as ever."""

    def __enter__(self):
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            # What the parent has the process ignore, as for `nohup`, stays ignored.
            heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in (None, signal.SIG_IGN)]
            self.before = {s: signal.signal(s, self) for s in heard}
        return self

    def __call__(self, *_):
        self.asked = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def fingerprint(params):
    """By which a run knows the parameters again that it was given."""
    digest = hashlib.sha256(np.asarray(params["embed"]).tobytes()).hexdigest()[:16]
    return f"one whose embedding's SHA-256 begins with {digest}"


def _contents(seed_texts):
    """By which a run knows the texts again that it learns from."""
    learnt = [text for _, text, held_out in seed_texts if not held_out]
    digest = hashlib.sha256(json.dumps(learnt).encode()).hexdigest()[:16]
    return f"{len(learnt)} whose SHA-256 begins with {digest}"


def _start(config, train, out, initial, told):
    """(config, parameters, tokenizer, what it learns from) to begin with: of the run that `out` holds a state of, else `initial`'s;
    None where neither has it.
    """
    params = tokenizer = None
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a directory, got the file {out}")
    if initial is not None:
        if pathlib.Path(initial).resolve() == out.resolve():
            raise ValueError(f"initial: expected another directory than the one that is written, got {out}")
        found, params, tokenizer = checkpoint.load(initial, dtype=jnp.float32, learnt_masks=True)
        config = _agreed(config, found, initial)
    learns = {name: getattr(train, name) for name in LEARNS} | told
    learns["initial"] = params and fingerprint(params)
    if (out / "state.safetensors").exists():
        found, trained_with = checkpoint.described(out)
        if tokenizer is not None and tokenizer.to_str() != trained_with.to_str():
            raise ValueError(f"initial: expected the tokenizer of the run that goes on in {out}, got another in {initial}")
        config, tokenizer = _agreed(config, found, out), trained_with
        began = checkpoint.load_progress(out / "state.safetensors").get("learns", learns)
        for name in ("initial", "texts"):
            began.setdefault(name, learns[name])  # of a run that did not remember it yet
        for name in began | learns:
            # What came out would be of both.
            before, now = began.get(name), learns.get(name)
            if before != now:
                raise ValueError(f"{name}: expected {before}, with which the run in {out} began, got {now}")
    elif any(out.glob("model*")) or not checkpoint.may_describe(out):
        raise ValueError(f"out: expected a directory without a model, or with a run's state beside it, got {out}")
    config = config or DEFAULT
    config = dataclasses.replace(config, self_conditioning=config.self_conditioning or train.uniform_share > 0)
    return config, params, tokenizer, learns


def _agreed(config, found, where):
    """`found`, unless `config` is given and asks for another; training adds self-conditioning where it needs it."""
    for name, value in config.to_dict().items() if config else ():
        if name != "self_conditioning" and value != getattr(found, name):
            raise ValueError(f"config: expected the {name} {getattr(found, name)} of {where}, got {value}")
    return found


def run(
    config: DenoiserConfig | None, train: TrainConfig, out, *,
    initial=None, objective=None, given=None, told=None, batches=None, seed_texts=None, report=None,
):  # fmt: skip
    """Trains into directory `out`, going on from its state.safetensors if there is one; returns the averaged parameters.

    `out` holds a whole model at every moment after the first save. initial: a checkpoint directory to start from. Its config and
    tokenizer hold, as do those of a run that goes on; config is None, or has to agree. seed_texts: what to learn from, a list of
    (name, text, held out?), as `data.read` makes of files; by default `data.files()`. objective, given: another than those above,
    with its arrays; told: the JSON values that make it what it is. batches(streams, rows, length, seed, eos_id): what gives a step
    its rows, in the place of `data.Batches`. report(progress: dict) is called after every step. On Ctrl-C or SIGTERM the step ends
    and is saved, then KeyboardInterrupt is raised. Raises ValueError, before anything is written, where `out` holds a model that is
    not a run's, or a run that learns from something else (LEARNS, told, initial, seed_texts), and FloatingPointError where the loss
    or an update is not finite, which is not saved.
    """
    if not importlib.util.find_spec("optax"):
        raise ValueError("training needs the optax package: pip install 'dlm_kernels[train]'")
    if out in checkpoint.BESIDE:
        raise ValueError(f"out: expected another name than of a model that comes with the package, got {out}; ./{out} is none")
    out = pathlib.Path(out)
    seed_texts = _texts(seed_texts)
    told = (told or {}) | {"texts": _contents(seed_texts)}
    config, params, tokenizer, learns = _start(config, train, out, initial, told)
    if train.block_share:
        losses.check_blocks(config)
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(train.seed)) | (params or {})
    tokenizer, streams = prepare(config, seed_texts, tokenizer)
    if batches is None:
        batches = data.Batches(streams, train.rows, train.length, train.seed)
    else:
        batches = batches(streams, train.rows, train.length, train.seed, config.eos_id)
    average = jax.tree.map(jnp.copy, params)
    state = {"params": params, "average": average, "optimizer": optimizer(train).init(params)}
    progress = {"step": 0, "seconds": 0.0, "tokens": 0, "loss": None}
    path = out / "state.safetensors"
    for name in (path.name, "model.safetensors"):
        checkpoint.remove_partials(out / name)
    if path.exists():
        state, progress = checkpoint.load_state(path, state), checkpoint.load_progress(path)
    saved = clock = time.monotonic()

    def share(ahead=0.0):
        """Of the run that is over; of its steps, `ahead` of the next too."""
        return (progress["step"] + ahead) / train.steps if train.minutes is None else progress["seconds"] / (60 * train.minutes)

    with _Stop() as stop:
        while share() < 1 and not stop.asked:
            step = progress["step"]
            chosen = objective or _drawn_objective(train, step)
            rate = np.float32(schedule(train, share(0.5)))
            state, value = train_step(config, train, chosen, state, given, batches[step], step, rate)
            value = float(value)
            if not np.isfinite(value):
                raise _diverged(f"loss is {value} at step {step}", path)
            before = progress["loss"]
            now = time.monotonic()
            progress = {
                "step": step + 1,
                "seconds": progress["seconds"] + now - clock,
                "tokens": progress["tokens"] + train.rows * train.length,
                "loss": value if before is None else 0.98 * before + 0.02 * value,
            }
            clock = now
            if report:
                report(progress | {"share": min(share(), 1.0)})
            if now - saved > train.save_every:
                _save(path, config, state, progress | {"learns": learns}, tokenizer)
                saved = time.monotonic()
        _save(path, config, state, progress | {"learns": learns}, tokenizer)
    if share() < 1:
        raise KeyboardInterrupt(f"stopped after step {progress['step']}, which is saved in {out}; the same command goes on")
    return state["average"]


def _save(path, config, state, progress, tokenizer):
    """In an order in which a kill at any moment leaves a run that can go on, or nothing that is taken for a model."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
        raise _diverged(f"the update of step {progress['step'] - 1} is not finite", path)
    checkpoint.describe(path.parent, config, tokenizer)
    checkpoint.save_state(path, state, progress)
    checkpoint.save_parameters(path.parent, state["average"])


def _diverged(how, path):
    left = f"what was saved before is in {path.parent}" if path.exists() else "nothing was saved"
    return FloatingPointError(f"{how}; {left}")
