"""Releases of kernel libraries belong to releases of torch: another pair would load, and crash or compute nonsense."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from ctfp8_compile.lowering import fbgemm
from ctfp8_compile.target import KERNEL_LIBRARIES


@pytest.mark.parametrize(
    ("library", "torch_release", "distribution", "release", "why_not"),
    [
        ("fbgemm", "2.11.0+cu130", "fbgemm-gpu-genai", "1.6.0", None),
        ("fbgemm", "2.13.0+cu130", "fbgemm-gpu-genai", "1.8.1", None),
        ("fbgemm", "2.13.0+cu130", "fbgemm-gpu-genai", "1.7.0",
         "fbgemm-gpu-genai 1.7.0 is not built for torch 2.13, 1.8 is: pip install 'fbgemm-gpu-genai==1.8.*'"),
        ("fbgemm", "2.13.0", "fbgemm-gpu-genai", "1.80.0",
         "fbgemm-gpu-genai 1.80.0 is not built for torch 2.13, 1.8 is: pip install 'fbgemm-gpu-genai==1.8.*'"),
        ("fbgemm", "2.99.0", "fbgemm-gpu-genai", "1.9.0", None),  # nobody knows
        ("mslk", "2.11.0", "mslk-cuda", "1.1.0", None),
        ("mslk", "2.11.0", "mslk-cuda", "1.2.0",
         "mslk-cuda 1.2.0 is not built for torch 2.11, 1.1 is: pip install 'mslk-cuda==1.1.*'"),
        ("mslk", "2.11.0", "mslk", "0.0.0", None),  # of torch's own index, for any; PyPI's is empty, and does not load
    ],
)  # fmt: skip
def test_a_release_of_another_torch_is_refused(monkeypatch, library, torch_release, distribution, release, why_not):
    def version(name: str) -> str:
        if name != distribution:
            raise importlib.metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", torch_release)
    assert KERNEL_LIBRARIES[library].mismatch() == why_not
    if why_not is not None:  # and with a GPU, before anything of it is loaded, that is the check's sentence
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert fbgemm.missing.__wrapped__(library) == why_not


def test_a_library_that_is_absent_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for library, distribution in (("fbgemm", "fbgemm-gpu-genai"), ("mslk", "mslk-cuda")):
        if KERNEL_LIBRARIES[library].installed() is None:
            why = fbgemm.missing.__wrapped__(library)
            assert why.startswith(f"{distribution} is not installed, or does not load (")
            assert why.endswith(f"pip install {distribution}")
