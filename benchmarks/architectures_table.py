"""Loads a small checkpoint of every architecture and scheme, with ctfp8 and with transformers; writes docs/architectures.md.

    python benchmarks/architectures_table.py [--only ARCHITECTURE ...]

Checkpoints come from `tests/support/forge.py`: a model of random weights, each Linear quantized by compressed-tensors, in the
names llm-compressor writes, and with the dequantized weights in transformers' own model as the truth. `exact` means that
the logits (for stock transformers: the weights) are equal bit for bit. FP8_BLOCK is
tried with sizes that are multiples of the 128 × 128 block and with sizes that are not; so are the same blocks in the words of
`fp8` files, and MXFP8 (multiples of 32, of 128 or not). Of an `fp8` file stock transformers' weights are those it gives with
`FineGrainedFP8Config(dequantize=True)`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.progress import track
from transformers import FineGrainedFP8Config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from conftest import relative_error  # noqa: E402
from support.forge import ARCHITECTURES, FORMATS, Forged, forge  # noqa: E402

import ctfp8_compile as ctfp8  # noqa: E402

BEGIN, END = "<!-- table: python benchmarks/architectures_table.py -->", "<!-- end of table -->"
COLUMNS = ("architecture", "transformers class", "experts in the file", "ctfp8", "ctfp8, `fp8` file", "ctfp8, MXFP8",
           "stock transformers", "stock, `fp8` file", "stock, MXFP8")  # fmt: skip


def cases(architecture: str, schemes: Sequence[str]) -> list[tuple[str, bool]]:
    """Scheme, and whether sizes are odd."""
    both = ("FP8_BLOCK", *FORMATS)
    return [(scheme, odd) for scheme in schemes for odd in ((False, True) if scheme in both else (True,))]


def experts(architecture: str) -> str:
    """How the file names them."""
    layout = ARCHITECTURES[architecture].experts
    if layout is None:
        return "–"
    names = layout.whole or (layout.names if layout.gated else layout.names[1:])
    return ", ".join(f"`{name}`" for name in names) + (", three-dimensional" if layout.whole else ", one by one")


def ours(forged: Forged) -> str:
    """`exact`, or how far the logits are off."""
    with torch.no_grad():
        got = ctfp8.from_pretrained(forged.folder, forged.auto_class)(**forged.inputs).logits
        want = forged.reference(**forged.inputs).logits
    return "exact" if torch.equal(got, want) else f"logits off by {relative_error(got, want):.1g}"


def stock(forged: Forged) -> str:
    """`exact`, how many weights are wrong after the first forward, or an exception.

    Weights are compared, not logits, because transformers also rounds activations as the checkpoint's scheme says.
    """
    try:
        with torch.no_grad():
            fp8 = (
                json.loads((forged.folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
            )
            how = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if fp8 else {}
            model = forged.auto_class.from_pretrained(forged.folder, dtype="auto", **how).eval()
            logits = model(**forged.inputs).logits
            expected = forged.reference(**forged.inputs).logits
    except Exception as error:
        return f"raises {type(error).__name__}"
    got, want = model.state_dict(), forged.reference.state_dict()
    if any(name not in got for name in want):  # it built other modules
        return "exact" if torch.equal(logits, expected) else f"logits off by {relative_error(logits, expected):.1g}"
    wrong = [n for n, w in want.items() if got[n].shape != w.shape or not torch.equal(got[n].to(w.dtype), w)]
    return f"{len(wrong)} of {len(want)} tensors wrong" if wrong else "exact"


def summary(outcomes: dict[str, str]) -> str:
    """One cell for all schemes of a architecture."""
    if len(set(outcomes.values())) == 1:
        return next(iter(outcomes.values()))
    by_outcome = defaultdict(list)
    for case, what in outcomes.items():
        by_outcome[what].append(case)
    return "; ".join(f"{what}: {', '.join(which)}" for what, which in by_outcome.items())


def row(architecture: str) -> str:
    by_us, by_stock = [], []
    for schemes in (ARCHITECTURES[architecture].schemes, *((format,) for format in FORMATS)):
        results: tuple[dict[str, str], dict[str, str]] = {}, {}
        for scheme, odd in cases(architecture, schemes):
            with tempfile.TemporaryDirectory() as folder:
                forged = forge(architecture, scheme, Path(folder), odd=odd)
                case = scheme + (" (odd sizes)" if odd and scheme == "FP8_BLOCK" else "")
                if scheme in FORMATS:
                    case = "odd sizes" if odd else "whole blocks"
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results[0][case], results[1][case] = ours(forged), stock(forged)
                name = type(forged.reference).__name__
        by_us.append(summary(results[0]))
        by_stock.append(summary(results[1]))
    return "| " + " | ".join([architecture, f"`{name}`", experts(architecture), *by_us, *by_stock]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, help="print these rows and leave the file alone")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    rows = [row(architecture) for architecture in track(arguments.only or ARCHITECTURES, "loading …")]
    if arguments.only:
        print("\n".join(rows))
        return
    table = "\n".join(["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *rows])
    page = ROOT / "docs/architectures.md"
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
