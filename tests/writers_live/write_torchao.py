"""torchao, through transformers: python write_torchao.py SOURCE GRANULARITY OUT"""

import sys

import torchao.quantization as ao
from transformers import AutoModelForCausalLM, TorchAoConfig

source, granularity, out = sys.argv[1:]
config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=getattr(ao, granularity)())
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=TorchAoConfig(config))
model.save_pretrained(out)
