"""A GPU in name only: CUDA code runs on a machine without one, on tensors that have shapes and no contents.

PyTorch's fake tensors (torch._subclasses.fake_tensor) do the work. A CPU build of PyTorch needs three things
more: the shim in cuda_shim.cpp, preloaded, so that autograd finds a device; answers for what code asks of
torch.cuda; and a value wherever the host waits for the device, which is also where such waits are counted.
"""

import os
import subprocess
import sys
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]

H100 = types.SimpleNamespace(  # what Inductor and the planner ask of a device
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=85 * 10**9,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


def preload() -> None:
    """Start this process anew with the shim in it, built first if need be; SystemExit without a compiler."""
    shim = ROOT / "build" / f"cuda_shim-{torch.__version__}.so"
    if str(shim) in os.environ.get("LD_PRELOAD", ""):
        return
    source = ROOT / "tools" / "cuda_shim.cpp"
    if not shim.exists() or shim.stat().st_mtime < source.stat().st_mtime:
        shim.parent.mkdir(exist_ok=True)
        partial = shim.with_suffix(f".{os.getpid()}")
        home = Path(torch.__file__).parent
        link = [f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-ltorch_cpu", "-lc10"]
        command = [
            "g++",
            "-shared",
            "-fPIC",
            "-std=c++20",
            f"-I{home}/include",
            str(source),
            *link,
            "-o",
            str(partial),
        ]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit(
                "the rehearsal needs a C++ compiler, g++: install it (Debian: apt install g++)"
            ) from None
        partial.replace(shim)
    words = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, words, os.environ | {"LD_PRELOAD": str(shim)})


class HostWaits(TorchDispatchMode):
    """Counts where the host waits for the device or copies to it, and answers with made-up values.

    ``counts`` has a line for each kind and place, such as ``item aymen_gpt/training/optim.py:67``. Asynchronous
    copies to the device are counted as 'async copy', they wait for nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def note(self, kind: str) -> None:
        for frame in reversed(traceback.extract_stack()):
            if frame.filename.startswith(str(ROOT)) and frame.filename != __file__:
                self.counts[f"{kind} {Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"] += 1
                return
        self.counts[kind] += 1

    def waits(self) -> int:
        return sum(n for what, n in self.counts.items() if not what.startswith("async copy"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        torch._C._set_only_lift_cpu_tensors(True)
        name = func.overloadpacket.__name__
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None:
            return func(*args, **kwargs)
        on_gpu, target = first.device.type == "cuda", kwargs.get("device")
        if name == "_local_scalar_dense" and on_gpu:
            self.note("item")
            return True if first.dtype == torch.bool else 1.0 if first.dtype.is_floating_point else 1
        if name == "nonzero" and on_gpu:
            self.note("nonzero")
            return first.new_empty((1, first.dim()), dtype=torch.int64)
        if name == "_to_copy" and target is not None and (torch.device(target).type == "cuda") != on_gpu:
            if on_gpu:
                self.note("copy to the host")
                with fake_tensor.unset_fake_temporarily():
                    return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            self.note("async copy" if kwargs.get("non_blocking") else "copy to the device")
        if name == "copy_" and on_gpu and args[1].device.type == "cpu" and args[1].dim():
            self.note("copy to the device")
        return func(*args, **kwargs)


def _module_to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(p.detach().to(*args, **kwargs), p.requires_grad)
    return module


def _on_the_host(method: Any) -> Any:
    """A method of tensors on the host, such as numpy, that fake tensors keep from their contents."""

    def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        with fake_tensor.unset_fake_temporarily():
            return method(tensor, *args, **kwargs)

    return run


class _HostGenerator(torch.Generator):
    """A generator on the host, whatever device is asked for: fake tensors draw no numbers."""

    def __new__(cls, device: object = None) -> "_HostGenerator":
        return super().__new__(cls)


_sdpa = F.scaled_dot_product_attention


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What SDPA picks on a GPU, since its own choice asks the device."""
    if q.device.type != "cuda":
        return _sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        if torch.backends.cuda.cudnn_sdp_enabled():
            raise RuntimeError("cuDNN may take attention with a mask, and build a plan for each of its shapes")
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(q.size(0), q.size(1), q.size(2), k.size(2))
    of = torch.ops.aten._scaled_dot_product_efficient_attention
    return of(q, k, v, bias, q.requires_grad, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def pretended_gpu(count_waits: bool = True) -> Iterator[HostWaits]:
    """Inside, torch has one H100 and every tensor is fake. Needs ``preload`` first."""
    waits = HostWaits()
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: H100.name,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: waits.note("synchronize"),
        "mem_get_info": lambda device=None: (80 * 10**9, H100.total_memory),
        "max_memory_allocated": lambda device=None: 1,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for owner, name, value in (
            (fake_tensor, "init_gpu_context", lambda *args: None),
            (FakeTensorMode, "avoid_device_init", True),
            (torch, "Generator", _HostGenerator),
            (torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode)),  # fakes know no inference
            (Tensor, "numpy", _on_the_host(Tensor.numpy)),
            (Tensor, "tolist", _on_the_host(Tensor.tolist)),
            (Tensor, "pin_memory", lambda tensor, *args: tensor),
            (torch.nn.Module, "to", _module_to),
            (F, "scaled_dot_product_attention", _attention),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if count_waits:
            stack.enter_context(waits)
        yield waits
