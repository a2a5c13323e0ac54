"""A GPU that is not there, for as much of torch, Inductor and Triton as it takes to write and build its code.

`install` changes this process for good, so it belongs in one of its own (`worker.py`). What is played: the device's
properties, its streams and guards, and Triton's driver. What is real: dynamo, our passes, all of Inductor up to the code it
writes, and Triton's compiler with ptxas.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

#: By compute capability: multiprocessors, shared memory a block may ask for (bytes), device memory (GB).
_CUDA = {
    (8, 0): (108, 166912, 80),
    (8, 9): (142, 101376, 48),
    (9, 0): (132, 232448, 80),
    (10, 0): (148, 232448, 180),
    (10, 3): (148, 232448, 270),
    (12, 0): (170, 101376, 32),
    (12, 1): (48, 101376, 128),
}


def install(device: str, capability: tuple[int, int] | None) -> None:
    """Makes this process see one `cuda` device of a compute capability, or one `xpu` device."""
    ctypes.CDLL(str(_guard()))
    if device == "cuda":
        assert capability is not None
        _cuda(capability)
    else:
        _xpu()
    _inductor()


def _guard() -> Path:
    """`guard.cpp` as a library, built once for a version of torch."""
    source = Path(__file__).with_name("guard.cpp")
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"ctfp8-fake-device-{os.getuid()}" / f"guard-{key}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        root = Path(torch.__file__).parent
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{root}/include", str(source), f"-L{root}/lib", "-lc10",
             "-ltorch_cpu", "-o", str(unfinished)],
            check=True,
        )  # fmt: skip
        unfinished.rename(library)
    return library


def _cuda(capability: tuple[int, int]) -> None:
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses import fake_tensor

    processors, shared, memory = _CUDA[capability]
    properties = SimpleNamespace(
        name="a GPU that is not there", major=capability[0], minor=capability[1], multi_processor_count=processors,
        total_memory=memory << 30, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, warp_size=32, shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared, shared_memory_per_multiprocessor=shared + 1024, L2_cache_size=50 << 20,
        gcnArchName="", clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
    )  # fmt: skip
    torch.version.cuda = "13.0"
    number = capability[0] * 10 + capability[1]
    _device_module(torch.cuda, properties)
    torch.cuda.get_device_capability = lambda *args, **kwargs: capability
    for name in ("_cuda_setDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice", "_cuda_getDevice"):
        setattr(torch._C, name, lambda *args: 0)
    torch._C._cuda_getCurrentRawStream = lambda *args: 0
    fake_tensor.init_gpu_context = lambda device: None
    _interface(CudaInterface, properties, number)
    _triton("cuda", number, 32, torch.cuda, processors, shared)


def _xpu() -> None:
    from torch._dynamo.device_interface import XpuInterface

    properties = SimpleNamespace(
        name="a GPU that is not there", gpu_subslice_count=64, gpu_eu_count=512, max_work_group_size=1024,
        max_num_sub_groups=64, sub_group_sizes=[16, 32], total_memory=48 << 30, local_mem_size=131072,
        has_bfloat16_conversions=True, has_fp16=True, has_fp64=True, has_subgroup_matrix_multiply_accumulate=True,
        multi_processor_count=64, max_compute_units=512, warp_size=32, major=0, minor=0, architecture=0,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, last_level_cache_size=18 << 20,
    )  # fmt: skip
    _device_module(torch.xpu, properties)
    torch._C._xpu_getCurrentRawStream = lambda *args: 0
    for name in ("_xpu_setDevice", "_xpu_exchangeDevice", "_xpu_maybeExchangeDevice", "_xpu_getDevice"):
        setattr(torch._C, name, lambda *args: 0)
    _interface(XpuInterface, properties, vars(properties))
    _triton("xpu", vars(properties), 32, torch.xpu, 64, 131072)
    # triton from PyPI has no backend for it: its code is written, and not built
    torch.utils._triton.triton_hash_with_backend = lambda: "no backend"


class _Context:
    """Stands for a device or a stream as a context manager."""

    cuda_stream = 0
    device_index = 0

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __enter__(self) -> None: ...

    def __exit__(self, *args: Any) -> None: ...


def _device_module(module: Any, properties: Any) -> None:
    """`torch.cuda` or `torch.xpu`."""
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
        "get_device_name": properties.name, "is_bf16_supported": True, "is_initialized": True, "_lazy_init": None,
        "synchronize": None, "set_device": None, "current_stream": _Context(), "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(module, name, lambda *args, _answer=answer, **kwargs: _answer)
    module.device = module._DeviceGuard = _Context
    for name in ("get_rng_state", "set_rng_state"):
        setattr(module.random, name, getattr(module, name))


def _interface(interface: Any, properties: Any, capability: Any) -> None:
    """What dynamo and Inductor ask about the device."""
    answers = {
        "is_available": True, "get_compute_capability": capability, "current_device": 0, "device_count": 1,
        "get_device_properties": properties, "is_triton_capable": True, "raise_if_triton_unavailable": None,
        "get_raw_stream": 0, "synchronize": None, "is_bf16_supported": True, "is_dtype_supported": True,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(interface, name, staticmethod(lambda *args, _answer=answer, **kwargs: _answer))
    for name in ("set_device", "current_device", "get_device_properties"):
        answer = answers.get(name)
        setattr(interface.Worker, name, staticmethod(lambda *args, _answer=answer, **kwargs: _answer))


def _triton(backend: str, arch: Any, warp: int, module: Any, processors: int, shared: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    about = {"max_shared_mem": shared, "multiprocessor_count": processors, "max_num_regs": 65536, "warpSize": warp}

    class Driver:
        launcher_cls = None
        utils = SimpleNamespace(get_device_properties=lambda device: about)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(backend, arch, warp)

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None: ...

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return module

        def get_active_torch_device(self) -> torch.device:
            return torch.device(backend)

        @staticmethod
        def is_active() -> bool:
            return True

    driver.set_active(Driver())


def _inductor() -> None:
    """Its caches off; what would put a tensor on the device while compiling, too."""
    from torch._inductor import config
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers

    config.compile_threads = 1
    config.fx_graph_cache = False
    config.use_static_triton_launcher = False
    config.joint_graph_constant_folding = False
    torch._functorch.config.enable_autograd_cache = False
    for module in (joint_graph, post_grad):
        module.lazy_init = lambda *args, **kwargs: None  # traces its patterns on the device
    triton_helpers.set_driver_to_gpu = triton_helpers.set_driver_to_cpu = lambda *args: None
