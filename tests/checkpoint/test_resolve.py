"""What a tensor is stored as decides: configs that fit their file, contradict it, or say nothing; value = FP8 value × scale."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from conftest import fp8_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ctfp8_compile as ctfp8
from ctfp8_compile.checkpoint.files import InMemory, encode_scale
from ctfp8_compile.checkpoint.grid import Grid
from ctfp8_compile.checkpoint.notes import Notes
from ctfp8_compile.checkpoint.resolve import resolve
from ctfp8_compile.checkpoint.scheme import Schemes, heads_of
from ctfp8_compile.model.parametrization import quantized_parameters
from ctfp8_compile.ops import FP8

SAYS = "the checkpoint is read as its files say"


def stored(
    rows: int, cols: int, block: tuple[int, int], runs: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor, Tensor]:
    """An FP8 weight, its scales `[row blocks, column blocks]`, powers of two, and what it is worth: made block by block."""
    values = (torch.randn(rows, cols) * 60).clamp(-448, 448).to(FP8)
    truth = torch.empty(rows, cols, dtype=torch.float64)
    grid: list[list[float]] = []
    for r0, r1 in _pieces(rows, block[0], runs[0]):
        grid.append([])
        for c0, c1 in _pieces(cols, block[1], runs[1]):
            scale = 2.0 ** -int(torch.randint(6, 14, ()))
            truth[r0:r1, c0:c1] = values[r0:r1, c0:c1].double() * scale
            grid[-1].append(scale)
    return values, torch.tensor(grid), truth


def _pieces(size: int, block: int, runs: int) -> list[tuple[int, int]]:
    run = size // runs
    step = block or run
    return [
        (first, min(first + step, start + run))
        for start in range(0, size, run)
        for first in range(start, start + run, step)
    ]


def loaded(state: dict[str, Tensor], config, rows: int, cols: int, name: str = "proj") -> tuple[nn.Module, list[str]]:
    """A module of one Linear and what loading warned of."""
    module = nn.Module()
    module.add_module(name, nn.Linear(cols, rows, bias=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ctfp8.load_state_dict(module, state, config)
    said = [str(w.message) for w in caught if SAYS in str(w.message)]
    assert len(said) <= 1
    return module, said


def scheme(module: nn.Module):
    return next(d.info.scheme for _, _, d in quantized_parameters(module))


BLOCKS = {"tensor": (0, 0), "channel": (1, 0), "block": (128, 128), "small": (64, 64), "group": (1, 128), "mx": (1, 32)}


def config_of(kind: str, **extra):
    """In compressed-tensors' words."""
    if kind in ("small", "group"):
        config = fp8_config("block", None, (64, 64), **extra)
        if kind == "group":
            config["config_groups"]["group_0"]["weights"] = {
                "num_bits": 8,
                "type": "float",
                "strategy": "group",
                "group_size": 128,
            }
        return config
    return fp8_config(kind, None, **extra)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(2, 40).map(lambda n: 8 * n),
    cols=st.integers(2, 12).map(lambda n: 32 * n),
    true=st.sampled_from(list(BLOCKS)),
    said=st.sampled_from([*BLOCKS, "ignored", "no target", "int4"]),
)
def test_shapes_against_configs(rows, cols, true, said):
    assume(true != "group" or cols % 128 == 0)
    fp8, scale, truth = stored(rows, cols, BLOCKS[true])
    if true == "tensor":
        scale = scale.reshape(1)
    kind = said if said in BLOCKS else true
    config = config_of(kind)
    group = config["config_groups"]["group_0"]
    if said == "ignored":
        config["ignore"] = ["proj"]
    if said == "no target":
        group["targets"] = ["re:other.*"]
    if said == "int4":
        group["weights"] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    fits = Grid(BLOCKS[kind]).fits(rows, cols, scale.shape)
    assume(said not in BLOCKS or said == true or not fits)  # else the file is what its config says
    shape = "U8" if true == "mx" else ""
    state = {"proj.weight": fp8, "proj.weight_scale": encode_scale(scale, torch.uint8) if shape else scale}
    try:
        module, warned = loaded(state, config, rows, cols)
    except ctfp8.CheckpointError as error:
        assert "does not say which" in str(error)  # noqa: PT017 - two kinds of blocks that give as many scales
        return
    assert torch.equal(module.proj.weight.double(), truth)
    assert bool(warned) == (said != true)


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8", "modelopt"])
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("tensor", [(), (1,), (1, 1), (1, 1, 1)]),
        ("channel", [(-1,), (-1, 1), (1, -1), (-1, 1, 1, 1)]),
        ("block", [(2, 3), (2, 1, 3, 1)]),
    ],
)
def test_every_shape_of_a_scale(method, kind, shapes):
    rows, cols = 160, 320
    fp8, scale, truth = stored(rows, cols, BLOCKS[kind])
    config = {
        "compressed-tensors": config_of(kind),
        "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128] if kind == "block" else None},
        "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO" if kind == "block" else "FP8"},
    }[method]
    for shape in shapes:
        for name in ("weight_scale", "weight_scale_inv"):
            state = {"proj.weight": fp8, f"proj.{name}": scale.reshape(shape), "proj.input_scale": torch.ones(1)}
            module, _ = loaded(state, config, rows, cols)
            assert torch.equal(module.proj.weight.double(), truth)


@pytest.mark.parametrize("shape", [(1,), (), (1, 1)])
@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_a_weight_of_one_block_and_a_head_of_one_scale(method, shape):
    config = config_of("block") if method != "fp8" else {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for rows, cols in ((64, 64), (128, 128), (384, 256)):
        fp8, scale, truth = stored(rows, cols, (0, 0))
        module, warned = loaded({"proj.weight": fp8, "proj.weight_scale": scale.reshape(shape)}, config, rows, cols)
        assert torch.equal(module.proj.weight.double(), truth)
        assert bool(warned) == (rows > 128)


@pytest.mark.parametrize(
    ("rows", "cols", "runs"),
    [
        (128, 128, (4, 1)), (320, 256, (5, 1)), (480, 128, (5, 1)), (300, 256, (6, 1)), (160, 96 * 5, (1, 5)), (256, 256, (8, 1)),
        (64, 128, (2, 1)), (160, 48, (4, 1)), (128, 128, (8, 1)), (128, 64, (8, 1)),
    ],
)  # fmt: skip
def test_blocks_that_begin_anew_in_each_part(rows, cols, runs):
    """One head after the other, or one rank's part: `k * ceil(rows / k / 128)` scales."""
    fp8, scale, truth = stored(rows, cols, (128, 128), runs)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    module, warned = loaded({"proj.weight": fp8, "proj.weight_scale_inv": scale}, config, rows, cols)
    assert torch.equal(module.proj.weight.double(), truth)
    assert "begin anew every" in warned[0]


@pytest.mark.parametrize(("rows", "cols", "heads"), [(576, 256, 3), (576, 256, 6), (224, 40, 4), (24576, 128, 128)])
def test_numbers_of_heads_tell_apart_what_shapes_do_not(rows, cols, heads):
    fp8, scale, _ = stored(rows, cols, (128, 128), (heads, 1))
    schemes = Schemes({"quant_method": "fp8", "weight_block_size": [128, 128]})
    tensors = InMemory({"q.weight": fp8, "q.weight_scale": scale})
    with pytest.raises(ctfp8.CheckpointError, match="does not say which"):
        resolve(tensors, schemes, "q.weight", Notes())
    schemes.heads = heads_of(
        {"text_config": {"num_attention_heads": heads, "num_key_value_heads": 1}, "id2label": {0: "a"}}
    )
    assert resolve(tensors, schemes, "q.weight", Notes()).grid == Grid((128, 128), (heads, 1))


def test_parts_of_which_there_could_be_several_numbers_are_refused_and_the_cure_works():
    fp8, scale, truth = stored(576, 256, (128, 128), (3, 1))
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(
        ctfp8.CheckpointError,
        match=r"each of 6 parts or .* of 3 parts or .* of 2 parts, .*Store one scale for each row",
    ):
        loaded({"proj.weight": fp8, "proj.weight_scale_inv": scale}, config, 576, 256)
    rows = torch.cat([torch.arange(2 * i, 2 * i + 2).repeat_interleave(128)[:192] for i in range(3)])
    module, _ = loaded({"proj.weight": fp8, "proj.weight_scale_inv": scale[rows]}, config, 576, 256)
    assert torch.equal(module.proj.weight.double(), truth)


@pytest.mark.parametrize("shape", [(64, 1), (128, 3), (3,), (7, 7), (2, 128, 1), (1, 7)])
@pytest.mark.parametrize("kind", ["channel", "block", "tensor"])
def test_a_shape_that_fits_no_scheme_is_refused_with_a_cure(kind, shape):
    state = {"proj.weight": torch.zeros(128, 128).to(FP8), "proj.weight_scale": torch.ones(shape)}
    with pytest.raises(ctfp8.CheckpointError, match=r"proj.weight_scale .*does not fit.*expected shape.*Add a group"):
        loaded(state, config_of(kind), 128, 128)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu, torch.float32])
@pytest.mark.parametrize("kind", ["mx", "block", "channel", "tensor"])
def test_powers_of_two_that_the_config_does_not_announce(kind, dtype):
    rows, cols = 96, 256
    fp8, scale, truth = stored(rows, cols, BLOCKS[kind])
    config = config_of(kind)
    config["config_groups"]["group_0"]["weights"].pop("scale_dtype", None)
    state = {"proj.weight": fp8, "proj.weight_scale": encode_scale(scale, dtype)}
    module, warned = loaded(state, config, rows, cols)
    assert torch.equal(module.proj.weight.double(), truth)
    # F8_E8M0 says what it is, and MXFP8 has bytes; elsewhere U8 could also be a scale that was cast by mistake
    assert bool(warned) == (dtype == torch.uint8 and kind != "mx")
    assert not warned or "proj.weight: scales stored as bytes" in warned[0]
    assert scheme(module).exponents == (dtype != torch.float32)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["q_b_proj", "b_proj", "lm_head", "gate", "mlp.gate_proj", "experts.3.w1", "layers.11.o_proj"]),
    listed=st.lists(
        st.sampled_from(["b_proj", "proj", "gate", "lm_head", "layers.1", "experts", "w1", "*", "*b_proj", "o_proj*", "re:.*", "mlp."]),
        max_size=3,
    ),
    method=st.sampled_from(["fp8", "modelopt", "compressed-tensors"]),
)  # fmt: skip
def test_names_against_lists(name, listed, method):
    """Whatever a list leaves out, by its whole name or a part of it: FP8 in the file is FP8, with its scale."""
    fp8, scale, truth = stored(32, 64, (0, 0))
    config = {
        "fp8": {"quant_method": "fp8", "modules_to_not_convert": listed},
        "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": listed},
        "compressed-tensors": config_of("tensor", ignore=listed),
    }[method]
    if method == "fp8":
        assume("re:.*" not in listed)
    parent, _, leaf = f"model.{name}".rpartition(".")
    module = nn.ModuleDict()
    inner = module
    for part in parent.split("."):
        inner[part] = nn.ModuleDict()
        inner = inner[part]
    inner[leaf] = nn.Linear(64, 32, bias=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ctfp8.load_state_dict(
            module, {f"model.{name}.weight": fp8, f"model.{name}.weight_scale": scale.reshape(1)}, config
        )
    assert torch.equal(inner[leaf].weight.double(), truth)
    assert sum(SAYS in str(w.message) for w in caught) <= 1


def _groups(**groups):
    """A config of several groups: name → (targets, kind, activation)."""
    config = fp8_config()
    config["config_groups"] = {
        name: {**copy.deepcopy(fp8_config(kind, activation)["config_groups"]["group_0"]), "targets": targets}
        for name, (targets, kind, activation) in groups.items()
    }
    return config


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("other", ["int8", "block", "channel"])
def test_of_groups_that_overlap_the_one_that_fits_counts(order, other):
    config = _groups(
        a=(["re:.*proj$"], "tensor", "tensor"), b=(["re:.*pro.$"], other if other != "int8" else "block", None)
    )
    if other == "int8":
        config["config_groups"]["b"] |= {"weights": INT8, "format": "int-quantized"}
    config["config_groups"] = {name: config["config_groups"][name] for name in order}
    fp8, scale, truth = stored(160, 256, (0, 0))
    state = {"proj.weight": fp8, "proj.weight_scale": scale.reshape(1), "proj.input_scale": torch.ones(1)}
    module, warned = loaded(state, config, 160, 256)
    assert torch.equal(module.proj.weight.double(), truth)
    assert (scheme(module).activation, warned) == ("tensor", [])


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("re:.*qkv_proj$", "q_proj"), ("re:.*qkv_proj$", "v_proj"), ("re:.*gate_up_proj$", "up_proj"), ("qkv_proj", "k_proj"),
        ("re:.*q_proj$", "qkv_proj"), ("re:.*up_proj$", "gate_up_proj"), ("*k_proj", "k_proj"), ("linear", "anything"),
    ],
)  # fmt: skip
def test_targets_by_fused_or_unfused_names(target, name):
    config = _groups(a=([target], "channel", "token"), b=(["re:none"], "block", "group"))
    fp8, scale, truth = stored(160, 256, (1, 0))
    module, warned = loaded({f"{name}.weight": fp8, f"{name}.weight_scale": scale}, config, 160, 256, name)
    assert torch.equal(getattr(module, name).weight.double(), truth)
    assert (str(scheme(module)), warned) == ("channel weights, token activations", [])


def test_what_quantizes_the_input_where_config_and_file_differ():
    fp8, scale, _ = stored(160, 256, (0, 0))
    state = {"proj.weight": fp8, "proj.weight_scale": scale.reshape(1)}
    static = {**state, "proj.input_scale": torch.full((1,), 0.5)}

    def activation(state, config):
        module, warned = loaded(state, config, 160, 256)
        return scheme(module).activation, "".join(warned)

    assert activation(static, fp8_config("tensor", "tensor")) == ("tensor", "")
    found, said = activation(state, fp8_config("tensor", "tensor"))
    assert found == "token"
    assert "no input_scale" in said
    found, said = activation(static, fp8_config("tensor", "token"))
    assert found == "token"
    assert "proj.input_scale: superfluous" in said
    found, said = activation(static, fp8_config("tensor", "tensor", ignore=["proj"]))
    assert found == "tensor"
    assert "leaves it out" in said
    config = fp8_config("tensor", "tensor")
    config["config_groups"]["group_0"]["targets"] = ["other"]
    assert activation(state, config)[0] == "none"


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("input_scale", torch.ones(1)), ("output_scale", torch.ones(1)), ("weight_zero_point", torch.zeros(64, 1).to(FP8)),
        ("weight_zero_point", torch.zeros(64, 1, dtype=torch.int8)), ("input_zero_point", torch.zeros(1)),
        ("weight_shape", torch.tensor([64, 128])), ("weight_global_scale", torch.ones(1)),
    ],
)  # fmt: skip
def test_what_is_superfluous_changes_nothing(leaf, value):
    fp8, scale, truth = stored(64, 128, (1, 0))
    state = {"proj.weight": fp8, "proj.weight_scale": scale, f"proj.{leaf}": value}
    module, warned = loaded(state, config_of("channel"), 64, 128)
    assert torch.equal(module.proj.weight.double(), truth)
    assert f"proj.{leaf}: superfluous" in warned[0]


@pytest.mark.parametrize(
    ("leaf", "value", "match"),
    [
        ("weight_zero_point", torch.ones(64, 1), "zero points that are not zero"),
        ("weight_global_scale", torch.full((1,), 2.0), "a second scale"),
        ("weight_shape", torch.tensor([64, 64]), "is not the shape of"),
        ("weight_g_idx", torch.zeros(128, dtype=torch.int32), "another order"),
    ],
)
def test_what_would_change_the_result_is_refused(leaf, value, match):
    fp8, scale, _ = stored(64, 128, (1, 0))
    with pytest.raises(ctfp8.CheckpointError, match=f"proj.{leaf} .*{match}"):
        loaded({"proj.weight": fp8, "proj.weight_scale": scale, f"proj.{leaf}": value}, config_of("channel"), 64, 128)


@pytest.mark.parametrize("kind", ["tensor", "channel", "block", "group"])
@pytest.mark.parametrize("zero", [0x00, 0x80])
def test_zero_scales_over_zeros(kind, zero):
    fp8, scale, truth = stored(160, 256, BLOCKS[kind])
    scale[0, 0] = 0
    first = next(iter(_pieces(160, BLOCKS[kind][0], 1))), next(iter(_pieces(256, BLOCKS[kind][1], 1)))
    at = tuple(slice(*place) for place in first)
    fp8.view(torch.uint8)[at] = zero
    truth[at] = 0
    state = {"proj.weight": fp8, "proj.weight_scale": scale}
    module, warned = loaded(state, config_of(kind), 160, 256)
    assert torch.equal(module.proj.weight.double(), truth)
    assert not warned
    for bad in (0x01, 0x7F):
        fp8.view(torch.uint8)[at[0].start, at[1].start] = bad
        with pytest.raises(ctfp8.CheckpointError, match="proj.weight_scale .*scale 0.0 at index"):
            loaded(state, config_of(kind), 160, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [torch.ones(1), torch.full((64, 1), 1e-3)])
def test_a_plain_weight_beside_a_scale_is_what_it_is(dtype, scale):
    """Quantized and stored dequantized, or never quantized: the scale is not applied again."""
    weight = ((torch.randn(64, 128) * 60).clamp(-448, 448).to(FP8).float() * 1e-3).to(dtype)
    other = stored(64, 128, (1, 0))

    def module() -> nn.Module:
        return nn.Sequential(*(nn.Linear(128, 64, bias=False, dtype=dtype) for _ in range(2)))

    state = {"0.weight": weight, "0.weight_scale": scale, "1.weight": other[0], "1.weight_scale": other[1]}
    with pytest.warns(UserWarning, match="0.weight_scale: superfluous"):
        got = ctfp8.load_state_dict(module(), state, config_of("channel"))
    assert torch.equal(got[0].weight, weight)
    state["0.weight"], state["0.weight_scale"] = other[0].to(dtype), torch.full((64, 1), 1e-3)
    with pytest.raises(ctfp8.CheckpointError, match="0.weight .*its numbers are FP8 values, which 0.weight_scale"):
        ctfp8.load_state_dict(module(), state, config_of("channel"))
