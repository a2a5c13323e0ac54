"""What files say of a key-value cache: used as it is meant, refused where it is damaged, said where it is not used."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument
from ctfp8_compile.ops import FP8

KV = DATA / "llama/FP8_DYNAMIC_KV"
LAYERS, HEADS, WIDTH = 2, 2, 32
IDS = torch.arange(5, 29).mul(7).remainder(250).add(3).reshape(2, 12)


def written(folder: Path, change: Callable[[dict[str, Tensor]], object], scheme: Any = ...) -> Path:
    """The checkpoint of a calibrated cache with other scales, and another `kv_cache_scheme`."""
    shutil.copytree(KV, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    if scheme is not ...:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"] = scheme
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path) -> tuple[Any, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ctfp8.from_pretrained(folder, dtype=torch.float32)
    return model, " ".join(
        str(w.message) for w in caught if "KV cache" in str(w.message) or "key-value" in str(w.message)
    )


def run(model: Any, cache: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([
            model(input_ids=part, use_cache=True, **{cache_argument(model): cache}).logits for part in IDS.split([9, 1, 1, 1], 1)
        ], 1)  # fmt: skip


class Exact(DynamicCache):
    """In float64: rounds what it is given as `how[layer]` says, for keys and values `(scale, bias)`; a scale of None is a token's own."""

    how: list[tuple[tuple[Any, Any], tuple[Any, Any]]]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(*map(self.rounded, (keys, values), self.how[layer]), layer, *args, **kwargs)

    @staticmethod
    def rounded(x: Tensor, how: tuple[Any, Any]) -> Tensor:
        scale, bias = how
        shift = torch.zeros(1, 1, 1, 1) if bias is None else bias
        wide = x.double() - shift.double()
        own = 2.0 ** (wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448).log2().ceil()
        step = own if scale is None else scale.double().view(1, -1, 1, 1)
        return ((wide / step).clamp(-448, 448).float().to(FP8).double() * step + shift.double()).to(x.dtype)


def check(model: Any, how: Any) -> None:
    exact = Exact(config=model.config)
    exact.how = how
    want = run(model, exact)
    for cache in (ctfp8.static_cache(model, 2, 40), ctfp8.dynamic_cache(model)):
        assert relative_error(run(model, cache), want) < 1e-3
        assert {layer.keys.dtype for layer in cache.layers} == {torch.uint8}


def scales(state: dict[str, Tensor]) -> list[str]:
    return [name for name in state if name.endswith(("k_scale", "v_scale"))]


def of(folder: Path, which: str) -> list[Tensor]:
    state = load_file(folder / "model.safetensors")
    return [state[f"model.layers.{i}.self_attn.{which}"] for i in range(LAYERS)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -0.01])
@pytest.mark.parametrize("name", ["k_scale", "v_scale", "kv_scale", "k_proj.output_scale", "v_proj.v_scale"])
def test_damaged_scales_are_refused(name: str, bad: float, tmp_path: Path) -> None:
    tensor = f"model.layers.1.self_attn.{name}"

    def damage(state: dict[str, Tensor]) -> None:
        for key in [key for key in scales(state) if "layers.1" in key]:
            del state[key]
        state[tensor] = torch.tensor([bad])

    with pytest.raises(ctfp8.CheckpointError, match=tensor.replace(".", r"\.") + ".*finite and positive"):
        ctfp8.from_pretrained(written(tmp_path / "f", damage))


@pytest.mark.parametrize("count", [3, WIDTH, HEADS * WIDTH])
def test_a_scale_of_no_heads_is_refused(count: int, tmp_path: Path) -> None:
    folder = written(tmp_path / "f", lambda s: s.update({"model.layers.0.self_attn.k_scale": torch.ones(count)}))
    with pytest.raises(ctfp8.CheckpointError, match=r"layers\.0\.self_attn\.k_scale.*layer's 2 heads, not"):
        ctfp8.from_pretrained(folder)


def test_scales_of_queries_are_not_read(tmp_path: Path) -> None:
    """llm-compressor leaves them as they were allocated."""
    folder = written(
        tmp_path / "f", lambda s: s.update({"model.layers.0.self_attn.q_scale": torch.tensor([float("nan")])})
    )
    assert ctfp8.static_cache(loaded(folder)[0], 1, 8).layers[0].keys.dtype == torch.uint8


@pytest.mark.parametrize("shape", [(), (1,), (HEADS,), (HEADS, 1, 1), (1, HEADS, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"model.layers.{i}.self_attn.{w}_scale": torch.rand(shape, generator=generator).mul(0.02).add(0.01).to(dtype)
        for i in range(LAYERS)
        for w in "kv"
    }
    folder = written(tmp_path / "f", lambda s: s.update(made))
    check(
        loaded(folder)[0],
        [tuple((made[f"model.layers.{i}.self_attn.{w}_scale"].float(), None) for w in "kv") for i in range(LAYERS)],
    )


@pytest.mark.parametrize("kept", ["k", "v"])
def test_one_sided_scales(kept: str, tmp_path: Path) -> None:
    """The other side has a scale for each token."""

    def drop(state: dict[str, Tensor]) -> None:
        for name in scales(state):
            if not name.endswith(f"{kept}_scale"):
                del state[name]

    folder = written(tmp_path / "f", drop)
    own = of(folder, f"{kept}_scale")
    check(loaded(folder)[0], [((s, None), (None, None)) if kept == "k" else ((None, None), (s, None)) for s in own])


def test_a_layer_without_scales(tmp_path: Path) -> None:
    folder = written(tmp_path / "f", lambda s: [s.pop(name) for name in scales(s) if "layers.0" in name])
    keys, values = (load_file(folder / "model.safetensors")[f"model.layers.1.self_attn.{w}_scale"] for w in "kv")
    check(loaded(folder)[0], [((None, None), (None, None)), ((keys, None), (values, None))])


@pytest.mark.parametrize("both", [False, True])
def test_one_scale_for_both(both: bool, tmp_path: Path) -> None:
    """`kv_scale`; one of keys alone comes before it."""

    def change(state: dict[str, Tensor]) -> None:
        for name in scales(state):
            if not both or name.endswith("v_scale"):
                del state[name]
        state.update({f"model.layers.{i}.self_attn.kv_scale": torch.tensor(0.02) for i in range(LAYERS)})

    folder = written(tmp_path / "f", change)
    keys = of(folder, "k_scale") if both else [torch.tensor(0.02)] * LAYERS
    check(loaded(folder)[0], [((k, None), (torch.tensor(0.02), None)) for k in keys])


@pytest.mark.parametrize("value", [0.0, 3.0, -8.0])
def test_zero_points(value: float, tmp_path: Path) -> None:
    """`(x / scale + z)` is what is stored."""
    zero = torch.full((1,), value).to(FP8)
    folder = written(
        tmp_path / "f",
        lambda s: s.update({f"model.layers.{i}.self_attn.k_zero_point": zero.clone() for i in range(LAYERS)}),
    )
    bias = [None if value == 0 else (-zero.float() * k.float()).view(1, 1, 1, 1) for k in of(folder, "k_scale")]
    pairs = zip(of(folder, "k_scale"), of(folder, "v_scale"), bias, strict=True)
    check(loaded(folder)[0], [((k, b), (v, None)) for k, v, b in pairs])


@pytest.mark.parametrize("where", ["", "k_proj."])
def test_affine_caches(where: str, tmp_path: Path) -> None:
    """ModelOpt's: a bias of each head and column is taken off before, and put on again behind."""
    generator = torch.Generator().manual_seed(0)
    made = {
        f"model.layers.{i}.self_attn.{where.replace('k', w)}{w}_bias": torch.randn(
            1, HEADS, 1, WIDTH, generator=generator
        ).bfloat16()
        for i in range(LAYERS)
        for w in "kv"
    }
    folder = written(tmp_path / "f", lambda s: s.update(made))
    model, _ = loaded(folder)
    biases = [
        [made[f"model.layers.{i}.self_attn.{where.replace('k', w)}{w}_bias"].float() for w in "kv"]
        for i in range(LAYERS)
    ]
    pairs = zip(of(folder, "k_scale"), of(folder, "v_scale"), biases, strict=True)
    check(model, [((k, b[0]), (v, b[1])) for k, v, b in pairs])
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert made.keys() <= load_file(tmp_path / "out/model.safetensors").keys()


FP8_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    "scheme",
    [{**FP8_SCHEME, "dynamic": True, "strategy": "token"}, FP8_SCHEME],
    ids=["dynamic", "static, without scales"],
)
def test_a_scheme_without_scales(scheme: dict[str, Any], tmp_path: Path) -> None:
    model, said = loaded(written(tmp_path / "f", lambda s: [s.pop(name) for name in scales(s)], scheme))
    assert "keep it in FP8" in said
    check(model, [((None, None), (None, None))] * LAYERS)


@pytest.mark.parametrize("scheme", [{**FP8_SCHEME, "type": "int"}, {**FP8_SCHEME, "num_bits": 4}])
def test_another_cache_than_fp8(scheme: dict[str, Any], tmp_path: Path) -> None:
    """Is said; the default is the model's dtype, and FP8 that was asked for does not use its scales."""
    model, said = loaded(written(tmp_path / "f", lambda s: None, scheme))
    assert f"{scheme['num_bits']}-bit {scheme['type']}" in said
    assert {layer.keys.dtype for layer in ctfp8.static_cache(model, 1, 8).layers} == {torch.float32}
    run(model, ctfp8.dynamic_cache(model))
    exact = Exact(config=model.config)
    exact.how = [((None, None), (None, None))] * LAYERS
    assert relative_error(run(model, ctfp8.dynamic_cache(model, "fp8")), run(model, exact)) < 1e-3


def test_layers_for_more_tokens_have_scales_of_their_own(tmp_path: Path) -> None:
    folder = written(tmp_path / "f", lambda s: s.update({"mtp.layers.0.self_attn.k_scale": torch.tensor([9.0])}))
    check(
        loaded(folder)[0],
        [((k, None), (v, None)) for k, v in zip(of(folder, "k_scale"), of(folder, "v_scale"), strict=True)],
    )


@pytest.mark.long
def test_compiled_with_one_side_and_biases(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in scales(state) if name.endswith("v_scale")]:
            del state[name]
        state["model.layers.1.self_attn.v_bias"] = torch.randn(1, HEADS, 1, WIDTH)

    model, _ = loaded(written(tmp_path / "f", change))
    want = run(model, ctfp8.static_cache(model, 2, 40))
    cache = ctfp8.static_cache(model, 2, 40)
    compiled = torch.compile(model, backend="ctfp8", fullgraph=True, dynamic=False)
    with torch.no_grad():
        got = torch.cat(
            [
                compiled(input_ids=part, use_cache=True, **{cache_argument(model): cache}).logits
                for part in IDS.split([9, 1, 1, 1], 1)
            ],
            1,
        )
    assert relative_error(got, want) < 1e-4
