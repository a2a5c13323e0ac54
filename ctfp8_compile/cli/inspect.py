"""`ctfp8 inspect`: what a checkpoint's headers say, as a table or JSON."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from rich.table import Table

from ..checkpoint.contents import Contents, look
from ..checkpoint.place import is_folder
from ..counted import counted
from .headers import headers
from .terminal import escape, out, size


def inspect(checkpoint: str, as_json: bool) -> None:
    """Prints the contents of a folder, or of a repository of the hub."""
    if is_folder(checkpoint):
        found = look(Path(checkpoint))
    else:
        with headers(checkpoint) as folder:
            found = look(folder)
    print(json.dumps(found.to_dict())) if as_json else _print(found)


def _print(found: Contents) -> None:
    console = out()
    format = f"{found.format}: " if found.format else ""
    console.print(f"[bold]{escape(found.model)}[/], {counted(found.files, 'file')}; {format}{escape(found.schemes)}")
    for transform in found.transforms:
        console.print(f"transform {escape(transform)}")
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("number", "shape", "dtype", "size", "tensors"):
        table.add_column(column, overflow="fold")
    for what, rows in itertools.groupby(found.rows, lambda row: row.what):
        table.add_section()
        table.add_row("", "", "", "", f"[bold]{escape(what)}[/]")
        for row in rows:
            shape = "×".join(map(str, row.shape)) or "scalar"
            style = "" if row.fp8 else "dim"
            table.add_row(str(row.count), shape, row.dtype, size(row.nbytes), escape(row.name), style=style)
    console.print(table)
    fp8 = (
        f"FP8 weights {size(found.fp8_bytes)}, their scales {size(found.scale_bytes)}, the rest "
        if found.fp8_bytes
        else ""
    )
    if found.mtp_bytes:
        weights = f"{found.mtp_fp8_weights} FP8 weight{'s' * (found.mtp_fp8_weights != 1)}"
        console.print(
            f"Layers for multi-token prediction among them: {weights}, {size(found.mtp_bytes)} with their scales"
        )
    if found.notes:
        console.print(escape(f"Read as its files say: {found.notes}."), soft_wrap=True)
    console.print(f"{fp8}{size(found.other_bytes)}; in bf16 {size(found.bf16_bytes)}")
