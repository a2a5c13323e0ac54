"""Releases of kernel libraries belong to releases of torch: another pair would load, and crash or compute nonsense."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from ctfp8_compile.lowering import choose, fbgemm, kernels_of
from ctfp8_compile.lowering.kernel import Kind, Problem
from ctfp8_compile.target import KERNEL_LIBRARIES, KernelLibrary, Target

UNPAIRED = KernelLibrary.unpaired  # conftest says that each torch has its releases


def _installed(monkeypatch: pytest.MonkeyPatch, torch_release: str, distribution: str, release: str) -> None:
    """As where nothing but this release of a kernel library is installed, beside this torch."""

    def version(name: str) -> str:
        if name != distribution:
            raise importlib.metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", torch_release)
    monkeypatch.setattr(KernelLibrary, "unpaired", UNPAIRED)


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
    _installed(monkeypatch, torch_release, distribution, release)
    assert KERNEL_LIBRARIES[library].mismatch() == why_not
    if why_not is not None:  # and with a GPU, before anything of it is loaded, that is the check's sentence
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert fbgemm._not_loaded.__wrapped__(library) == why_not


def test_a_library_that_is_absent_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for library, distribution in (("fbgemm", "fbgemm-gpu-genai"), ("mslk", "mslk-cuda")):
        if KERNEL_LIBRARIES[library].installed() is None:
            why = fbgemm._not_loaded.__wrapped__(library)
            assert why.startswith(f"{distribution} is not installed, or does not load (")
            assert why.endswith(f"pip install {distribution}")


NOBODY_KNOWS = "no release of fbgemm-gpu-genai is known to be built for torch {}, only for torch 2.11 to 2.14"


def _linear(scheme: str, kind: Kind = "linear") -> Problem:
    block, activation = ((128, 128), "group") if scheme == "block" else ((1, 1024), "token")
    weight = (1024, 1024) if kind == "linear" else (8, 1024, 1024)
    return Problem(kind, torch.bfloat16, (16, 1024), weight, block, activation, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU, where the library is declared")
@pytest.mark.parametrize(
    ("torch_release", "unknown"),
    [("2.11.0+cu130", None), ("2.12.1", None), ("2.13.0+cpu", None), ("2.14.1", None), ("2.14.0a0+git1", None),
     ("2.10.0", "2.10"), ("2.15.0", "2.15"), ("2.15.0+cu132", "2.15"), ("2.16.0.dev20261101+cu132", "2.16"), ("3.0.0", "3.0")],
)  # fmt: skip
@pytest.mark.parametrize("installed", [("", ""), ("fbgemm-gpu-genai", "1.9.0"), ("fbgemm-gpu-genai", "1.10.0")])
@pytest.mark.parametrize(
    ("kind", "scheme", "other"),
    [("linear", "row", "aten._scaled_mm"), ("grouped_mm", "row", "aten._scaled_grouped_mm"),
     ("linear", "block", "aten._scaled_mm"), ("grouped_mm", "block", "Triton weight-only")],
)  # fmt: skip
def test_a_torch_without_a_known_pair_takes_what_comes_next_and_says_why(
    monkeypatch, torch_release, unknown, installed, kind, scheme, other
):
    _installed(monkeypatch, torch_release, *installed)
    target = Target.parse("cuda:sm90")
    kernel, why = choose(kernels_of(target), _linear(scheme, kind), target)
    if unknown is None:
        assert kernel.library == "fbgemm"
        assert "known to be built" not in why
    else:
        assert kernel.name.startswith(other)
        assert (
            f"{NOBODY_KNOWS.format(unknown)}; ctfp8.kernels='fbgemm' takes the one that is installed all the same"
            in why
        )
    named = Target.parse("cuda:sm90+fbgemm")  # who names it has it
    assert choose(kernels_of(named), _linear(scheme, kind), named)[0].library == "fbgemm"


@pytest.mark.parametrize(
    ("library", "torch_release", "distribution", "why"),
    [
        ("mslk", "2.11.0", "mslk-cuda", None),
        ("mslk", "2.13.0", "mslk-cuda", "no release of mslk-cuda is known to be built for torch 2.13, only for torch 2.11"),
        ("mslk", "2.13.0", "mslk", None),  # of torch's own index, for any
        ("mslk", "2.13.0", "", "no release of mslk-cuda is known to be built for torch 2.13, only for torch 2.11"),
        ("fbgemm", "2.15.0", "", NOBODY_KNOWS.format("2.15")),
    ],
)  # fmt: skip
def test_what_is_known_is_of_the_distribution_that_is_installed(monkeypatch, library, torch_release, distribution, why):
    _installed(monkeypatch, torch_release, distribution, "1.1.0")
    assert KERNEL_LIBRARIES[library].unpaired() == why


def test_the_cure_for_an_absent_library_is_no_release_of_another_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _installed(monkeypatch, "2.15.0", "", "")
    monkeypatch.setattr(fbgemm.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("absent")))
    why = fbgemm._not_loaded.__wrapped__("fbgemm")
    assert why == f"fbgemm-gpu-genai is not installed, or does not load (absent), and {NOBODY_KNOWS.format('2.15')}"
