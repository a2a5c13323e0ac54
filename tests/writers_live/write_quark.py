"""AMD Quark: python write_quark.py SOURCE SCHEME OUT, with the name of one of its schemes for language models"""

import sys

import torch
from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

source, scheme, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
config = LLMTemplate.get(model.config.model_type).get_config(scheme=scheme)
batches = [torch.randint(0, 250, (64,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
quantizer = ModelQuantizer(config)
model = quantizer.freeze(quantizer.quantize_model(model, DataLoader(batches, batch_size=1)))
with torch.no_grad():
    export_safetensors(model=model, output_dir=out)
