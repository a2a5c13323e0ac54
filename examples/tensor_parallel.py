"""One model on several processes: each reads and holds its part of the FP8 weights, all compute the same tokens.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py [CKPT] [--experts]

CKPT is an FP8 checkpoint; without one, the shipped byte-level Llama serves. `--experts` gives each rank whole experts of a
mixture instead of a part of each. On GPUs torch.distributed uses NCCL, on Intel's XCCL, on CPUs gloo.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer
from transformers.distributed import DistributedConfig

import ctfp8_compile as ctfp8

SHIPPED = Path(__file__).parent / "models" / "llama"


def main() -> None:
    folder = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), SHIPPED)
    dist.init_process_group()
    ranks = dist.get_world_size()
    experts = {"ep_size": ranks} if "--experts" in sys.argv else {}
    model = ctfp8.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=ranks, **experts))
    here = torch.tensor([sum(p.nbytes for p in model.parameters() if p.dtype == torch.float8_e4m3fn)])
    sizes = [torch.empty_like(here) for _ in range(ranks)]
    dist.all_gather(sizes, here)
    inputs = AutoTokenizer.from_pretrained(folder)("def area(width, height):", return_tensors="pt")
    with torch.no_grad():
        eager = model(**inputs, use_cache=False).logits
        compiled = torch.compile(model, backend="ctfp8", fullgraph=True)(**inputs, use_cache=False).logits
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    if dist.get_rank() == 0:
        print("bytes of FP8 weights on each rank:", [int(size) for size in sizes])
        print(f"largest difference of compiled logits from eager ones: {(compiled - eager).abs().max():.4f}")
        print("tokens:", tokens.tolist())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
