"""The HTML picture of a rewrite, in a real browser."""

from __future__ import annotations

import collections
import html
import html.parser
import re
import shutil
import subprocess

import pytest
import torch
from conftest import IDS, fp8_config, quantize
from transformers import LlamaConfig, LlamaForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile.report import Entry, Report
from ctfp8_compile.report.html import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def entry(name, shape=(64, 64), kernel="kernel A", reason=""):
    return Entry(name, "linear", kernel, reason, shape, (1, 64), "token", before=("ctfp8.dequantize", "mm"))


def big_moe(layers: int = 80) -> Report:
    """Attention to an FP8 cache in each layer; two of them have experts that no kernel takes."""
    done, kept, cached = [], [], []
    for i in range(layers):
        cached.append(
            Entry(f"model.layers.{i}.self_attn", "attention to an FP8 cache", "fused attention", "", (1, 8, 4096, 129), (),
                  "none", before=("scaled_dot_product_attention",), after=("ctfp8.attention",), cache_bytes=8_454_144)
        )  # fmt: skip
        done += [entry(f"model.layers.{i}.self_attn.{w}_proj.weight", (4096, 4096)) for w in "qkvo"]
        for name, shape in (("gate_up_proj", (128, 3072, 4096)), ("down_proj", (128, 4096, 1536))):
            odd = i in (7, 41)
            (kept if odd else done).append(
                entry(
                    f"model.layers.{i}.mlp.experts.{name}",
                    shape,
                    "" if odd else "kernel B",
                    "odd <rows>" if odd else "",
                )
            )
    return Report("cuda:sm90", tuple(done), tuple(kept), experts_per_token=8, attention=tuple(cached))


def tags(text: str) -> collections.Counter[str]:
    """How many elements of each kind a page has; all of them are closed."""
    open_tags: list[str] = []
    found: collections.Counter[str] = collections.Counter()

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            found[tag] += 1
            if tag not in ("meta", "input"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Parser().feed(text)
    assert not open_tags
    return found


def test_alike_layers_are_drawn_once_and_bytes_add_up():
    text = page(big_moe())
    names = re.findall(r'class="name">([^<]*?) <', text)
    assert names == ["model.layers.0 … 6, 8 … 40, 42 … 79", "model.layers.7, 41"]
    assert "78 alike" in text
    assert "odd &lt;rows&gt;" in text
    dense = 4 * (4096 * 4096 + 4096 * 4 * 64)  # a scale for each row and 64 columns
    experts = 128 * ((3072 * 4096 + 3072 * 4 * 64) + (4096 * 1536 + 4096 * 4 * 24))
    assert f"{80 * (dense + experts) / 1e9:.3g} GB" in text
    assert f"{80 * (dense + experts / 16) / 1e9:.3g} GB" in text  # 8 of 128 experts
    share = 100 * dense / 4 / (80 * (dense + experts))
    cost = f"{dense / 4e6:.3g} MB ({share:.2g} %), {78 * dense / 4e9:.3g} GB ({78 * share:.2g} %) in 78 layers"
    assert text.count(cost) == 4
    assert "<b>80</b>attentions to a cache of 676 MB" in text
    assert "attention to an FP8 cache: keys 1×8×4096×129" in text


def test_a_page_grows_with_layers_that_differ_and_not_with_their_number():
    pages = {layers: page(big_moe(layers)) for layers in (60, 80, 800)}
    assert tags(pages[60]) == tags(pages[80]) == tags(pages[800])
    assert tags(pages[80]).total() < 400
    assert max(map(len, pages.values())) < min(map(len, pages.values())) + 100 < 30_000
    alternating = [entry(f"model.layers.{i}.mlp.up_proj.weight", (64 + i % 2, 64)) for i in range(80)]
    text = page(Report("cpu", tuple(alternating), ()))
    assert re.findall(r'class="name">([^<]*?) <', text) == ["model.layers.0, 2, …, 78", "model.layers.1, 3, …, 79"]


@pytest.mark.nightly
@pytest.mark.long
def test_eighty_layers_of_a_real_graph():
    """A Llama of 80 layers with an FP8 cache, traced, explained and drawn."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=80, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).bfloat16()
    state = dict(model.state_dict())
    for name in [n for n in state if n.endswith("_proj.weight")]:
        state[name], state[name + "_scale"] = quantize(state[name].float())
    model = ctfp8.load_state_dict(model, state, fp8_config(ignore=["lm_head"]))
    decoder = ctfp8.StaticCacheDecoder(model, 1, 64, dtype="fp8")
    for target, rows in (("cpu", 1), ("cuda:sm90", 1)):
        report = ctfp8.explain(decoder, (torch.tensor([[1]]), torch.tensor(0)), target=target)
        assert (len(report.rewritten) + len(report.kept), len(report.attention)) == (560, 80)
        text = page(report)
        assert text.count('class="layer"') == rows
        assert len(text) < 30_000
        assert tags(text).total() < 300
        lines = str(report).splitlines()
        assert [line.split()[0] for line in lines if "model.layers.*" in line] == ["80"] * 8
        assert len(lines) < 15


def test_an_entry_says_what_it_was_and_what_it_became(load):
    done = ctfp8.explain(load("qwen3moe/FP8_DYNAMIC"), (IDS,), {"use_cache": False}, target="cuda:sm90")
    assert done.experts_per_token == 2
    steps = {(e.before, e.after) for e in done.rewritten}
    assert (("ctfp8.dequantize", "linear"), ("ctfp8.quantize_per_token", "ctfp8.scaled_mm")) in steps
    kept = ctfp8.explain(load("qwen3moe/FP8_DYNAMIC"), (IDS,), {"use_cache": False}, target="cuda:sm75")
    assert {(e.before[0], e.after) for e in kept.kept} == {("ctfp8.dequantize", ())}


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_draws_it(width, tmp_path):
    """The page measures itself in headless Chromium: rows, bars with width, nothing wider than the window."""
    probe = """<script>addEventListener("load", () => {
      document.querySelectorAll("details").forEach(d => d.open = true);
      const bars = [...document.querySelectorAll(".bar i")].map(i => i.getBoundingClientRect());
      document.title = JSON.stringify({rows: document.querySelectorAll(".layer").length, bars: bars.length,
        flat: bars.filter(b => b.height < 8 || b.width <= 0).length,
        wide: document.documentElement.scrollWidth - innerWidth});
      box.value = "odd <rows>"; box.dispatchEvent(new Event("input"));
      document.title += " shown " + [...document.querySelectorAll(".layer")].filter(d => d.style.display === "").length;
    })</script>"""
    file = tmp_path / "page.html"
    file.write_text(page(big_moe()).replace("</body>", probe + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
               f"--window-size={width},1000"]  # fmt: skip
    dom = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", dom)[1]
    assert '"rows":2' in title
    assert '"flat":0' in title
    assert int(re.search(r'"wide":(-?\d+)', title)[1]) <= 0
    assert title.endswith("shown 1")
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", file.as_uri()], capture_output=True, timeout=120)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000


def test_a_page_without_entries():
    assert "FP8 weights" in page(Report("cpu", (), ()))


def test_the_picture_names_the_model_and_shows_in_a_notebook(load):
    report = ctfp8.explain(load("llama/FP8_DYNAMIC"), (torch.arange(8)[None],), {"use_cache": False}, target="xpu")
    assert report.model == "FP8_DYNAMIC (LlamaForCausalLM)"
    frame = report._repr_html_()
    assert frame.startswith('<iframe srcdoc="')
    assert frame.count("<") == 2  # the page is text in an attribute
    assert "What ctfp8 does for FP8_DYNAMIC (LlamaForCausalLM) on xpu" in html.unescape(frame)
