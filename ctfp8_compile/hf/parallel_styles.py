"""transformers' parallel styles with functional collectives only: what each does to a module's inputs and outputs.

Parameters are cut as transformers cuts them. Here activations are plain tensors, never DTensors, so that a tracer sees one
graph of matmuls and collectives, the same on every rank.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Replicate

from ..checkpoint.shard import Cut
from ..compat import functional_collectives as collectives
from ..errors import SchemeError
from .compat import (
    ALL_PARALLEL_STYLES,
    AllReduceEP,
    AllReduceParallel,
    ColwiseParallel,
    EmbeddingParallel,
    EPImplementationInterface,
    MoeExpertsParallel,
    PackedColwiseParallel,
    RowwiseParallel,
    replace_layer_number_by_wildcard,
)

PREFIX = "ctfp8_"
#: Styles that cut parameters, or mark modules, and move nothing between ranks without gradients.
SILENT = (
    "colwise", "packed_rowwise", "replicated_with_grad_allreduce", "mla_kv_a_proj", "moe_identity_expert", "local_params",
    "replicate", "grouped_gemm", "ep_dispatch_experts",
)  # fmt: skip
#: Styles of modules that hold a part of each of their parameters, by rules of these, and whose outputs are summed.
SUMMED = ("all_reduce", "moe_tp_experts")


def rewrite_plan(model: nn.Module, plan: dict[str, str]) -> None:
    """Puts our styles in place of transformers', in place.

    Raises:
        SchemeError: a style that we do not know.
    """
    modules = {replace_layer_number_by_wildcard(name) for name, _ in model.named_modules()}
    for name, style in plan.items():
        if style.startswith(PREFIX):
            continue
        if PREFIX + style in ALL_PARALLEL_STYLES:
            if name in modules:
                plan[name] = PREFIX + style
        elif style not in SILENT and name in modules:
            raise SchemeError(
                f"{name}: the parallel plan has the style {style!r}, which FP8 models are not tested with. "
                "Give it another one: DistributedConfig(tp_plan={...})."
            )
    known = modules | {replace_layer_number_by_wildcard(name) for name, _ in model.named_parameters()}
    for name in [name for name, style in plan.items() if style.removeprefix(PREFIX) in SUMMED and name in modules]:
        # transformers builds other experts for some quantized models (llama4); whole ones must not be summed
        if not any(inner.startswith(f"{name}.") and inner in known for inner in plan):
            del plan[name]


def mark_local(model: nn.Module) -> None:
    """Linears compute on their local tensors in every mode, as transformers does for quantized ones."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.__dict__["_hf_quantized_needs_local_tp"] = True


class _Local:
    """Mixed into a style: the module's parameters are local, and so are its inputs and outputs."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def context_around_forward(self, module: nn.Module, mesh: Any) -> Any:
        return contextlib.nullcontext()

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: Any) -> Any:
        return args, kwargs

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: Any) -> Any:
        return output


class _Rowwise(_Local, RowwiseParallel):
    """`all_reduce(x_local @ W_local.T) + bias`; the bias, which every rank holds whole, is added once, after the sum."""

    def install_forward(self, module: Any, mesh: Any) -> Any:
        if module._parameters.get("bias") is None:
            return super().install_forward(module, mesh)
        if type(module).forward is not nn.Linear.forward:
            raise SchemeError(
                f"{type(module).__name__} has a bias and a forward of its own: its result cannot be summed over ranks "
                "before the bias is added."
            )

        def forward(x: Tensor) -> Tensor:
            (x, *_), _ = self.transform_inputs_pre_forward(module, (x,), {}, mesh)
            return _all_reduce(nn.functional.linear(x, module.weight), mesh) + module.bias

        module.forward = forward
        return module

    def transform_inputs_pre_forward(self, module: Any, args: Any, kwargs: Any, mesh: Any) -> Any:
        if not isinstance(self.input_layouts, Replicate):
            return args, kwargs
        start, stop = _run(module.in_features, mesh)
        return (args[0][..., start:stop], *args[1:]), kwargs

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: Any) -> Any:
        return _all_reduce(output, mesh)


class _Gathered(_Local, ColwiseParallel):
    """`all_gather(x @ W_local.T)` along the last dimension."""

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        return _all_gather(output, module.out_features, mesh)


class _PackedColwise(_Local, PackedColwiseParallel):
    pass


class _Embedding(_Local, EmbeddingParallel):
    """Of a vocabulary cut over the ranks, each looks up its own ids; of vectors cut over the ranks, each its part."""

    def install_forward(self, module: Any, mesh: Any) -> nn.Module:
        if self.shard_dim != 0:
            return super().install_forward(module, mesh)
        start, stop = _run(module.num_embeddings, mesh)
        module.padding_idx = None  # of the whole vocabulary, and only for gradients

        def forward(ids: Tensor) -> Tensor:
            elsewhere = (ids < start) | (ids >= stop)
            own = (ids - start).masked_fill(elsewhere, 0)
            vectors = type(module).forward(module, own)  # of the class it has by then: one of an FP8 table is another
            return _all_reduce(vectors.masked_fill(elsewhere[..., None], 0), mesh)

        module.forward = forward
        return module

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        return _all_gather(output, module.embedding_dim, mesh)


class _Summed(_Local, AllReduceParallel):
    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: Any) -> Any:
        return None if output is None else _all_reduce(output, mesh)


class _Experts(_Local, MoeExpertsParallel):
    """Each rank has a slice of every expert."""

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: Any) -> Any:
        return None if output is None else _all_reduce(output, mesh)


class _OwnExperts(AllReduceEP):
    """Each rank has some whole experts, and gives the routes to others weight 0."""

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        count = self.num_local_experts
        elsewhere = top_k_index // count != self.ep_mesh.get_local_rank()
        index = (top_k_index % count).masked_fill(elsewhere, count)
        out = self.experts_forward(hidden_states, index, top_k_weights.masked_fill(elsewhere, 0.0))
        return _all_reduce(out, self.ep_mesh)


def _run(size: int, mesh: Any) -> tuple[int, int]:
    return next(iter(Cut(0, mesh.size(), mesh.get_local_rank()).runs(size)), (0, 0))


def _group(mesh: Any) -> Any:
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def _all_reduce(x: Tensor, mesh: Any) -> Tensor:
    return _arrived(collectives.all_reduce(x, "sum", _group(mesh)))


def _all_gather(x: Tensor, size: int, mesh: Any) -> Tensor:
    """Along the last dimension, whose last slices may be shorter."""
    share = -(-size // mesh.size())
    if x.shape[-1] != share:
        x = nn.functional.pad(x, (0, share - x.shape[-1]))
    whole = _arrived(_gather(x.movedim(-1, 0).contiguous(), 0, _group(mesh)))
    return whole[:size].movedim(0, -1)


def _arrived(result: Tensor) -> Tensor:
    """Outside of a tracer a collective gives a tensor that waits at its first use: here it is used at once."""
    return result.wait() if isinstance(result, collectives.AsyncCollectiveTensor) else result


#: torch 2.13 renamed it.
_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor

for _name, _style in {
    "rowwise": _Rowwise(),
    "rowwise_rep": _Rowwise(input_layouts=Replicate()),
    "rowwise_split_input": _Rowwise(input_layouts=Replicate()),
    "colwise_gather_output": _Gathered(output_layouts=Replicate()),
    "colwise_rep": _Gathered(output_layouts=Replicate()),
    "packed_colwise": _PackedColwise(),
    "embedding_rowwise": _Embedding(shard_dim=0),
    "embedding_colwise": _Embedding(shard_dim=1),
    "all_reduce": _Summed(),
    "moe_tp_experts": _Experts(),
}.items():
    ALL_PARALLEL_STYLES.register(PREFIX + _name, _style)
EPImplementationInterface.register("ctfp8", _OwnExperts)
