"""What to compute on, in which precision, chosen once at the start of a command."""

import os
import platform
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from aymen_gpt.errors import UsageError, nearest

# Of kinds of GPU, from their makers' data sheets: dense bf16 peak in TFLOP/s and memory in GB. The first name that
# a device's name has as whole words counts.
KINDS = {
    "B200": (2250, 180),
    "GH200": (989, 96),
    "H200": (989, 141),
    "H100 NVL": (835, 94),
    "H100 PCIe": (756, 80),
    "H100": (989, 80),
    "H800": (989, 80),
    "A100": (312, 80),
    "A800": (312, 80),
    "L40S": (362, 48),
    "L40": (181, 48),
    "L4": (121, 24),
    "A10G": (70, 24),
    "A10": (125, 24),
    "RTX 5090": (209, 32),
    "RTX 4090": (165, 24),
    "RTX 3090": (71, 24),
}


@dataclass(frozen=True)
class Device:
    """A torch device, the dtype that matrix products run in, and what a reader of the log wants to know."""

    place: torch.device
    dtype: torch.dtype
    name: str
    peak_flops: float | None

    def autocast(self, *, cache: bool = True) -> AbstractContextManager[object]:
        """Matrix products in ``dtype``; weights, softmax, norms and sums stay float32.

        ``cache`` keeps a copy in ``dtype`` of each weight to the end, as if all weights were to stay in memory.
        """
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.place.type, dtype=self.dtype, cache_enabled=cache)


def choose_device(name: str = "auto", dtype: str = "auto", local_rank: int = 0) -> Device:
    """The device of this process; UsageError when the one asked for is not there.

    ``name`` is auto (cuda, else mps, else cpu), cpu, mps, cuda or cuda:N; under torchrun each process takes the
    GPU of its local rank. ``dtype`` auto is bfloat16 where the hardware multiplies it fast, else float16 on CUDA
    (with a loss scale, see Trainer) and float32 elsewhere.
    """
    kind = name.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        name = kind
    if kind not in ("cpu", "mps", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, mps, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this machine has no CUDA device that torch can use; try --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has no Apple GPU that torch can use; try --device cpu")
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    if kind == "cuda":
        require_gpu(name, device.index)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    full_name = torch.cuda.get_device_name(device) if kind == "cuda" else cpu_name()
    return Device(device, _dtype(dtype, kind), full_name, peak_flops(full_name))


def require_gpu(name: str, index: int) -> None:
    """UsageError where this machine has no GPU of that number, or several processes would share one."""
    there, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name != "cuda" and processes > 1:
        raise UsageError(f"--device {name}: all {processes} processes would share one GPU; leave the number out")
    if index >= there and processes > 1:
        raise UsageError(f"{processes} processes and {there} GPUs on this machine: try --nproc_per_node={there}")
    if index >= there:
        raise UsageError(f"--device {name}: this machine has {there} GPUs, cuda:0 is the first")


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by its full name, None where it is not known.

    >>> peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops("NVIDIA RTX A1000")
    (312000000000000.0, None)
    """
    found = (teraflops for key, (teraflops, _) in KINDS.items() if re.search(rf"\b{key}\b", name))
    return next((1e12 * teraflops for teraflops in found), None)


def _dtype(name: str, kind: str) -> torch.dtype:
    """The dtype of a name; auto is the fastest that the hardware multiplies itself, not by emulation."""
    if name == "auto" and kind == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        fast = kind == "cpu" and re.search(r"\b(avx512_bf16|amx_bf16)\b", _cpu_info().get("flags", ""))
        name = "bfloat16" if fast else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {name}: expected auto, float32, bfloat16, float16")
    return getattr(torch, name)


def be_deterministic() -> None:
    """Ask torch for kernels that give the same bits on every run, before anything is computed.

    https://docs.pytorch.org/docs/stable/notes/randomness.html; a CPU needs none of it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed: in torch, in a library of CUDA's, or in host memory (Linux rather kills)."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in text
        for sign in ("out of memory", "can't allocate memory", "ALLOC_FAILED", "Failed to CUDA calloc")
    )


def is_compiler_failure(error: RuntimeError) -> bool:
    """Whether torch.compile gave up: no C compiler or Triton, or a GPU too old for it."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def forget_failed_try() -> None:
    """After a size that did not fit: free its memory, and do not count its programs towards compile's limit."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_elsewhere(name: str, dtype: str) -> tuple[Device, float]:
    """A device of one of the KINDS, to plan for, and its memory in GB; UsageError for another name."""
    known = {key.lower().replace(" ", "-"): key for key in KINDS}
    if name not in known:
        raise UsageError(f"--on {name}: expected {', '.join(known)}{nearest(name, known)}")
    teraflops, memory = KINDS[known[name]]
    chosen = _dtype("bfloat16" if dtype == "auto" else dtype, "cuda")
    return Device(torch.device("cuda"), chosen, known[name], 1e12 * teraflops), memory


def _cpu_info() -> dict[str, str]:
    """First processor of /proc/cpuinfo, {} where there is none (macOS, Windows)."""
    try:
        with open("/proc/cpuinfo") as f:
            lines = f.read().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def memory_gb() -> float | None:
    """Physical memory in GB, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return None


def memory_there(device: Device) -> float | None:
    """Memory for tensors in GB: the GPU's own, or the machine's."""
    if device.place.type == "cuda":
        return torch.cuda.mem_get_info(device.place)[1] / 1e9
    return memory_gb()


def peak_memory(place: torch.device) -> int:
    """The most bytes that tensors (CUDA) or the process (elsewhere) have taken so far."""
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place)
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        import resource  # Windows has neither

        # Where there is no /proc. On Linux ru_maxrss would be that of the parent, where it had taken more.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
