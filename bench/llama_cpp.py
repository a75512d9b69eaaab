"""llama.cpp's diffusion example, `llama-diffusion-cli` from its `examples/diffusion`, on a GGUF file of a case's own weights.

It is built with `cmake -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --target llama-diffusion-cli` and found on the
path, or where LLAMA_DIFFUSION_CLI says.
"""

import atexit
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from bench import machine
from bench.harness import Contender, Timed
from dlm_kernels.denoiser import sampler

# The vocabulary: token i is written as this character and the i-th after it, so that text in and out is tokens.
FIRST_CHARACTER = 0x20000
# Between writing a model and running it: layers' names there and here; theirs are [out, in].
LAYER = {"attn_q": "query", "attn_k": "key", "attn_v": "value", "attn_output": "out"}
LAYER |= {"ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}


def program():
    return os.environ.get("LLAMA_DIFFUSION_CLI") or shutil.which("llama-diffusion-cli")


@functools.cache
def version():
    """The build's number and commit; None where there is no program, or it does not say."""
    if program() is None:
        return None
    made = subprocess.run([program(), "--version"], capture_output=True, text=True)
    found = re.search(r"^version: (.*)$", made.stdout + made.stderr, re.MULTILINE)
    return found and found[1]


def why_missing():
    if program() is None:
        return "llama-diffusion-cli is not on the path, nor named by LLAMA_DIFFUSION_CLI"
    return machine.why_missing("gguf")


def peer(config, *, length, block, steps):
    """[1, P] -> [1, P + length]: `steps` passes over the whole text in each block, as LLaDA's own sampler.

    It times itself, without its start. Tokens are its greedy ones, but all equally sure, as its sampler has it: so which are
    written first differs, and what is compared with ours is one pass that writes all of a block.
    """

    def prepare(params, given):
        path, prompt = write(config, params), np.asarray(given)
        options = (path, prompt, block)
        canvas = np.pad(prompt, ((0, 0), (0, block)), constant_values=config.mask_id)
        expected = sampler.decode(config, params, canvas, first=prompt.shape[1], block=block, steps=1, implementation="xla").tokens
        tokens, _ = run(*options, block, 1)
        return *options, float(np.mean(tokens != np.asarray(expected)[0, prompt.shape[1] :]))

    def generate(path, prompt, block, error):
        return Timed(run(path, prompt, block, length, steps)[1], error)

    return Contender(generate, prepare, missing=why_missing())


def run(path, prompt, block, length, steps):
    """(the tokens written, seconds). prompt: int [1, P]."""
    size = prompt.shape[1] + length
    # One block may as well be as long as the text. Of several those that the prompt fills are empty, and take a pass each.
    block = size if block == length else block
    text = "".join(chr(FIRST_CHARACTER + token) for token in prompt[0])
    options = ["-ub", size, "-b", size, "-c", size, "--diffusion-block-length", block, "--diffusion-steps", steps * (size // block)]
    # With --temp 0 alone it would draw from the 40 most likely tokens.
    command = [program(), "-m", path, "-p", text, "--temp", 0, "--top-k", 1, *options]
    # What it says last, the text, is lost in about half of all runs: it may exit before its log is written.
    for _ in range(20):
        made = subprocess.run([str(each) for each in command], capture_output=True, text=True)
        said = made.stdout + made.stderr
        time = re.search(r"total time: ([\d.]+)ms", said)
        tokens = [ord(each) - FIRST_CHARACTER for each in said if ord(each) >= FIRST_CHARACTER]
        if made.returncode == 0 and time and len(tokens) >= length:
            return np.array(tokens[-length:]), float(time[1]) / 1000
        if made.returncode:
            break
    raise RuntimeError(f"llama-diffusion-cli ended with {made.returncode}: {said.strip()[-300:]}")


@functools.cache
def folder(size):
    """For a file of `size` bytes: in memory where twice that is free, for a disk may take longer than all else in the case."""
    memory = Path("/dev/shm")
    free = memory.is_dir() and min(shutil.disk_usage(memory).free, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    made = tempfile.TemporaryDirectory(dir=memory if free > 2 * size else None)
    atexit.register(made.cleanup)
    return Path(made.name)


def write(config, params):
    """A GGUF file of LLaDA's architecture, in float32 or bfloat16 as the parameters; the one of before is gone."""
    import gguf

    path, c = folder(sum(array.nbytes for array in params.values())) / "llada.gguf", config
    path.unlink(missing_ok=True)
    writer = gguf.GGUFWriter(path, "llada")
    writer.add_context_length(4096)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_dimension_count(c.head_size)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(False)
    writer.add_vocab_size(c.vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([chr(FIRST_CHARACTER + i) for i in range(c.vocab)])
    writer.add_token_scores([0.0] * c.vocab)
    writer.add_token_types([gguf.TokenType.NORMAL] * c.vocab)
    writer.add_mask_token_id(c.mask_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

    def add(name, array):
        array = np.asarray(array)
        if array.dtype == np.float32 or array.ndim == 1:  # norms are always float32
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
        else:
            bits = np.ascontiguousarray(array).view(np.uint8)
            writer.add_tensor(name, bits, raw_shape=bits.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd.weight", params["embed"])
    add("output.weight", params["embed" if c.tie_embeddings else "head"])
    add("output_norm.weight", params["final_norm"])
    for i in range(c.layers):
        for norm in ("attention", "ffn"):
            add(f"blk.{i}.{norm.replace('attention', 'attn')}_norm.weight", params[f"layers.{i}.{norm}_norm"])
        for theirs, ours in LAYER.items():
            matrix = params[f"layers.{i}.{ours}"].T  # of JAX, which transposes several times as fast as NumPy
            if ours in ("query", "key"):
                # RoPE there rotates neighbours; here the first half of a head with the second.
                halves = matrix.reshape(-1, 2, c.head_size // 2, c.d_model)
                matrix = halves.swapaxes(1, 2).reshape(matrix.shape)
            add(f"blk.{i}.{theirs}.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
