"""compressed-tensors alone: python write_compressed_tensors.py SOURCE SCHEME OUT"""

import sys

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM

source, scheme, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
group = preset_name_to_scheme(scheme, ["Linear"])
config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="initialized")
apply_quantization_config(model, config)
for module in model.modules():
    if hasattr(module, "weight_scale"):
        low, high = module.weight.amin(1, keepdim=True), module.weight.amax(1, keepdim=True)
        scale, _ = calculate_qparams(low, high, group.weights)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        module.quantization_status = QuantizationStatus.FROZEN
compressor = ModelCompressor.from_pretrained_model(model)
with torch.no_grad():
    compressor.compress_model(model)
model.save_pretrained(out)
compressor.update_config(out)
