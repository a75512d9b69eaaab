"""python -m bench tune: times the kernels with other sizes of their tiles, and writes the fastest to csrc/tiles.h.

Each size in turn, the rest as the header has them: the sources that read it are compiled for this processor once for every value
tried, the results are loaded beside each other, and they take turns in one process on cases of this suite. What is compiled is
kept in build/tune, so that `--build`, which only compiles, leaves a quiet machine to the run after it.
"""

import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import math
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax
import pybind11

from bench import attention, cross_entropy, harness, lm_head, machine, report, unmask
from bench.harness import OURS, Contender, Patched
from dlm_kernels import cpu_kernels

SOURCES = machine.ROOT / "csrc"
HEADER = SOURCES / "tiles.h"
# What a value must save to replace the one that is there: less is noise.
LEAST_GAIN = 0.02


@dataclasses.dataclass(frozen=True)
class Size:
    about: str  # its comment in the header
    tried: tuple[int, ...]
    sources: tuple[str, ...]  # of csrc/: what its cases run of those that read it
    cases: Callable  # () -> the cases that choose it


def _attention():
    return [attention.case("LLaDA-8B", t, s, "bfloat16") for t, s in ((512, 1024), (32, 2048))] + [
        attention.case("MDLM", 1024, 1024, "float32"),
        attention.case("SDAR-4B", 128, 1024, "bfloat16", "block-causal 32"),
    ]


def _backward():
    shapes = ("MDLM", 512, "float32"), ("LLaDA-8B", 256, "bfloat16")
    return [attention.case(model, t, t, dtype, backward=True) for model, t, dtype in shapes]


def _head():
    return [
        lm_head.case("LLaDA-8B slice", 128, 4096, 8192, "bfloat16"),
        lm_head.case("MDLM slice", 256, 768, 16384, "float32"),
        lm_head.case("SDAR-4B slice", 32, 2560, 16384, "bfloat16"),
        cross_entropy.case("MDLM slice", 512, 768, 8192, "float32", 0.5, backward=True),
    ]


def _scores():
    return [unmask.case("LLaDA-8B", 32, 126464, kind) for kind in ("float32", "bfloat16")] + [
        unmask.case("LLaDA-8B", 32, 126464, temperature=1.0, ranked=True)
    ]


# In the order in which they are chosen.
SIZES = {
    "kAttentionKeys": Size("Attention: keys of a tile", (96, 144, 192, 288), ("attention",), _attention),
    "kAttentionPanels": Size("Attention: panels of query rows that share a tile of keys", (4, 8, 12), ("attention",), _attention),
    "kBackwardRows": Size("Its gradient: query rows of a tile", (48, 96, 144, 192), ("attention_backward",), _backward),
    "kBackwardKeys": Size("Its gradient: keys of a tile", (64, 128, 192), ("attention_backward",), _backward),
    "kHeadRows": Size("LM head: rows of a block", (96, 192, 288), ("lm_head", "cross_entropy"), _head),
    "kHeadColumns": Size("LM head: tokens of a tile", (64, 128, 256), ("lm_head", "cross_entropy"), _head),
    "kHeadDepth": Size("LM head: elements along the width, at once", (64, 128, 256, 512), ("lm_head", "cross_entropy"), _head),
    "kScorePiece": Size("Scores: logits of a row that one sum goes through", (4096, 16384, 65536, 131072), ("unmask",), _scores),
}


def values(text):
    """{name: value} of a header."""
    return {name: int(value) for name, value in re.findall(r"constexpr int64_t (\w+) = (\d+);", text)}


def measured(text):
    """{name: {value tried: its time over that of the value taken}} of a header."""
    lines = re.findall(r"^(// .*)\nconstexpr int64_t (\w+)", text, re.MULTILINE)
    return {name: {int(value): float(time) for value, time in re.findall(r"(\d+): (\d+\.\d\d)", about)} for about, name in lines}


def machine_of(text):
    return re.search(r"^// on (.*)\.$", text, re.MULTILINE)[1]


def header(chosen, measured, machine_name):
    """The header of the values `chosen`, from which `values`, `measured` and `machine_of` read what it was made of."""
    lines = [
        "// Sizes of tiles. Written by `python -m bench tune`, which timed the values in each comment, relative to the one taken,",
        f"// on {machine_name}.",
        *("#pragma once", "", "#include <cstdint>", "", "namespace dlm::tiles {", ""),
    ]
    for name, size in SIZES.items():
        times = ", ".join(f"{value}: {time:.2f}" for value, time in sorted(measured.get(name, {}).items()))
        lines += [f"// {size.about}. {times or 'Not measured'}.", f"constexpr int64_t {name} = {chosen[name]};"]
    return "\n".join([*lines, "", "}  // namespace dlm::tiles", ""])


def run(only=None, compile_only=False):
    """Tunes the sizes whose names contain `only`, all without it, and writes the header; the kernels are to be built anew."""
    text = HEADER.read_text()
    present, times_of = values(text), measured(text)
    if not any((only or "").lower() in name.lower() for name in SIZES):
        raise report.Unusable(f"--only: expected a part of one of {', '.join(SIZES)}, got {only!r}")
    chosen, build = dict(present), Build(machine.ROOT / "build" / "tune")
    for name, size in SIZES.items():
        if (only or "").lower() not in name.lower():
            continue
        paths = {value: build.extension(present | {name: value}, size.sources) for value in sorted({*size.tried, present[name]})}
        if compile_only:
            continue
        times = relative_times(paths, present[name], name, size)
        best = min(times, key=times.get)
        if times[best] < 1 - LEAST_GAIN:
            chosen[name] = best
        times_of[name] = {value: time / times[chosen[name]] for value, time in times.items()}
        print(f"{name}: {chosen[name]}, of {times_of[name]}", flush=True)
        HEADER.write_text(header(chosen, times_of, machine.device_name()))
    print(HEADER)


def relative_times(paths, present, name, size):
    """{value: time over that of the value `present`, the geometric mean over the size's cases}; paths: {value: extension}."""
    prefixes = {value: register(load(path), f"tune_{name}_{value}_") for value, path in paths.items()}
    logs = {value: [] for value in paths}
    for case in size.cases():
        ours = case.contenders[OURS]
        contenders = {
            value: Contender(Patched(ours.function, cpu_kernels, "TARGETS", prefix), ours.prepare)
            for value, prefix in prefixes.items()
        }
        row = harness.measure(dataclasses.replace(case, contenders=contenders), seconds=2.0)
        for value, result in row["contenders"].items():
            if "missing" in result:
                raise RuntimeError(f"{name} = {value}: {case.operation}, {case.name}: {result['missing']}")
            ratios = [a / b for a, b in zip(result["times"], row["contenders"][present]["times"])]
            logs[value].append(math.log(statistics.median(ratios)))
    return {value: math.exp(statistics.fmean(each)) for value, each in logs.items()}


def load(path):
    name = f"tune_{path.parent.name}._cpu"  # a name of its own, or pybind11 would give the module that it knows by it
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def register(module, prefix):
    for name, handler in module.ffi_handlers().items():
        jax.ffi.register_ffi_target(prefix + name, handler, platform="cpu")
    return prefix


class Build:
    """csrc/ compiled for this processor's instruction set alone."""

    def __init__(self, folder):
        self.folder, self.isa = folder, cpu_kernels.isa()
        with mock.patch("setuptools.setup"):
            settings = runpy.run_path(str(machine.ROOT / "setup.py"))
        self.names = [*settings["KERNELS"], *settings["COMMON"]]
        paths = (jax.ffi.include_dir(), pybind11.get_include(), sysconfig.get_path("include"))
        self.compiler = shlex.split(sysconfig.get_config_var("CXX")) + [
            *settings["FLAGS"],
            *settings["INSTRUCTION_SETS"].get(self.isa, []),
            f"-DDLM_ISA={self.isa}",
            "-fPIC",
            *(flag for path in paths for flag in ("-isystem", path)),
        ]
        self.present = self._copy(values(HEADER.read_text()))

    def extension(self, sizes, sources):
        """The path of the extension with the sizes `sizes`, which differ from the header's in what `sources` read."""
        changed = self._copy(sizes)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda name: self._object(changed if name in sources else self.present, name), self.names))
        path = changed / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not path.exists():
            link = shlex.split(sysconfig.get_config_var("LDCXXSHARED"))
            subprocess.run([*link, "-o", path, *objects], check=True)
        return path

    def _copy(self, sizes):
        """csrc/ with the header of `sizes`, in a folder named by its contents."""
        texts = {path.name: path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cc", ".h")}
        texts |= {"tiles.h": header(sizes, {}, "trial")}
        folder = self.folder / hashlib.sha256(repr((texts, self.compiler)).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        return folder

    def _object(self, folder, name):
        path = folder / f"{name}.o"
        if not path.exists():
            part = path.with_suffix(".part")
            subprocess.run([*self.compiler, "-c", folder / f"{name}.cc", "-o", part], check=True)
            os.replace(part, path)
        return path
