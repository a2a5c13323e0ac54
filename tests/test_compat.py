"""Private names of torch and transformers: named in one place, found in the installed release; releases that are tested."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import conftest
import pytest
import torch
import transformers
from support.tested import README, rendered
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile import compat
from ctfp8_compile.hf import compat as hf_compat
from ctfp8_compile.hf.quantizer import Quantizer

PACKAGE = Path(ctfp8.__file__).parent
NAMES = [
    *((compat, "torch", torch.__version__, name) for name in compat.PRIVATE),
    *((hf_compat, "transformers", transformers.__version__, name) for name in hf_compat.PRIVATE),
]


@pytest.mark.parametrize(("module", "distribution", "version", "name"), NAMES, ids=[name for *_, name in NAMES])
def test_a_private_name_is_there_and_its_line_says_so(module, distribution, version, name):
    assert getattr(module, name) is not None
    minor = ".".join(map(str, compat.release(version)[:2]))
    if minor in {".".join(map(str, compat.release(v)[:2])) for v in compat.tested(distribution)}:
        assert minor in module.PRIVATE[name][1].split()


def test_no_other_file_names_what_is_private():
    private = r"torch\._(?!_version__)|torch\.fx\.experimental|torch\.export\.pt2_archive|transformers\.\w+\.\w+ import"
    private += r"|\._(?:set_replace_hook|example_inputs|range_constraints)\b"
    for file in PACKAGE.rglob("*.py"):
        lines = [line.partition("#")[0] for line in file.read_text().splitlines() if "`" not in line]
        assert file.name == "compat.py" or not [line for line in lines if re.search(private, line)], file


def test_every_hook_of_the_quantizer_is_one_that_transformers_calls():
    base = hf_compat.HfQuantizer
    own = {n for n, member in vars(Quantizer).items() if inspect.isfunction(member) and not n.startswith("__")}
    hooks = {n for n in own if hasattr(base, n)}
    assert {n for n in own - hooks if not n.startswith("_")} == {"take_over_saving"}
    for name in hooks:
        theirs, ours = (inspect.signature(getattr(c, name)).parameters.values() for c in (base, Quantizer))
        flexible = any(p.kind is p.VAR_KEYWORD for p in ours)
        assert flexible or {p.name for p in theirs if p.default is p.empty} <= {p.name for p in ours}, name


def test_a_private_name_that_is_gone_is_one_sentence():
    table = {"gone": ("torch._no_such_room.gone", "2.11 2.13")}
    with pytest.raises(
        ctfp8.UsageError, match=r"torch 2\S+ has no torch\._no_such_room\.gone, .* seen in 2\.11, 2\.13\."
    ):
        compat.look_up("torch", table, compat.__name__, "gone")


@pytest.fixture
def _known(monkeypatch, tmp_path):
    """Releases 2.13 and 2.14.1 are tested, 5.24 is."""
    file = tmp_path / "tested.json"
    rows = [("2.14.1+cu130", "5.24.0"), ("2.13.0+cpu", "5.23.0")]
    file.write_text(json.dumps([{"torch": a, "transformers": b} for a, b in rows]))
    monkeypatch.setattr(compat, "TESTED", file)
    for function in (compat.tested, compat.warn_if_newer):
        function.cache_clear()
    yield
    for function in (compat.tested, compat.warn_if_newer):
        function.cache_clear()


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("installed", ["2.15.0", "2.100.0+cpu", "3.0.0a0"])
def test_a_newer_release_warns_once_and_goes_on(monkeypatch, installed):
    monkeypatch.setattr(compat, "version", lambda distribution: installed)
    compat.__dict__.pop("OpOverload", None)
    with pytest.warns(UserWarning, match=rf"torch {re.escape(installed)} is newer .* \(2\.13\.0, 2\.14\.1\)"):
        assert compat.OpOverload is torch._ops.OpOverload
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compat.look_up("torch", compat.PRIVATE, compat.__name__, "OpOverload") is torch._ops.OpOverload


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("installed", ["2.14.9", "2.13.0+cpu", "2.12.0", "unknown"])
def test_a_tested_or_older_release_does_not_warn(monkeypatch, installed):
    monkeypatch.setattr(compat, "version", lambda distribution: installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_if_newer("torch")


def test_the_versions_of_a_package_on_the_path_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "not_installed_here", types.SimpleNamespace(__version__="1.2.3"))
    assert compat.version("not-installed-here") == "1.2.3"
    assert compat.version("neither-installed-nor-imported") == "unknown"
    assert compat.version("torch").partition("+")[0] == torch.__version__.partition("+")[0]


def test_the_readme_lists_the_combinations_of_the_record():
    assert rendered(json.loads(compat.TESTED.read_text())) in README.read_text()


@pytest.mark.parametrize(("worker", "status", "recorded"), [(False, 0, [2]), (True, 0, []), (False, 1, [])])
def test_only_a_whole_suite_that_passed_is_recorded(monkeypatch, worker, status, recorded):
    """One of pytest-xdist's processes sees a part of it."""
    found: list[int] = []
    monkeypatch.setattr(conftest.tested, "record", found.append)
    config = types.SimpleNamespace(getoption=lambda name: True, **({"workerinput": {}} if worker else {}))
    conftest.pytest_terminal_summary(types.SimpleNamespace(stats={"passed": [1, 2]}), status, config)
    assert found == recorded


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_cache_goes_by_the_name_its_release_gives_it(kind):
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, is_decoder=True)).eval()
    cache = ctfp8.static_cache(model, max_length=16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.arange(4)[None], **{hf_compat.cache_argument(model): cache})
    assert cache.get_seq_length() == 4


def test_a_model_without_a_cache_generates_no_text():
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = AutoModel.from_config(AutoConfig.for_model("vit", **sizes))
    with pytest.raises(ctfp8.UsageError, match="ViTModel does not generate text"):
        hf_compat.cache_argument(vision)


def test_an_export_where_the_package_is_on_the_path_only(tmp_path):
    """As in a checkout that was never installed: no distribution is found."""
    code = """
import importlib.metadata, sys
def missing(name): raise importlib.metadata.PackageNotFoundError(name)
import torch, transformers, compressed_tensors, ctfp8_compile as ctfp8
importlib.metadata.version = missing
layer = torch.nn.Linear(16, 16, bias=False)
ctfp8.export(layer, (torch.ones(2, 16),), path=sys.argv[1])
print(ctfp8.load(sys.argv[1]).manifest.versions["ctfp8-compile"])
"""
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "m.pt2"], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split()[-1] == ctfp8.__version__
