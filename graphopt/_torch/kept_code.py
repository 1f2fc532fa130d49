"""Compiled code in AOTAutograd's cache on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode

from graphopt._torch.donated import donated_by, permit_kept_graphs, sparing

__all__ = [
    "forget_code",
    "is_kept",
    "is_known_to_caches",
    "keeping_code",
    "keeps_code",
    "kept_as_text",
    "kept_code",
    "known_to_caches",
]


@dataclass
class KeptText:
    """One half in an entry of AOTAutograd's cache that is kept as text, in the place of a name in Inductor's
    cache: what ``load`` and ``post_compile`` give is ``code``, which ``kept_code`` makes of the text."""

    text: str
    backward: bool = False
    backward_state_indices: Sequence[int] = ()
    num_symints_saved_for_bw_: int = 0
    code: Callable[..., Any] | None = None

    def pre_save(self) -> None:
        """AOTAutograd asks for this before it writes: there is nothing to prepare."""

    def load(self, inputs: Sequence[Any]) -> Any:
        return self.code

    def post_compile(self, code: Any, settings: Any) -> Any:
        if not self.backward:
            return code
        return torch._dynamo.disable(code, reason="a backward is not traced")  # type: ignore[no-untyped-call]


def kept_as_text(code: Callable[..., Any], text: str) -> Callable[..., Any]:
    """``code``, a boxed callable, kept as ``text`` where ``keeping_code`` keeps it."""
    code._fx_graph_cache_key = f"{_TEXT}{text}"  # type: ignore[attr-defined]
    return code


_TEXT = "graphopt text "
"""What the keys of halves begin with that are kept as text; keys of Inductor's cache are hashes."""


def _with_texts(entry: Any) -> Any:
    """An entry of the cache with halves that are kept as text in place of their keys."""
    forward, backward = entry.compiled_fw, entry.compiled_bw
    key = forward.fx_graph_cache_info[0]
    if not key.startswith(_TEXT):
        return entry
    entry.compiled_fw = KeptText(key.removeprefix(_TEXT))
    if backward is not None:
        entry.compiled_bw = KeptText(
            backward.fx_graph_cache_info[0].removeprefix(_TEXT),
            True,
            backward.backward_state_indices,
            backward.num_symints_saved_for_bw_,
        )
    return entry


@contextmanager
def keeping_code(name: str) -> Iterator[None]:
    """What AOTAutograd compiles goes to its cache under ``name``; nothing is read from there."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    usual_save, usual_lookup = AOTAutogradCache.save, AOTAutogradCache._lookup

    def save(key: str, entry: Any, remote: bool) -> None:
        usual_save(name, _with_texts(entry), False)

    def lookup(*args: Any) -> None:
        return None

    cache: Any = AOTAutogradCache
    cache.save, cache._lookup = staticmethod(save), staticmethod(lookup)
    try:
        with functorch_config.patch({"enable_autograd_cache": True, "bundled_autograd_cache": False}):
            yield
    finally:
        cache.save, cache._lookup = staticmethod(usual_save), staticmethod(usual_lookup)


def keeps_code() -> bool:
    """Whether torch's caches of compiled code are switched on."""
    from torch._inductor import config as inductor_config

    on = inductor_config.fx_graph_cache and functorch_config.enable_autograd_cache
    return bool(on) and not inductor_config.force_disable_caches


def is_kept(name: str) -> bool:
    """Whether AOTAutograd's cache on this machine has something under ``name``."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    folder = AOTAutogradCache._get_tmp_dir_for_key(name)
    return os.path.isdir(folder) and bool(os.listdir(folder))


def forget_code(prefix: str) -> None:
    """Take what was kept under names that begin with ``prefix`` out of AOTAutograd's cache."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    for folder in Path(AOTAutogradCache._get_tmp_dir()).glob(f"{prefix}*"):
        shutil.rmtree(folder, ignore_errors=True)


def kept_code(
    name: str,
    around_backward: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    of_text: Callable[[str], Callable[..., Any]] | None = None,
) -> Callable[..., Any] | None:
    """What ``keeping_code`` kept under ``name``, as it was compiled; ``None`` where parts are gone.

    ``around_backward`` makes what autograd calls of the code of the backward; ``of_text`` makes the code of a
    half that was kept as text (``kept_as_text``).
    """
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache, FXGraphCacheMiss
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.utils import BoxedBool

    found = AOTAutogradCache._lookup(name, True, False, [], {}, None)
    if found is None:
        return None
    entry: Any = found[0]
    for half in (entry.compiled_fw, entry.compiled_bw):
        if isinstance(half, KeptText):
            assert of_text is not None, "who keeps text reads it"
            half.code = of_text(half.text)
    donated = donated_by(entry.runtime_metadata)
    permit_kept_graphs(entry.runtime_metadata)
    if entry.compiled_bw is not None and (donated or around_backward is not None):
        usual = entry.compiled_bw.post_compile

        def post_compile(result: Any, config: Any) -> Any:
            why = "generated code is not traced"
            code = usual(result, config)
            code = sparing(code if around_backward is None else around_backward(code), donated)
            return torch._dynamo.disable(code, reason=why)  # type: ignore[no-untyped-call]

        entry.compiled_bw.post_compile = post_compile
    sizes = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    context = TracingContext.try_get() or TracingContext(FakeTensorMode(shape_env=sizes))
    settings = {"cudagraphs": BoxedBool(False), "boxed_forward_device_index": BoxedDeviceIndex(None)}
    try:
        with tracing(context):
            run = entry.wrap_post_compile([], entry.sanitized_aot_config, settings)
    except FXGraphCacheMiss:
        return None
    return lambda *args: run(list(args))


def known_to_caches(code: Callable[..., Any], as_code: Any) -> Any:
    """``code``, which calls the compiled graph ``as_code``, found in torch's caches as that graph is."""
    for name in ("_fx_graph_cache_key", "_fx_graph_cache_debug_lines", "guards_expr"):
        if getattr(as_code, name, None) is not None:
            setattr(code, name, getattr(as_code, name))
    return code


def is_known_to_caches(code: Any) -> bool:
    return getattr(code, "_fx_graph_cache_key", None) is not None
