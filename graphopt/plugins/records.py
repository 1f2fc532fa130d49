"""What plugins hand over, and what the host says about them: frozen records, no behaviour.

Nothing here imports torch: a plugin that only adds a command stays cheap to load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Generic, Literal, TypeVar

if TYPE_CHECKING:
    import click
    import torch
    import torch.fx as fx
    from torch.export import ExportedProgram
    from torch.utils._pytree import TreeSpec

    from graphopt.candidate import Reason
    from graphopt.cost import CostModel, NodeCost
    from graphopt.decoding.cache_scores import CacheScore
    from graphopt.decoding.look import Look
    from graphopt.device import DeviceSpec
    from graphopt.dump.page import Sheet
    from graphopt.emit.replacing import Group
    from graphopt.policy import PolicyQuestion, Selection
    from graphopt.program import Program

__all__ = [
    "CacheScoreSpec",
    "Capture",
    "CaptureInputs",
    "CaptureOptions",
    "CodecSpec",
    "Command",
    "CostModelFactory",
    "DumpFormat",
    "KernelSpec",
    "OperatorCost",
    "PluginRecord",
    "PolicySpec",
    "Registered",
    "ReplacementSpec",
    "ScorerSpec",
    "ShareScoreSpec",
    "Status",
    "TunableSpec",
]

Status = Literal["active", "disabled", "failed", "incompatible"]
T = TypeVar("T")


@dataclass(frozen=True)
class PluginRecord:
    """One plugin and how it fared.

    ``hooks`` are the hooks that it implements. A ``failed`` plugin has ``error``; hooks of it that
    did not fail still count. ``disabled`` and ``incompatible`` plugins contribute nothing. ``slow`` says
    what of it took long, which is no failure.
    """

    name: str
    distribution: str
    version: str
    status: Status
    error: str = ""
    hooks: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()

    def __str__(self) -> str:
        source = f"{self.distribution} {self.version}".strip()
        said = "; ".join(filter(None, (self.error, *self.slow)))
        return f"{self.name} ({source}): {self.status}" + (f": {said}" if said else "")


@dataclass(frozen=True)
class Registered(Generic[T]):
    """What a hook returned, with who returned it; errors and listings name both."""

    value: T
    plugin: str
    distribution: str


@dataclass(frozen=True)
class CaptureInputs:
    """One call of a model, ``model(*args, **kwargs)``: tensors are copies, which may be written."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class CaptureOptions:
    """What a capture is for. ``mode``: whether what comes out is differentiated, ``"train"`` or ``"infer"``;
    ``dynamic_shapes`` is that argument of ``optimize``."""

    mode: Literal["train", "infer"]
    dynamic_shapes: bool | None = None


@dataclass(frozen=True)
class Capture:
    """A model's call as a graph, from ``graphopt_capture``.

    ``graph`` is called as the model is and returns what it does. Where its placeholders are something else,
    ``placeholders`` says what, in their order: the dotted name of a parameter or buffer of the model, or the
    position of a leaf of ``tree_leaves((args, kwargs))``; and where what it returns is flat, ``out_tree`` is
    the structure that the model returns.

    Parameters and buffers in ``graph`` are the model's own, or copies under the names that these have in it,
    or under other names that ``names`` maps to them; the model's own take their place. Other tensors are
    constants; other parameters are refused.

    A capture stands for calls of the same structure, types, sizes and values that are no tensors, in the same
    mode of every module. ``dynamic``: for calls of other sizes too.
    """

    graph: fx.GraphModule | ExportedProgram
    names: Mapping[str, str] = field(default_factory=dict)
    placeholders: tuple[str | int, ...] | None = None
    out_tree: TreeSpec | None = None
    dynamic: bool = False


@dataclass(frozen=True)
class KernelSpec:
    """A kernel: the custom op that runs it, its ATen reference and where it applies.

    ``op`` is the qualified name of a ``torch.library`` op (``"graphopt::rms_norm"``).
    ``reference`` computes the same from the same arguments with ATen ops. ``supports`` takes those
    arguments and returns ``None`` or why the kernel does not take them.
    """

    name: str
    op: str
    reference: Callable[..., Any]
    supports: Callable[..., Reason | None]
    summary: str = ""


@dataclass(frozen=True)
class CodecSpec:
    """A way to hold a floating-point tensor in fewer bytes between forward and backward.

    ``pack`` and ``unpack`` name kernels (``KernelSpec.name``). The first is called as
    ``(x, stream, *constants)`` and gives one tensor or several; ``stream`` tells the values of a program
    apart, for codecs that round at random. The second is called as ``(*packed, size, stride, dtype,
    *constants)`` and gives a tensor of that layout.

    ``bits``: what an element takes, shared parts counted; ``error``: the most that an element may be off,
    in the unit that ``metric`` names; ``unbiased``: whether the mean over streams is the value itself.
    """

    name: str
    pack: str
    unpack: str
    bits: float
    error: float
    metric: str
    unbiased: bool
    constants: tuple[Any, ...] = ()
    summary: str = ""


@dataclass(frozen=True)
class ScorerSpec:
    """A way to say how much a packed weight is off, for the allocation of bytes to weights.

    ``score(weight, unpacked, statistics)`` takes the weight float32[N, K], what its packed form stands for
    and what calibration found of it (``graphopt.Calibration``), all on one device, and gives a number that is
    0 where nothing changed and is added up over weights. ``needs``: observers that calibration must have had
    (``graphopt.packing.calibration.OBSERVERS``); without any it works with no calibration. ``metric`` says
    what the number measures.
    """

    name: str
    score: Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], float]
    metric: str
    needs: tuple[str, ...] = ()
    summary: str = ""


@dataclass(frozen=True)
class ShareScoreSpec:
    """A way to say how much it costs to let one attention read the keys and values of another.

    ``score(look, pairs)`` takes a ``graphopt.decoding.look.Look`` at a program over calibration tokens and
    pairs (consumer, source) of indices of attentions, and gives a number for each; the least are chosen
    first. ``additive``: numbers are in the unit of ``Look.divergence`` and add up, roughly, so that a choice
    is made of them and corrected by what it measures. Else pairs are taken one after another, as far as
    ``accepts(look, sources)``, where given, says yes to all that were taken.
    """

    name: str
    score: Callable[[Look, Sequence[tuple[int, int]]], Sequence[float]]
    metric: str
    additive: bool = False
    accepts: Callable[[Look, Mapping[int, int]], bool] | None = None
    summary: str = ""


@dataclass(frozen=True)
class CacheScoreSpec:
    """A way to say which keys a store that drops some is to keep, for ``evict{policy=name}``.

    ``score(given)`` takes a ``graphopt.decoding.cache_scores.ScoreContext`` and gives a number for each key,
    float32 [B, Hkv, L]; the least goes first. It is a function of what it is given alone and changes none of
    it.
    """

    name: str
    score: CacheScore
    summary: str = ""


@dataclass(frozen=True)
class CostModelFactory:
    """A cost model by name: ``build(device)`` returns one for that device."""

    name: str
    build: Callable[[DeviceSpec], CostModel]
    summary: str = ""


@dataclass(frozen=True)
class PolicySpec:
    """A way to pick a schedule for each program of a step, for ``optimize(policy=name)``.

    ``choose(question)`` gives a ``graphopt.Selection`` from what the ``graphopt.PolicyQuestion`` offers, or
    ``None`` for the planner's own choice. It may be asked several times for one step, as its code turns out
    to take more or less than was expected, must answer the same to the same question, and keeps nothing in
    between.
    """

    name: str
    choose: Callable[[PolicyQuestion], Selection | None]
    summary: str = ""


@dataclass(frozen=True)
class OperatorCost:
    """What a call of an operator takes: ``price(node, device)`` for ``name``, such as ``"acme::gate"``.

    It goes by the metadata of the node (``node.meta["val"]``, also of its arguments) alone. Sizes may be
    symbols: ``graphopt.cost.known_size`` reads them, where ``int`` would fix them. ``workspace_bytes`` are 0:
    those are said with ``graphopt.operator_scratch.state_scratch``.
    """

    name: str
    price: Callable[[fx.Node, DeviceSpec], NodeCost]
    summary: str = ""


@dataclass(frozen=True)
class DumpFormat:
    """A way to write a program: ``write(program, stream)``; ``suffix`` is the file's (``".dot"``).

    ``write_all(sheets, first, cost, stream)``, where a format has it, writes all programs of a step as one
    document instead: sheets (``graphopt.dump.page.Sheet``), the number of the one that was asked for, and
    what costs are predicted with. ``write_with(program, kernels, stream)``, where a format has it, is called
    in place of ``write`` with the kernels that are registered, by name.
    """

    name: str
    suffix: str
    write: Callable[[Program, IO[str]], None]
    summary: str = ""
    write_all: Callable[[Sequence[Sheet], int, CostModel, IO[str]], None] | None = None
    write_with: Callable[[Program, Mapping[str, KernelSpec], IO[str]], None] | None = None


@dataclass(frozen=True)
class TunableSpec:
    """A kernel that can be started in several ways, for ``graphopt tune`` to choose among (docs/tuning.md).

    A problem is a named tuple of what a launch is for (dtypes, sizes, what is asked), its numbers of rows
    rounded up to a power of two, and from some number on alike; a configuration is a named tuple of how it is
    started. Their fields hold ``None``, ``bool``, ``int``, ``str`` or dtypes.

    ``sources``: modules whose code the kernel is; results are forgotten where that changes. ``kernels()``
    gives the object whose attributes are the jitted functions, and raises ``ModuleNotFoundError`` without
    triton. ``default(problem)``: a configuration that always works. ``configurations(problem)``: others that
    may be faster. ``check(problem, configuration)``: ``None``, or why it would compute something else.

    ``operands(problem, device)``: tensors of a launch, on the device ``"meta"`` too. ``run(kernels,
    processors, problem, operands, configuration)`` launches and returns what is to be compared with
    ``reference(problem, operands)``; ``processors`` is the number of multiprocessors. It may overwrite
    operands, and always does the same. ``estimate(problem, configuration)``: registers, spilled and shared
    bytes before anything is compiled; ``predict(problem, configuration, usage, gpu)``: time in any unit, to
    rank configurations by. ``shipped()``: the problems that are tuned where none are named.
    ``default_on(problem, processors)``: what ``default`` is on a GPU with so many multiprocessors, where it
    depends on them.
    """

    name: str
    sources: tuple[str, ...]
    kernels: Callable[[], Any]
    default: Callable[[Any], Any]
    configurations: Callable[[Any], Iterable[Any]]
    check: Callable[[Any, Any], Reason | None]
    operands: Callable[[Any, torch.device], tuple[Any, ...]]
    run: Callable[[Any, int, Any, tuple[Any, ...], Any], Sequence[torch.Tensor]]
    reference: Callable[[Any, tuple[Any, ...]], Sequence[torch.Tensor]]
    estimate: Callable[[Any, Any], Any]
    predict: Callable[[Any, Any, Any, Any], float]
    shipped: Callable[[], Iterable[Any]]
    summary: str = ""
    default_on: Callable[[Any, int], Any] | None = None


@dataclass(frozen=True)
class ReplacementSpec:
    """Kernels for groups of operators of lowered graphs, in place of those that Inductor would make.

    ``propose(gm, cost)`` gives disjoint groups of a graph that is about to be compiled, those that it would
    keep and those that it would not. It must not change the graph, and is asked for every graph: where
    nothing can be kept it should say so at once. ``source(kernel)`` gives the text of a kernel by the name in
    its ``GroupRecord``, for people to read, or ``None``.
    """

    name: str
    propose: Callable[[fx.GraphModule, CostModel], Sequence[Group]]
    summary: str = ""
    source: Callable[[str], str | None] | None = None


@dataclass(frozen=True)
class Command:
    """A verb of the command line. ``load`` returns the click command, only when it is asked for."""

    name: str
    summary: str
    load: Callable[[], click.Command]
