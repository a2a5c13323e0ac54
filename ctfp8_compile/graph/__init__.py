"""ATen graphs: building nodes, tracing weights back to their markers, printing."""

from .nodes import arguments, before, call, fake_value, sizes, value
from .same import same_kind, same_strides
from .text import format_graph, format_value, op_name
from .weight import (
    CACHED,
    MARKER,
    Weight,
    is_marker,
    is_plumbing,
    is_traced_marker,
    is_view,
    module_name,
    module_path,
    name_markers,
    parameter_name,
    trace_weight,
)

__all__ = [
    "CACHED",
    "MARKER",
    "Weight",
    "arguments",
    "before",
    "call",
    "fake_value",
    "format_graph",
    "format_value",
    "is_marker",
    "is_plumbing",
    "is_traced_marker",
    "is_view",
    "module_name",
    "module_path",
    "name_markers",
    "op_name",
    "parameter_name",
    "same_kind",
    "same_strides",
    "sizes",
    "trace_weight",
    "value",
]
