"""Reports and targets: what a user reads."""

from __future__ import annotations

import json
import re

import pytest
import torch

import ctfp8_compile as ctfp8
from ctfp8_compile.report import Entry, Report
from ctfp8_compile.target import Target

DONE = Entry("model.q_proj.weight", "linear", "kernel A", "", (16, 32), (1, 32), "token")
KEPT = Entry("model.<odd>.weight", "linear", "", "N=1000 is not a multiple of 16", (1000, 32), (1, 32), "token")
REPORT = Report("cuda:sm90", (DONE,), (KEPT,))


def test_summary_names_kernels_and_reasons():
    want = (
        "2 FP8 weights for cuda:sm90; 1 linear → kernel A; 1 dequantized in the graph (N=1000 is not a multiple of 16)"
    )
    assert REPORT.summary() == want
    assert re.search(r"1 × model.q_proj.weight +16×32 +linear → kernel A", str(REPORT))
    assert "dequantized: N=1000 is not a multiple of 16" in str(REPORT)


def test_to_dict_is_json():
    again = json.loads(json.dumps(REPORT.to_dict()))
    assert again["rewritten"][0]["name"] == "model.q_proj.weight"
    assert again["kept"][0]["reason"] == KEPT.reason


def test_html_is_self_contained_and_escaped(tmp_path):
    page = REPORT.to_html(tmp_path / "report.html").read_text()
    assert "model.&lt;odd&gt;.weight" in page
    assert "http" not in page


def test_a_weight_kept_in_one_graph_is_kept_in_all():
    other = Report("cuda:sm90", (Entry(KEPT.name, "linear", "kernel A", "", (1000, 32), (1, 32), "token"),), ())
    both = [entry for report in (other, REPORT) for entry in (*report.rewritten, *report.kept)]
    merged = Report.of("cuda:sm90", both)
    assert (len(merged.rewritten), len(merged.kept)) == (1, 1)


@pytest.mark.parametrize(
    ("text", "device", "capability"),
    [("cpu", "cpu", None), ("xpu", "xpu", None), ("cuda:sm90", "cuda", (9, 0)), ("cuda:sm120", "cuda", (12, 0))],
)
def test_targets(text, device, capability):
    target = ctfp8.Target.parse(text)
    assert (target.device, target.capability) == (device, capability)
    assert str(target) == text


def test_devices_without_kernels_have_a_sentence(monkeypatch):
    for device in ("mps", "mps:0", "hpu"):
        with pytest.raises(
            ctfp8.TargetError, match="no lowering for device type .* Elsewhere load with dequantize=True"
        ):
            Target.detect(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    for find in (lambda: Target.detect("cuda:0"), lambda: Target.parse("cuda")):
        with pytest.raises(ctfp8.TargetError, match="AMD's GPUs .* dequantize=True"):
            find()
    assert Target.parse("cuda:sm90").capability == (9, 0)  # for another machine


@pytest.mark.parametrize("text", ["", "gpu", "cpu:sm90", "cuda:90", "xpu:sm80"])
def test_not_a_target(text):
    with pytest.raises(ctfp8.TargetError, match="is not a target"):
        ctfp8.Target.parse(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
def test_plain_cuda_without_a_gpu():
    with pytest.raises(ctfp8.TargetError, match="no CUDA device; name the one to compile for"):
        ctfp8.Target.parse("cuda")
