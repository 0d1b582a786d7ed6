"""``python -m tests.model.compile_kernels 80 90``: the kernels for GPUs as machine code, which needs no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lapse_elmo.model import pointwise_triton

# Of each kernel: its pointers, to what is stored (s) or wide (w), and the constant that says whether there is one more.
KERNELS = {"_cell_forward": ("swwws", "HAS_PREVIOUS"), "_cell_backward": ("swwssw", "HAS_PREVIOUS")}
KERNELS |= {"_clip_forward": ("sw", "HAS_MASK"), "_clip_backward": ("sssw", "HAS_MASK")}
STORAGES = {"fp32": ("fp32", tl.float32), "bf16": ("fp32", tl.float32), "fp64": ("fp64", tl.float64)}


def sources(name: str) -> Iterator[ASTSource]:
    """Yield the source of a kernel for every storage dtype, with and without its optional arguments."""
    kernel, (pointers, option) = getattr(pointwise_triton, name), KERNELS[name]
    for storage, (wide, dtype) in STORAGES.items():
        for there in (False, True):
            constants = {"CLIP": 3.0, "HAS_CLIP": there, option: there, "WIDE": dtype, "BLOCK": pointwise_triton._BLOCK}
            types = iter([f"*{storage if kind == 's' else wide}" for kind in pointers] + ["i32"])
            signature = {n: "constexpr" if n in constants else next(types) for n in kernel.arg_names}
            yield ASTSource(fn=kernel, signature=signature, constexprs=constants)


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for name in KERNELS:
            for source in sources(name):
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                print(capability, name, source.signature["gates" if "gates" in source.signature else "hidden"],
                      len(compiled.asm["cubin"]))
