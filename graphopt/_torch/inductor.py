"""Graphs compiled by Inductor, under graphopt's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.fx as fx
from torch._functorch import config as functorch_config

from graphopt._torch.choices import our_choices
from graphopt._torch.donated import donated_by, notes_of_compiled, permit_kept_graphs, sparing
from graphopt._torch.kept_code import keeping_code, known_to_caches
from graphopt._torch.scheduler import KernelOrder, in_order

__all__ = [
    "code_environment",
    "compile_with_inductor",
    "generated_source",
    "inductor_decompositions",
    "inductor_inner_compile",
    "inductor_kernels",
    "read_before_writes",
    "return_none",
]


def inductor_kernels() -> Any:
    """Inductor's table of library kernels, which its generated code calls by attribute."""
    from torch._inductor.select_algorithm import extern_kernels

    return extern_kernels


def inductor_inner_compile(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Compile one forward, backward or inference graph; a boxed callable (``CompiledFxGraph``)."""
    from torch._inductor.compile_fx import compile_fx_inner

    if "get_decomp_fn" in kwargs:
        # A table of functions has no key in Inductor's graph cache; a function's is its name.
        kwargs["get_decomp_fn"] = inductor_decompositions
    return compile_fx_inner(gm, list(inputs), **kwargs)


def generated_source(compiled: Any) -> tuple[str, dict[str, Any]] | None:
    """The Python wrapper that Inductor generated and the constants that it reads by name;
    ``None`` where there is no such source (an empty graph, the C++ wrapper)."""
    source = getattr(compiled, "source_code", None)
    if not isinstance(source, str):
        return None
    return source, dict(getattr(compiled, "constants", None) or {})


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions but for one: the gradient of an embedding of 16-bit floats on CUDA stays
    a call of the library. Decomposed it is summed up in a float32 tensor as large as two of the weight."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings, make_fallback

    operator = torch.ops.aten.embedding_dense_backward.default
    if operator not in lowerings:
        make_fallback(operator, warn=False, override_decomp=True)  # type: ignore[no-untyped-call]
    table = dict(select_decomp_table())
    decomposed = table[operator]

    def embedding_dense_backward(grad: torch.Tensor, *args: Any) -> Any:
        if grad.device.type == "cuda" and grad.dtype in (torch.float16, torch.bfloat16):
            return NotImplemented
        return decomposed(grad, *args)

    table[operator] = embedding_dense_backward
    return table


def return_none(output: fx.Node, position: int) -> None:
    """Let a graph return ``None`` instead of a value, before Inductor compiles it.

    Which of the values users see Inductor has noted by position, and takes them to be values.
    """
    returned = list(output.args[0])  # type: ignore[arg-type]
    returned[position] = None
    output.args = (tuple(returned),)
    seen = output.meta.get("user_visible_output_idxs")
    if seen is not None:
        output.meta["user_visible_output_idxs"] = [index for index in seen if index != position]


def _ordering(order: KernelOrder, key: str) -> Callable[[list[Any]], list[Any]]:
    """``order`` as a pass of Inductor's scheduler, which is ``key`` in the keys of its graph cache.

    torch 2.13 asks such a pass for its ``uuid``, 2.11 pickles it with the settings.
    """
    from torch._inductor import custom_graph_pass

    base: type = getattr(custom_graph_pass, "CustomSchedulerPass", object)

    class Ordering(base):  # type: ignore[misc]
        def __call__(self, nodes: list[Any]) -> list[Any]:
            return in_order(nodes, order)

        def uuid(self) -> str:
            return key

        def __reduce__(self) -> tuple[Any, ...]:
            return str, (key,)

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    made: Callable[[list[Any]], list[Any]] = Ordering()
    return made


_ordered: set[Any] = set()


def read_before_writes(graph: fx.Graph) -> None:
    """Let Inductor compute what reads memory before an operator of ``graph`` that is not torch's writes it.

    It computes elementwise values where they are used, unless a write comes in between. Writes of custom
    operators it notes when their call has its place, and what reads the memory then comes behind.
    """
    from torch._inductor import lowering as inductor_lowering
    from torch._library.utils import get_layout_constraint_tag

    lowering: Any = inductor_lowering
    for node in graph.nodes:
        op = node.target
        if not isinstance(op, torch._ops.OpOverload) or op in _ordered or not op._schema.is_mutable:
            continue
        if op.namespace in ("aten", "prims") or (op in lowering.lowerings and op not in lowering.fallbacks):
            continue
        if op not in lowering.lowerings:
            tag: Any = get_layout_constraint_tag(op, with_default=True)
            lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)
        lowering.lowerings[op] = _noting_writes(op, lowering.lowerings[op])
        _ordered.add(op)


def _noting_writes(op: Any, lower: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor.virtualized import V
    from torch._library.utils import zip_schema

    def call(*args: Any, **kwargs: Any) -> Any:
        graph: Any = V.graph
        for argument, value in zip_schema(op._schema, args, kwargs):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if tensor is not None:
                    tensor.realize()
                    graph.mark_buffer_mutated(tensor.get_name())
        return lower(*args, **kwargs)

    return call


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    partition: Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]],
    inner: Callable[..., Any],
    operations_limit: int,
    order: KernelOrder,
    cache_key: str = "",
    keep: str = "",
) -> Callable[..., Any]:
    """``compile_fx`` with the given partition and inner compiler.

    A value computed by more than ``operations_limit`` operations is stored, not inlined. ``order``
    puts the kernels in order, instead of Inductor's own reordering for peak memory.
    AOTAutograd's graph cache is not read: on a hit the partition would not be asked. Inductor's, of the
    halves, is where ``cache_key`` says what ``order`` and the choices made here are; without, it is not.
    ``keep``: a name under which the result is put into AOTAutograd's cache, for ``kept_code``; where it
    cannot be, it is not, and nothing is said.
    Backwards of the result may keep the graph for another (``graphopt._torch.donated``).
    """
    from torch._inductor.compile_fx import compile_fx

    noted: list[Any] = []

    def sparing_inner(graph: fx.GraphModule, graph_inputs: Sequence[Any], **kwargs: Any) -> Any:
        made = inner(graph, graph_inputs, **kwargs)
        if not kwargs.get("is_backward"):
            return made
        noted.append(notes_of_compiled())
        spares = sparing(made, donated_by(noted[-1]))
        return made if spares is made else known_to_caches(spares, made)

    keeping = keeping_code(keep) if keep else nullcontext()
    with _our_settings(partition, operations_limit, order, cache_key), keeping, our_choices():
        table = inductor_decompositions()
        compiled: Any = compile_fx(gm, list(inputs), inner_compile=sparing_inner, decompositions=table)
    # Not before: what AOTAutograd keeps on disk says what was donated.
    for about in noted:
        permit_kept_graphs(about)
    function: Callable[..., Any] = compiled
    return function


@contextmanager
def _our_settings(
    partition: Callable[[fx.GraphModule, int], tuple[fx.GraphModule, fx.GraphModule]] | None,
    operations_limit: int,
    order: KernelOrder,
    cache_key: str,
) -> Iterator[None]:
    """Inductor's and AOTAutograd's settings for the code that is compiled here."""
    from torch._inductor import config as inductor_config
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Ours(CustomPartitionerFn):
        def __call__(self, gm: Any, joint_inputs: Any, **kwargs: Any) -> Any:
            assert partition is not None
            return partition(gm, kwargs["num_fwd_outputs"])

        def uuid(self) -> str:
            return cache_key

        def __reduce__(self) -> tuple[Any, ...]:
            return str, (cache_key,)

    settings = {
        "custom_partitioner_fn": Ours(),
        "fx_graph_cache": bool(cache_key) and inductor_config.fx_graph_cache,
        "realize_opcount_threshold": operations_limit,
        "reorder_for_peak_memory": False,
        "_post_fusion_custom_pass": _ordering(order, cache_key),
    }
    # The backward is compiled now, not at its first run: its memory is part of the plan.
    joint_settings = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with inductor_config.patch(settings), functorch_config.patch(joint_settings):
        yield


def code_environment(operations_limit: int, order: KernelOrder, cache_key: str) -> str:
    """Names all that generated code depends on besides its graph: the version of torch and of the compilers,
    the machine, settings. Source: what Inductor's graph cache goes by, for a graph that is empty."""
    from torch._inductor.codecache import compiled_fx_graph_hash

    graph = fx.Graph()
    graph.output(())
    with _our_settings(None, operations_limit, order, cache_key):
        key, _ = compiled_fx_graph_hash(fx.GraphModule({}, graph), [], {}, [])
        joint = sorted((name, _setting(value)) for name, value in functorch_config.get_config_copy().items())
    return f"{key} {joint}"


def _setting(value: Any) -> str:
    """The value of a setting, the same in every process: functions by their names."""
    return getattr(value, "__qualname__", None) or repr(sorted(value) if isinstance(value, set) else value)
