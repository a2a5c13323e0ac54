"""An FP8 checkpoint in ONNX Runtime and in OpenVINO: written once with ctfp8, run where there is no torch.

    python examples/onnx_openvino.py                               # both, with the shipped Llama, in a process each
    python examples/onnx_openvino.py write CKPT llama.onnx         # or llama.xml
    python examples/onnx_openvino.py run llama.onnx CKPT/tokenizer.json "Return a list of "

To run needs numpy and tokenizers, and onnxruntime or openvino.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

MODEL = Path(__file__).parent / "models" / "llama"
PROMPT = "Return a list of "
NEW_TOKENS = 64


class OnnxRuntime:
    """A decoder whose cache goes in and out."""

    def __init__(self, path: str):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.past = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), types[i.type])  # no tokens yet
            for i in self.session.get_inputs()
            if i.name.startswith("past_key_values.")
        }

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        found = dict(zip(self.outputs, self.session.run(None, inputs | self.past), strict=True))
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        return found["logits"]


class OpenVino:
    """A decoder that keeps its cache itself; `beam_idx` says which row of the batch each goes on from."""

    def __init__(self, path: str):
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}  # by default bfloat16 where the processor has it
        self.request = openvino.compile_model(path, "CPU", settings).create_infer_request()

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        self.request.infer(inputs | {"beam_idx": np.zeros(1, np.int32)})
        return self.request.get_tensor("logits").data


def generate(path: str, tokenizer: str, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """The likeliest token at each step, until one ends the text: 0, of the shipped models."""
    tokens = Tokenizer.from_file(tokenizer)
    text = tokens.encode(prompt).ids
    model = (OpenVino if path.endswith(".xml") else OnnxRuntime)(path)
    ids = np.array([text])  # first the prompt, then token by token
    for _ in range(new_tokens):
        positions = np.arange(len(text) - ids.shape[1], len(text))[None]
        logits = model(input_ids=ids, attention_mask=np.ones((1, len(text)), np.int64), position_ids=positions)
        ids = logits[:, -1:].argmax(-1)
        text.append(int(ids[0, 0]))
        if text[-1] == 0:
            break
    return tokens.decode(text)


def write(checkpoint: str, path: str) -> None:
    import ctfp8_compile as ctfp8

    model = ctfp8.from_pretrained(checkpoint)
    print(f"{Path(path).name}: {ctfp8.export(model, path=path)}")


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        write(*sys.argv[2:4])
    elif sys.argv[1:2] == ["run"]:
        print(generate(*sys.argv[2:5]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("llama.onnx", "llama.xml"):
                path = str(Path(folder) / name)
                for way in (["write", str(MODEL), path], ["run", path, str(MODEL / "tokenizer.json"), PROMPT]):
                    subprocess.run([sys.executable, __file__, *way], check=True)


if __name__ == "__main__":
    main()
