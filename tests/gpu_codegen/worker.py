"""Compiles cases for one GPU that is not there and prints, as JSON, what each would launch.

python worker.py '{"gpu": {…}, "cases": [{…}, …]}'
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import functools
import json
import tempfile
import traceback
from dataclasses import asdict
from typing import Any

import cubins
import fake_device
import fbgemm_stub
import torch
from cases import Case, Gpu
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

DATA = Path(__file__).parent.parent / "data"


def main() -> None:
    wanted = json.loads(sys.argv[1])
    gpu = Gpu(**wanted["gpu"])
    cases = [Case(**{**c, "options": tuple(map(tuple, c["options"]))}) for c in wanted["cases"]]
    device, _, capability = gpu.target.partition(":sm")
    fake_device.install(device, (int(capability[:-1]), int(capability[-1])) if capability else None)
    if gpu.fbgemm:
        fbgemm_stub.install()
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is not part of the answer
    for case in cases:
        try:
            result = compiled(case, device, gpu.kernels)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
        print(json.dumps(result), file=out, flush=True)


def compiled(case: Case, device: str, kernels: str) -> dict[str, Any]:
    """Through the door users take: load the checkpoint, `torch.compile(backend="ctfp8")`, call."""
    import played

    import ctfp8_compile as ctfp8
    from ctfp8_compile.inductor import packed, prepacked

    # addresses that do not exist are not packed, and tell nothing apart
    packed.WithPacked.__call__ = lambda self, *args: self.compiled(*args)
    prepacked.WithPrepacked.values = lambda self, tensors: self._make(tensors).values
    torch._dynamo.reset()
    model, mode = _model(case.model, case.experts, case.part, device)
    module, args, kwargs = _call(model, case, mode, device)
    before = len(ctfp8.compiled_reports())
    with mode, torch.no_grad(), played.playing(device) as (launches, modules):
        compiled = torch.compile(
            module,
            backend="ctfp8",
            fullgraph=True,
            dynamic=case.rows is None,
            options={**dict(case.options), "ctfp8.kernels": kernels},
        )
        compiled(*args, **kwargs)
    report = ctfp8.compiled_reports()[before:]
    result = {
        "launches": [asdict(launch) for launch in launches],
        "rewritten": {e.name: e.kernel for r in report for e in r.rewritten},
        "kept": {e.name: e.reason for r in report for e in r.kept},
        "graphs": len(modules),
        "calls": [_body(m) for m in modules],
        "built": [],
    }
    if case.build != "no":
        sources = dict.fromkeys(launch.source for launch in launches if launch.source)
        result["built"] = [cubins.build(source, case.build == "all") for source in sources]
    return result


def _body(module: str) -> str:
    return module.partition("    def call(")[2].partition("runner = Runner")[0]


@functools.cache
def _model(name: str, experts: str | None, part: str, device: str) -> tuple[nn.Module, FakeTensorMode]:
    """A model whose tensors are on the device, and the mode that keeps them."""
    import ctfp8_compile as ctfp8

    options: dict[str, Any] = {"experts_implementation": experts} if experts else {}
    if device == "xpu":
        options["attn_implementation"] = "eager"  # torch's choice of a kernel asserts without that device
    architecture, _, scheme = name.rpartition(":")[2].partition("/")
    if name.startswith("forged:"):
        from support.architectures import Sizes
        from support.forge import forge

        with tempfile.TemporaryDirectory() as folder:
            forged = forge(architecture, scheme, Path(folder), sizes=Sizes(hidden=512, intermediate=1024, expert=512))
            model = ctfp8.from_pretrained(forged.folder, forged.auto_class, **options)
    elif name.startswith("own:"):
        from modules import own

        model = own(architecture, scheme)
    else:
        model = ctfp8.from_pretrained(DATA / architecture / scheme, **options)
    if part == "decoder":
        model = ctfp8.StaticCacheDecoder(model, 1, 64, dtype="fp8")
        for layer in model.cache.layers:
            layer.device = torch.device(device)
    mode = FakeTensorMode()
    on_device(model, mode, device)
    return model, mode


def on_device(model: nn.Module, mode: FakeTensorMode, device: str) -> None:
    """Makes every tensor a fake one on the device; what is shared stays shared."""
    seen: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in seen:
            with mode:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            seen[id(tensor)] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
        return seen[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor):
                    tensors[name] = fake(tensor)


def _call(
    model: nn.Module, case: Case, mode: FakeTensorMode, device: str
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    rows = case.rows or 23
    with mode:
        if case.model.startswith("own:"):
            return model, (torch.empty((rows, 512), dtype=torch.bfloat16, device=device),), {}
        if case.part == "model":
            ids = torch.empty((1, rows), dtype=torch.int64, device=device)
            return model, (ids,), {"use_cache": False}
        if case.part == "decoder":
            ids = torch.empty((1, rows), dtype=torch.int64, device=device)
            return model, (ids, torch.empty((), dtype=torch.int64, device=device)), {}
        config = model.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        hidden = torch.empty((1, rows, config.hidden_size), dtype=torch.bfloat16, device=device)
        rotary = torch.empty((1, rows, head), dtype=torch.bfloat16, device=device)
        return model.model.layers[0], (hidden,), {"position_embeddings": (rotary, rotary)}


if __name__ == "__main__":
    main()
