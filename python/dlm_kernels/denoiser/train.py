"""Trains a denoiser: absorbing masks at every ratio, Muon, and a state on disk that a kill at any moment leaves whole."""

import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from dlm_kernels import masked_cross_entropy, masks, soft_embedding
from dlm_kernels.denoiser import checkpoint, data, half, limits, model
from dlm_kernels.denoiser.config import DenoiserConfig
from dlm_kernels.ops import dispatch

GOLDEN = 0.618034  # multiples of it, modulo 1, spread evenly
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
    least_ratio: float = 0.1  # see `loss`
    block_share: float = 0.0  # share of the updates that are `block_loss`, at a random block size
    uniform_share: float = 0.0  # share of the updates that are `uniform_loss`, which makes a model for `renoise.decode`
    error_share: float = 0.0  # share of the visible tokens that the other updates replace, see `with_errors`
    average: float = (
        0.999  # what a step keeps of the running average of the parameters, which is what a checkpoint holds
    )
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


def corrupt(tokens, key, mask_id, block_size):
    """Masks exactly k of the n tokens of each block of each row, k uniform on 1..n and spread evenly over the blocks.

    tokens int32 [B, L]; block_size an int or a traced scalar, L for whole rows. Returns the masked tokens, which are masked,
    bool [B, L], and their block's ratio k / n, float32 [B, L].
    """
    b, length = tokens.shape
    for_ratio, for_place = jax.random.split(key)
    position = jnp.arange(length)
    block = position // block_size
    size = jnp.minimum((block + 1) * block_size, length) - block * block_size
    spread = jnp.arange(b)[:, None] / b + block * GOLDEN
    count = jnp.floor((jax.random.uniform(for_ratio, ()) + spread) % 1.0 * size).astype(jnp.int32) + 1
    draw = jax.random.uniform(for_place, (b, length))
    before = (block[:, None] == block) & (draw[:, None, :] < draw[:, :, None])
    before |= (block[:, None] == block) & (draw[:, None, :] == draw[:, :, None]) & (position < position[:, None])
    masked = before.sum(-1) < count
    return jnp.where(masked, mask_id, tokens), masked, count / size


def with_errors(tokens, noisy, masked, key, share, special):
    """Replaces about `share` of the tokens that `corrupt` left visible by tokens from elsewhere in the batch.

    Of a row's columns a share of 2 share, evenly spaced from a random one on, is checked: every other one of these is replaced
    where it is visible, so that the model learns both to keep and to reject. special: ids, which are never written, nor
    replaced. Returns the tokens and which are checked, bool [B, L], never a masked one. Source: LLaDA2.1's token-to-token editing.
    """
    b, length = tokens.shape
    for_offset, for_parity, for_other = jax.random.split(key, 3)
    # The columns where this passes a whole number: spacing of any length, and at most 2 share L + 1 of them.
    passed = jnp.floor(jnp.arange(length + 1) * (2 * share) + jax.random.uniform(for_offset, (b, 1))).astype(jnp.int32)
    checked = (passed[:, 1:] > passed[:, :-1]) & ~masked & ~jnp.isin(tokens, special)
    parity = jax.random.randint(for_parity, (b, 1), 0, 2)
    other = jax.random.permutation(for_other, tokens.reshape(-1)).reshape(b, length)
    replaced = checked & (passed[:, 1:] % 2 == parity) & ~jnp.isin(other, special)
    return jnp.where(replaced, other, noisy), checked


def loss(config, params, tokens, key, *, least_ratio=0.0, error_share=0.0, implementation=None):
    """The bound on -log p per token, in nats, of packed rows [B, L]: cross-entropy of the masked tokens over the masked ratio.

        noisy, masked, ratio = corrupt(tokens)
        nll = -log_softmax(head(hidden_states(noisy)))[tokens]
        return sum(nll[masked] / ratio[masked]) / (B * L)

    least_ratio: ratios below it weigh as if they were it. The few tokens of such rows would otherwise carry the gradient of
    a whole row each; 0 is the bound itself. error_share: see `with_errors`; what it checks is learnt with weight 1, and with any
    the value is no bound. Source: MDLM, LLaDA.
    """
    b, length = tokens.shape
    noisy, masked, ratio = corrupt(tokens, key, config.mask_id, length)
    # Of what is visible: the ends of all documents would tell the model which masks are end-of-text, and the value be no bound.
    document = masks.packed(data.segments(noisy, config.eos_id).astype(jnp.int32))
    weights = masked / (jnp.maximum(ratio, least_ratio) * (b * length))
    # Evenly spread counts add up to at most this many, so the head sees half of the rows, in an array of fixed size.
    most = (b + 1) * length // 2 + b
    if error_share:
        special = jnp.array([config.pad_id, config.eos_id, config.mask_id])
        noisy, checked = with_errors(tokens, noisy, masked, jax.random.fold_in(key, 1), error_share, special)
        weights += checked / (b * length)
        masked |= checked
        most += b * (int(2 * error_share * length) + 2)  # one more than there can be, for rounding in float32
    most = min(most, b * length)
    hidden = model.hidden_states(config, params, noisy, mask=document, implementation=implementation)
    (index,) = jnp.nonzero(masked.reshape(-1), size=most, fill_value=b * length)
    hidden, targets, weights = (
        x.reshape(b * length, *x.shape[2:]).at[index].get(mode="fill", fill_value=0)[None]
        for x in (hidden, tokens, weights)
    )
    return masked_cross_entropy(
        hidden, model.head_weight(config, params), targets, weights, implementation=implementation
    )


def block_loss(config, params, tokens, key, block_size, *, least_ratio=0.0, implementation=None):
    """`loss` where a block is denoised given the clean blocks before it and nothing after: block 1 is autoregression.

    All blocks of a row are learnt from at once: the model reads [noisy; clean] rows under `masks.block_diffusion`.
    block_size: an int or a traced scalar. Source: BD3-LM (Arriola et al. 2025).
    """
    noisy, masked, ratio = corrupt(tokens, key, config.mask_id, block_size)
    hidden = block_states(config, params, noisy, tokens, block_size, implementation=implementation)
    weights = masked / (jnp.maximum(ratio, least_ratio) * tokens.size)
    return masked_cross_entropy(
        hidden, model.head_weight(config, params), tokens, weights, implementation=implementation
    )


def block_states(config, params, noisy, clean, block_size, *, implementation=None):
    """The states of every block of `noisy` [B, L], given the blocks of `clean` before its own: [B, L, d_model]."""
    length = clean.shape[1]
    column = jnp.arange(length, dtype=jnp.int32)
    hidden = model.hidden_states(
        config,
        params,
        jnp.concatenate([noisy, clean], axis=1),
        positions=jnp.tile(column, 2)[None],
        mask=masks.block_diffusion(length, block_size),
        implementation=implementation,
    )
    if not config.shifted:
        return hidden[:, :length]
    # What a block's first token is told by is the column before, which by then is clean.
    begins = (column % block_size == 0) & (column > 0)
    return jnp.where(begins[:, None], hidden[:, length:], hidden[:, :length])


def uniform_loss(config, params, tokens, key, *, implementation=None):
    """Cross-entropy of every token where some are random: what `renoise.decode` asks of a model, which no mask tells where.

        noisy = where(uniform() < ratio, random tokens, tokens)                 # a ratio a row, spread evenly over 0-100%
        soft = soft_embedding(hidden_states(noisy), embed)                      # in every other row; zeros in the others
        return mean(-log_softmax(head(hidden_states(self_conditioned(noisy, soft))))[tokens])

    packed rows [B, L]; config.self_conditioning. No gradient flows through soft. Source: DiffusionGemma's fine-tuning.
    """
    b, length = tokens.shape
    for_ratio, for_place, for_token, for_rows = jax.random.split(key, 4)
    ratio = (jax.random.uniform(for_ratio, ()) + jnp.arange(b)[:, None] / b) % 1.0
    random = jax.random.randint(for_token, (b, length), 0, config.vocab)
    noisy = jnp.where(jax.random.uniform(for_place, (b, length)) < ratio, random, tokens)
    # Of what is given, as in `loss`.
    document = masks.packed(data.segments(noisy, config.eos_id).astype(jnp.int32))
    options = dict(mask=document, implementation=implementation)
    head, embedded = model.head_weight(config, params), half.look_up(params["embed"], noisy)
    first = model.hidden_states(config, params, noisy, **options)
    soft = soft_embedding(first, head, embedding=params["embed"], implementation=implementation)
    # Neighbouring ratios take turns, whichever rows begin.
    turn = (jnp.arange(b) + jax.random.randint(for_rows, (), 0, 2)) % 2 == 0
    soft = jnp.where(turn[:, None, None], jax.lax.stop_gradient(soft), 0)
    embedded = model.self_conditioned(config, params, embedded, soft)
    hidden = model.hidden_states(config, params, noisy, embedded=embedded, **options)
    weights = jnp.full(tokens.shape, 1 / tokens.size)
    return masked_cross_entropy(hidden, head, tokens, weights, implementation=implementation)


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
    """What `train_step` descends on: `loss`. given: what else an objective needs; nothing here."""
    options = dict(least_ratio=train.least_ratio, error_share=train.error_share, implementation=train.implementation)
    return loss(config, params, tokens, key, **options)


def block_objective(config, train, params, given, tokens, key):
    """`block_loss` at a block size drawn from the powers of two up to the length."""
    for_loss, for_block = jax.random.split(key)
    size = 2 ** jax.random.randint(for_block, (), 0, train.length.bit_length())
    options = dict(least_ratio=train.least_ratio, implementation=train.implementation)
    return block_loss(config, params, tokens, for_loss, size, **options)


def uniform_objective(config, train, params, given, tokens, key):
    return uniform_loss(config, params, tokens, key, implementation=train.implementation)


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


def prepare(config, seed_texts=None, tokenizer=None):
    """(tokenizer, training streams, held-out texts) of the standard library, or of `seed_texts` [(name, text, held out?)]."""
    found = data.files() if seed_texts is None else seed_texts
    train_texts = [text for _, text, held_out in found if not held_out]
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
    return tokenizer, [whole, in_units], [text for _, text, held_out in found if held_out]


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
    learns = {name: getattr(train, name) for name in LEARNS} | (told or {})
    learns["initial"] = params and fingerprint(params)
    if (out / "state.safetensors").exists():
        found, trained_with = checkpoint.described(out)
        if tokenizer is not None and tokenizer.to_str() != trained_with.to_str():
            raise ValueError(f"initial: expected the tokenizer of the run that goes on in {out}, got another in {initial}")
        config, tokenizer = _agreed(config, found, out), trained_with
        began = checkpoint.load_progress(out / "state.safetensors").get("learns", learns)
        began.setdefault("initial", learns["initial"])  # of a run that did not remember it yet
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
    tokenizer hold, as do those of a run that goes on; config is None, or has to agree. objective, given: another than those above,
    with its arrays; told: the JSON values that make it what it is. batches(streams, rows, length, seed, eos_id): what gives a step
    its rows, in the place of `data.Batches`. report(progress: dict) is called after every step. On Ctrl-C or SIGTERM the step ends
    and is saved, then KeyboardInterrupt is raised. Raises ValueError, before anything is written, where `out` holds a model that is
    not a run's, or a run that learns from something else (LEARNS, told, initial), and FloatingPointError where the loss or an
    update is not finite, which is not saved.
    """
    if not importlib.util.find_spec("optax"):
        raise ValueError("training needs the optax package: pip install 'dlm_kernels[train]'")
    if out in checkpoint.BESIDE:
        raise ValueError(f"out: expected another name than of a model that comes with the package, got {out}; ./{out} is none")
    out = pathlib.Path(out)
    config, params, tokenizer, learns = _start(config, train, out, initial, told)
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(train.seed)) | (params or {})
    tokenizer, streams, _ = prepare(config, seed_texts, tokenizer)
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
