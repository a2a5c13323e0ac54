"""The command line: what each command prints, its JSON, its files, and its errors without a traceback."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from conftest import DATA, FP8_PARAMETERS
from safetensors.torch import save_file
from typer.testing import CliRunner

import ctfp8_compile as ctfp8
from ctfp8_compile.cli.app import app
from ctfp8_compile.cli.decoder import Decoder

SHIPPED = DATA.parent.parent / "examples/models"


def ctfp8_command(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100"})
    assert result.exit_code == code, result.output
    return result


def test_inspect_names_schemes_layers_sizes_and_why_not():
    out = ctfp8_command("inspect", SHIPPED / "moe").stdout
    assert "Qwen3MoeForCausalLM, 1 file; compressed-tensors: channel weights, token activations" in out
    assert "model.layers.*.mlp.experts.*.down_proj.weight" in out
    assert "ignored by the config" in out
    assert "an embedding" in out


def test_inspect_json_sizes_are_those_of_the_file():
    found = json.loads(ctfp8_command("inspect", SHIPPED / "llama", "--json").stdout)
    file = SHIPPED / "llama/model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert found["fp8_bytes"] + found["scale_bytes"] + found["other_bytes"] == file.stat().st_size - header
    assert sum(row["count"] for row in found["rows"] if row["fp8"]) == 35
    assert found["bf16_bytes"] == 2 * found["fp8_bytes"] + found["other_bytes"]


def test_what_a_file_holds_is_no_command_to_the_terminal(tmp_path):
    tensors = {"a\x1b]0;owned\x07.\x1b[31mweight": torch.ones(2, 2), "b\u202ecod.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((DATA / "llama/FP8/config.json").read_text()) | {"architectures": ["X\x1b[2J"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = ctfp8_command("inspect", tmp_path).stdout
    assert not {c for c in out if not c.isprintable()} - {"\n"}
    assert "X\\x1b" in out
    error = ctfp8_command("explain", tmp_path, code=1)
    assert not {c for c in error.stderr if not c.isprintable()} - {"\n"}


def test_inspect_reads_headers_only(tmp_path):
    """A 100 GB checkpoint of holes: no disk, no time."""
    shutil.copy(DATA / "llama/FP8/config.json", tmp_path)
    weights = {f"model.layers.{i}.mlp.up_proj.weight": [100_000, 100_000] for i in range(10)}
    index = {}
    for i, (name, shape) in enumerate(weights.items()):
        size = shape[0] * shape[1]
        header = {name: {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [0, size]}}
        header |= {name + "_scale": {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]}}
        text = json.dumps(header).encode()
        with open(tmp_path / f"model-{i}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size + 4)
        index |= dict.fromkeys(header, f"model-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = json.loads(ctfp8_command("inspect", tmp_path, "--json").stdout)
    assert found["files"] == 10
    assert found["fp8_bytes"] == 10**11


def test_inspect_says_what_a_checkpoint_is_that_is_not_fp8(tmp_path):
    out = ctfp8_command("inspect", DATA / "llama/dense").stdout
    assert "not quantized: config.json has no quantization_config" in out
    assert "model.layers.*.mlp.down_proj.weight" in out
    found = json.loads(ctfp8_command("inspect", DATA / "llama/dense", "--json").stdout)
    assert found["bf16_bytes"] == found["other_bytes"] == sum(row["nbytes"] for row in found["rows"])

    shutil.copytree(DATA / "llama/dense", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    out = ctfp8_command("inspect", tmp_path).stdout
    assert "another format: quantization_config says quant_method='gptq'" in out
    assert "model.layers.*.mlp.down_proj.weight" in out


def test_nothing_is_wrapped_and_no_bar_is_drawn_in_a_pipe():
    python = [sys.executable, "-m", "ctfp8_compile"]
    for command in (["inspect"], ["explain", "-v", "--target", "cuda:sm89"]):
        run = subprocess.run([*python, *command, str(SHIPPED / "moe")], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        (line,) = [line for line in run.stdout.splitlines() if "experts" in line and "down_proj" in line]
        assert line.rstrip().endswith("down_proj.weight" if command == ["inspect"] else "→ Triton weight-only")
        assert not run.stderr


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine with one repository, of the shipped Llama; it answers ranges, and counts bytes."""
    sent = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            file = SHIPPED / "llama" / self.path.partition("?")[0].rpartition("/")[2]
            if "/me/llama/" not in self.path or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if "/me/llama/" in self.path else "RepoNotFound")
                self.end_headers()
                return
            data, wanted = file.read_bytes(), self.headers.get("Range")
            first, last = map(int, wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(data))
            part = data[first : last + 1]
            self.send_response(206 if wanted else 200)
            for name, value in {"Content-Length": len(part), "ETag": '"1"', "X-Repo-Commit": "0" * 40}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                sent.append(len(part))
                self.wfile.write(part)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()


def test_inspect_reads_headers_of_a_hub_id(hub, tmp_path):
    address, sent = hub
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    python = [sys.executable, "-m", "ctfp8_compile", "inspect", "--json"]
    run = subprocess.run([*python, "me/llama"], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == json.loads(ctfp8_command("inspect", SHIPPED / "llama", "--json").stdout)
    assert sum(sent) < 150_000 < (SHIPPED / "llama/model.safetensors").stat().st_size
    run = subprocess.run([*python, "me/nothing"], capture_output=True, text=True, env=env)
    assert run.returncode == 1
    assert "me/nothing: no such folder, and the hub does not give its headers" in run.stderr


def test_explain_says_the_summary_and_folds_layers_when_asked_for_more():
    arguments = ("explain", SHIPPED / "llama", "--target", "xpu")
    assert ctfp8_command(*arguments).stdout == "35 FP8 weights for xpu; 35 linear → aten._scaled_mm\n"
    lines = ctfp8_command(*arguments, "-v").stdout.splitlines()
    assert len(lines) == 1 + 7 + 1
    assert lines[6].startswith("    5 × model.layers.*.mlp.up_proj.weight       640×256  linear → aten._scaled_mm")
    assert lines[8].startswith("   35 × note: oneDNN")
    declined = ctfp8_command("explain", SHIPPED / "llama", "--target", "cuda:sm80", "-v").stdout
    assert "   35 × not taken by a kernel that comes before: cuda:sm80 has no FP8 tensor cores" in declined


def test_explain_counts_attention_to_a_cache():
    arguments = ("explain", SHIPPED / "llama", "--cache", 64, "-v")
    assert "5 × model.model.layers.*.self_attn " in ctfp8_command(*arguments).stdout
    assert "; 5 attention to a cache → fused attention\n" in ctfp8_command(*arguments[:-1]).stdout


def test_more_tokens_than_the_model_has_positions(tmp_path):
    shutil.copytree(SHIPPED / "llama", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    arguments = ("--prompt", "def ", "--eager", "--json", "--max-new-tokens")
    assert "more than the 8 positions" in ctfp8_command("generate", tmp_path, *arguments, 9).stderr
    assert not ctfp8_command("generate", tmp_path, *arguments, 2).stderr


@pytest.mark.parametrize("command", ["inspect", "explain", "export", "generate", "bench"])
def test_every_command_speaks_json(command):
    assert "--json" in ctfp8_command(command, "--help").stdout


def test_explain_for_another_machine_with_a_picture(tmp_path):
    page = tmp_path / "moe.html"
    result = ctfp8_command("explain", SHIPPED / "moe", "--target", "cuda:sm90", "--html", page)
    assert result.stdout.startswith(
        "24 FP8 weights for cuda:sm90; 16 linear → fbgemm f8f8bf16_rowwise; 8 grouped experts"
    )
    assert "model.layers.0 … 3" in page.read_text()


@pytest.mark.parametrize("architecture", list(FP8_PARAMETERS))
def test_explain_json(architecture):
    report = json.loads(
        ctfp8_command("explain", DATA / architecture / "FP8_DYNAMIC", "--target", "xpu", "--json").stdout
    )
    assert len(report["rewritten"]) + len(report["kept"]) == FP8_PARAMETERS[architecture]
    linears = {e["kernel"] for e in report["rewritten"] if e["rule"] == "linear"}
    assert linears == {"aten._scaled_mm"}


@pytest.mark.parametrize("options", [[], ["--cache", "32"]])
def test_an_exported_file_gives_the_models_logits(tmp_path, options, load):
    file = tmp_path / "llama.pt2"
    made = json.loads(ctfp8_command("export", DATA / "llama/FP8", file, *options, "--json").stdout)
    assert made["bytes"] == file.stat().st_size
    assert made["target"] == "cpu"
    program = ctfp8.load(file)
    ids = torch.arange(5, 16)[None]
    with torch.no_grad():
        want = load("llama/FP8")(ids, use_cache=False).logits
        got = program(ids, torch.tensor(0)) if options else program(ids, use_cache=False)
    got = got if isinstance(got, torch.Tensor) else got["logits"] if isinstance(got, dict) else got.logits
    assert (got - want).norm() / want.norm() < 0.02


def test_generate_is_greedy_transformers():
    from transformers import AutoTokenizer

    prompt = "Return a list of "
    made = json.loads(
        ctfp8_command(
            "generate", SHIPPED / "llama", "--prompt", prompt, "--max-new-tokens", 12, "--eager", "--json"
        ).stdout
    )
    model, tokenizer = ctfp8.from_pretrained(SHIPPED / "llama"), AutoTokenizer.from_pretrained(SHIPPED / "llama")
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert made["text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert made["new_tokens"] == 12
    assert made["tokens_per_second"] > 0


def test_generate_prints_while_it_goes_and_is_reproducible():
    arguments = (
        "generate",
        SHIPPED / "llama",
        "--prompt",
        "def ",
        "--max-new-tokens",
        20,
        "--temperature",
        1,
        "--eager",
    )
    one, two = (ctfp8_command(*arguments, "--seed", 3) for _ in range(2))
    assert one.stdout == two.stdout
    assert one.stdout.startswith("def ")
    assert "tokens/s" in one.stderr


@pytest.mark.long
def test_bench_table_json_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "llama.svg"
    result = ctfp8_command(
        "bench", DATA / "llama/FP8", "--prompt-tokens", 8, "--new-tokens", 3, "--rounds", 1, "--plot", plot, "--json"
    )
    speeds = json.loads(result.stdout)
    assert set(speeds) == {"ctfp8", "bf16 eager"}
    assert speeds["ctfp8"]["weight_bytes"] < speeds["bf16 eager"]["weight_bytes"]
    assert all(speed["tokens_per_second"] > 0 for speed in speeds.values())
    text = plot.read_text()
    assert "<svg" in text
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


@pytest.mark.long
def test_bench_with_a_context_compares_caches(tmp_path):
    """The shipped model, from the command line; each way reads its context once and compiles twice."""
    pytest.importorskip("matplotlib")
    arguments = ("bench", SHIPPED / "llama", "--context", 300, "--new-tokens", 4, "--rounds", 2)
    before = len(ctfp8.compiled_reports())
    speeds = json.loads(ctfp8_command(*arguments, "--json", "--plot", tmp_path / "x.svg").stdout)
    assert list(speeds) == ["ctfp8, FP8 cache", "ctfp8, bf16 cache", "bf16 eager"]
    fp8, bf16, eager = speeds.values()
    assert 0.5 < fp8["cache_bytes"] / bf16["cache_bytes"] < 0.52
    assert bf16["cache_bytes"] == eager["cache_bytes"]
    assert all(speed["tokens_per_second"] > 0 for speed in speeds.values())
    fused = [{e.rule for e in report.attention} for report in ctfp8.compiled_reports()[before:]]
    assert fused.count({"attention to an FP8 cache"}) == fused.count({"attention to a cache"}) == 2
    assert "context of 300 tokens" in (tmp_path / "x.svg").read_text()


def test_a_compiled_decoder_compiles_twice_and_not_again():
    """Once for prompts of every length, once for one token."""
    model = ctfp8.from_pretrained(DATA / "llama/FP8", dtype=torch.float32)  # no near ties between tokens
    # dynamo decides that, whatever the compiler behind it: `bench`, and generate's tests, have ours
    compiled, eager = Decoder(model, 40, "eager"), Decoder(model, 40, None)
    for length in (7, 12, 20):
        ids = torch.arange(5, 5 + length)[None]
        assert list(compiled.tokens(ids, 5)) == list(eager.tokens(ids, 5))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


ERRORS = {
    "no folder": (["inspect", "nowhere"], "nowhere: no such folder, and not a hub id"),
    "not a checkpoint": (["inspect", "{tmp}"], "Is this a checkpoint folder?"),
    "not a hub id": (["explain", "./nowhere"], "no such folder, and not a hub id"),
    "no text": (["generate", "{shipped}/llama", "--prompt", "", "--eager"], "the prompt is empty"),
    "not quantized": (["explain", "{data}/llama/dense"], "no quantization_config"),
    "no target": (["explain", "{data}/llama/FP8", "--target", "tpu"], "'tpu' is not a target"),
    "no pass": (["explain", "{data}/llama/FP8", "--passes", "mach"], "there is no pass 'mach'; there are keep-strides"),
    "passes in no order": (["explain", "{data}/llama/FP8", "--passes", "rewrite,match"], "has to run behind match"),
    "graphs of nothing": (["explain", "{data}/llama/FP8", "--graphs"], "give --passes, too"),
    "no place": (["explain", "{data}/llama/FP8", "--html", "{tmp}/no/x.html"], "does not exist. Make it first."),
    "no artifact": (["export", "{data}/llama/FP8", "{tmp}/x.bin"], "give the path one of these suffixes"),
    "no tokenizer": (
        ["generate", "{data}/llama/FP8", "--prompt", "x"],
        "no tokenizer that transformers can read is there",
    ),
    "no device": (["generate", "{shipped}/llama", "--prompt", "x", "--device", "gpu"], "--device gpu: not a device"),
    "not this machine's": (
        ["bench", "{shipped}/llama", "--device", "xpu"],
        "--device xpu: this machine has no XPU device. Leave it out",
    ),
    "no picture": (["bench", "{data}/llama/FP8", "--plot", "{tmp}/x.txt"], "a plot is one of .png, .svg, .pdf"),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors_are_a_line_on_stderr_and_exit_code_1(case, tmp_path):
    arguments, message = ERRORS[case]
    result = ctfp8_command(*(a.format(tmp=tmp_path, data=DATA, shipped=SHIPPED) for a in arguments), code=1)
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_debug_shows_where_an_error_comes_from():
    result = CliRunner().invoke(app, ["--debug", "inspect", "nowhere"])
    assert isinstance(result.exception, ctfp8.CheckpointError)


@pytest.mark.parametrize("arguments", [["nope"], ["generate", "x"], ["bench", "x", "--rounds", "0"]])
def test_a_wrong_command_line_is_exit_code_2(arguments):
    ctfp8_command(*arguments, code=2)


def test_as_a_program():
    """`python -m ctfp8_compile`, and that results go to stdout alone."""
    run = subprocess.run(
        [sys.executable, "-m", "ctfp8_compile", "inspect", str(SHIPPED / "llama"), "--json"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["model"] == "LlamaForCausalLM"
    assert not run.stderr
    version = subprocess.run([sys.executable, "-m", "ctfp8_compile", "--version"], capture_output=True, text=True)
    assert version.stdout == f"ctfp8 {ctfp8.__version__}\n"


def test_an_artifact_generates_what_its_model_does_without_transformers(tmp_path):
    """In a process of its own, which imports neither transformers nor the compiler's passes of Inductor."""
    file = tmp_path / "llama.pt2"
    ctfp8_command("export", SHIPPED / "llama", file, "--cache", 64, "--json")
    arguments = ("--prompt", "Return a list of ", "--max-new-tokens", 12, "--json")
    want = json.loads(ctfp8_command("generate", SHIPPED / "llama", "--eager", *arguments).stdout)
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['compressed_tensors'] = None\n"
        "from ctfp8_compile.cli.app import app; app(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "generate", file, "--tokenizer", SHIPPED / "llama", *arguments]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout)
    assert (got["text"], got["new_tokens"]) == (want["text"], want["new_tokens"])
    too_many = ctfp8_command("generate", file, "--tokenizer", SHIPPED / "llama", "--prompt", "x" * 60, code=1)
    assert "has room for 64 tokens; the prompt has 60" in too_many.stderr
    assert "holds no tokenizer" in ctfp8_command("generate", file, "--prompt", "x", code=1).stderr


def test_an_artifact_without_a_cache_does_not_generate(tmp_path):
    file = tmp_path / "llama.pt2"
    ctfp8_command("export", DATA / "llama/FP8", file, "--json")
    refused = ctfp8_command("generate", file, "--tokenizer", SHIPPED / "llama", "--prompt", "x", code=1)
    assert "has no key-value cache inside" in refused.stderr
    refused = ctfp8_command("generate", file, "--tokenizer", tmp_path, "--prompt", "x", code=1)
    assert "not a readable tokenizer" in refused.stderr
