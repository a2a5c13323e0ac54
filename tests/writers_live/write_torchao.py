"""torchao, through transformers: python write_torchao.py SOURCE WAY OUT; activations are only quantized where there is a GPU"""

import sys

import torchao.quantization as ao
from transformers import AutoModelForCausalLM, TorchAoConfig

source, way, out = sys.argv[1:]
if way == "weight_only":
    config = ao.Float8WeightOnlyConfig()
else:
    config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=getattr(ao, way)())
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=TorchAoConfig(config))
model.save_pretrained(out)
