"""GPTQModel: python write_gptqmodel.py SOURCE METHOD OUT, weights rounded to FP8 without calibration"""

import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # on two cores it makes one, and then asks for two

from gptqmodel import GPTQModel
from gptqmodel.quantization import FP8Config

source, method, out = sys.argv[1:]
model = GPTQModel.load(source, FP8Config(weight_scale_method=method), device="cpu")
model.quantize(calibration=None)
model.save(out)
