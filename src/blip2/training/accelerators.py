"""What the processors that a run may be planned for can do: memory, and products a second without sparsity.

The figures are the makers' data sheets'; of the processor of this computer they are measured.
"""

import os
import time
from dataclasses import dataclass

import torch

from blip2.errors import BadRecipe


@dataclass(frozen=True)
class Accelerator:
    """A processor.

    Attributes:
        name: as `--gpu` takes it.
        title: as people call it.
        memory_bytes: what programs can have of it.
        bfloat16_flops: floating-point operations a second in bfloat16 with float32 sums; None: it has no such units.
        float32_flops: the same in float32, without TF32.
    """

    name: str
    title: str
    memory_bytes: float
    bfloat16_flops: float | None
    float32_flops: float

    @property
    def is_gpu(self) -> bool:
        """Whether this is something other than the computer's own processor."""
        return self.name != "cpu"

    def precision(self, asked: str) -> str:
        """What "auto" means there: bfloat16 where there are units for it, else float32."""
        if asked != "auto":
            return asked
        return "bfloat16" if self.bfloat16_flops else "float32"

    def flops(self, precision: str) -> float:
        """Operations a second in that arithmetic; bfloat16 without units for it runs no faster than float32."""
        return (self.bfloat16_flops or self.float32_flops) if precision == "bfloat16" else self.float32_flops


GIB = 2**30
TERA = 1e12

# Memory as nvidia-smi or PyTorch tells it (an H200 of "141 GB" has 139.8 GiB).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Accelerator("a100-40g", "A100 40 GB", 39.4 * GIB, 312 * TERA, 19.5 * TERA),
        Accelerator("a100-80g", "A100 80 GB", 79.2 * GIB, 312 * TERA, 19.5 * TERA),
        Accelerator("h100", "H100 SXM 80 GB", 79.2 * GIB, 989 * TERA, 67 * TERA),
        Accelerator("h200", "H200 SXM 141 GB", 139.8 * GIB, 989 * TERA, 67 * TERA),
        Accelerator("b200", "B200 SXM 180 GB", 178.4 * GIB, 2250 * TERA, 75 * TERA),
        Accelerator("l40s", "L40S 48 GB", 44.4 * GIB, 362 * TERA, 91.6 * TERA),
        Accelerator("4090", "GeForce RTX 4090 24 GB", 23.5 * GIB, 165 * TERA, 82.6 * TERA),
        Accelerator("3090", "GeForce RTX 3090 24 GB", 23.6 * GIB, 71 * TERA, 35.6 * TERA),
        Accelerator("t4", "T4 16 GB", 14.6 * GIB, None, 8.1 * TERA),
    )
}
NAMES = (*GPUS, "cpu")
PROBE_WIDTH = 1024
PROBE_SECONDS = 0.4


def find(name: str) -> Accelerator:
    """The processor of that name; "cpu" is this computer's, measured now.

    Raises:
        BadRecipe: there is none.
    """
    if name == "cpu":
        return this_cpu()
    if name not in GPUS:
        raise BadRecipe(f"--gpu {name}: not a processor a plan knows. Known: {', '.join(NAMES)}.")
    return GPUS[name]


def this_cpu() -> Accelerator:
    """This computer's processor: its whole memory, and its rate of matrix products as measured in a second."""
    has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()  # as loop.resolve_precision
    return Accelerator(
        name="cpu",
        title=f"this computer, {torch.get_num_threads()} threads",
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        bfloat16_flops=measured_flops(torch.bfloat16) if has_units else None,
        float32_flops=measured_flops(torch.float32),
    )


def measured_flops(dtype: torch.dtype) -> float:
    """Operations a second of square matrix products here: the best of those that fit into 0.4 s, at least three."""
    one, other = torch.randn(2, PROBE_WIDTH, PROBE_WIDTH).to(dtype)
    best, begin, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - begin < PROBE_SECONDS:
        start = time.perf_counter()
        torch.mm(one, other)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2 * PROBE_WIDTH**3 / best
