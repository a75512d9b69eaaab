"""The same work on more processors, and over more devices: what each doubling saves."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench import apart, attention, end_to_end, harness, lm_head, machine, unmask

ON_CPU = machine.platform_name() == "cpu"


def processors(case, count):
    """`case` on `count` of the CPU's processors."""
    return dataclasses.replace(
        case,
        operation="scale",
        name=f"{case.operation}, {case.name}, {count} processor{'s' * (count > 1)}",
        contenders={name: case.contenders[name] for name in (harness.OURS, harness.PLAIN, "torch") if name in case.contenders},
        sweep=(f"processors: {case.operation}, {case.name}", count),
        apart=dict(processors=count),
        headline=False,
        quick=False,
    )


def devices(case, axes, count):
    """`case` over `count` devices: its contenders' i-th argument divided along axes[i], or whole on each where that is None; their
    outputs along axes[-1].
    """

    def mesh():
        if len(jax.devices()) < count:
            raise RuntimeError(f"there are {len(jax.devices())} devices")
        return Mesh(np.array(jax.devices()[:count]), ("devices",))

    def along(axis):
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "devices")

    def sharded(function):
        # The mesh is made where the devices are, in the process that measures.
        @jax.jit
        def run(*arrays):
            specs = tuple(map(along, axes[:-1]))
            over = functools.partial(jax.shard_map, mesh=mesh(), in_specs=specs, out_specs=along(axes[-1]), check_vma=False)
            return over(function)(*arrays)

        return run

    def placed(contender):
        def prepare(*inputs):
            arguments = zip(contender.prepare(*inputs), axes[:-1], strict=True)
            return tuple(jax.device_put(array, NamedSharding(mesh(), along(axis))) for array, axis in arguments)

        return dataclasses.replace(contender, function=sharded(contender.function), prepare=prepare)

    contenders = {name: placed(case.contenders[name]) for name in (harness.OURS, harness.PLAIN)}
    return dataclasses.replace(
        case,
        operation="scale",
        name=f"{case.operation}, {case.name}, {count} device{'s' * (count > 1)}",
        contenders=contenders,
        sweep=(f"devices: {case.operation}, {case.name}", count),
        apart=dict(devices=count) if ON_CPU else None,
        headline=False,
        quick=False,
    )


def doublings(most):
    """1, 2, 4, ... up to `most`, at most 8: each is a process of its own, and a curve needs no more."""
    return [n for n in (1, 2, 4, 8) if n <= most]


def cases():
    heads = attention.case("LLaDA-8B", 1024, 1024, "bfloat16")
    step = unmask.case("LLaDA-8B", 128, 126464)
    head = lm_head.case("MDLM", 256, 768, 50258, "float32")
    made = []
    if ON_CPU and apart.PROCESSORS:
        made += [processors(case, n) for case in (heads, step, head) for n in doublings(len(apart.PROCESSORS))]
    text = end_to_end.case("shipped", 64, 64, 32, 8, batch=8)
    # Heads of attention; rows of hidden states; texts of a batch, whose number of steps is for all.
    split = ((heads, (2, 2, 2, 2)), (head, (1, None, 1)), (text, (None, 0, None, 0)))
    many = max(2, len(machine.processors())) if ON_CPU else len(jax.devices())
    return made + [devices(case, axes, n) for case, axes in split for n in doublings(many)]
