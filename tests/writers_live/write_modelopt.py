"""NVIDIA ModelOpt: python write_modelopt.py SOURCE CONFIG OUT, with the name of one of mtq's configs"""

import sys

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

source, config, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()


def calibrate(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for seed in range(4):
            model(torch.randint(0, 250, (1, 64), generator=torch.Generator().manual_seed(seed)))


export_hf_checkpoint(mtq.quantize(model, getattr(mtq, config), calibrate), export_dir=out)
