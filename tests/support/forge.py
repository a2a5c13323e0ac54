"""Makes tiny compressed-tensors FP8 checkpoints as llm-compressor writes them, each with a model that is its truth.

    forged = forge("qwen3_moe", "FP8_BLOCK", tmp_path, odd=True)
    forged.reference(**forged.inputs).logits     # what a loader must reproduce from forged.folder

The reference is transformers' own model holding `dequantize(quantize(weight))`, both by compressed-tensors; no loader
takes part. The checkpoint is made as llm-compressor makes it: fused experts become Linears, compressed-tensors
compresses each Linear and writes the config, and `save_pretrained` gives the weights their names in the file.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant
from compressed_tensors.utils import match_named_modules
from safetensors import safe_open
from support.architectures import ARCHITECTURES, FORMATS, MXFP8_ODD, SCHEMES, Architecture, Experts, Sizes
from support.formats import respell
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

__all__ = ["ARCHITECTURES", "FORMATS", "SCHEMES", "Architecture", "Forged", "Sizes", "forge"]


@dataclass(frozen=True)
class Forged:
    """A checkpoint folder and what a model loaded from it must compute."""

    folder: Path
    auto_class: Any
    inputs: dict[str, Tensor]
    reference: nn.Module
    fp8_names: tuple[str, ...]

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.reference(**self.inputs).logits


def forge(
    architecture: str,
    scheme: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.bfloat16,
    odd: bool = False,
    sizes: Sizes | None = None,
    shards: int = 1,
) -> Forged:
    """Write `architecture` quantized by `scheme` to `folder`.

    `scale_dtype` is what scales are stored in (llm-compressor: the model's dtype). `odd` picks sizes that are multiples
    of 16 but not of 128, `sizes` any others. `shards` is how many files the weights go to, about.
    """
    spec = ARCHITECTURES[architecture]
    if scheme == "fp8":
        made = forge(architecture, "FP8_BLOCK", Path(folder) / "made", seed=seed, dtype=dtype, scale_dtype=torch.float32,
                     odd=odd, sizes=sizes)  # fmt: skip
        return replace(made, folder=respell(made.folder, Path(folder) / "fp8", "fp8"))
    if scheme not in (*spec.schemes, "MXFP8"):
        raise ValueError(f"llm-compressor cannot write {architecture} as {scheme}")
    usual = MXFP8_ODD if scheme == "MXFP8" else spec.odd
    config = spec.config(sizes or (usual if odd else Sizes()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reference = spec.auto_class.from_config(config, dtype=dtype).eval().requires_grad_(False)
        _spread(reference, transposed=spec.experts is not None and spec.experts.transposed)
        _keep_in_float32(reference)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in spec.inputs(config).items()}

    linearised, homes = _linearise(reference, spec.experts)
    quantization = scheme_of(scheme, spec.experts)
    quantized = dict(match_named_modules(linearised, quantization.targets, spec.ignore))
    if group := quantization.weights.group_size:  # compressed-tensors has no partial groups
        quantized = {name: linear for name, linear in quantized.items() if linear.in_features % group == 0}
    for name, linear in quantized.items():
        _quantize(linear, quantization, scale_dtype, input_key=f"{seed} {_input_of(name)}")
    compressor = ModelCompressor.from_pretrained_model(_with_conversions(linearised))
    compressor.compress_model(linearised)
    for name, linear in quantized.items():
        homes[name].copy_(_dequantized(linear))
        _as_file_has_it(linear)
    _save(linearised, folder, shards)
    compressor.update_config(folder)
    return Forged(Path(folder), spec.auto_class, inputs, reference, tuple(_fp8_names(Path(folder))))


# --- the model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _spread(model: nn.Module, transposed: bool) -> None:
    """Give every row, expert and layer its own magnitude, so that a misplaced scale or a swapped half shows."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # Mamba's decay rates mean something as they are
            continue
        if parameter.dim() < 2:
            parameter.add_(torch.randn_like(parameter) * 0.1)
            continue
        fused = name.endswith("_proj")  # a parameter of the experts module itself, not a Linear's `.weight`
        rows = parameter.transpose(-1, -2) if transposed and fused and parameter.dim() == 3 else parameter
        magnitude = torch.randn(rows.shape[:-1]).mul(0.4).exp().unsqueeze(-1)
        rows.copy_(torch.randn(rows.shape) * magnitude * rows.shape[-1] ** -0.5)


def _keep_in_float32(model: PreTrainedModel) -> None:
    """What transformers leaves in float32 however it is told to load, such as routers' correction biases."""
    for kept in getattr(model, "_keep_in_fp32_modules_strict", None) or ():
        for module in model.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if name == kept:
                    tensor.data = tensor.data.float()


class ExpertMLP(nn.Module):
    """One expert's Linears under the file's names. The class is named as llm-compressor's, whose name the ignore list
    depends on: compressed-tensors takes modules called `…Gate…` for routers unless they are called `…ExpertMLP…`."""


class GraniteMoeHybridParallelExpertsLinear(nn.Linear):
    """All experts' rows as one Linear: what llm-compressor quantized for Granite, a target of its own in the config."""

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.experts = weight.shape[0]
        self.weight = nn.Parameter(weight.flatten(0, 1).clone(), requires_grad=False)
        self.out_features, self.in_features = self.weight.shape
        self.register_parameter("bias", None)


def _linearise(reference: nn.Module, experts: Experts | None) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A copy of the model in which everything to quantize is a Linear, and for each Linear the view of the reference's
    own weights that it was taken from."""
    model = copy.deepcopy(reference)
    homes = {name: m.weight.data for name, m in reference.named_modules() if isinstance(m, nn.Linear)}
    fused = [(name, m) for name, m in reference.named_modules() if experts and _is_fused(m)]
    for name, module in fused:
        parent, attribute = name.rpartition(".")[::2]
        if experts.whole:
            model.get_submodule(parent).__delattr__(attribute)
            for own, weight in zip(experts.whole, (module.gate_up_proj, module.down_proj), strict=True):
                setattr(model.get_submodule(parent), own, GraniteMoeHybridParallelExpertsLinear(weight))
                homes[f"{parent}.{own}"] = weight.data.flatten(0, 1)
            continue
        linears = nn.ModuleList()
        for index, parts in enumerate(_expert_linears(module, experts)):
            expert = ExpertMLP()
            for own, (weight, bias) in parts.items():
                setattr(expert, own, _linear(weight, bias))
                homes[f"{name}.{index}.{own}"] = weight
            linears.append(expert)
        model.set_submodule(name, linears)
    return model, homes


def _is_fused(module: nn.Module) -> bool:
    return isinstance(getattr(module, "down_proj", None), nn.Parameter)


def _expert_linears(module: nn.Module, experts: Experts) -> Iterator[dict[str, tuple[Tensor, Tensor | None]]]:
    """Per expert, file name → (weight `[out, in]`, bias), as views of the fused parameters."""
    gate, up, down = experts.names
    wide = "gate_up_proj" if experts.gated else "up_proj"
    for index in range(module.down_proj.shape[0]):

        def of(name: str, index: int = index) -> tuple[Tensor, Tensor | None]:
            weight = getattr(module, name).data[index]
            bias = getattr(module, f"{name}_bias", None)
            return weight.T if experts.transposed else weight, None if bias is None else bias.data[index]

        weight, bias = of(wide)
        if not experts.gated:
            yield {up: (weight, bias), down: of("down_proj")}
            continue
        half = weight.shape[0] // 2
        first, second = slice(half), slice(half, None)
        if experts.interleaved:
            first, second = slice(0, None, 2), slice(1, None, 2)
        yield {
            gate: (weight[first], None if bias is None else bias[first]),
            up: (weight[second], None if bias is None else bias[second]),
            down: of("down_proj"),
        }


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


# --- quantization ------------------------------------------------------------------------------------------------


def scheme_of(name: str, experts: Experts | None) -> QuantizationScheme:
    targets = ["Linear"] + (["GraniteMoeHybridParallelExpertsLinear"] if experts and experts.whole else [])
    weight_only = name == "W8A16"  # compressed-tensors' preset of that name is the integer one
    preset = preset_name_to_scheme("FP8_DYNAMIC" if weight_only else name, targets)
    weights = preset.weights.model_copy(update={"observer": "memoryless_minmax"})  # what llm-compressor fills in
    inputs = None if weight_only else preset.input_activations
    return QuantizationScheme(targets=targets, weights=weights, input_activations=inputs)


def _quantize(linear: nn.Linear, scheme: QuantizationScheme, scale_dtype: torch.dtype, input_key: str) -> None:
    """Attach the scheme and its scales; the compressor does the rest."""
    linear.quantization_scheme = scheme
    linear.quantization_status = QuantizationStatus.FROZEN
    args = scheme.weights
    scale = weight_scale(linear.weight.data, args, torch.float32 if args.scale_dtype == torch.uint8 else scale_dtype)
    linear.weight_scale = nn.Parameter(scale, requires_grad=False)
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        # Roomy, as if calibrated on more than the inputs here: nothing saturates, and e4m3 loses nothing by it.
        largest = 32 + 64 * (zlib.crc32(input_key.encode()) / 2**32)
        linear.input_scale = nn.Parameter(torch.tensor([largest / 448], dtype=scale_dtype), requires_grad=False)


def weight_scale(weight: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> Tensor:
    """Min-max scales: `[1]`, `[N, 1]` or one per block, partial blocks at the ends counted as whole."""
    if args.strategy == QuantizationStrategy.TENSOR:
        groups = weight.reshape(1, -1)
    elif args.strategy == QuantizationStrategy.CHANNEL:
        groups = weight.unsqueeze(1)
    elif args.strategy == QuantizationStrategy.GROUP:
        groups = weight.unflatten(1, (-1, args.group_size))
    else:
        rows, columns = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (rows, columns))
        groups = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(-2)
    groups = groups.float()
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return scale.to(scale_dtype)


def _input_of(name: str) -> str:
    """Linears that read the same tensor are calibrated to the same input scale."""
    parent, _, own = name.rpartition(".")
    group = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj", "w3": "w1"}.get(own, own)
    return f"{parent}.{group}"


def _dequantized(linear: nn.Linear) -> Tensor:
    # In float32 the product of an e4m3 and a scale is exact for bfloat16 scales, so that this equals dequantizing in
    # the scale's own dtype; a float32 model gets more than that would give.
    scale = linear.weight_scale.data
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    return dequantize(linear.weight.data, scale.float(), args=linear.quantization_scheme.weights)


# --- the file ----------------------------------------------------------------------------------------------------


def _with_conversions(model: PreTrainedModel) -> PreTrainedModel:
    """As if loaded by `from_pretrained`, so that names are mapped back to the file's. A change of prefix only belongs
    to checkpoints that had the other prefix."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    return model


def _as_file_has_it(linear: nn.Linear) -> None:
    if isinstance(linear, GraniteMoeHybridParallelExpertsLinear):
        for name, parameter in (("weight", linear.weight), ("weight_scale", linear.weight_scale)):
            whole, left = divmod(parameter.shape[0], linear.experts)
            if left:
                raise ValueError(f"{tuple(parameter.shape)} does not split into {linear.experts} experts: {name}")
            setattr(linear, name, nn.Parameter(parameter.data.unflatten(0, (-1, whole)), requires_grad=False))


def _save(model: PreTrainedModel, folder: Path, shards: int) -> None:
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=total // shards + 1 if shards > 1 else "20GB")


def _fp8_names(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            yield from (name for name in tensors.keys() if tensors.get_slice(name).get_dtype() == "F8_E4M3")  # noqa: SIM118
