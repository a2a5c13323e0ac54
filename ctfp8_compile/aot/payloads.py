"""Reads the tensors of a `.pt2`: each record once into memory of its own, and no tensor reaches beyond its record."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from ..compat import deserialize_scalar_type, schema
from ..errors import ArtifactError
from . import typed
from .archive import Archive
from .closed_list import checks
from .typed import Misfit, short


def read_tensors(archive: Archive, folder: str, prefix: str, config: str, devices: set[str]) -> dict[str, torch.Tensor]:
    """The tensors that the JSON record `config` of a folder lists, by their name in the module, on the CPU.

    Tensors that share a record share its memory, as tied weights do.

    Raises:
        ArtifactError: naming the tensor that does not fit its bytes, or the record that is damaged.
    """
    path_name = re.compile(rf"{prefix}\d+", re.ASCII)
    try:
        listed = typed.build(schema.PayloadConfig, typed.parse(archive.read(folder + config)), checks(devices), config)
        payloads = {name: _checked(archive, folder, path_name, name, p) for name, p in listed.config.items()}
    except Misfit as problem:
        raise ArtifactError(f"{archive.path}: {problem}. It was edited or damaged; not loaded.") from None
    storages = {
        path: archive.tensor(folder + path) for path in dict.fromkeys(p.path_name for p in listed.config.values())
    }
    out: dict[str, torch.Tensor] = {}
    for name, (payload, dtype, size, stride, offset) in payloads.items():
        flat = storages[payload.path_name].view(dtype)
        if dtype == torch.bool and bool((flat.view(torch.uint8) > 1).any()):
            raise ArtifactError(f"{archive.path}: {name} holds bytes that are no bool. It was edited; not loaded.")
        tensor = torch.as_strided(flat, size, stride, offset)
        out[name] = nn.Parameter(tensor, requires_grad=False) if payload.is_param else tensor
    return out


def _checked(
    archive: Archive, folder: str, path_name: re.Pattern[str], name: str, payload: schema.PayloadMeta
) -> tuple[schema.PayloadMeta, torch.dtype, list[int], list[int], int]:
    """A payload with its dtype, sizes, strides and offset, all within the bytes of its record."""
    meta, record = payload.tensor_meta, archive.records.get(folder + payload.path_name)
    if payload.use_pickle or meta is None:
        raise Misfit(f"{short(name)} is pickled, which could run code")
    if not path_name.fullmatch(payload.path_name) or record is None:
        raise Misfit(f"{short(name)} is in {short(payload.path_name)}, which the file lacks")
    numbers = [n.value for n in (*meta.sizes, *meta.strides, meta.storage_offset)]
    if any(type(n) is not int for n in numbers):
        raise Misfit(f"{short(name)} has a symbolic size")
    size, stride, offset = numbers[: len(meta.sizes)], numbers[len(meta.sizes) : -1], numbers[-1]
    dtype = deserialize_scalar_type(meta.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    if math.prod(size) > 2**48 or record.size % dtype.itemsize or (last + 1) * dtype.itemsize > record.size:
        raise Misfit(f"{short(name)} reaches beyond the {record.size} bytes of {payload.path_name}")
    return payload, dtype, size, stride, offset
