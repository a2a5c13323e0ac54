"""Every private name of transformers that this package leans on, and what its releases call the same thing differently."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import modeling_layers

from ..compat import look_up
from ..errors import UsageError

#: Name here: where transformers has it, and the releases it was seen in.
PRIVATE = {
    "QuantizationConfigMixin": ("transformers.utils.quantization_config.QuantizationConfigMixin", "5.23 5.24"),
    "HfQuantizer": ("transformers.quantizers.base.HfQuantizer", "5.23 5.24"),
    "register_quantization_config": ("transformers.quantizers.auto.register_quantization_config", "5.23 5.24"),
    "register_quantizer": ("transformers.quantizers.auto.register_quantizer", "5.23 5.24"),
    "get_checkpoint_conversion_mapping": (
        "transformers.conversion_mapping.get_checkpoint_conversion_mapping",
        "5.23 5.24",
    ),
    "get_model_conversion_mapping": ("transformers.conversion_mapping.get_model_conversion_mapping", "5.23 5.24"),
    "Concatenate": ("transformers.core_model_loading.Concatenate", "5.23 5.24"),
    "ConversionOps": ("transformers.core_model_loading.ConversionOps", "5.23 5.24"),
    "Interleave": ("transformers.core_model_loading.Interleave", "5.23 5.24"),
    "MergeModulelist": ("transformers.core_model_loading.MergeModulelist", "5.23 5.24"),
    "Transpose": ("transformers.core_model_loading.Transpose", "5.23 5.24"),
    "WeightConverter": ("transformers.core_model_loading.WeightConverter", "5.23 5.24"),
    "WeightRenaming": ("transformers.core_model_loading.WeightRenaming", "5.23 5.24"),
    "WeightTransform": ("transformers.core_model_loading.WeightTransform", "5.23 5.24"),
    "dot_natural_key": ("transformers.core_model_loading.dot_natural_key", "5.23 5.24"),
    "rename_source_key": ("transformers.core_model_loading.rename_source_key", "5.23 5.24"),
    "revert_weight_conversion": ("transformers.core_model_loading.revert_weight_conversion", "5.23 5.24"),
    "remove_tied_weights_from_state_dict": (
        "transformers.modeling_utils.remove_tied_weights_from_state_dict", "5.23 5.24"
    ),
    "load_offloaded_parameter": ("transformers.integrations.accelerate.load_offloaded_parameter", "5.23 5.24"),
    "ALL_ATTENTION_FUNCTIONS": ("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", "5.23 5.24"),
    "ALL_MASK_ATTENTION_FUNCTIONS": ("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS", "5.23 5.24"),
    "cached_file": ("transformers.utils.hub.cached_file", "5.23 5.24"),
    "DynamicLayer": ("transformers.cache_utils.DynamicLayer", "5.23 5.24"),
    "DynamicSlidingWindowLayer": ("transformers.cache_utils.DynamicSlidingWindowLayer", "5.23 5.24"),
    "StaticSlidingWindowLayer": ("transformers.cache_utils.StaticSlidingWindowLayer", "5.23 5.24"),
    "DYNAMIC_LAYER_TYPE_MAPPING": ("transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING", "5.23 5.24"),
    "STATIC_LAYER_TYPE_MAPPING": ("transformers.cache_utils.STATIC_LAYER_TYPE_MAPPING", "5.23 5.24"),
    "get_layer_types_and_kwargs": ("transformers.cache_utils.get_layer_types_and_kwargs", "5.23 5.24"),
    "install_output_recorders": (
        "transformers.utils.output_capturing.maybe_install_capturing_hooks", "5.24"
    ),
    "MtpModel": ("transformers.modeling_layers.MtpModel", "5.24"),
    "StaticLayer": ("transformers.cache_utils.StaticLayer", "5.23 5.24"),
    "ALL_PARALLEL_STYLES": ("transformers.distributed.parallel_utils.ALL_PARALLEL_STYLES", "5.23 5.24"),
    "replace_layer_number_by_wildcard": ("transformers.distributed.parallel_utils.replace_layer_number_by_wildcard", "5.23 5.24"),
    "AllReduceParallel": ("transformers.distributed.tensor_parallel.AllReduceParallel", "5.23 5.24"),
    "ColwiseParallel": ("transformers.distributed.tensor_parallel.ColwiseParallel", "5.23 5.24"),
    "EmbeddingParallel": ("transformers.distributed.tensor_parallel.EmbeddingParallel", "5.23 5.24"),
    "MoeExpertsParallel": ("transformers.distributed.tensor_parallel.MoeExpertsParallel", "5.23 5.24"),
    "PackedColwiseParallel": ("transformers.distributed.tensor_parallel.PackedColwiseParallel", "5.23 5.24"),
    "RowwiseParallel": ("transformers.distributed.tensor_parallel.RowwiseParallel", "5.23 5.24"),
    "AllReduceEP": ("transformers.distributed.expert_parallel.AllReduceEP", "5.23 5.24"),
    "EPImplementationInterface": ("transformers.distributed.expert_parallel.EPImplementationInterface", "5.23 5.24"),
    "ensure_torch_distributed": ("transformers.distributed.utils._ensure_torch_distributed", "5.23 5.24"),
    "build_server": ("transformers.cli.serving.server.build_server", "5.24"),  # and below: need ctfp8-compile[serve]
    "ModelManager": ("transformers.cli.serving.model_manager.ModelManager", "5.24"),
    "ChatCompletionHandler": ("transformers.cli.serving.chat_completion.ChatCompletionHandler", "5.24"),
    "CompletionHandler": ("transformers.cli.serving.completion.CompletionHandler", "5.24"),
    "ResponseHandler": ("transformers.cli.serving.response.ResponseHandler", "5.24"),
    "GenerationState": ("transformers.cli.serving.utils.GenerationState", "5.24"),
    "GenerateManager": ("transformers.cli.serving.utils.GenerateManager", "5.24"),  # one request after another
    "CBGenerateManager": ("transformers.cli.serving.utils.CBGenerateManager", "5.24"),  # batched continuously
    "CBStreamer": ("transformers.cli.serving.utils.CBStreamer", "5.24"),
    "GenerationCancelled": ("transformers.cli.serving.utils._GenerationCancelled", "5.24"),
    "response_events_to_chunks": ("transformers.cli.serving.utils.response_events_to_chunks", "5.24"),
    "StreamError": ("transformers.cli.serving.utils._StreamError", "5.24"),
    "ContinuousBatchingLogitsProcessor": (
        "transformers.generation.continuous_batching.cb_logits_processors.ContinuousBatchingLogitsProcessor", "5.24"
    ),
    "ContinuousBatchingLogitsProcessorList": (
        "transformers.generation.continuous_batching.cb_logits_processors.ContinuousBatchingLogitsProcessorList", "5.24"
    ),
}  # fmt: skip
#: What a forward calls its key-value cache: `cache` from 5.24 on, where the name before it warns, to go in 5.40.
_CACHE_ARGUMENTS = ("cache", "past_key_values")
#: Whether drafts that go beyond the end of a text are cut off, and not only never made: from 5.24 on.
CUTS_DRAFTS = hasattr(modeling_layers, "MtpModel")


def __getattr__(name: str) -> Any:
    return look_up("transformers", PRIVATE, __name__, name)


def cache_argument(model: Any) -> str:
    """The name under which a model's forward, and its `generate`, take a key-value cache.

    Raises:
        UsageError: it takes none.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in _CACHE_ARGUMENTS:
        if name in parameters:
            return name
    raise UsageError(
        f"{type(model).__name__} does not generate text: its forward takes no key-value cache ({' or '.join(_CACHE_ARGUMENTS)})."
    )
