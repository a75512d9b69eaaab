"""Checkpoints: a directory of model.safetensors, config.json and tokenizer.json, and one file of training state."""

import glob
import json
import os
import pathlib
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dlm_kernels.denoiser import architectures, chat, data, model, pretrained
from dlm_kernels.denoiser.config import DenoiserConfig

SHIPPED = pathlib.Path(__file__).parent / "weights"
BESIDE = ("student-8", "student-2", "renoise")  # each in a folder of its name there


def find(name=None):
    """The directory of a model: by default the shipped one's, that of one of BESIDE, which come with it, or a path."""
    return SHIPPED / (name or "") if name in (None, *BESIDE) else pathlib.Path(name)


def save(directory, config, params, tokenizer, *, dtype=jnp.bfloat16):
    """Writes what `load` reads, each file whole or not at all."""
    describe(directory, config, tokenizer)
    save_parameters(directory, params, dtype=dtype)


def describe(directory, config, tokenizer):
    """Writes what `described` reads: without it no array in the directory means anything."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # First what `may_describe` knows its own by.
    write_atomic(directory / "config.json", (json.dumps(config.to_dict(), indent=2, default=_number) + "\n").encode())
    write_atomic(directory / "tokenizer.json", tokenizer.to_str().encode())


def may_describe(directory):
    """Whether `describe` overwrites nothing there but what it wrote itself."""
    directory = pathlib.Path(directory)
    if not (directory / "config.json").exists():
        return not (directory / "tokenizer.json").exists()
    # One that an earlier version wrote has fewer fields.
    return {"d_model", "mask_id"} <= _config(directory).keys() <= DenoiserConfig().to_dict().keys()


def save_parameters(directory, params, *, dtype=jnp.bfloat16):
    arrays = {name: np.asarray(array.astype(dtype)) for name, array in params.items()}
    write_atomic(pathlib.Path(directory) / "model.safetensors", safetensors.numpy.save(arrays, {"format": "pt"}))


def load(directory=SHIPPED, *, dtype=None, learnt_masks=False):
    """(config, params, tokenizer) of what `find` finds: ours, or a published checkpoint (see `pretrained`); `dtype` converts.

    Raises ValueError where there is none, or a parameter is missing, unknown, or of another shape than the config says; with
    `learnt_masks` for a DiffusionGemma too.
    """
    directory = find(directory)
    values = _config(directory)
    config, tokenizer = described(directory)
    if learnt_masks:
        model.check_masks(config)
    if architectures.of(values):
        return config, pretrained.load(directory, values, dtype=dtype), tokenizer
    arrays = read(directory / "model.safetensors")
    shapes = model.parameter_shapes(config)
    if arrays.keys() != shapes.keys():
        raise ValueError(f"{directory}: parameters differ from the config's: {sorted(arrays.keys() ^ shapes.keys())}")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{directory}: {name}: expected shape {shape}, got {arrays[name].shape}")
    params = {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    return config, params, tokenizer


def described(directory):
    """(config, tokenizer) of what `load` loads, its parameters there or not. ValueError as of `load`."""
    directory = find(directory)
    values = _config(directory)
    tokenizer = chat.tokenizer(directory)
    if architectures.of(values):
        config = pretrained.described(directory, values)
    elif "model_type" in values:
        known = ", ".join(architectures.ARCHITECTURES)
        raise ValueError(f"{directory}/config.json: model_type: expected one of {known}, got {values['model_type']}")
    else:
        try:
            config, tokenizer = DenoiserConfig.from_dict(values), data.literal(tokenizer)
        except ValueError as error:
            raise ValueError(f"{directory}/config.json: {error}") from None
    # An id beyond the embeddings would read another token's, and no error say so.
    most = max(tokenizer.get_vocab().values(), default=-1) + 1
    if most > config.vocab:
        raise ValueError(f"{directory}: expected a tokenizer of at most {config.vocab} ids, got {most}")
    return config, tokenizer


def published(directory):
    """Whether the checkpoint there is one of `pretrained`'s. Raises ValueError where there is none."""
    return architectures.of(_config(find(directory))) is not None


def _config(directory):
    path = pathlib.Path(directory) / "config.json"
    if not path.exists():
        raise ValueError(f"{directory}: no checkpoint is there; expected a directory with config.json, for nothing is downloaded")
    return pretrained.read_object(path)


def _number(value):
    """A NumPy scalar as JSON has it."""
    return value.item()


def save_state(path, state, progress):
    """A pytree of arrays and a dict of JSON values, in one file that is replaced in one step."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    write_atomic(path, safetensors.numpy.save(arrays, {"progress": json.dumps(progress, default=_number)}))


def load_progress(path):
    """The dict that `save_state` wrote."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            progress = json.loads((file.metadata() or {}).get("progress", "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(progress, dict):
        raise ValueError(f"{path}: expected a state of training, got a safetensors file of something else")
    return progress


def load_state(path, like):
    """The pytree that `save_state` wrote, in the structure of `like`. ValueError where the structures differ."""
    arrays = read(path)
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    if arrays.keys() != set(names):
        raise ValueError(f"{path}: written by another configuration: {sorted(arrays.keys() ^ set(names))}")
    for name, (_, leaf) in zip(names, leaves):
        if arrays[name].shape != leaf.shape:
            raise ValueError(f"{path}: {name}: expected shape {leaf.shape}, got {arrays[name].shape}")
    return jax.tree.unflatten(tree, [jnp.asarray(arrays[name]) for name in names])


def read(path):
    """{name: array} of a safetensors file; ValueError where it is none."""
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def write_atomic(path, content):
    """A kill at any moment leaves the old file or the new one, never a part of either. Of a link, what it names is written."""
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device, which a file would take the place of
        path.write_bytes(content)
        return
    path = pathlib.Path(os.path.realpath(path))
    # A name of its own, so that of two writers neither replaces the file by a part of the other's.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_partials(path):
    """What `write_atomic` of this path left where it was killed."""
    path = pathlib.Path(os.path.realpath(path))
    for partial in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.partial"):
        partial.unlink(missing_ok=True)
