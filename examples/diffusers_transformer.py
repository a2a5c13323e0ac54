"""A diffusers transformer from one FP8 file in ComfyUI's layout: load_state_dict, explain, compile, save.

    python -m pip install -r examples/requirements-diffusers.txt
    python examples/diffusers_transformer.py

The model is a Flux transformer of random weights, small enough for any machine. Its file is as ComfyUI saves one: FP8 weights
with a scale each, `comfy_quant` beside them, all below `model.diffusion_model.`, some layers in their own precision.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import ctfp8_compile as ctfp8

CONFIG = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4,
    "joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
PREFIX = "model.diffusion_model."


def comfyui_file(state: dict[str, Tensor], file: Path) -> None:
    """Writes a state dict as ComfyUI does: the matrices of blocks in float8_e4m3fn, with one scale and a marker each.

    What goes in, what goes out, and the modulation by the time step stay in bfloat16.
    """
    out = {}
    for name, tensor in state.items():
        if tensor.dim() == 2 and "transformer_blocks." in name and ".norm" not in name:
            scale = tensor.float().abs().max() / 448
            marker = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
            out[f"{PREFIX}{name}"] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            out[f"{PREFIX}{name}_scale"] = scale
            layer = name.removesuffix(".weight")
            out[f"{PREFIX}{layer}.comfy_quant"] = torch.tensor(list(marker.encode()), dtype=torch.uint8)
        else:
            out[f"{PREFIX}{name}"] = tensor.to(torch.bfloat16)
    save_file(out, file, {"format": "pt"})


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """One step for an image of 8×8 patches and a text of 12 tokens."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
    return {
        "hidden_states": torch.randn(1, 64, 16, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, 12, 64, generator=generator).to(dtype),
        "pooled_projections": torch.randn(1, 32, generator=generator).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": grid.to(dtype),
        "txt_ids": torch.zeros(12, 3, dtype=dtype),
    }


def in_float64(tensors: dict[str, Tensor]) -> FluxTransformer2DModel:
    """The same model with the values of a file's tensors, by float64 arithmetic."""
    model = FluxTransformer2DModel(**CONFIG).double()
    values = {}
    for name in model.state_dict():
        stored = tensors[f"{PREFIX}{name}"].double()
        scale = tensors.get(f"{PREFIX}{name}_scale")
        values[name] = stored if scale is None else stored * scale.double()
    model.load_state_dict(values)
    return model.eval()


def bits(file: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Names, dtypes and bits of a file's tensors."""
    return {k: (v.dtype, v.reshape(-1).view(torch.uint8).numpy().tobytes()) for k, v in load_file(file).items()}


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "flux_fp8.safetensors"
        comfyui_file(FluxTransformer2DModel(**CONFIG).state_dict(), file)
        with torch.device("meta"):
            model = FluxTransformer2DModel(**CONFIG)
        model = ctfp8.load_state_dict(model, file)  # its parameters were float32: FP8 weights dequantize to that
        stored = ctfp8.state_dict(model)
        step = inputs(torch.float32)
        print(ctfp8.explain(model, (), {**step, "return_dict": False}))
        compiled = torch.compile(model, backend="ctfp8", fullgraph=True)
        got = compiled(**step, return_dict=False)[0]
        want = in_float64(stored)(**inputs(torch.float64), return_dict=False)[0]
        fp8 = sum(t.numel() for t in stored.values() if t.dtype == torch.float8_e4m3fn)
        print(f"{fp8:,} of {sum(p.numel() for p in model.parameters()):,} weights are FP8")
        print(f"relative error against float64: {float((got - want).norm() / want.norm()):.1e}")
        again = Path(folder) / "again.safetensors"
        ctfp8.save_state_dict(model, again)
        same = bits(again) == bits(file)
        print(f"saved again with the same names, dtypes and bits: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
