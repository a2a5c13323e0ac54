"""Shared fixtures: checkpoints under tests/data, each loaded once, and a compiler without state from other tests."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tested

import ctfp8_compile as ctfp8
from ctfp8_compile import lowering, passes
from ctfp8_compile.target import KernelLibrary

os.environ["CTFP8_CPU_ISAS"] = "all"  # tests run one instruction set after the other
DATA = Path(__file__).parent / "data"
ARCHITECTURES = ("llama", "qwen3", "mixtral", "qwen3moe")
SCHEMES = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK")
CHECKPOINTS = [f"{architecture}/{scheme}" for architecture in ARCHITECTURES for scheme in SCHEMES]
#: FP8 parameters of each architecture's model: 2 layers of q, k, v, o and either three MLP matrices or two stacks of experts.
FP8_PARAMETERS = {"llama": 14, "qwen3": 14, "mixtral": 12, "qwen3moe": 12}
#: Weights that stay dequantized, with the reason, in architectures where not all are rewritten.
ARCHITECTURE_REWRITES: dict[str, list[tuple[str, str]]] = {
    # the weight is the left operand: matmul(W, x)
    "jamba": [("model.layers.0.mamba.dt_proj.weight", "no rule knows this use of a weight: aten.matmul.default")]
}
IDS = torch.arange(5, 45).reshape(2, 20)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test's cases those that `@pytest.mark.quick` does not name are long; of its long ones, those that `ci` does not, nightly.

    What takes minutes begins first: `@pytest.mark.long(minutes=7)`. At the end, one process would run it and the others
    wait.
    """
    for item in items:
        if not hasattr(item, "callspec"):
            continue
        values = [getattr(value, "__name__", value) for value in item.callspec.params.values()]
        for mark, more in (("quick", "long"), ("ci", "nightly")):
            named = [found.args for found in item.iter_markers(mark)]
            chosen = all(
                item.callspec.id in names or any(v == name for v in values for name in names) for names in named
            )
            if not chosen and (mark == "quick" or item.get_closest_marker("long")):
                item.add_marker(more)
    items.sort(key=lambda item: -max((mark.kwargs.get("minutes", 0) for mark in item.iter_markers("long")), default=0))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _libraries_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torch that no release of a kernel library is known for, graphs are those for its last one."""
    monkeypatch.setattr(KernelLibrary, "unpaired", lambda self: None)


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """`load("llama/FP8")`: that checkpoint's model, loaded once a session."""

    @functools.cache
    def cached(name: str, **kwargs: Any) -> Any:
        return ctfp8.from_pretrained(DATA / name, **kwargs)

    return cached


@pytest.fixture
def kernel_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernels are eligible on every machine; where no kernel is built, operators run their reference implementation."""
    monkeypatch.setattr(lowering.cpu.FusedDequantizeMatmul, "supports", lambda self, problem, target: lowering.YES)


def assert_same_bits(one: Path, other: Path) -> None:
    """Two checkpoint folders hold the same tensors, bit for bit."""
    before, after = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape), key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[key].reshape(-1).view(torch.uint8)), key


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def fp8_config(
    strategy: str = "channel", activation: str | None = "token", block: tuple[int, int] = (128, 128), **extra: Any
) -> dict[str, Any]:
    """A compressed-tensors quantization_config with one group of Linears."""
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = list(block)
    if strategy == "mx":
        weights |= {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    inputs: dict[str, Any] | None = None
    if activation == "token":
        inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    elif activation == "tensor":
        inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    elif activation == "group":
        inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
    elif activation == "mx":
        inputs = {**weights, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp8-quantized" if strategy == "mx" else "float-quantized",
        "config_groups": {"group_0": group},
        **extra,
    }


def quantize(
    weight: torch.Tensor, strategy: str = "channel", block: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(float8 weight, float32 scale)` by compressed-tensors' own arithmetic; of MXFP8 by ours, which is tested against theirs."""
    if strategy == "mx":
        return torch.ops.ctfp8.quantize_mx(weight)
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy,
                            block_structure=list(block) if strategy == "block" else None)  # fmt: skip
    rows, cols = weight.shape
    if strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    elif strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        padded = torch.zeros(-(-rows // block[0]) * block[0], -(-cols // block[1]) * block[1], dtype=weight.dtype)
        padded[:rows, :cols] = weight
        tiles = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    scale, zero = calculate_qparams(low, high, args)
    return ct_quantize(weight, scale, zero, args, dtype=torch.float8_e4m3fn), scale.float()


@pytest.fixture(autouse=True, scope="session")
def _no_code_cache() -> Iterator[None]:
    """Our passes run only when Inductor compiles, so a cache hit from an earlier run would test nothing."""
    os.environ["CTFP8_CACHE_DIR"] = ""  # nor are graphs kept, here or in processes that tests start
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-tested", action="store_true", help="record a whole suite that passes, see support.tested"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-tested"):
        tested.refuse_a_part(config)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")  # one of pytest-xdist's processes, which sees a part of the suite
    if config.getoption("--record-tested") and exitstatus == 0 and not worker:
        tested.record(len(terminalreporter.stats["passed"]))


@pytest.fixture(autouse=True, scope="session")
def _passes_verified() -> Iterator[None]:
    """After every pass, the graph is well formed and its fake values are what its operators compute."""
    with passes.verifying():
        yield
