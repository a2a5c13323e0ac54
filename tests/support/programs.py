"""Random modules with FP8 weights, and what they must compute: the same steps in float64 on weights dequantized by hand.

    case = draw(seed)
    case.module(*case.inputs(rows))      # FP8, in case.dtype
    case.truth(*case.inputs(rows))       # float64

A program is a chain of steps on a tensor `[rows, tokens, features]`. Each step takes `(get, x)`, where `get(name)` is a
parameter by name: of the module, dequantized as it is asked for, or of the reference.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8

Step = Callable[[Callable[[str], Tensor], Tensor], Tensor]
TOKENS = 3
HUGE = 1e35  #: times FP8 values up to 448 and 130 features, beyond float32


class Holder(nn.Module):
    """A weight of any rank, and a bias of any shape."""

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...] | None, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weight, dtype=dtype))
        self.bias = None if bias is None else nn.Parameter(torch.zeros(bias, dtype=dtype))


class Program(nn.Module):
    def __init__(self, steps: list[Step], holders: dict[str, Holder]):
        super().__init__()
        self.steps = steps
        self.holders = nn.ModuleDict(holders)

    def get(self, name: str) -> Tensor:
        holder, leaf = name.split(".")
        return getattr(self.holders[holder], leaf)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self.get, x)
        return x


@dataclass
class Case:
    seed: int
    dtype: torch.dtype
    scheme: str
    words: list[str]
    module: nn.Module
    exact: dict[str, Tensor]
    features: int
    magnitude: float

    def inputs(self, rows: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + rows)
        x = torch.randn(rows, TOKENS, self.features, generator=generator) * self.magnitude
        return (x.to(self.dtype),)

    @torch.no_grad()
    def truth(self, x: Tensor) -> Tensor:
        y = x.double()
        for step in self.module.steps:
            y = step(self.exact.__getitem__, y)
        return y

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.dtype}, {self.scheme}: {' | '.join(self.words)}"


@dataclass
class _Draft:
    r: random.Random
    dtype: torch.dtype
    d: int  # features of x
    holders: dict[str, Holder] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def add(self, word: str, step: Step) -> None:
        self.words.append(word)
        self.steps.append(step)

    def size(self) -> int:
        return self.r.choice([8, 16, 24, 32, 40, 64, 72, 130])

    def new(self, *shape: int, bias: tuple[int, ...] | None = None) -> str:
        """The name of a weight: a new one, or one of that shape that is used already."""
        same = [
            n for n, h in self.holders.items() if tuple(h.weight.shape) == shape and (h.bias is None) == (bias is None)
        ]
        if same and self.r.random() < 0.4:
            self.words.append("(reused)")
            return self.r.choice(same)
        name = f"p{len(self.holders)}"
        self.holders[name] = Holder(shape, bias, self.dtype)
        return name


# ------------------------------------------------------------------------------------------------------------ the steps


def _linear(c: _Draft) -> None:
    n, odd = c.size(), c.r.random()
    bias = None if odd < 0.4 else (1,) if odd < 0.5 else (1, n) if odd < 0.6 else (n,)
    name = c.new(n, c.d, bias=bias)
    shape = c.r.choice(["as it is", "flat", "transposed", "columns"])

    def step(get: Any, x: Tensor) -> Tensor:
        b = get(f"{name}.bias") if bias else None
        if shape == "flat":
            y = F.linear(x.reshape(-1, x.shape[-1]), get(f"{name}.weight"), b)
            return y.reshape(x.shape[0], x.shape[1], -1)
        if shape == "transposed":
            return F.linear(x.transpose(0, 1), get(f"{name}.weight"), b).transpose(0, 1)
        if shape == "columns":
            wide = torch.cat([x, x], -1)
            return F.linear(wide[..., : x.shape[-1]], get(f"{name}.weight"), b)
        return F.linear(x, get(f"{name}.weight"), b)

    c.add(f"linear {c.d}->{n} bias {bias} {shape}", step)
    c.d = n


def _matmul(c: _Draft) -> None:
    n = c.size()
    name = f"{c.new(n, c.d)}.weight"
    forms: dict[str, Step] = {
        "x @ W.t()": lambda get, x: x @ get(name).t(),
        "x @ W.mT": lambda get, x: torch.matmul(x, get(name).mT),
        "x @ W.t()[None]": lambda get, x: x @ get(name).t().unsqueeze(0),
        "mean of x @ W.t() over 2": lambda get, x: (x @ get(name).t().expand(2, 1, -1, -1)).mean(0),
        "x[0] @ W.t() over rows": lambda get, x: x[0] @ get(name).t().expand(x.shape[0], -1, -1),
        "W @ x.mT": lambda get, x: (get(name) @ x.mT).mT,
        "W @ x over rows": lambda get, x: (get(name).unsqueeze(0) @ x.transpose(1, 2)).transpose(1, 2),
        "bmm expanded": lambda get, x: torch.bmm(x, get(name).t().expand(x.shape[0], -1, -1)),
        "bmm on the left": lambda get, x: torch.bmm(get(name).expand(x.shape[0], -1, -1), x.mT).mT,
        "bmm repeated": lambda get, x: torch.bmm(x, get(name).t().unsqueeze(0).repeat(x.shape[0], 1, 1)),
        "contiguous": lambda get, x: x @ get(name).t().contiguous(),
        "addmm": lambda get, x: torch.addmm(
            x.reshape(-1, x.shape[-1])[:, :1], x.reshape(-1, x.shape[-1]), get(name).t(), alpha=0.5
        ).reshape(x.shape[0], x.shape[1], -1),
        "baddbmm": lambda get, x: torch.baddbmm(x[..., :1], x, get(name).t().expand(x.shape[0], -1, -1)),
        "mv": lambda get, x: torch.stack([torch.mv(get(name), x[0, i]) for i in range(x.shape[1])])[None] + x[..., :1],
        "einsum": lambda get, x: torch.einsum("bsk,nk->bsn", x, get(name)),
        "einsum, weight first": lambda get, x: torch.einsum("nk,bsk->bns", get(name), x).transpose(1, 2),
        "einsum, rows kept": lambda get, x: torch.einsum("bsk,rnk->bsn", x, get(name).expand(2, -1, -1)) * 0.5,
        "tensordot": lambda get, x: torch.tensordot(x, get(name), dims=([2], [1])),
        "conv1d": lambda get, x: F.conv1d(x.transpose(1, 2), get(name).unsqueeze(-1)).transpose(1, 2),
        "scaled weight": lambda get, x: F.linear(x, get(name) * 0.5),
        "weight twice": lambda get, x: F.linear(x, get(name)) + x @ get(name).t() * 0.5,
        "sum of weight": lambda get, x: F.linear(x, get(name)) + get(name).sum(1) * 0.1,
        "view": lambda get, x: F.linear(x, get(name).reshape(-1).view(get(name).shape)),
        "flipped": lambda get, x: F.linear(x, get(name).flip(0)),
        "cast": lambda get, x: F.linear(x.to(torch.float32 if x.dtype != torch.float64 else x.dtype),
                                        get(name).to(torch.float32 if x.dtype != torch.float64 else x.dtype)).to(x.dtype),
    }  # fmt: skip
    form = c.r.choice(list(forms))
    c.add(f"{form} {c.d}->{n}", forms[form])
    c.d = n


def _square(c: _Draft) -> None:
    """Square weights used as they lie, where a transposition that is missed cannot be told from the shapes."""
    name = f"{c.new(c.d, c.d)}.weight"
    forms: dict[str, Step] = {
        "x @ W": lambda get, x: x @ get(name),
        "x @ W[None]": lambda get, x: x @ get(name).unsqueeze(0),
        "linear W.t()": lambda get, x: F.linear(x, get(name).t()),
        "twice transposed": lambda get, x: x @ get(name).t().t().mT,
        "three times": lambda get, x: x @ get(name).unsqueeze(0).transpose(1, 2).permute(0, 2, 1)[0].t(),
        "permuted batch": lambda get, x: torch.bmm(x, get(name).expand(x.shape[0], -1, -1).permute(0, 2, 1)),
        "reshaped": lambda get, x: x @ get(name).t().reshape(x.shape[-1], x.shape[-1]),
    }
    form = c.r.choice(list(forms))
    c.add(f"{form} {c.d}", forms[form])


def _sliced(c: _Draft) -> None:
    """A part of a weight, in rows, columns or steps."""
    n, k, a = c.size(), c.d + c.r.choice([0, 8, 16]), c.r.choice([0, 3, 8])
    name, rows, cols = f"{c.new(n + a, k)}.weight", slice(a, a + n), slice(k - c.d, k)
    if c.r.random() < 0.3:
        name, rows = f"{c.new(2 * n, k)}.weight", slice(None, None, 2)
    form = c.r.choice(["linear", "matmul", "chunk"])
    if form == "chunk":
        name, cols = f"{c.new(2 * n, c.d)}.weight", slice(None)
        c.add(f"chunk {c.d}->{n}", lambda get, x: F.linear(x, get(name).chunk(2, 0)[1]) + F.linear(x, get(name)[:n]))
    elif form == "linear":
        c.add(f"linear W[{rows}, {cols}]", lambda get, x: F.linear(x, get(name)[rows, cols]))
    else:
        c.add(f"x @ W[{rows}, {cols}].t()", lambda get, x: x @ get(name)[rows][:, cols].t())
    c.d = n


def _both(c: _Draft) -> None:
    """A weight times a weight."""
    m, n = c.size(), c.size()
    first, second = f"{c.new(m, c.d)}.weight", f"{c.new(n, m)}.weight"
    if c.r.random() < 0.5:
        c.add(f"x @ (W2 @ W1).t() {c.d}->{m}->{n}", lambda get, x: x @ (get(second) @ get(first)).t())
    else:
        c.add(f"x @ (W1.t() @ W2.t()) {c.d}->{m}->{n}", lambda get, x: x @ (get(first).t() @ get(second).t()))
    c.d = n


def _together(c: _Draft) -> None:
    """Linears with one input: gate and up, or q, k, v."""
    n, static = c.size(), c.r.random() < 0.5
    names = [f"{c.new(n, c.d)}.weight" for _ in range(2 + static)]

    def step(get: Any, x: Tensor) -> Tensor:
        ys = [F.linear(x, get(name)) for name in names]
        if not static:
            return F.silu(ys[0]) * ys[1]
        return torch.softmax(ys[0] @ ys[1].mT / math.sqrt(n), -1) @ ys[2]

    c.add(f"{'attention' if static else 'gated'} {c.d}->{n}", step)
    c.d = n


def _experts(c: _Draft) -> None:
    e, n = c.r.choice([1, 3, 4]), c.size()
    name = f"{c.new(e, n, c.d)}.weight"
    ids = [c.r.randrange(-e, e) for _ in range(TOKENS)]
    one = c.r.randrange(-e, e)
    cuts = [*sorted(c.r.randrange(0, TOKENS + 1) for _ in range(e - 1)), TOKENS]

    def flat(x: Tensor) -> Tensor:
        return x[-1]  # [tokens, features]

    def route(x: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(ids, dtype=dtype, device=x.device)

    def grouped(get: Any, x: Tensor) -> Tensor:
        rows = flat(x)
        if rows.dtype == torch.bfloat16:
            offs = torch.tensor(cuts, dtype=torch.int32)
            return torch._grouped_mm(rows, get(name).transpose(-2, -1), offs=offs)[None] + x[..., :1]
        begin, parts = 0, []
        for expert, end in enumerate(cuts):
            parts.append(rows[begin:end] @ get(name)[expert].t())
            begin = end
        return torch.cat(parts)[None] + x[..., :1]

    forms: dict[str, Step] = {
        f"selected [{one}]": lambda get, x: F.linear(x, get(name)[one]),
        f"selected, matmul [{one}]": lambda get, x: x @ get(name)[one].t(),
        f"selected, transposed first [{one}]": lambda get, x: x @ get(name).transpose(1, 2)[one],
        f"selected, last index [{one}]": lambda get, x: F.linear(x, get(name).select(-3, one)),
        f"gathered {ids}": lambda get, x: (
            torch.bmm(get(name)[route(x)], flat(x).unsqueeze(-1)).squeeze(-1)[None] + x[..., :1]
        ),
        f"gathered int32 {ids}": lambda get, x: (
            torch.bmm(get(name)[route(x, torch.int32)], flat(x).unsqueeze(-1)).squeeze(-1)[None] + x[..., :1]
        ),
        f"gathered, transposed {ids}": lambda get, x: (
            torch.bmm(flat(x).unsqueeze(1), get(name).mT[route(x)]).squeeze(1)[None] + x[..., :1]
        ),
        f"gathered, several rows {ids}": lambda get, x: (
            torch.bmm(x[:1].expand(TOKENS, -1, -1), get(name)[route(x)].mT).mean(0)[None] + x[..., :1]
        ),
        f"grouped {cuts}": grouped,
        "all": lambda get, x: torch.einsum("bsk,enk->bsen", x, get(name)).mean(2),
        "batched": lambda get, x: torch.bmm(x[:1].expand(e, -1, -1), get(name).mT).mean(0)[None] + x[..., :1],
        "one by one": lambda get, x: sum(F.linear(x, get(name)[i]) for i in range(e)) / e,
    }
    form = c.r.choice(list(forms))
    if form.startswith("grouped") and (c.d * 2 % 16 or n * 2 % 16):
        form = "all"  # torch's grouped matmul asks for rows of 16 bytes
    c.add(f"experts {e}: {form} {c.d}->{n}", forms[form])
    c.d = n


def _between(c: _Draft) -> None:
    d = c.d
    forms: dict[str, Step] = {
        "layer_norm": lambda get, x: F.layer_norm(x, (d,)),
        "rms_norm": lambda get, x: F.rms_norm(x, (d,), eps=1e-6),
        "relu": lambda get, x: F.relu(x) + 0.1 * x,
        "gelu": lambda get, x: F.gelu(x),
        "silu in place": lambda get, x: F.silu(x.clone(), inplace=True),
        "residual": lambda get, x: x + torch.tanh(x),
        "roll": lambda get, x: x.roll(1, 1),
        "cat and cut": lambda get, x: torch.cat([x, x * 2], 1)[:, 1 : 1 + TOKENS],
        "add in place": lambda get, x: x.clone().add_(x.mean()),
    }
    form = c.r.choice(list(forms))
    c.add(form, forms[form])


_STEPS = [_linear, _matmul, _matmul, _matmul, _square, _sliced, _both, _together, _experts, _experts]


# -------------------------------------------------------------------------------------------------------------- drawing


def draw(seed: int) -> Case:
    """The module of a seed, loaded with FP8 weights."""
    r = random.Random(seed)
    dtype = r.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    draft = _Draft(r, dtype, r.choice([8, 16, 24, 40, 64, 130]))
    features = draft.d
    magnitude = r.choice([1.0, 1.0, 1e-3, 100.0] + [HUGE] * (dtype != torch.float16))
    for number in range(r.choice([1, 2, 2, 3])):
        r.choice(_STEPS if magnitude != HUGE or number else [_linear, _matmul, _square, _sliced, _experts])(draft)
        if magnitude == HUGE:
            draft.add("back", lambda get, x: x * (x.detach().abs().amax().clamp_min(1.0).reciprocal()))
        draft.add("rms_norm", lambda get, x: F.rms_norm(x, (x.shape[-1],), eps=1e-6))
        if r.random() < 0.4:
            _between(draft)
    strategy = r.choice(["channel", "channel", "tensor", "block", "group"])
    block = {"channel": (1, 0), "tensor": (0, 0), "block": r.choice([(128, 128), (16, 32), (7, 5)]), "group": (1, 8)}[
        strategy
    ]
    activation = r.choice(["none", "token", "tensor", "group"])
    state, exact = _weights(draft, strategy, block, activation, seed)
    module = ctfp8.load_state_dict(Program(draft.steps, draft.holders), state, _config(strategy, block, activation))
    scheme = f"{strategy} {block}, {activation}"
    return Case(seed, dtype, scheme, draft.words, module, exact, features, magnitude)


def _weights(
    draft: _Draft, strategy: str, block: tuple[int, int], activation: str, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict, and what each parameter is exactly: rounded to the module's dtype once, then float64."""
    generator = torch.Generator().manual_seed(seed)
    state, exact = {}, {}
    for name, holder in draft.holders.items():
        weight = torch.randn(holder.weight.shape, generator=generator) * holder.weight.shape[-1] ** -0.5
        weight *= torch.randn(weight.shape[:-1], generator=generator).mul(0.5).exp().unsqueeze(-1)
        rows, cols = block[0] or weight.shape[-2], block[1] or weight.shape[-1]
        # the scale of each element, by hand
        height, width = math.ceil(weight.shape[-2] / rows), math.ceil(weight.shape[-1] / cols)
        scale = torch.empty(*weight.shape[:-2], height, width)
        wide = torch.empty_like(weight)
        for i in range(height):
            for j in range(width):
                at = (..., slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols))
                scale[..., i, j] = weight[at].abs().amax((-2, -1)) / 448
                wide[at] = scale[..., i, j, None, None]
        fp8 = (weight / wide).to(FP8)
        key = f"holders.{name}.weight"
        state[key] = fp8
        state[f"{key}_scale"] = scale.reshape(weight.shape[:-2] or (1,)) if strategy == "tensor" else scale
        if activation == "tensor":
            state[f"holders.{name}.input_scale"] = torch.tensor([0.02])
        exact[f"{name}.weight"] = (fp8.float() * wide).to(draft.dtype).double()
        if holder.bias is not None:
            bias = torch.randn(holder.bias.shape, generator=generator).to(draft.dtype)
            state[f"holders.{name}.bias"], exact[f"{name}.bias"] = bias, bias.double()
    return state, exact


def _config(strategy: str, block: tuple[int, int], activation: str) -> dict[str, Any]:
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    weights: dict[str, Any] = {**eight, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = list(block)
    if strategy == "group":
        weights["group_size"] = block[1]
    inputs: dict[str, Any] | None = {
        "none": None,
        "token": {**eight, "strategy": "token", "dynamic": True},
        "tensor": {**eight, "strategy": "tensor", "dynamic": False},
        "group": {**eight, "strategy": "group", "group_size": 128, "dynamic": True},
    }[activation]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
