"""A mutator that knows what an artifact is made of: zip fields, records, JSON trees, JSON within JSON, sizes and strides.

Values come from hypothesis, so a file that fails is made smaller. Files are tried by a process of their own (`Trier`): if it
dies, that is a finding, not the end of the test.
"""

from __future__ import annotations

import copy
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from support.hostile import Touch, pickled, stored

Draw = Callable[[Any], Any]
Records = list[tuple[str, bytes]]

MODEL, WEIGHTS, CONSTANTS = (
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
MANIFEST = "extra/ctfp8.json"
#: Importing it, or unpickling `Touch`, or evaluating one of `PYTHON` leaves a file behind.
EVIL_MODULE = "evil_module"
_NUMBERS = [
    -(2**63),
    -(2**31),
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    28,
    31,
    32,
    33,
    64,
    128,
    2**20,
    2**31,
    2**40,
    2**63 - 1,
    2**63,
    10**30,
]
_PLAIN = [None, True, False, 0.5, 1e308, "", "x", [], {}, "NaN", "Infinity"]


def python(mark: Path) -> list[str]:
    """Texts that run code where a reader evaluates, imports or resolves them."""
    call = f"__import__('{EVIL_MODULE}')"
    return [
        call, f"open({str(mark)!r}, 'w')", f"x={call}", f"Symbol({call})", f"Integer(1) if {call} else 1", "torch.load",
        "torch.ops.load_library", "torch.ops.aten.from_file.default", "torch.ops.aten.relu_.default", "_operator.methodcaller",
        "_operator.attrgetter", "math.factorial", "torch.hub.load", "torch.utils.data", "torch._C._jit_clear_class_registry",
        "builtins.eval", f"{EVIL_MODULE}.Kind", f"{EVIL_MODULE}:Kind", "collections.OrderedDict", "torch", "self", "__class__",
        "lambda: 0", "a b", "x" * 3000, "../../etc/passwd", "data/weights/weight_1", "weight_1", "weight_999", "custom_obj_0",
        "Pow(Integer(10), Integer(10000000000))", "Mul(Integer(2), Symbol('s0', positive=True))", "\x1b[2J", "é", "\0",
    ]  # fmt: skip


def mutated(draw: Draw, records: Records, mark: Path) -> bytes:
    """The bytes of a file with one to three changes."""
    records = [(name, data) for name, data in records]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        kind = draw(st.sampled_from(["json"] * 8 + ["record"] * 2 + ["payload"]))
        records = {"json": _json, "record": _record, "payload": _payload}[kind](draw, records, mark)
    data = stored(records)
    return _zip(draw, data) if draw(st.integers(0, 4)) == 0 else data


def _record(draw: Draw, records: Records, mark: Path) -> Records:
    i = draw(st.integers(0, len(records) - 1))
    (name, data), rest = records[i], records[:i] + records[i + 1 :]
    root = name.partition("/")[0]
    how = draw(st.sampled_from(["drop", "twice", "rename", "pickle", "empty", "cut", "other", "add"]))
    if how == "drop":
        return rest
    if how == "twice":
        return [*records, (name, draw(st.sampled_from(records))[1])]
    if how == "rename":
        new = draw(
            st.sampled_from(["models/model.json", "models/MODEL.json", "data/weights/model.pt", "x", "../x", "extra/x"])
        )
        return [*rest, (f"{root}/{new}", data)]
    if how == "add":
        new = draw(st.sampled_from(["data/weights/model.pt", "data/constants/custom_obj_0", "data/aotinductor/model/m.so",
                                    "data/sample_inputs/model.pt", "models/other.json", "data/constants/opaque_obj_0"]))  # fmt: skip
        return [*records, (f"{root}/{new}", pickled(Touch(mark))(b""))]
    content = {
        "pickle": pickled(Touch(mark))(b""),
        "empty": b"",
        "cut": data[: len(data) // 2],
        "other": draw(st.sampled_from(records))[1],
    }
    return [*records[:i], (name, content[how]), *records[i + 1 :]]


def _payload(draw: Draw, records: Records, mark: Path) -> Records:
    """Other bytes in a weight, of the same length or nearly so."""
    i = draw(st.sampled_from([i for i, (name, _) in enumerate(records) if "/weight_" in name]))
    name, data = records[i]
    longer = draw(st.integers(-9, 9))
    content = bytes(draw(st.sampled_from([0, 1, 0x7F, 0xFF])) for _ in range(4)) * (len(data) // 4)
    return [*records[:i], (name, (content + bytes(9))[: len(data) + longer]), *records[i + 1 :]]


def _json(draw: Draw, records: Records, mark: Path) -> Records:
    wanted = draw(st.sampled_from([MODEL] * 4 + [WEIGHTS] * 2 + [MANIFEST] * 3 + [CONSTANTS]))
    places = [i for i, (name, _) in enumerate(records) if name.endswith(wanted)]
    if not places:
        return records
    name, data = records[places[0]]
    try:
        tree = json.loads(data)
    except ValueError:
        return records
    text = json.dumps(_tree(draw, tree, mark))
    if draw(st.integers(0, 3)) == 0:
        text = _escaped(draw, text)
    if draw(st.integers(0, 15)) == 0 and text.startswith("{"):
        text = "{" + f'"{draw(st.sampled_from(list(tree) or ["x"]))}": null, ' + text[1:]  # a key twice
    return [*records[: places[0]], (name, text.encode()), *records[places[0] + 1 :]]


def _tree(draw: Draw, tree: Any, mark: Path) -> Any:
    """A tree with one change; in a string that holds JSON itself, often a change within."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return draw(st.sampled_from(_PLAIN))
    holder, key = places[draw(st.integers(0, len(places) - 1))]
    value = holder[key]
    if isinstance(value, str) and value[:1] in "[{" and draw(st.integers(0, 3)):
        try:
            text = json.dumps(_tree(draw, json.loads(value), mark))
            holder[key] = _escaped(draw, text) if draw(st.booleans()) else text
            return tree
        except ValueError:
            pass
    how = draw(st.sampled_from(["kin"] * 8 + ["near"] * 4 + ["set", "number", "python", "drop", "swap", "add", "enum"]))
    if how == "kin":  # what stands elsewhere under the same key: another tensor's name, another node's operator
        kin = [other[there] for other, there in places if type(there) is type(key) and (there == key or type(key) is int)
               and type(other[there]) is type(value)]  # fmt: skip
        holder[key] = copy.deepcopy(kin[draw(st.integers(0, len(kin) - 1))])
    elif how == "near" and type(value) is int:
        holder[key] = value + draw(st.sampled_from([-1, 1, 2, -value, value]))
    elif how == "near" and type(value) is bool:
        holder[key] = not value
    elif how == "drop":
        del holder[key]
    elif how == "swap":
        other, there = places[draw(st.integers(0, len(places) - 1))]
        holder[key] = copy.deepcopy(other[there])
    elif how == "add" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["as_operator", "as_int", "__enum__", "use_pickle", "x", "as_graph"]))] = (
            copy.deepcopy(value)
        )
    elif how == "add":
        holder.append(copy.deepcopy(value))
    elif how == "enum":
        holder[key] = {"__enum__": True, "fqn": f"{EVIL_MODULE}:Kind", "name": "A"}
    elif how == "python":
        holder[key] = draw(st.sampled_from(python(mark)))
    elif how == "number" or isinstance(value, int):
        holder[key] = draw(st.sampled_from(_NUMBERS))
    else:
        holder[key] = draw(st.sampled_from(_PLAIN))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def _escaped(draw: Draw, text: str) -> str:
    """The same JSON: a letter within strings written as its number."""
    letter = draw(st.sampled_from("_atse"))
    out, inside, quoted = [], False, False
    for char in text:
        out.append(f"\\u{ord(char):04x}" if inside and not quoted and char == letter else char)
        if char == '"' and not quoted:
            inside = not inside
        quoted = char == "\\" and not quoted
        if len(out) > 1 and out[-2] == "\\" and char == "u":
            quoted = False
    return "".join(out)


def _zip(draw: Draw, data: bytes) -> bytes:
    """Changes a field of a header, or cuts, doubles or moves bytes."""
    how = draw(st.sampled_from(["field", "field", "field", "flip", "cut", "double", "before", "after"]))
    at = draw(st.integers(0, len(data) - 1))
    if how == "field":
        mark = draw(st.sampled_from([b"PK\3\4", b"PK\1\2", b"PK\5\6"]))
        starts = [i for i in range(len(data)) if data.startswith(mark, i)]
        start = starts[draw(st.integers(0, len(starts) - 1))] + draw(st.integers(4, 45))
        value = draw(st.sampled_from([0, 1, 8, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
        new = value.to_bytes(4, "little")[: draw(st.sampled_from([2, 4]))]
        return data[:start] + new + data[start + len(new) :]
    length = draw(st.integers(1, 64))
    return {
        "flip": data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :],
        "cut": data[:at] + data[at + length :],
        "double": data[: at + length] + data[at:],
        "before": bytes(length) + data,
        "after": data + bytes(length),
    }[how]


# ---- trying a file in a process that may die ----

_TRIER = """
import json, resource, sys
import torch
import ctfp8_compile as ctfp8
from support.mutate import outcome
torch.set_num_threads(1)
ctfp8.load(sys.argv[1])    # builds or loads what loading needs
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), resource.RLIM_INFINITY))
inputs = torch.load(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(outcome(line.strip(), inputs)), flush=True)
"""


def outcome(path: str, inputs: tuple[Any, ...]) -> list[str]:
    """`["refused", class, message]`, `["right"]`, or what must never be: `["wrong", …]`, `["other", class, message]`."""
    import torch
    from torch._export.serde.serialize import ExportedProgramDeserializer

    import ctfp8_compile as ctfp8
    from ctfp8_compile.aot import archive, manifest, verify

    try:
        module = ctfp8.load(path)
        got = module(*inputs)
    except ctfp8.Ctfp8Error as error:
        return ["refused", type(error).__name__, str(error)]
    except BaseException as error:
        return ["other", type(error).__name__, str(error)]
    with archive.open_archive(Path(path)) as opened:
        checked = verify.read_program(opened, ctfp8.Target.parse(manifest.read_manifest(opened).target).device)
    program = ExportedProgramDeserializer().deserialize(checked.graph, checked.weights, checked.constants)
    try:
        args, kwargs = module._bind(inputs, {})
        want = program.module(check_guards=False)(*args, **kwargs)
    except Exception as error:
        return ["wrong", "the graph as it is in the file does not run", str(error)]
    flat = [torch.utils._pytree.tree_leaves(dict(o) if isinstance(o, dict) else o) for o in (got, want)]
    for g, w in zip(*flat, strict=True):
        if isinstance(g, torch.Tensor) and isinstance(w, torch.Tensor):
            usual = w.isfinite() & (w.abs() < 1e30)  # kernels multiply by scales in another order: others may overflow
            if g.shape != w.shape or not torch.allclose(g[usual].float(), w[usual].float(), atol=0.05, rtol=0.05):
                return ["wrong", "other numbers than the graph as it is in the file"]
        elif g != w:
            return ["wrong", f"{g!r} instead of {w!r}"]
    return ["right"]


class Trier:
    """Tries files in a process of its own, which starts again where one kills it."""

    def __init__(self, good: Path, inputs: Path):
        self.args, self.process = (str(good), str(inputs)), None

    def __call__(self, path: Path, seconds: float = 120) -> list[str]:
        process = self.process = self.process or self._start()
        assert process.stdin is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        line = self._line(process, seconds)
        if line:
            return json.loads(line)
        process.kill()
        code = process.wait()
        self.process = None
        return ["other", "crash or hang", f"exit status {code}"]

    def _start(self) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _TRIER, *self.args], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)  # fmt: skip
        assert self._line(process, 300) == "ready\n"
        return process

    def _line(self, process: subprocess.Popen[str], seconds: float) -> str:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else ""

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
