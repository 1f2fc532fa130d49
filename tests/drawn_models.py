"""Random models as Python text: whole graphs for ``optimize``, valid by construction.

A model has 1 to 14 steps, each a few lines: pointwise operators, broadcasts, views, slices, reductions,
products, norms, attention, losses, lookups, conversions, writes in place of intermediates, buffers and
inputs, lines that occur twice, stacks of equal layers; it returns one value or several, some of them views,
integers, inputs or the same value twice. Steps are drawn one after the other and run at once, so that
values stay finite and shapes are known. Nothing decides between two computed values (no ``>`` of two, no
maximum): rounding shows as a small error, a wrong operator as one of an element's size. Only values that
autograd keeps nothing of are written in place.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["DrawnModel", "drawn_model"]

MOST_STEPS = 14
LARGEST = 60.0


@dataclass(frozen=True)
class DrawnModel:
    """``source`` defines a class ``Model``; ``made`` makes the inputs, an expression for each."""

    seed: int
    made: tuple[tuple[str, str], ...]
    source: str
    rounds: bool
    """Whether values are rounded to sixteen bits on their way."""

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(self.seed + 1)
        made = [eval(text, {"torch": torch}) for _, text in self.made]
        return tuple(
            x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in made
        )

    def model(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        torch.manual_seed(self.seed)
        space: dict[str, Any] = {}
        exec(compile(self.source, f"<model {self.seed}>", "exec"), space)
        made: torch.nn.Module = space["Model"]()
        return made.to(dtype)

    def script(self) -> str:
        """A file that makes the model and its inputs."""
        made = "\n".join(f"{name} = {text}" for name, text in self.made)
        given = ", ".join(name for name, _ in self.made)
        end = f"model, inputs = Model(), ({given},)"
        return f"{self.source}\n\ntorch.manual_seed({self.seed + 1})\n{made}\n{end}\n"


_HEAD = """import torch
import torch.nn.functional as F


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("w", "k", "p"):
            self.register_parameter(name, torch.nn.Parameter(torch.randn({c}, {c}) / {c} ** 0.5))
        self.up = torch.nn.Linear({c}, {d})
        self.gate = torch.nn.Linear({c}, {d}, bias=False)
        self.down = torch.nn.Linear({d}, {c})
        self.scale = torch.nn.Parameter(1 + 0.1 * torch.randn({c}))
        self.shift = torch.nn.Parameter(0.1 * torch.randn({c}))
        self.table = torch.nn.Embedding(11, {c})
        self.norm = torch.nn.BatchNorm1d({c})
        self.conv = torch.nn.Conv1d({b}, {b}, 3, padding=1)
        self.register_buffer("seen", torch.zeros({c}))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("angle", torch.randn({s}, {h}))

    def forward(self, {names}):
"""


class _Drawer:
    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)
        self.seed = seed
        self.batch, self.length = self.r.choice([(1, 8), (2, 3), (2, 8), (3, 5), (4, 16)])
        self.rows = self.batch * self.length
        self.columns = self.r.choice([4, 8, 16, 32])
        self.wide = self.r.choice([12, 24, 40])
        self.deep = self.r.random() < 0.5
        self.shape: tuple[int, ...] = (
            (self.batch, self.length, self.columns) if self.deep else (self.rows, self.columns)
        )
        self.lines: list[str] = []
        self.pool: list[str] = []
        self.fixed: set[str] = set()
        self.rounds = False
        self.number = 0

    def drawn(self) -> DrawnModel:
        shape = ", ".join(map(str, self.shape))
        grad = self.r.choice(["", ".requires_grad_()"])
        made = [
            ("x", f"torch.randn({shape}){grad}"),
            ("y", f"torch.randn({self.columns}, {self.rows}).t().reshape({shape})"),
            ("n", f"torch.randn({shape})"),
            ("m", f"torch.rand({shape}) > 0.5"),
            ("i", f"torch.randint(0, 11, ({', '.join(map(str, self.shape[:-1]))},))"),
            ("j", f"torch.randint(0, {self.columns}, ({shape}))"),
        ]
        head = _HEAD.format(
            c=self.columns, d=self.wide, b=self.batch, s=self.length, h=self.columns // 2,
            names=", ".join(name for name, _ in made),
        )  # fmt: skip
        before = DrawnModel(self.seed, tuple(made), f"{head}        return x\n", False)
        model = before.model()
        self.space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "self": model}
        self.space |= dict(zip([name for name, _ in made], before.inputs(), strict=True))
        self.pool = ["x", "y"]
        for _ in range(self.r.randint(1, MOST_STEPS)):
            self._step()
        if not self.lines:
            self._take(["v0 = x * self.scale"], "v0")
        self.lines.append(f"return {self._results()}")
        body = "".join(f"        {line}\n" for line in self.lines)
        return DrawnModel(self.seed, tuple(made), head + body, self.rounds)

    def _step(self) -> None:
        step = self.r.choices([s for s, _ in _STEPS], [weight for _, weight in _STEPS])[0]
        name = f"v{self.number}"
        self.number += 1
        text = step(self, name)
        lines = text if isinstance(text, list) else [f"{name} = {text}"]
        self._take(lines, name)

    def _take(self, lines: list[str], name: str) -> None:
        """Run the lines of a step and keep them where its value is of use."""
        exec("\n".join(lines), self.space)
        value = self.space[name]
        if value.is_floating_point():
            seen = value.detach()
            if not bool(seen.isfinite().all()) or float(seen.abs().max()) > LARGEST:
                return
        self.lines += lines
        self.pool.append(name)

    def _results(self) -> str:
        made = [name for name in self.pool if name not in ("x", "y")]
        ends = [name for name in made if not any(_reads(line, name) for line in self.lines)] or made[-1:]
        kept = ends[-3:]
        draw = self.r.random()
        if draw < 0.15:
            kept.append(kept[0])
        elif draw < 0.3:
            kept.append(f"{self.r.choice(made)}.detach()")
        elif draw < 0.4:
            kept.append("i + 1")
        elif draw < 0.5:
            kept.append(f"{kept[0]}.reshape(-1)[::2]")
        elif draw < 0.6:
            kept.append(f"{self.r.choice(made)}.double().square().mean()")
        elif draw < 0.7:
            kept.append(self.r.choice(made))
        if len(kept) == 1 and self.r.random() < 0.7:
            return kept[0]
        if self.r.random() < 0.3:
            return "{" + ", ".join(f"'out{k}': {name}" for k, name in enumerate(kept)) + "}"
        return f"({', '.join(kept)},)"

    # --- what steps pick ----------------------------------------------------------------------

    def whole(self) -> str:
        """A value of the shape of most and of the model's type, late ones more often."""
        found = [n for n in self.pool if self._is_whole(n)]
        return self.r.choice(found[-3:] if self.r.random() < 0.6 else found)

    def _is_whole(self, name: str) -> bool:
        value = self.space[name]
        return tuple(value.shape) == self.shape and value.dtype == torch.float32

    def fitting(self) -> str:
        """A value that can be broadcast to the shape of most."""
        found = []
        for name in self.pool:
            try:
                shape = torch.broadcast_shapes(self.shape, self.space[name].shape)
            except RuntimeError:
                continue
            if tuple(shape) == self.shape:
                found.append(name)
        return self.r.choice(found[-4:] if self.r.random() < 0.6 else found)

    def fill(self, text: str) -> str:
        return text.format(
            a=self.whole(), b=self.whole(), f=self.fitting(), c=self.columns, d=self.wide, r=self.rows,
            h=self.columns // 2, q=self.columns // 4, s=self.length, g=self.batch, n=len(self.shape),
            shape=", ".join(map(str, self.shape)), k=self.r.choice([2, 3, 5]),
        )  # fmt: skip


def _reads(line: str, name: str) -> bool:
    _, _, value = line.partition(" = ")
    return name in "".join(c if c.isalnum() or c == "_" else " " for c in value or line).split()


# --- the steps ------------------------------------------------------------------------------

_Step = Callable[[_Drawer, str], "str | list[str]"]

_POINTWISE = (
    "torch.sigmoid({a})",
    "torch.tanh({a}) * {f}",
    "F.gelu({a})",
    "F.gelu({a}, approximate='tanh') + {f}",
    "F.silu({a}) * torch.tanh({b})",
    "F.relu({a} + 0.37)",
    "({a} - 0.41).abs() * 0.5",
    "{a}.clamp(-1.3, 1.1)",
    "torch.exp(-{a}.square())",
    "torch.log1p({a}.square())",
    "torch.rsqrt({a}.square() + 1)",
    "F.softplus({a})",
    "torch.sin({a}) - {f} * 0.25",
    "{a} / ({f}.square() + 1)",
    "torch.where(m, {a}, {f} * 0.5)",
    "{a}.masked_fill(m, 0.1)",
    "{a} * self.scale + self.shift",
    "torch.addcmul({a}, {f}, {b}.tanh(), value=0.5)",
    "torch.lerp({a}, {b}, 0.3)",
    "F.dropout({a}, 0.5, training=False) + {f}",
    "{a} * {a}.sigmoid() + {a}",
    "{a} + {a}",
    "{a}.pow(2) * 0.3 - {f}",
    "F.leaky_relu({a} + 0.21, 0.1)",
    "F.elu({a} - 0.13)",
    "{a} * 1 + 0",
    "-(-{a})",
)

_REDUCTIONS = (
    "{a}.sum(-1, keepdim=True) * 0.1",
    "{a}.mean(-1, keepdim=True)",
    "{a}.mean(0)",
    "{a}.mean()",
    "{a}.var(-1, keepdim=True, unbiased=False)",
    "torch.logsumexp({a}, -1, keepdim=True)",
    "{a}.cumsum(-1) * 0.2",
    "{a}.square().sum((0, -1), keepdim=True).sqrt() * 0.05",
    "torch.linalg.vector_norm({a}.square() + 0.1, dim=-1, keepdim=True) * 0.1",
    "{a} - {a}.mean(-1, keepdim=True)",
    "torch.softmax({a}, -1)",
    "F.log_softmax({a}, -1) * 0.2",
    "torch.softmax({a}.masked_fill(m, -5.0), -1) * {b}",
    "F.layer_norm({a}, ({c},))",
    "F.layer_norm({a} + {b}, ({c},), self.scale, self.shift)",
    "F.rms_norm({a}, ({c},), self.scale)",
    "{a} * torch.rsqrt({a}.square().mean(-1, keepdim=True) + 1e-3) * self.scale",
    "F.normalize({a} + 2.0, dim=-1)",
)

_VIEWS = (
    "{a}.flip(0)",
    "{a}.transpose(-1, -2).contiguous().transpose(-1, -2)",
    "{a}.reshape({r}, 2, {h}).transpose(1, 2).reshape({shape})",
    "torch.cat((-{a}[..., {h}:], {a}[..., :{h}]), -1)",
    "F.pad({a}[..., 1:], (1, 0))",
    "{a}[..., :1].expand({shape})",
    "{a}[..., :1]",
    "{a}[..., -1:] * 2",
    "{a}[0]",
    "{a}[-1:]",
    "torch.roll({a}, 1, -1)",
    "{a}.unsqueeze(0).squeeze(0)",
    "torch.stack(({a}, {b}), -1).sum(-1)",
    "torch.stack(({a}[..., ::2], {a}[..., 1::2]), -1).flatten(-2)",
    "sum({a}.chunk(2, -1)).repeat_interleave(2, -1)",
    "torch.cat({a}.split([1, {c} - 1], -1)[::-1], -1)",
    "{a}.reshape(-1).view({shape})",
    "{a}.narrow(-1, 0, {h}).repeat(*[1] * ({n} - 1), 2)",
    "torch.tril({a}.reshape({r}, {c})).reshape({shape})",
    "{a}.unflatten(-1, (2, {h})).movedim(-1, -2).flatten(-2)",
    "{a}.reshape({r}, {c}).t().reshape({shape})",
)

_LOOKUPS = (
    "self.table(i)",
    "{a} + F.embedding(i, self.table.weight) * 0.5",
    "torch.gather({a}, -1, j)",
    "torch.zeros_like({a}).scatter_add(-1, j, {b}) * 0.5",
    "{a}.index_select(-1, j.reshape(-1)[:{c}])",
    "F.one_hot(i, {c} + 11)[..., :{c}].to({a}.dtype) + {a}",
    "{a} * (i.unsqueeze(-1) + 1).to({a}.dtype) * 0.1",
    "{a} + torch.arange({c}, dtype={a}.dtype) * 0.01",
    "{a} * m",
    "F.cross_entropy({a}.reshape({r}, {c}), i.reshape(-1) % {c})",
    "F.cross_entropy(F.linear({a}.reshape({r}, {c}), self.table.weight), i.reshape(-1))",
    "F.nll_loss(F.log_softmax({a}.reshape({r}, {c}), -1), i.reshape(-1) % {c}, reduction='sum') * 0.05",
    "F.mse_loss({a}, {b})",
)

_PRODUCTS = (
    "{a} @ self.w",
    "F.linear({a}, self.w, self.shift)",
    "F.gelu(F.linear({a}, self.k)) + {b}",
    "self.down(F.silu(self.gate({a})) * self.up({a}))",
    "self.down(F.relu(self.up({a}) + 0.2)) + {b}",
    "torch.addmm(self.shift, {a}.reshape({r}, {c}), self.p).reshape({shape})",
    "({a} @ self.w) * ({a} @ self.k).tanh() + {a} @ self.p",
    "torch.einsum('...c,dc->...d', {a}, self.w)",
    "torch.bmm({a}.reshape({g}, {s}, {c}), self.w.expand({g}, -1, -1)).reshape({shape})",
    "({a}.reshape({r}, {c}).t() @ {b}.reshape({r}, {c}) / {r})[:1]",
    "(self.w @ self.k)[0] * {a}",
    "self.conv({a}.reshape(1, {g}, -1)).reshape({shape})",
    "self.norm({a}.reshape({r}, {c})).reshape({shape})",
    "F.linear(F.rms_norm({a}, ({c},), self.scale), self.w) + {a}",
)

_CONVERSIONS = (
    "{a}.double() * 0.5",
    "({a}.double() + {f}).to({a}.dtype)",
    "({a} * 10).to(torch.int32).to({a}.dtype) * 0.05 * 0 + {b}",
    "({a}.detach() * 0 + 1).to(torch.int64) + i.unsqueeze(-1)",
)

_ROUNDED = (
    "{a}.to(torch.bfloat16).to({a}.dtype)",
    "({a}.bfloat16() @ self.w.bfloat16()).to({a}.dtype)",
    "({a}.half() * 0.5 + 1).to({a}.dtype)",
    "F.softmax({a}.bfloat16(), -1, dtype=torch.float32).to({a}.dtype)",
)


def _picked(texts: tuple[str, ...]) -> _Step:
    def step(d: _Drawer, name: str) -> str:
        return d.fill(d.r.choice(texts))

    return step


def _rounded(d: _Drawer, name: str) -> str:
    text = d.fill(d.r.choice(_ROUNDED))
    d.rounds = True
    return text


def _again(d: _Drawer, name: str) -> str | list[str]:
    """A line that is there already."""
    found = [line for line in d.lines if line.startswith("v") and " = " in line and "[" not in line[:5]]
    if not found:
        return d.fill("{a} * 0.5")
    return f"{d.r.choice(found).partition(' = ')[2]} * 0.9"


_WRITES = (
    "{t}.add_({f}, alpha=0.5)",
    "{t}.mul_(0.7)",
    "{t}.neg_()",
    "{t}.sub_(0.1)",
    "{t}[..., ::2] += {a}[..., ::2]",
    "{t}[..., 0] = 0.3",
    "{t}[0].add_({a}[0])",
    "{t}.reshape({r}, {c})[:, 1:].mul_(0.5)",
    "{t}.masked_fill_(m, 0.2)",
    "{t}.narrow(-1, 1, 2).copy_({a}.narrow(-1, 0, 2))",
    "{t}.transpose(-1, -2)[..., 0].zero_()",
)
_FIRST = ("{a}.clone()", "{a} * 1.5", "{a} + {f}", "torch.zeros_like({a})", "{a}.detach().clone()")
_LAST_WRITES = ("{t}.tanh_()", "{t}.sigmoid_()", "{t}.mul_({a})", "F.silu({t}, inplace=True)")


def _in_place(d: _Drawer, name: str) -> list[str]:
    aliased = d.r.random() < 0.3
    # A view of what needs no gradient yet cannot be written once its base does.
    first = "{a} * self.scale" if aliased else d.r.choice(_FIRST)
    lines = [f"{name} = ({d.fill(first)}).contiguous()"]
    chosen = [d.r.choice(_WRITES) for _ in range(d.r.randint(1, 4))]
    if d.r.random() < 0.3:
        chosen.append(d.r.choice(_LAST_WRITES))
    if aliased:
        view = f"u{name[1:]}"
        lines.append(f"{view} = {name}[..., 1:]")
        chosen = [*chosen[:1], f"{view}.mul_(0.8)", *chosen[1:]]
    # The value itself is in no pool yet: nothing that autograd keeps is written.
    lines += [d.fill(text.replace("{t}", name)) for text in chosen]
    return lines


def _of_state(d: _Drawer, name: str) -> list[str]:
    """Buffers and an input that are read as copies and written."""
    a = d.whole()
    kind = d.r.choice(("seen", "count", "input"))
    if kind == "seen":
        mean = f"{a}.detach().reshape(-1, {d.columns}).mean(0)"
        return [
            f"{name} = {a} + self.seen.clone()",
            f"self.seen.mul_(0.9).add_({mean}, alpha=0.1)",
        ]
    if kind == "count":
        return ["self.count += 1", f"{name} = {a} * (1 + 0.1 * self.count.clone())"]
    return [f"{name} = {a} + n.clone()", f"n.mul_(0.5).add_({d.r.choice(('0.1', f'{a}.detach() * 0.2'))})"]


def _attention(d: _Drawer, name: str) -> list[str]:
    heads = 2 if d.columns < 16 else 4
    size = d.columns // heads
    a = d.whole()
    split = f".reshape({d.batch}, {d.length}, {heads}, {size}).transpose(1, 2)"
    lines = [f"q{name}, k{name}, w{name} = [({a} @ w){split} for w in (self.w, self.k, self.p)]"]
    q, k, v = f"q{name}", f"k{name}", f"w{name}"
    if d.r.random() < 0.4 and size == d.columns // 2:
        # The columns that angles are for are those of one of two heads.
        for x in (q, k):
            turned = f"torch.cat((-{x}[..., {size // 2}:], {x}[..., :{size // 2}]), -1)"
            lines.append(f"{x} = {x} * self.angle.cos() + {turned} * self.angle.sin()")
    if d.r.random() < 0.3:
        k, v = (f"{t}[:, :1].expand(-1, {heads}, -1, -1)" for t in (k, v))
    zeros = f"torch.zeros({d.length}, {d.length}, dtype={q}.dtype)"
    mask = f"torch.ones({d.length}, {d.length}, dtype=torch.bool).tril()"
    kind = d.r.choice(("plain", "causal", "mask", "float", "written", "written causal"))
    if kind.startswith("written"):
        scores = f"({q} @ ({k}).transpose(-1, -2)) * {size**-0.5:.6f}"
        if kind.endswith("causal"):
            scores = f"({scores}).masked_fill(~{mask}, float('-inf'))"
        made = f"torch.softmax({scores}, -1) @ {v}"
    else:
        options = {
            "plain": "",
            "causal": ", is_causal=True",
            "mask": f", attn_mask={mask}",
            "float": f", attn_mask={zeros}.masked_fill(~{mask}, -1e4)",
        }
        made = f"F.scaled_dot_product_attention({q}, {k}, {v}{options[kind]})"
    shape = ", ".join(map(str, d.shape))
    return [*lines, f"{name} = ({made}).transpose(1, 2).reshape({shape})"]


def _layers(d: _Drawer, name: str) -> list[str]:
    """The same lines several times over."""
    count = d.r.randint(2, 4)
    body = d.r.choice(
        (
            "{t} = {t} + self.down(F.silu(self.gate({t})) * self.up({t})) * 0.3",
            "{t} = F.layer_norm({t} + F.gelu({t} @ self.w), ({c},), self.scale, self.shift)",
            "{t} = {t} + (F.rms_norm({t}, ({c},), self.scale) @ self.k).tanh()",
            "{t} = torch.softmax({t}, -1) * {t} + ({t} @ self.p).sin()",
        )
    )
    return [f"{name} = {d.whole()}"] + [d.fill(body.replace("{t}", name))] * count


_STEPS: tuple[tuple[_Step, int], ...] = (
    (_picked(_POINTWISE), 8),
    (_picked(_REDUCTIONS), 5),
    (_picked(_VIEWS), 5),
    (_picked(_LOOKUPS), 3),
    (_picked(_PRODUCTS), 5),
    (_picked(_CONVERSIONS), 1),
    (_rounded, 1),
    (_again, 1),
    (_in_place, 3),
    (_of_state, 1),
    (_attention, 2),
    (_layers, 1),
)


def drawn_model(seed: int) -> DrawnModel:
    """The model of a seed."""
    return _Drawer(seed).drawn()
