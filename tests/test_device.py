"""Devices are chosen once, and one that is not there is refused with what to try."""

import contextlib

import pytest
import torch

from aymen_gpt.errors import UsageError
from aymen_gpt.training import device as devices


def test_bfloat16_is_chosen_where_the_cpu_multiplies_it(monkeypatch):
    for flags, fast in (("fma avx512_bf16", True), ("amx_bf16", True), ("fma avx2", False), ("", False)):
        monkeypatch.setattr(devices, "_cpu_info", lambda flags=flags: {"flags": flags})
        assert devices.choose_device("cpu", "auto").dtype == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [("cuda", "auto", "--device cuda: this machine has no CUDA device"),
     ("cuda:1", "auto", "--device cuda:1: this machine has no CUDA device"),
     ("mps", "auto", "--device mps: this machine has no Apple GPU"),
     ("tpu", "auto", "--device tpu: expected auto, cpu, mps, cuda or cuda:N"),
     ("cpu", "fp8", "--dtype fp8: expected auto, float32, bfloat16, float16")],
)  # fmt: skip
def test_what_is_not_there_is_refused_and_the_cpu_is_always_there(monkeypatch, name, dtype, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=message):
        devices.choose_device(name, dtype)
    found = devices.choose_device("auto", "float32")
    assert (found.place, found.dtype, found.peak_flops) == (torch.device("cpu"), torch.float32, None)
    assert found.name


def test_each_rank_takes_the_gpu_of_its_local_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    before = torch.get_float32_matmul_precision()
    found = devices.choose_device("auto", "auto", local_rank=3)
    torch.set_float32_matmul_precision(before)
    assert chosen == [torch.device("cuda:3")] == [found.place]
    assert (found.dtype, found.peak_flops) == (torch.bfloat16, 989e12)


@pytest.mark.parametrize(
    ("name", "local_rank", "processes", "message"),
    [
        ("cuda:9", 0, 1, "--device cuda:9: this machine has 4 GPUs, cuda:0 is the first"),
        ("cuda", 5, 8, "8 processes and 4 GPUs on this machine: try --nproc_per_node=4"),
        ("cuda:1", 1, 2, "--device cuda:1: all 2 processes would share one GPU; leave the number out"),
    ],
)
def test_a_gpu_that_is_not_there_or_taken_is_one_line(monkeypatch, name, local_rank, processes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(UsageError, match=message):
        devices.choose_device(name, "auto", local_rank)


def test_mfu_is_stated_for_devices_whose_peak_is_known():
    found = {"H100 NVL": 835, "H100 PCIe": 756, "H100 80GB HBM3": 989, "GH200 480GB": 989, "A10G": 70, "A10": 125,
             "L4": 121, "L40S": 362, "GeForce RTX 5090": 209, "RTX A1000 Laptop GPU": None}  # fmt: skip
    for name, tflops in found.items():
        assert devices.peak_flops(f"NVIDIA {name}") == (tflops and tflops * 1e12), name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("CUDA error: out of memory", True),
     ("MPS backend out of memory (MPS allocated: 8.00 GB)", True),
     ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
     ("NCCL error: Failed to CUDA calloc 4194304 bytes", True),
     ("CUDA error: an illegal memory access was encountered", False)],
)  # fmt: skip
def test_every_failed_allocation_is_known_for_one(text, expected):
    assert devices.is_out_of_memory(RuntimeError(text)) is expected


def test_float32_runs_without_autocast():
    assert isinstance(devices.choose_device("cpu", "float32").autocast(), contextlib.nullcontext)
    with devices.choose_device("cpu", "bfloat16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
