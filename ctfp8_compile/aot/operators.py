"""Which operators the graph of an artifact may call: those that compute new tensors from tensors, and nothing else."""

from __future__ import annotations

import importlib
import re

import torch

from ..compat import OpOverload
from ..errors import ArtifactError, TargetError
from ..target import KERNEL_LIBRARIES
from .ranks import COLLECTIVES, NAMESPACE

#: Operator namespaces of graphs we write.
NAMESPACES = ("aten", "prims", "ctfp8", *KERNEL_LIBRARIES)

_OPERATOR = re.compile(rf"torch\.ops\.({'|'.join(NAMESPACES)})\.(\w+)\.(\w+)", re.ASCII)
#: What ranks say to each other; which groups of them may is checked by `ranks.bind`.
_COLLECTIVE = re.compile(rf"torch\.ops\.{NAMESPACE}\.({'|'.join(COLLECTIVES)}|wait_tensor)\.default")
#: Arithmetic on symbolic sizes.
_SCALAR = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|torch\.sym_(not|int|float|ite|max|min|sqrt)|math\.trunc"
)
#: Operators of ATen that reach files or other tensors' memory, or make tensors that are no plain strided ones.
_NEVER = re.compile(
    r"from_file|set_data|record_stream|resize\w*|rename\w*|.*sparse.*|.*nested.*|to_padded_tensor|.*quantized.*|quantize_per_.*"
    r"|q_\w+|int_repr|fbgemm_.*|to_mkldnn.*|mkldnn_(linear|reorder|max_pool|adaptive).*|miopen_.*|cudnn_.*|_?data|.*_backward(_\w+)?"
)
#: ATen's private operators check their arguments less; these are the ones that inference graphs of models hold.
_PRIVATE = re.compile(
    r"_(to_copy|softmax|log_softmax|safe_softmax|masked_softmax|aminmax|unsafe_view|unsafe_index(_put)?|unsafe_masked_index"
    r"|reshape_alias|adaptive_avg_pool[23]d|native_batch_norm_legit(_no_training|_functional)?|batch_norm_impl_index"
    r"|batch_norm_no_update|fused_rms_norm|scaled_dot_product_\w+|scaled_mm(_v2)?|scaled_grouped_mm(_v2)?|grouped_mm|int_mm"
    r"|assert_scalar|assert_tensor_metadata|assert_async|functional_(assert|sym_constrain)_\w+|local_scalar_dense"
    r"|convolution(_mode)?|trilinear|embedding_bag(_forward_only)?|upsample_\w+|weight_norm(_interface)?|prelu_kernel"
    r"|[cp]dist_forward|euclidean_dist|fft_[cr]2[cr]|conj(_physical|_copy)?|neg_view(_copy)?|linalg_\w+|logcumsumexp|stack"
    r"|is_a(ll|ny)_true|dim_arange|thnn_fused_(lstm|gru)_cell|add_relu|addmm_activation|native_multi_head_attention"
    r"|transformer_encoder_layer_fwd|pad_circular|pad_enum|_(and|or|xor|lshift|rshift)__)"
)


def check_operator(target: str) -> None:
    """Returns if a graph may call the operator of this name, and it is there.

    Raises:
        ArtifactError: it may not, or this version of torch has no such operator.
        TargetError: a library that registers it is not installed here.
    """
    if _COLLECTIVE.fullmatch(target):
        return
    match = _OPERATOR.fullmatch(target)
    if match is None:
        if not _SCALAR.fullmatch(target):
            raise _refusal(target)
        return
    namespace, name, overload = match.groups()
    operator = _registered(namespace, name, overload)
    if operator is None and namespace in KERNEL_LIBRARIES:
        operator = _from_library(target, namespace, name, overload)
    if operator is None:
        raise ArtifactError(
            f"its graph calls {target}, which torch {torch.__version__} does not have. Export the model again with "
            "this version of torch."
        )
    if namespace == "aten" and (_NEVER.fullmatch(name) or (name.startswith("_") and not _PRIVATE.fullmatch(name))):
        raise _refusal(target)
    if namespace in ("aten", "prims") and operator._schema.is_mutable:
        raise _refusal(target)


def _refusal(target: str) -> ArtifactError:
    return ArtifactError(f"its graph calls {target[:100]!a}, which ctfp8 does not load.")


def _registered(namespace: str, name: str, overload: str) -> OpOverload | None:
    operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    return operator if isinstance(operator, OpOverload) else None


def _from_library(target: str, namespace: str, name: str, overload: str) -> OpOverload:
    module, package = KERNEL_LIBRARIES[namespace].module, KERNEL_LIBRARIES[namespace].distributions[0]
    try:
        importlib.import_module(module)
    except Exception as error:  # a library without its GPU fails in ways of its own (OSError, RuntimeError, …)
        raise TargetError(
            f"its graph calls {target}, and {module} cannot be imported here ({error}). Install it: pip install {package}"
        ) from error
    operator = _registered(namespace, name, overload)
    if operator is None:
        raise TargetError(f"its graph calls {target}, which the installed {package} does not have. Update it.")
    return operator
