"""What torch.compile writes for a GPU that is not here: Inductor's Triton source, counted and compiled.

``programs`` takes a model's loss and its backward through Dynamo, AOTAutograd and Inductor for a pretended H100
and returns their source. ``Counted`` reads from a source what it launches, multiplies, moves and holds.
``kernels`` compiles every Triton kernel in it to machine code for a GPU's architecture. Needs the triton package,
which CPU builds of PyTorch lack (``pip install --no-deps triton==3.7.1``).
"""

import importlib.util
import itertools
import math
import os
import re
import tempfile
import types
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor
from torch import Tensor

from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.loss import linear_cross_entropy
from tools.pretend_cuda import H100, pretended_gpu


@contextmanager
def _triton_for(architecture: int) -> Iterator[None]:
    """Triton and Inductor believe in a GPU of this architecture, such as 90 for sm_90; kernels are not loaded."""
    import torch._inductor.compile_fx
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.scheduler
    import torch._inductor.utils
    import torch.utils._triton
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    class Driver:
        utils = types.SimpleNamespace(get_device_properties=lambda device: limits)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_device_interface(self) -> Any:
            return torch.cuda

        def get_benchmarker(self) -> None:
            return None

        def is_active(self) -> bool:
            return True

    triton.runtime.driver.set_active(Driver())
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any, **more: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, **more))

        inductor_modules = (torch._inductor.utils, torch._inductor.scheduler, torch._inductor.compile_fx)
        for module in (torch.utils._triton, *inductor_modules):
            for name in ("has_triton", "has_triton_package"):
                if hasattr(module, name):
                    patch(module, name, lambda *args, **more: True)
        patch(CudaInterface, "is_available", staticmethod(lambda: True))
        patch(CudaInterface, "get_device_properties", staticmethod(lambda device=None: H100), create=True)
        patch(CudaInterface, "get_compute_capability", staticmethod(lambda device=None: architecture))
        patch(CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: H100))
        patch(torch.version, "cuda", "13.0")
        patch(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True)
        patch(helpers, "set_driver_to_gpu", lambda: None)
        yield


def programs(
    config: GPTConfig, rows: int, *, deterministic: bool = False, residual: torch.dtype = torch.float32
) -> list[str]:
    """The source of each graph of the summed loss of ``rows`` rows in bfloat16, and of its backward.

    Raises torch._dynamo's exceptions where it is not one graph each.
    """
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []

    def keep(lowering: Any) -> Any:
        """In place of compiling and loading the program: keep its text, return tensors of the shapes it would."""
        sources.append(lowering.codegen()[0].value)
        output = next(node for node in lowering.orig_gm.graph.nodes if node.op == "output")
        values = [getattr(node, "meta", {}).get("val", node) for node in output.args[0]]

        def call(args: list[Any]) -> list[Any]:
            args.clear()
            return [
                torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
                if isinstance(v, Tensor)
                else v
                for v in values
            ]

        return types.SimpleNamespace(__file__="", call=call, recursively_apply_fns=lambda *args: None)

    settings = {
        "joint_graph_constant_folding": False,  # it executes
        "force_disable_caches": True,
        "compile_threads": 1,
        "benchmark_kernel": True,  # which writes each kernel's GB beside it
        "deterministic": deterministic,
    }
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with (
            _triton_for(90),
            pretended_gpu(count_waits=False),
            inductor.patch(settings),
            mock.patch.object(GraphLowering, "compile_to_module", keep),
        ):
            torch.set_float32_matmul_precision("high")
            model = GPT(config).to("cuda:0")
            model.residual = residual

            def loss(x: Tensor, y: Tensor) -> Tensor:
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    return linear_cross_entropy(model.hidden(x), model.wte.weight, y, config.vocab_size)

            tokens = torch.zeros(rows, config.block_size + 1, dtype=torch.int64, device="cuda:0")
            torch.compile(loss, dynamic=False, fullgraph=True)(tokens[:, :-1], tokens[:, 1:]).backward()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch._dynamo.reset()
    return sources


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "uint64": 8, "int32": 4, "bool": 1}


@dataclass
class Counted:
    """What one program does, read from its source: see ``count``."""

    launches: int = 0
    matmul_flops: int = 0
    attention: Counter[str] = field(default_factory=Counter)  # "forward" and "backward" calls
    kernel_gb: dict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # GB that each Triton kernel moves, over all its launches
    peak_gb: float = 0.0  # the most that buffers made in the program hold at once
    atomics: int = 0  # lines with an atomic addition, whose order no run repeats


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def count(source: str) -> Counted:
    """Follow ``call``, the function at the end of the source, line by line."""
    found = Counted(atomics=source.count("tl.atomic_add"))
    of_kernel = dict(re.findall(r"'kernel_name': '(\w+)'.*?'kernel_num_gb': ([\d.e-]+)", source))
    body = source[source.rindex("    def call(self, args):") :].partition("\n    return (")[0]
    shapes: dict[str, tuple[int, ...]] = {}
    held: dict[str, float] = {}
    for line in (line.strip() for line in body.splitlines()):
        if made := re.match(r"(\w+) = empty_strided_cuda\(\(([^)]*)\), \([^)]*\), torch\.(\w+)\)", line):
            shapes[made[1]] = _shape(made[2])
            held[made[1]] = math.prod(shapes[made[1]]) * BYTES[made[3]]
        elif made := re.match(r"assert_size_stride\((\w+), \(([^)]*)\)", line):
            shapes[made[1]] = _shape(made[2])
            if made[1].startswith("buf") and "flash_attention" in line:  # outputs bfloat16, sums float32
                held[made[1]] = math.prod(shapes[made[1]]) * (2 if len(shapes[made[1]]) == 4 else 4)
        elif made := re.match(r"(\w+) = reinterpret_tensor\(\w+, \(([^)]*)\)", line):
            shapes[made[1]] = _shape(made[2])
        elif made := re.match(r"(\w+) = (\w+); del", line):
            shapes[made[1]] = shapes.get(made[2], ())
        found.peak_gb = max(found.peak_gb, sum(held.values()) / 1e9)
        for name in re.findall(r"\bdel (\w+)", line):
            size = held.pop(name, 0.0)
            if size and "reuse" in line and (new := re.match(r"(\w+) = ", line)):
                held[new[1]] = size
        if ran := re.match(r"(triton_\w+)\.run\(", line):
            found.launches += 1
            found.kernel_gb[ran[1]] += float(of_kernel[ran[1]])
        elif product := re.match(r"extern_kernels\.(?:mm|addmm|bmm)\((.*)\)", line):
            found.launches += 1
            found.matmul_flops += _product_flops(product[1], shapes)
        elif "flash_attention" in line and "= torch.ops" in line:
            found.launches += 1
            found.attention["backward" if "backward" in line else "forward"] += 1
    return found


def _product_flops(arguments: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """2MKN of a product of matrices; a bias before them and the place for the result are passed over."""
    matrices = []
    words = re.findall(
        r"reinterpret_tensor\(\w+, (\([^)]*\)), \([^)]*\), \d+\)|(\w+)", arguments.split(", out=")[0]
    )
    for view, name in words:
        shape = _shape(view) if view else shapes.get(name, ())
        if len(shape) == 2:
            matrices.append(shape)
    for (m, k), (k2, n) in itertools.pairwise(matrices):
        if k == k2:
            return 2 * m * k * n
    return 0


def kernels(source: str, architecture: int) -> tuple[int, int, list[str]]:
    """Compile every Triton kernel of a source: how many, machine programs made, and what failed with its error."""
    texts = re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", source, re.S)
    made, failures = 0, []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=f"{folder}/cache"),
        _triton_for(architecture),
        pretended_gpu(count_waits=False),
    ):
        for name, text in texts:
            path = Path(folder) / f"{name}.py"
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
                kernel = getattr(module, name)
                kernel.precompile(warm_cache_only=True)
                made += len(kernel.compile_results)
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}"[:300])
    return len(texts), made, failures
