"""The command line: `ctfp8 inspect | explain | export | generate | serve | bench | cache`.

Results go to stdout (`--json`: nothing but JSON), progress and errors to stderr. Exit codes: 0 done, 1 an error, 2 a wrong
command line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import Ctfp8Error, UsageError
from ..paused_gc import paused_gc
from .alone import PassesAlone
from .place import check_place
from .terminal import err, escape, out

app = typer.Typer(
    name="ctfp8",
    help="Run compressed-tensors FP8 checkpoints at FP8 speed and memory: look into one, see what becomes of it, run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache = typer.Typer(help="What was compiled and is kept for the next start.", no_args_is_help=True)
app.add_typer(cache, name="cache")
_debug = False

Checkpoint = Annotated[str, typer.Argument(help="A checkpoint folder, or a hub id.", metavar="CKPT")]
Target = Annotated[
    str | None,
    typer.Option(help="cpu, xpu, cuda:sm90 …, +fbgemm or +scaled_mm behind it; default: this machine's GPU, or cpu."),
]
Spread = Annotated[
    bool,
    typer.Option(
        "--tp", help="A part of the model on each process of torchrun -m ctfp8_compile; the first one prints."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, xpu; default: the GPU if there is one. With --tp, torchrun's ranks say."),
]
Mtp = Annotated[bool, typer.Option("--mtp", help="Draft with the checkpoint's own layers for multi-token prediction.")]
Assistant = Annotated[
    str | None,
    typer.Option(help="Draft with this smaller model of the same tokenizer: a folder or a hub id, FP8 or not."),
]
Lookup = Annotated[
    int,
    typer.Option("--prompt-lookup", help="Draft so many tokens from where the text had the last ones before.", min=0),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ctfp8 {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and warnings of the libraries.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    global _debug
    _debug = debug


def _command(function: Callable[..., None], of: typer.Typer = app, **options: Any) -> Callable[..., None]:
    """Turns errors into a line or two on stderr and exit code 1; `--debug` lets them through."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        several = kwargs.get("tp", False)
        with contextlib.ExitStack() as end:
            if several:
                from . import ranks

                end.callback(ranks.leave)
            try:
                with warnings.catch_warnings(), paused_gc():
                    if not _debug:
                        warnings.simplefilter("ignore")
                    with ranks.quiet_but_first() if several else contextlib.nullcontext():
                        function(*args, **kwargs)
            except BrokenPipeError:
                raise  # whoever read the output has enough: typer ends quietly
            except (Ctfp8Error, OSError, ValueError, RuntimeError, ImportError) as error:
                if _debug:
                    raise
                if not several or ranks.fails_first():
                    _print(error)
                raise typer.Exit(1) from None

    return of.command(**options)(command)


def _print(error: Exception) -> None:
    if isinstance(error, Ctfp8Error):
        err().print(f"[bold red]error:[/] {escape(error)}", soft_wrap=True)
        return
    first = next(iter(str(error).strip().splitlines()), "")
    err().print(f"[bold red]error:[/] {type(error).__name__}: {escape(first)}", soft_wrap=True)
    err().print("ctfp8 --debug … shows where it comes from.")


@_command
def inspect(checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """What a checkpoint holds: schemes, layers, sizes, what is not FP8 and why. Reads headers, no weights.

    Of a hub id, too, only headers are fetched.

    [dim]ctfp8 inspect examples/models/moe[/]
    """
    from .inspect import inspect

    inspect(checkpoint, as_json)


@functools.partial(_command, cls=PassesAlone)
def explain(
    checkpoint: Annotated[
        str | None, typer.Argument(help="A checkpoint folder, or a hub id; --passes needs none.", metavar="CKPT")
    ] = None,
    target: Target = None,
    cache: Annotated[
        int | None,
        typer.Option(help="With a static key-value cache for this many tokens; its attention is counted, too."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the picture of it, one self-contained page.")] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also the weights; layers alike share a line.")
    ] = False,
    passes: Annotated[
        str | None,
        typer.Option(help="Also run the passes, or only those named: match,rewrite,decompose; print what each did."),
    ] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="With --passes: the graph after each.")] = False,
    as_json: AsJson = False,
) -> None:
    """What becomes of the FP8 weights on a target, and why some stay dequantized. Nothing is compiled or run.

    [dim]ctfp8 explain examples/models/moe --target cuda:sm90 --html moe.html
    ctfp8 explain examples/models/moe --target cuda:sm90 --passes[/]
    """
    if passes is not None and not as_json:
        from .passes import print_line

        print_line(passes)
    if graphs and passes is None:
        raise UsageError("--graphs shows the graph after each pass; give --passes, too.")
    if checkpoint is None:
        if passes is None or graphs:
            raise typer.BadParameter("Missing argument 'CKPT'; without one, --passes prints the pipeline and no more.")
        return
    import torch

    from .. import StaticCacheDecoder
    from .. import Target as Machine
    from .. import explain as explain_model
    from .loading import device_of, example, load

    target = str(Machine.detect(device_of(None)) if target is None else Machine.parse(target))  # before a long load
    if html is not None:
        check_place(html)
    model = load(checkpoint, _debug)
    args, kwargs = example(model)
    if cache is not None:
        model, kwargs = StaticCacheDecoder(model, 1, cache), {}
        args = (args[0][:, :1], torch.tensor(0))
    with err().status("tracing …"):
        report = explain_model(model, args, kwargs, target, passes=passes, graphs=graphs)
    if html is not None:
        report.to_html(html)
        err().print(f"wrote {html}")
    if passes is not None and not as_json:
        from .passes import print_passes

        print_passes(report.passes)
    print(json.dumps(report.to_dict()) if as_json else report if verbose else report.summary())


@_command
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="The file to write; ends in .pt2, .onnx or .xml.", metavar="OUT")],
    target: Target = None,
    package: Annotated[str | None, typer.Option(help="aoti: machine code for this machine instead of a graph.")] = None,
    cache: Annotated[
        int | None, typer.Option(help="With a key-value cache for this many tokens inside, batch 1: for generation.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of an .onnx: float32, the default, or float16.")] = None,
    stateless: Annotated[bool, typer.Option("--stateless", help="Of an .xml: the cache goes in and out.")] = False,
    quantize_activations: Annotated[
        bool, typer.Option("--quantize-activations", help="Of an .onnx or .xml: static activations go through FP8.")
    ] = False,
    folder: Annotated[
        bool, typer.Option("--folder", help="Of an .onnx or .xml: config and tokenizer beside it, for other programs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model to one file that runs without transformers: a .pt2 (ctfp8.load), .onnx or .xml (OpenVINO).

    A .pt2 is rewritten for a target. Batch and sequence are dynamic; with --cache the number of tokens of a call is.

    [dim]ctfp8 export examples/models/llama llama.pt2 --target cuda:sm90
    ctfp8 export examples/models/llama llama.onnx[/]
    """
    from .export import Wanted, write_other, write_program

    if output.suffix in (".onnx", ".xml"):
        given = {"target": target, "package": package, "cache": cache}
        wanted = Wanted(dtype, stateless, quantize_activations, folder)
        write_other(checkpoint, output, given, wanted, as_json, _debug)
        return
    others = {"dtype": dtype, "stateless": stateless, "quantize-activations": quantize_activations, "folder": folder}
    if wrong := [name for name, value in others.items() if value]:
        raise UsageError(f"{output}: --{wrong[0]} is for .onnx and .xml files; leave it out.")
    write_program(checkpoint, output, target, package, cache, as_json, _debug)


@_command
def generate(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint folder, a hub id, or a .pt2 of ctfp8 export --cache.", metavar="CKPT")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token at each step.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperature > 0.")] = 0,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile: starts at once, runs slower.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="The folder with the tokenizer, if not CKPT.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Of a .pt2 with machine code: run it.")] = False,
    mtp: Mtp = False,
    assistant: Assistant = None,
    prompt_lookup: Lookup = 0,
    device: Device = None,
    tp: Spread = False,
    as_json: AsJson = False,
) -> None:
    """Continue a text with the compiled model; says how fast. A .pt2 starts at once.

    [dim]ctfp8 generate examples/models/llama --prompt "Return a list of "
    ctfp8 generate llama.pt2 --tokenizer examples/models/llama --prompt "Return a list of "[/]
    """
    from .generate import generate

    if checkpoint.endswith(".pt2"):
        if mtp or assistant or prompt_lookup:
            raise UsageError(
                "a .pt2 generates token by token. Draft with a checkpoint folder, or leave the option out."
            )
        from .artifact import of_artifact

        text = of_artifact(Path(checkpoint), tokenizer, prompt, max_new_tokens, trust)
    else:
        from .decoder import of_checkpoint
        from .drafted import Drafts
        from .loading import device_of

        drafts = Drafts(mtp, assistant, prompt_lookup)
        drafts.check(tp)
        where = device_of(device)
        text = of_checkpoint(checkpoint, tokenizer, prompt, max_new_tokens, eager, _debug, tp, where, drafts)
    generate(text, max_new_tokens, temperature, seed, as_json)


@_command
def serve(
    checkpoint: Checkpoint,
    host: Annotated[
        str, typer.Option(help="Address to listen at; the default is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.", min=0, max=65535)] = 8000,
    device: Device = None,
    max_batch: Annotated[int, typer.Option(help="Requests that run at a time.", min=1, max=1024)] = 16,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a request, prompt and answer; default: 4096, or what the model was made for.", min=8
        ),
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; those beyond are refused (429).", min=0)] = 64,
    cache: Annotated[
        str, typer.Option(help="Keys and values: fp8, bf16 (the model's dtype), auto (fp8 if calibrated for it).")
    ] = "auto",
    mtp: Annotated[bool, typer.Option("--mtp", help="Refused: no drafts are made for requests in a batch.")] = False,
    api_key: Annotated[
        str | None, typer.Option(help="What clients must send as their key (401 otherwise).", envvar="CTFP8_API_KEY")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients know the model by; default: the folder's name.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile: starts at once, runs slower.")] = False,
) -> None:
    """Serve a checkpoint as OpenAI's API does: chat completions, completions, responses, streamed or not, batched.

    [dim]ctfp8 serve examples/models/llama --port 8000[/]
    """
    from .serve import serve

    serve(checkpoint, host, port, device, (max_batch, context), cache, mtp, queue, api_key, name, eager, _debug)


@_command
def bench(
    checkpoint: Checkpoint,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)] = 128,
    context: Annotated[
        int | None,
        typer.Option(help="Decode with so many tokens in the cache, kept as FP8 and as bf16; read once.", min=1),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=2)] = 32,
    rounds: Annotated[int, typer.Option(help="Repeats; medians are shown.", min=1)] = 5,
    inductor: Annotated[bool, typer.Option("--inductor", help="Also bf16 compiled by Inductor.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a .png or .svg file.")] = None,
    mtp: Mtp = False,
    assistant: Assistant = None,
    prompt_lookup: Lookup = 0,
    prompt: Annotated[
        str | None,
        typer.Option(help="Begin with this text, not with made-up tokens: what drafts are worth depends on it."),
    ] = None,
    device: Device = None,
    tp: Spread = False,
    as_json: AsJson = False,
) -> None:
    """Prefill and decode speed and weight memory, against the same model dequantized to bf16, in turn in one process.

    [dim]ctfp8 bench examples/models/llama --plot llama.svg
    ctfp8 bench examples/models/llama --context 400[/]
    """
    from ..model.freeze import dequantize_
    from .bench import check_plot, compare, draw, speeds, ways_of
    from .drafted import Drafts
    from .loading import device_of, load, load_tokenizer

    drafts = Drafts(mtp, assistant, prompt_lookup)
    drafts.check(tp)
    if drafts and context is not None:
        raise UsageError(
            "--context reads a text once and goes on with it; drafts are measured without. Leave out one of them."
        )
    ids = None
    if prompt is not None:
        ids = load_tokenizer(checkpoint)(prompt, return_tensors="pt").input_ids
        prompt_tokens = ids.shape[1]
    if plot is not None:
        check_place(plot)
        check_plot(plot)
    where = device_of(device)
    plain, model = dequantize_(load(checkpoint, _debug, tp, where)), load(checkpoint, _debug, tp, where)
    prompt_tokens = prompt_tokens if context is None else context
    ways = ways_of(plain, model, context is not None, drafts, inductor)
    results = compare(ways, prompt_tokens, new_tokens, rounds, err(), context is None, ids)
    if plot is not None:
        name, what = Path(checkpoint).resolve().name, "prompt" if context is None else "context"
        draw(results, prompt_tokens, plot, f"{name}, {what} of {prompt_tokens} tokens, batch 1")
        err().print(f"wrote {plot}")
    if as_json:
        print(json.dumps({way: speed._asdict() for way, speed in results.items()}))
        return
    out().print(speeds(results, prompt_tokens, bool(drafts)))


@functools.partial(_command, of=cache, name="list")
def list_kept(as_json: AsJson = False) -> None:
    """The graphs that were compiled before and start without being compiled again; CTFP8_CACHE_DIR names their folder.

    [dim]ctfp8 cache list[/]
    """
    from .cache import show

    show(as_json)


@functools.partial(_command, of=cache, name="clear")
def clear_kept(as_json: AsJson = False) -> None:
    """Drop them all. Inductor's own cache, TORCHINDUCTOR_CACHE_DIR, stays as it is.

    [dim]ctfp8 cache clear[/]
    """
    from .cache import clear

    clear(as_json)
