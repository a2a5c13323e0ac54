"""Loads a small checkpoint of every family and scheme with ctfp8 and with stock transformers, and writes docs/families.md.

    python benchmarks/families_table.py [--only FAMILY ...]

Checkpoints come from `tests/forge.py`: a model of random weights, each Linear quantized by compressed-tensors, in the
names llm-compressor writes, and with the dequantized weights in transformers' own model as the truth. `exact` means that
the logits (for stock transformers: the weights) are equal bit for bit. FP8_BLOCK is
tried with sizes that are multiples of the 128 × 128 block and with sizes that are not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from rich.progress import track

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from conftest import relative_error  # noqa: E402
from support.forge import FAMILIES, Forged, forge  # noqa: E402

import ctfp8_compile as ctfp8  # noqa: E402

BEGIN, END = "<!-- table: python benchmarks/families_table.py -->", "<!-- end of table -->"
COLUMNS = ("family", "transformers class", "experts in the file", "ctfp8", "stock transformers")


def cases(family: str) -> list[tuple[str, bool]]:
    """Scheme, and whether sizes are odd."""
    return [
        (scheme, odd)
        for scheme in FAMILIES[family].schemes
        for odd in ((False, True) if scheme == "FP8_BLOCK" else (True,))
    ]


def experts(family: str) -> str:
    """How the file names them."""
    layout = FAMILIES[family].experts
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
            model = forged.auto_class.from_pretrained(forged.folder, dtype="auto").eval()
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
    """One cell for all schemes of a family."""
    if len(set(outcomes.values())) == 1:
        return next(iter(outcomes.values()))
    by_outcome = defaultdict(list)
    for case, what in outcomes.items():
        by_outcome[what].append(case)
    return "; ".join(f"{what}: {', '.join(which)}" for what, which in by_outcome.items())


def row(family: str) -> str:
    results: tuple[dict[str, str], dict[str, str]] = {}, {}
    for scheme, odd in cases(family):
        with tempfile.TemporaryDirectory() as folder:
            forged = forge(family, scheme, Path(folder), odd=odd)
            case = scheme + (" (odd sizes)" if odd and scheme == "FP8_BLOCK" else "")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results[0][case], results[1][case] = ours(forged), stock(forged)
            name = type(forged.reference).__name__
    return "| " + " | ".join([family, f"`{name}`", experts(family), *map(summary, results)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, help="print these rows and leave the file alone")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    rows = [row(family) for family in track(arguments.only or FAMILIES, "loading …")]
    if arguments.only:
        print("\n".join(rows))
        return
    table = "\n".join(["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *rows])
    page = ROOT / "docs/families.md"
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
