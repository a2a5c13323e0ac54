"""Models larger than one device: transformers shards by its plan, and FP8 weights, with their scales, follow.

What transformers makes of a plan are DTensors on the meta device, of which its loader reads this rank's part of each file.
The parts become plain tensors; which part of what they are is kept, so that saving can put them together again.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers.distributed import DistributedConfig

from ..checkpoint.shard import Cut, Cuts, Shard, blocks_of, cure, held, local_shape, of_rank, put, within
from ..counted import counted
from ..errors import UsageError
from ..model.experts import of_experts
from ..model.parametrization import Dequantize, quantized_parameters
from ..model.plan import QuantizedParameter
from ..model.ranks import agree, is_first
from .compat import ensure_torch_distributed


def take_config(kwargs: dict[str, Any], dequantize: bool) -> DistributedConfig | None:
    """The `distributed_config` among the arguments of `from_pretrained`, checked, or one made of `tp_plan`, `tp_size`.

    Raises:
        UsageError: of a kind that does not work here, or that this launch does not fit.
    """
    config = kwargs.pop("distributed_config", None)
    alone = {name: kwargs.pop(name) for name in ("tp_plan", "tp_size") if kwargs.get(name) is not None}
    if config is None and alone:
        config = DistributedConfig(**alone)
    elif alone:
        raise UsageError("tp_plan and tp_size are part of distributed_config; give one or the other.")
    if config is None:
        return None
    config = DistributedConfig.from_dict(config) if isinstance(config, dict) else copy.copy(config)
    if config.dp_size > 1 or config.pp_size > 1:
        raise UsageError(
            "FP8 models run tensor parallel (tp_size) and expert parallel (ep_size); FSDP and pipeline parallelism "
            "(fsdp_size, dp_replicate_size, pp_size) are not supported."
        )
    if config.tp_size == 1 and config.ep_size == 1:
        return None
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if world != config.tp_size:
        raise UsageError(
            f"tp_size={config.tp_size}, but {world} process{'es' * (world > 1)} run. Start the script with "
            f"torchrun --nproc-per-node {config.tp_size}."
        )
    if config.ep_size not in (1, config.tp_size):
        raise UsageError(f"ep_size={config.ep_size} must be 1 or tp_size, {config.tp_size}.")
    if config.enable_sequence_parallel:
        raise UsageError("sequence parallelism is not supported with FP8 models.")
    if config.ep_implementation not in ("auto", "all_reduce", "ctfp8"):
        raise UsageError(f"ep_implementation={config.ep_implementation!r} is not supported; leave it out.")
    config.ep_implementation = "ctfp8"
    if dequantize or kwargs.get("device_map") is not None:
        raise UsageError("device_map, or dequantize=True, and distributed_config exclude each other.")
    ensure_torch_distributed()
    return config


def check_heads(model: Any) -> None:
    """Refuses heads that cannot be divided: a part of a head is none."""
    config, size = model.config.get_text_config(decoder=True), model.config.distributed_config.tp_size
    cut = any(name.rpartition(".")[2] in ("q_proj", "k_proj", "qkv_proj") for name in model.tp_plan)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if cut and isinstance(heads, int) and heads % size:
            raise UsageError(
                f"{name} is {heads}, which tp_size={size} does not divide: a head cannot be cut. Choose a tp_size that does."
            )


def is_distributed(model: Any) -> bool:
    return getattr(model.config, "distributed_config", None) is not None


def key_value_heads(model: Any, heads: int) -> range:
    """Which of a layer's key-value heads this rank has."""
    plan = getattr(model, "_tp_plan", None) or {}
    cut = any(name.endswith(".k_proj") and style == "colwise" for name, style in plan.items())
    if not (cut and is_distributed(model)):
        return range(heads)
    ranks = model.config.distributed_config.tp_size
    own = heads // ranks
    first = dist.get_rank() % ranks * own
    return range(first, first + own)


def cuts_of(parameter: DTensor) -> Cuts:
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    return tuple(
        Cut(p.dim % parameter.ndim, parameter.device_mesh.size(i), coordinate[i], getattr(p, "split_factor", 1))  # type: ignore[attr-defined]
        for i, p in enumerate(parameter.placements)
        if not isinstance(p, Replicate)
    )


def cut(
    info: QuantizedParameter, weight_scale: Tensor, input_scale: Tensor | None, part: Shard
) -> tuple[QuantizedParameter, Tensor, Tensor | None]:
    """What this rank needs of what is known of a parameter, and of its scales.

    Where static scales of several tensors were merged, each rank keeps those of all: the largest of them counts.
    """
    if input_scale is not None and len(info.layout.shape) == 3:
        input_scale = input_scale[held(info.layout.shape, part.cuts)[0]]
    return dataclasses.replace(info, layout=part), part.cut_scale(weight_scale, info.scheme), input_scale


def warn_of_cut_blocks(model: nn.Module) -> None:
    """Says which weights have smaller blocks than in the file, and what keeps them."""
    parts = {name: (d.info.layout, d.info.scheme) for name, _, d in quantized_parameters(model)}
    smaller = {
        n: (part, s) for n, (part, s) in parts.items() if isinstance(part, Shard) and part.cut_block(s) is not None
    }
    if not smaller or not is_first():
        return
    name, (part, scheme) = next(iter(smaller.items()))
    before, after = ("x".join(map(str, block)) for block in (part.whole.block(scheme), part.block(scheme)))
    warnings.warn(
        f"{name}: the border between two ranks cuts its blocks of {before}, which become {after} "
        f"({counted(len(smaller), 'weight')} in "
        f"all). Results are the same; a kernel for whole blocks does not take them; {cure(list(smaller.values()))}.",
        stacklevel=2,
    )


def localize(model: nn.Module) -> dict[str, tuple[tuple[int, ...], Cuts]]:
    """Puts this rank's part in place of each DTensor, in place.

    Returns:
        by name, the whole shape of each parameter that was cut, and how.
    """
    found: dict[str, tuple[tuple[int, ...], Cuts]] = {}
    local: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if cuts := cuts_of(parameter):
                    found[f"{path}.{leaf}" if path else leaf] = (tuple(parameter.shape), cuts)
                if id(parameter) not in local:
                    local[id(parameter)] = nn.Parameter(parameter.to_local(), requires_grad=False)
                module._parameters[leaf] = local[id(parameter)]
    return found


def gather(part: Tensor, shape: tuple[int, ...], cuts: Cuts, rows: range | None = None) -> Tensor:
    """The whole tensor on the CPU of rank 0, one rank's part after the other; elsewhere nothing of it is filled in.

    Args:
        rows: of its first dimension, those to gather; None: all.
    """
    if rows is not None:
        here, cuts = within(shape, cuts, rows)
        part, shape = part[here], (len(rows), *shape[1:])
    agree()  # that it is received: who fails to send or to write says so here
    return _gather(part, shape, cuts)


def gather_quantized(
    weight: Tensor, dequantize: Dequantize, whole: QuantizedParameter, experts: range | None = None
) -> tuple[Tensor, Dequantize]:
    """`gather` for an FP8 parameter and its scales, or for some of its experts."""
    part, scale, static = dequantize.info.layout, dequantize.weight_scale, dequantize.input_scale
    assert isinstance(part, Shard)
    cuts = part.cuts
    if experts is not None:
        here, cuts = within(whole.layout.shape, cuts, experts)
        weight, scale, static = weight[here], scale[here], None if static is None else static[here]
        whole = of_experts(whole, experts)
    agree()
    shape = whole.layout.shape
    by_expert = tuple(cut for cut in cuts if cut.dim == 0 and len(shape) == 3)
    if static is not None and by_expert:
        static = _gather(static, (shape[0], static.shape[-1]), by_expert)
    scale = _gather_scale(scale, whole, cuts)
    return _gather(weight, shape, cuts), Dequantize(whole, scale, static)


def gather_scales(dequantize: Dequantize, whole: QuantizedParameter) -> Dequantize:
    """`gather_quantized` for the scales alone, of a matrix."""
    part = dequantize.info.layout
    assert isinstance(part, Shard)
    agree()
    return Dequantize(whole, _gather_scale(dequantize.weight_scale, whole, part.cuts), dequantize.input_scale)


def _gather(part: Tensor, shape: tuple[int, ...], cuts: Cuts) -> Tensor:
    whole = torch.empty(shape, dtype=part.dtype, device="cpu" if is_first() else "meta")
    for rank, theirs in _parts(part, lambda rank: local_shape(shape, of_rank(cuts, rank))):
        put(_bits(whole), _bits(theirs), of_rank(cuts, rank))
    return whole


def _gather_scale(part: Tensor, whole: QuantizedParameter, cuts: Cuts) -> Tensor:
    shards = [blocks_of(whole.layout, of_rank(cuts, rank)) for rank in range(dist.get_world_size())]
    high, wide = whole.layout.block(whole.scheme)
    *experts, rows, columns = whole.layout.shape
    scale = torch.empty((*experts, -(-rows // high), -(-columns // wide)), dtype=part.dtype)

    def shape(rank: int) -> tuple[int, ...]:
        *own, n, k = shards[rank].shape
        high, wide = shards[rank].block(whole.scheme)
        return (*own, -(-n // high), -(-k // wide))

    for rank, theirs in _parts(part, shape):
        shards[rank].put_scale(scale, theirs, whole.scheme)
    return scale


def _parts(part: Tensor, shape: Callable[[int], tuple[int, ...]]) -> Iterator[tuple[int, Tensor]]:
    """On rank 0: each rank and its part. Elsewhere: nothing; the part is sent. Who has nothing of it is left out."""
    device = torch.device("cpu") if dist.get_backend() == "gloo" else part.device
    if not is_first():
        if part.numel():
            dist.send(_bytes(part).to(device), dst=0)
        return
    if part.numel():
        yield 0, part.cpu()
    for rank in range(1, dist.get_world_size()):
        if math.prod(found := shape(rank)):
            received = torch.empty(found, dtype=part.dtype, device=device)
            dist.recv(_bytes(received), src=rank)
            yield rank, received.cpu()


def _bits(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that every operator takes."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
