"""The shape of a denoiser: everything that its parameters' shapes and its forward pass depend on."""

import dataclasses
from typing import ClassVar

from dlm_kernels.denoiser import limits
from dlm_kernels.denoiser.experts import Experts, together


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """A LLaDA-shaped Transformer, bidirectional over all or by blocks. Frozen: it can be a static argument of a jitted function."""

    layers: int = 6
    d_model: int = 256
    heads: int = 4
    kv_heads: int = 2  # divides heads: query head n reads kv head n // (heads // kv_heads)
    head_size: int = 64
    ffn: int = 704  # width inside SwiGLU
    vocab: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    qk_norm: bool = True  # RMSNorm of each query and key head, before RoPE
    qkv_bias: bool = False
    tie_embeddings: bool = True
    self_conditioning: bool = False  # has learnt to read the soft embedding of the pass before, see `model.self_conditioned`
    shifted: bool = False  # the state of position i - 1 predicts token i, as Dream's does; position 0 its own
    block_size: int | None = None  # attends to its own block of so many positions, counted from 0, and those before; None: to all
    pad_id: int = 0
    eos_id: int = 1
    mask_id: int = 2
    rotary_size: int | None = None  # RoPE turns so many of the head_size, the first ones; None: all
    experts: Experts | None = None  # in the place of the SwiGLU
    threshold: float = 0.85  # above which a model with a block_size is decoded by default
    ends: tuple[int, ...] = ()  # ids that end a text beside eos_id
    delete_id: int | None = None  # by which a model that has learnt it says that a token is one too many
    insert_id: int | None = None  # that one is missing before it

    learnt_masks: ClassVar[bool] = True

    def __post_init__(self):
        sizes = ("layers", "d_model", "heads", "kv_heads", "head_size", "ffn", "vocab")
        limits.counts(**{name: getattr(self, name) for name in sizes})
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads {self.heads}, got {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size: expected an even number, for RoPE, got {self.head_size}")
        if self.rotary_size is not None:
            limits.counts(rotary_size=self.rotary_size)
            if self.rotary_size % 2 or self.rotary_size > self.head_size:
                raise ValueError(f"rotary_size: expected an even number up to head_size {self.head_size}, got {self.rotary_size}")
        if self.block_size is not None:
            limits.counts(block_size=self.block_size)
        limits.numbers(1, rope_theta=self.rope_theta)
        limits.numbers(0, rms_norm_eps=self.rms_norm_eps, threshold=self.threshold)
        for name in ("rope_theta", "rms_norm_eps", "threshold"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name}: expected a number, got {getattr(self, name)!r}")
        for name in ("qk_norm", "qkv_bias", "tie_embeddings", "self_conditioning", "shifted"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        for name in ("pad_id", "eos_id", "mask_id"):
            limits.counts(0, **{name: getattr(self, name)})
            if not getattr(self, name) < self.vocab:
                raise ValueError(f"{name}: expected an id in [0, {self.vocab}), got {getattr(self, name)}")
        limits.ids(self.vocab, ends=self.ends)
        if (self.delete_id is None) != (self.insert_id is None):
            raise ValueError(f"delete_id, insert_id: expected both or neither, got {self.delete_id}, {self.insert_id}")
        if self.delete_id is not None:
            limits.ids(self.vocab, delete_id=[self.delete_id], insert_id=[self.insert_id])
        if together(self.experts) and self.block_size is None:
            raise ValueError("experts.capacity: expected a block_size, whose tokens choose experts together, got None")
        if self.mask_id in (self.pad_id, self.eos_id):
            raise ValueError(f"mask_id: expected another id than pad_id and eos_id, got {self.mask_id}")

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        if values.get("experts") is not None:
            values = values | {"experts": _fields(Experts, "config: experts", values["experts"])}
        if isinstance(values.get("ends"), list):
            values = values | {"ends": tuple(values["ends"])}
        return _fields(cls, "config", values)


def _fields(kind, name, values):
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(values, dict) or values.keys() - known:
        got = sorted(values.keys() - known) if isinstance(values, dict) else values
        raise ValueError(f"{name}: expected the fields {sorted(known)}, got also {got}")
    return kind(**values)
