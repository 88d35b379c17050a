"""Kernels as compiled for GPUs that are not there: registers, spills and shared memory of each, by Triton's own ptxas.

    python -m tests.support.offline                              all steps, on an H100
    python -m tests.support.offline --gpu a100 --dtype float16   on an A100, of one dtype
    python -m tests.support.offline --step divergence --kernel pair_kernel --hidden 2560 --vocabulary 151936

The steps run on tensors without values, and each kernel is noted where Triton would compile it, with all that it would
compile it for; then it is compiled. Plans and tiles are those of the GPU, so what does not fit there shows here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from egrsd_kernels import Head, fused_egrsd_loss, linear_divergence, linear_logp, token_statistics
from egrsd_kernels.backends import EXTRAS, KINDS
from egrsd_kernels.backends import triton as kernels
from egrsd_kernels.backends.triton import common, tuning
from egrsd_kernels.backends.triton import divergence as pairs
from egrsd_kernels.backends.triton.divergence import chunk
from egrsd_kernels.rows import Rows
from tests.support import fake_gpu


class GPU(NamedTuple):
    arch: int
    multiprocessors: int
    shared: int
    """Bytes that a block can have."""


# By CUDA's table of compute capabilities.
GPUS = {
    "a100": GPU(80, 108, 163 << 10),
    "l40s": GPU(89, 142, 99 << 10),
    "h100": GPU(90, 132, 227 << 10),
    "b200": GPU(100, 148, 227 << 10),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Problem(NamedTuple):
    """What a step is taken of; ``bias``: with that and a softcap."""

    dtype: str
    tma: bool
    hidden: int
    vocabulary: int
    bias: bool = False
    rows: int = 384


class Built(NamedTuple):
    """A kernel that was compiled; or ``error``, why it was not."""

    kernel: str
    options: str
    registers: int = 0
    spilled: int = 0
    """Bytes of a thread's stack."""
    shared: int = 0
    """Bytes of a block."""
    seconds: float = 0.0
    error: str = ""


class Noted(fake_gpu.Compiled):
    """Stands for a compiled kernel, and keeps what it would have been compiled from."""

    found: ClassVar[list[tuple[Any, dict[str, Any]]]] = []

    def __init__(self, source: Any, target: Any = None, options: Any = None, **_: Any):
        super().__init__(source)
        self.found.append((source, options))


compile_kernel = triton.compiler.compile


build_rows = kernels.build_rows


def rows_in_order(valid: torch.Tensor, active: torch.Tensor) -> Rows:
    """What no kernel has written is an index to PyTorch, too."""
    rows = build_rows(valid, active)
    torch.arange(len(rows.order), out=rows.order)
    return rows


def install(gpu: GPU) -> None:
    """For the rest of the process: Triton, and the package, find this GPU."""

    class Driver(fake_gpu.Driver):
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", gpu.arch, 32)

    fake_gpu.install()
    driver.set_active(Driver())
    triton.compiler.compile = Noted
    for module in (tuning, chunk):
        module.device_limits = lambda device: (gpu.multiprocessors, gpu.shared)
    pairs.takes_hidden = kernels.takes
    kernels.build_rows = rows_in_order
    common._knows_tma = lambda device: gpu.arch >= 90


# ---------------------------------------------------------------------------------------------------------- the steps


def operands(p: Problem) -> dict[str, Any]:
    dtype = DTYPES[p.dtype]
    return {
        "hidden": torch.zeros(p.rows, p.hidden, dtype=dtype).requires_grad_(),
        "teacher_hidden": torch.zeros(p.rows, p.hidden, dtype=dtype),
        # Nothing reads it, so it takes no memory.
        "weight": torch.empty(p.vocabulary, p.hidden, dtype=dtype),
        "bias": torch.zeros(p.vocabulary, dtype=dtype) if p.bias else None,
        "target_ids": torch.zeros(p.rows, dtype=torch.long),
        "softcap": 30.0 if p.bias else None,
    }


def heads(x: dict[str, Any]) -> Iterator[Head]:
    """Frozen, and trained."""
    for trained in (False, True):
        weight, bias = (None if y is None else y.detach().requires_grad_(trained) for y in (x["weight"], x["bias"]))
        yield Head(weight, bias, softcap=x["softcap"])


def loss(p: Problem) -> None:
    x, advantages = operands(p), torch.ones(p.rows)
    for head, mode in itertools.product(heads(x), ("exact", "sparse")):
        fused_egrsd_loss(
            x["hidden"], head.weight, x["teacher_hidden"], x["target_ids"], advantages, student_bias=head.bias,
            softcap=head.softcap, lookahead=3, grad_mode=mode, backend="triton",
        ).backward()  # fmt: skip


def logp(p: Problem) -> None:
    x = operands(p)
    for head, keep_bytes in itertools.product(heads(x), (0, 1 << 30)):
        options = {"return_entropy": True, "entropy_grad": True, "keep_bytes": keep_bytes, "backend": "triton"}
        sum(y.sum() for y in linear_logp(x["hidden"], head, x["target_ids"], **options)).backward()
        linear_logp(x["hidden"], head, x["target_ids"], keep_bytes=keep_bytes, backend="triton").sum().backward()


def statistics(p: Problem) -> None:
    x = operands(p)
    for head in heads(x):
        for extras in ((), EXTRAS):
            options = {"bias": head.bias, "softcap": head.softcap, "extras": extras, "backend": "triton"}
            token_statistics(x["hidden"], head.weight, x["target_ids"], **options)
        linear_logp(x["hidden"], head, x["target_ids"], extras=EXTRAS, backend="triton")


def divergence(p: Problem) -> None:
    """Of one head for both models, and of two."""
    x = operands(p)
    for kind, head in itertools.product(KINDS, heads(x)):
        for weight in (head.weight.detach(), torch.empty_like(x["weight"])):
            teacher = Head(weight, None if head.bias is None else head.bias.detach(), softcap=head.softcap)
            linear_divergence(
                x["hidden"], head, x["teacher_hidden"], teacher, kind=kind, target_ids=x["target_ids"],
                return_stats=True, backend="triton",
            ).divergence.sum().backward()  # fmt: skip


STEPS: dict[str, Callable[[Problem], None]] = {
    "loss": loss, "logp": logp, "statistics": statistics, "divergence": divergence,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- compiling


def noted(problem: Problem, steps: list[str]) -> list[tuple[Any, dict[str, Any]]]:
    """What Triton would compile for these steps, and has not been asked for before in this process."""
    os.environ["EGRSD_KERNELS_TMA"] = "1" if problem.tma else "0"
    Noted.found.clear()
    for name in steps:
        STEPS[name](problem)
    return list(Noted.found)


def described(source: Any, options: dict[str, Any]) -> str:
    """The operands' dtype, the tile with warps and stages, and the constants that are set."""
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    tile = [str(constants.pop(name)) for name in ("ROWS", "COLS", "DEPTH") if name in constants]
    types = [str(x) for x in source.signature.values()]
    dtype = next((name for name in ("bf16", "fp16") if any(name in x for x in types)), "fp32")
    chosen = [
        name if value is True else f"{name}={value}"
        for name, value in constants.items()
        if name.isupper() and value not in (False, None) and name not in ("GROUP", "PROGRAMS", "PRECISION")
    ]
    tiles = "x".join(tile) + " " if tile else ""
    return f"{dtype} {tiles}warps={options['num_warps']} stages={options['num_stages']} {' '.join(chosen)}"


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and others of a kernel, as cuobjdump counts them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", printed)}


def build(gpu: GPU, source: Any, options: dict[str, Any]) -> Built:
    name, what, start = source.fn.fn.__name__, described(source, options), time.perf_counter()
    try:
        made = compile_kernel(source, target=GPUTarget("cuda", gpu.arch, 32), options=options)
    except Exception as error:
        return Built(name, what, error=f"{type(error).__name__}: {error}")
    used = resources(made.asm["cubin"])
    return Built(name, what, used["REG"], used["STACK"], made.metadata.shared, time.perf_counter() - start)


def built(gpu: str, problems: list[Problem], steps: list[str], kernel: str = "") -> Iterator[Built]:
    """All kernels of these steps whose name the pattern is found in."""
    install(GPUS[gpu])
    sources = [x for problem in problems for x in noted(problem, steps) if re.search(kernel, x[0].fn.fn.__name__)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda x: build(GPUS[gpu], *x), sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=list(DTYPES))
    parser.add_argument("--family", choices=["tma", "pointer"], nargs="*", default=["tma", "pointer"])
    parser.add_argument("--step", choices=STEPS, nargs="*", default=list(STEPS))
    parser.add_argument("--hidden", type=int, nargs="*", default=[4096])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--bias", action="store_true", help="with a bias and a softcap")
    parser.add_argument("--kernel", default="", help="a pattern of names")
    parser.add_argument("--json", action="store_true", help="a JSON object for each kernel")
    args = parser.parse_args()
    families = [name == "tma" for name in args.family if name == "pointer" or GPUS[args.gpu].arch >= 90]
    problems = [
        Problem(dtype, tma, hidden, args.vocabulary, args.bias, args.rows)
        for dtype, tma, hidden in itertools.product(args.dtype, families, args.hidden)
    ]
    if not args.json:
        print(f"triton {triton.__version__}, {args.gpu}: registers, bytes of stack and of shared memory, seconds")
    for one in built(args.gpu, problems, args.step, args.kernel):
        if args.json:
            print(json.dumps(one._asdict()), flush=True)
        else:
            used = f"{one.registers:3} {one.spilled:4} {one.shared:6} {one.seconds:4.1f}"
            print(f"{one.kernel:26} {used}  {one.options} {one.error}", flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 compiles nothing")
    main()
