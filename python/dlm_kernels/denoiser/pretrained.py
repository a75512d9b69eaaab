"""Published checkpoints, read from their own safetensors under their own names, as `architectures` has them."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors

from dlm_kernels.denoiser import architectures, gemma, model


def described(directory, config):
    """The config of a published checkpoint; config: its config.json. Raises ValueError for what is not computed here."""
    to_config, _ = architectures.of(config)
    told = _without_nulls(config)  # as which their classes write what is left to the default
    try:
        return to_config(told | told.get("rope_parameters", {}))  # where transformers 5 writes rope_theta
    except KeyError as error:
        raise ValueError(f"{directory}/config.json: expected {error}, got none") from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:  # of a value of another kind than is told of
        raise ValueError(f"{directory}/config.json: {error}") from None


def read_object(path):
    """The JSON object in a file."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {values!r}")
    return values


def _without_nulls(values):
    return {name: _without_nulls(x) if isinstance(x, dict) else x for name, x in values.items() if x is not None}


def load(directory, config, *, dtype=None):
    """The parameters of a published checkpoint, described as by `described`. `dtype` converts; None keeps what is stored, but for
    files of several dtypes, which come in the embedding's: all but the router, which computes in float32 and may be stored so.

    Reads one tensor at a time, from model.safetensors or from the shards that model.safetensors.index.json lists. Raises ValueError
    where the config does not fit, or a parameter is missing, unknown or of another shape.
    """
    directory, (_, names) = pathlib.Path(directory), architectures.of(config)
    ours = described(directory, config)
    shapes = (model if ours.learnt_masks else gemma).parameter_shapes(ours)
    theirs = {name: _their_names(names, ours, name) for name in shapes}
    (stored, tensor), params = _tensors(directory), {}
    # Some files hold the embedding once more as the head that it is, and the frequencies that follow from the config.
    beside = {names["head"], *(name for name in stored if name.endswith(".rotary_emb.inv_freq"))}
    if not ours.learnt_masks:
        beside |= _beside_the_decoder(ours, stored, tensor)
    unknown = sorted(stored - beside - {name for of_one in theirs.values() for name in of_one})
    if unknown:  # a bias, say, or one more layer, without which the model would be another
        raise ValueError(f"{directory}: expected what config.json tells of, got {len(unknown)} more, such as {unknown[0]}")
    for name, shape in shapes.items():
        arrays = [_own_rows(ours, one, name, tensor(one)) for one in theirs[name]]
        asked = dtype or (None if name.endswith(("embed", ".router", ".router_bias")) else params["embed"].dtype)
        array = jnp.asarray(np.stack(arrays) if arrays[0].ndim < len(shape) else arrays[0], asked)
        if name not in ("embed", "head") and array.ndim > 1:
            array = array.swapaxes(-1, -2)
        if array.shape != shape:
            raise ValueError(f"{directory}: {name}: expected shape {shape}, got {array.shape}")
        params[name] = array
    return params


def _their_names(names, config, name):
    """Of one of our parameters the names in their files: one, or that of every expert."""
    _, i, part = name.split(".") if name.startswith("layers.") else (None, None, name)
    many = range(config.experts.count if "{e}" in names[part] else 1)
    return [names[part].format(i=i, e=e) for e in many]


def _own_rows(config, theirs, name, array):
    """Of matrices that lie one below the other in one, the queries', keys' and values' or gate and up, that of `name`; else all."""
    if theirs.endswith(".query_key_value.weight"):
        queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
        rows = {"query": queries, "key": keys, "value": keys}
    elif theirs.endswith(".gate_up_proj"):
        rows = dict.fromkeys(("expert_gate", "expert_up"), config.experts.ffn)
    else:
        return array
    if array.shape[-2] != sum(rows.values()):
        raise ValueError(f"{theirs}: expected {' + '.join(map(str, rows.values()))} rows, got {array.shape[-2]}")
    parts = np.split(array, np.cumsum([*rows.values()])[:-1], axis=-2)
    return dict(zip(rows, parts))[name.split(".")[-1]]


def _beside_the_decoder(config, stored, tensor):
    """What a DiffusionGemma's files hold of its encoder: what reads images, and a number for each layer that it has twice."""
    twice = [architectures.GEMMA["scalar"].format(i=i) for i in range(config.layers)]
    of_encoder = {name.replace("model.decoder.", "model.encoder.language_model."): name for name in twice}
    for name, of_decoder in of_encoder.items():
        if name in stored and (its := tensor(name)) != (tied := tensor(of_decoder)):
            raise ValueError(f"{name}: expected {of_decoder}'s {tied}, with which it is tied here, got {its}")
    return of_encoder.keys() | {name for name in stored if name.startswith(architectures.GEMMA_VISION)}


def _tensors(directory):
    """All names, and a function from a name to its tensor, in whichever of the files it is; each is mapped once, not read."""
    index, files = directory / "model.safetensors.index.json", {}

    def opened(file):
        if file not in files:
            try:
                files[file] = safetensors.safe_open(directory / file, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{directory / file}: {error}") from None
        return files[file]

    if index.exists():
        where = read_object(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise ValueError(f"{index}: expected a weight_map from names to files, got {str(where)[:40]}")
    else:
        where = dict.fromkeys(opened("model.safetensors").keys(), "model.safetensors")

    def tensor(name):
        if name not in where or name not in opened(where[name]).keys():
            raise ValueError(f"{directory}: expected a parameter {name}, got none")
        return opened(where[name]).get_tensor(name)

    return where.keys(), tensor
