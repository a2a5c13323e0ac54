"""Language models, encoders and classifiers in onnxruntime and OpenVINO: numbers and texts of ours in float32."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import DATA, fp8_config, quantize
from safetensors.torch import save_file
from support.runtimes import compiled, decoder, fp8_in_openvino, in_steps, onnx_types, session

import ctfp8_compile as ctfp8

MODELS = DATA.parent.parent / "examples" / "models"
EXAMPLE = DATA.parent.parent / "examples" / "onnx_openvino.py"
PROMPT, NEW = "Return a list of ", 24


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`files("moe", ".xml")`: a shipped model, written once; `files("moe", None)`: the same in float32."""
    made, folder = {}, tmp_path_factory.mktemp("files")

    def file(name, suffix):
        if (name, suffix) not in made:
            if suffix is None:
                made[name, None] = ctfp8.from_pretrained(MODELS / name, dtype=torch.float32)
            else:
                path = folder / f"{name}{suffix}"
                ctfp8.export(ctfp8.from_pretrained(MODELS / name), path=path)
                made[name, suffix] = path
        return made[name, suffix]

    return file


SHIPPED = pytest.mark.parametrize(
    ("name", "suffix"), [("llama", ".onnx"), ("moe", ".xml"), ("moe", ".onnx"), ("llama", ".xml")]
)


@pytest.mark.long
@pytest.mark.ci("llama-.onnx", "moe-.xml")
@SHIPPED
def test_a_shipped_model(name, suffix, files):
    """A padded batch in several calls, then a text, greedily; what a text left behind does not reach the next."""
    path, model = files(name, suffix), files(name, None)
    run = decoder(path)
    ids = np.arange(3, 33).reshape(2, 15)
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
        call = {"attention_mask": torch.from_numpy(mask), "position_ids": positions, "use_cache": False}
        want = model(torch.from_numpy(ids), **call).logits.numpy()
    for steps in ([15], [9, 1, 5]):
        assert np.abs(in_steps(run, ids, mask, steps) - want)[mask.astype(bool)].max() < 1e-4
    tokens = transformers.AutoTokenizer.from_pretrained(MODELS / name)
    inputs = tokens(PROMPT, return_tensors="pt")
    text = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0].numpy()
    run.begin(1)
    got = inputs.input_ids.numpy()
    new = got
    while got.shape[1] < len(text):
        at = np.arange(got.shape[1] - new.shape[1], got.shape[1])[None]
        new = run(new, np.ones_like(got), at)[:, -1:].argmax(-1)
        got = np.concatenate([got, new], 1)
    assert got[0].tolist() == text.tolist()
    sizes = [path, path.with_name(f"{path.name}.data")] if suffix == ".onnx" else [path.with_suffix(".bin")]
    assert sum(p.stat().st_size for p in sizes) <= 1.05 * (MODELS / name / "model.safetensors").stat().st_size
    if suffix == ".onnx":
        assert onnx_types(path)["FLOAT8E4M3FN"] == {"llama": 35, "moe": 24}[name]
    else:
        assert fp8_in_openvino(compiled(path)) == {"llama": 35, "moe": 16}[name]  # of experts it makes float32


RUNS = """
import sys
for name in ("torch", "transformers", "ctfp8_compile"):
    sys.modules[name] = None  # an import of them fails
sys.argv = ["example", "run", *sys.argv[2:]]
import runpy
runpy.run_path({example!r}, run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.ci("llama-.onnx", "moe-.xml")
@SHIPPED
def test_a_process_without_torch_writes_the_text_of_ours(name, suffix, files):
    arguments = [files(name, suffix), MODELS / name / "tokenizer.json", PROMPT]
    out = subprocess.run([sys.executable, "-c", RUNS.format(example=str(EXAMPLE)), "-", *map(str, arguments)],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert out.returncode == 0, out.stderr
    tokens = transformers.AutoTokenizer.from_pretrained(MODELS / name)
    inputs = tokens(PROMPT, return_tensors="pt")
    text = files(name, None).generate(**inputs, max_new_tokens=64, do_sample=False)[0]
    assert out.stdout.rstrip("\n") == tokens.decode(text, skip_special_tokens=True).rstrip("\n")


@pytest.mark.long
@pytest.mark.ci("qwen3/FP8-.onnx", "qwen3moe/MXFP8-.xml")
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("name", ["llama/FP8_BLOCK", "llama/MXFP8", "qwen3/FP8", "qwen3moe/MXFP8", "mixtral/FP8_BLOCK"])
def test_schemes_of_checkpoints(name, suffix, tmp_path):
    path = tmp_path / f"m{suffix}"
    ctfp8.export(ctfp8.from_pretrained(DATA / name), path=path)
    ids = np.arange(3, 25).reshape(2, 11)
    with torch.no_grad():
        want = ctfp8.from_pretrained(DATA / name, dtype=torch.float32)(torch.from_numpy(ids), use_cache=False).logits
    got = in_steps(decoder(path), ids, np.ones_like(ids), [6, 1, 4])
    assert np.abs(got - want.numpy()).max() < 1e-4


def _checkpoint(folder, model):
    """A model of transformers, its linears FP8 with a scale per channel, as a checkpoint."""
    state = {}
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.contiguous().clone()
        if name in linears:
            state[name], state[f"{name}_scale"] = quantize(tensor.float())
    folder.mkdir()
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": fp8_config()}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


@pytest.mark.long
@pytest.mark.ci("BertModel", "LlamaForSequenceClassification")
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize(
    ("name", "config", "outputs"),
    [
        ("BertModel", transformers.BertConfig(**SMALL), ("last_hidden_state", "pooler_output")),
        ("BertForSequenceClassification", transformers.BertConfig(**SMALL, num_labels=3), ("logits",)),
        (
            "LlamaForSequenceClassification",
            transformers.LlamaConfig(**SMALL, num_labels=3, pad_token_id=0),
            ("logits",),
        ),
    ],
)
def test_models_that_read_a_text_at_once(name, config, outputs, suffix, tmp_path):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    folder = _checkpoint(tmp_path / "ckpt", cls(config).bfloat16().eval())
    path = tmp_path / f"m{suffix}"
    done = ctfp8.export(ctfp8.from_pretrained(folder, cls), path=path)
    assert done.outputs == outputs
    ids = np.arange(5, 35).reshape(3, 10)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["attention_mask"][1, 6:] = feed["input_ids"][1, 6:] = 0
    call = {key: torch.from_numpy(value) for key, value in feed.items()}
    with torch.no_grad():
        want = ctfp8.from_pretrained(folder, cls, dtype=torch.float32)(**call)
    if "token_type_ids" in done.inputs:
        feed["token_type_ids"] = np.zeros_like(ids)
    got = session(path).run(None, feed) if suffix == ".onnx" else list(compiled(path)(feed).values())
    kept = feed["attention_mask"].astype(bool)
    for key, value in zip(outputs, got, strict=True):
        difference = np.abs(value - want[key].numpy())
        assert (difference[kept] if key == "last_hidden_state" else difference).max() < 1e-4, key


CLIP = transformers.CLIPConfig(
    text_config={k: v for k, v in SMALL.items() if k != "vocab_size"} | {"vocab_size": 128, "eos_token_id": 34},
    vision_config={k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8},
    projection_dim=32,
)


@pytest.mark.quick("CLIPModel")
@pytest.mark.parametrize(("name", "config"), [("CLIPModel", CLIP), ("CLIPVisionModel", CLIP.vision_config)])
def test_a_model_that_sees_says_how(name, config, tmp_path):
    folder = _checkpoint(tmp_path / "ckpt", getattr(transformers, name)(config).bfloat16().eval())
    model = ctfp8.from_pretrained(folder, getattr(transformers, name))
    with pytest.raises(ctfp8.UsageError, match=rf"^{name} .*Pass the arguments of one"):
        ctfp8.export(model, path=tmp_path / "m.onnx")


@pytest.mark.long
@pytest.mark.ci(".onnx")
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_one_call_of_a_model_that_sees(suffix, tmp_path):
    """What it returns within others is an output by the names of both."""
    folder, path = (
        _checkpoint(tmp_path / "ckpt", transformers.CLIPModel(CLIP).bfloat16().eval()),
        tmp_path / f"m{suffix}",
    )
    call = {"input_ids": torch.arange(5, 35).reshape(3, 10), "pixel_values": torch.randn(3, 3, 16, 16)}
    rows = torch.export.Dim("rows")
    model = ctfp8.from_pretrained(folder, transformers.CLIPModel)
    done = ctfp8.export(model, kwargs=call, path=path, dynamic_shapes={name: {0: rows} for name in call})
    assert "vision_model_output.last_hidden_state" in done.outputs
    feed = {name: value.numpy()[:2] for name, value in call.items()}
    got = session(path).run(None, feed) if suffix == ".onnx" else list(compiled(path)(feed).values())
    with torch.no_grad():
        model = ctfp8.from_pretrained(folder, transformers.CLIPModel, dtype=torch.float32)
        want = model(**{name: value[:2] for name, value in call.items()})
    for name, value in zip(done.outputs, got, strict=True):
        outer, _, inner = name.partition(".")
        exact = want[outer][inner] if inner else want[outer]
        assert np.abs(value - exact.numpy()).max() < 1e-4, name
