"""Dynamo: what it raises, and the settings that graphopt captures under."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, cast

import torch
import torch.fx as fx

__all__ = [
    "ISOLATES_RECOMPILES",
    "compile_errors",
    "fixes_a_size",
    "followed_code",
    "graph_break_errors",
    "inner_error",
    "quiet_capture",
    "source_name",
    "splitting",
    "told_uncompiled",
    "unmasked",
]


def followed_code() -> frozenset[CodeType]:
    """The code that dynamo has followed for the graph that is being compiled."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    return frozenset(context.traced_code if context is not None else ())


def source_name(node: fx.Node) -> str:
    """The Python expression that dynamo took a graph input from, or ``""``."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)


def unmasked(error: Exception) -> Exception:
    """The error that dynamo was about to raise, where cutting its traceback short failed instead: it asserts
    that a frame is there, which exceptions that were raised before may have lost."""
    from torch._dynamo.exc import ShortenTraceback

    meant = error.__context__
    return meant if isinstance(error, AssertionError) and isinstance(meant, ShortenTraceback) else error


def inner_error(error: BaseException) -> BaseException:
    """The error that a backend raised, from under the one that dynamo wraps it in."""
    from torch._dynamo.exc import BackendCompilerFailed

    while isinstance(error, BackendCompilerFailed) and error.inner_exception is not None:
        error = error.inner_exception
    return error


def graph_break_errors() -> tuple[type[BaseException], ...]:
    """What ``fullgraph=True`` raises for code that cannot be captured in one graph."""
    from torch._dynamo import exc

    names = ("Unsupported", "UserError", "InternalTorchDynamoError", "TorchRuntimeError")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))


def fixes_a_size(error: BaseException) -> bool:
    """Whether ``torch.export`` says that a program is for one number where a symbol was asked for."""
    return "specialized it to be a constant" in str(error)


def splitting(error: BaseException) -> Exception:
    """What a backend raises for dynamo to run a function as it did, and to capture what that calls alone."""
    from torch._subclasses.fake_tensor import UnsupportedFakeTensorException

    return UnsupportedFakeTensorException(f"{type(error).__name__}: {error}")


def compile_errors() -> tuple[type[BaseException], ...]:
    """What a call of something compiled raises where it is compilation that failed, nothing having run."""
    from torch._dynamo import exc

    names = ("TorchDynamoException", "FailOnRecompileLimitHit")
    return tuple(getattr(exc, name) for name in names)


def _never_capturing() -> bool:
    """``torch.cuda.is_current_stream_capturing`` where torch was built without CUDA: its own raises."""
    return False


@dataclass
class _Told:
    """How many blocks are ``inside`` of ``told_uncompiled``, of all threads: the last one puts back."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    put_back: Callable[[], None] = lambda: None


_TOLD = _Told()


@contextmanager
def told_uncompiled() -> Iterator[None]:
    """Code that dynamo follows in the block is told that nothing is compiling, where it asks
    ``torch.compiler.is_compiling`` and its like, and asks at that time whether a stream is being captured: it
    takes the path that it takes op by op."""
    with _TOLD.lock:
        _TOLD.inside += 1
        if _TOLD.inside == 1:
            _TOLD.put_back = _tell_uncompiled()
    try:
        yield
    finally:
        with _TOLD.lock:
            _TOLD.inside -= 1
            if not _TOLD.inside:
                _TOLD.put_back()


def _tell_uncompiled() -> Callable[[], None]:
    """Change dynamo's tables; a function that changes them back."""
    from torch._dynamo.variables import torch as known

    # Tables for all of dynamo, which it looks such functions up in as it follows their calls.
    states = known.tracing_state_functions()
    asked = (
        torch.compiler.is_compiling,
        torch.compiler.is_dynamo_compiling,
        torch._utils.is_compiling,
        torch._dynamo.external_utils.is_compiling,
    )
    before = {function: states[function] for function in asked if function in states}
    capturing = torch.cuda.is_current_stream_capturing
    built = torch.version.cuda is not None or torch.version.hip is not None
    folds: dict[Any, None] = cast(Any, known.constant_fold_functions)
    folded = built and capturing not in folds
    states.update(dict.fromkeys(before, False))
    if folded:
        folds[capturing] = None
    elif not built:
        torch.cuda.is_current_stream_capturing = _never_capturing

    def put_back() -> None:
        states.update(before)
        if folded:
            del folds[capturing]
        torch.cuda.is_current_stream_capturing = capturing

    return put_back


@contextmanager
def quiet_capture() -> Iterator[None]:
    """Dynamo settings that graphopt captures under.

    Calls of a logger are no graph break; methods that libraries add to loggers (``warning_once``) go by the
    level that they begin with. How many models of one class were optimized before does not count: dynamo
    limits compilations by code object, so that the ninth budget tried on a model would be refused. A number
    that changes from call to call, or from model to model (the rate of a dropout), stays a number: dynamo
    would make it a tensor that the graph reads back, which no program at the semantic level can say. Random
    numbers of NumPy are drawn from NumPy's generator, as in eager: dynamo would draw them from torch's.
    What ``DistributedDataParallel`` wraps stays one graph: dynamo would cut it where buckets of gradients
    end, and calls of a chain hand their gradients over one by one anyway.
    """
    from torch._dynamo import config

    newer, older = "ignore_logging_functions", "ignore_logger_methods"
    name = newer if hasattr(config, newer) else older
    levels = ("debug", "info", "warning", "error", "exception", "critical")
    loggers = {method for key, method in vars(logging.Logger).items() if key.partition("_")[0] in levels}
    # What a model's operator or a backend refuses is raised, with its reason; torch also writes a traceback.
    # A filter, not a level: changing levels empties the cache of every logger, at each step.
    talkative = [logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "_dynamo.exc")]
    settings: dict[str, Any] = {name: set(getattr(config, name)) | loggers}
    settings["specialize_float"] = True
    settings["use_numpy_random_stream"] = True
    settings["optimize_ddp"] = False
    settings["accumulated_recompile_limit"] = max(config.accumulated_recompile_limit, _MANY)
    if not ISOLATES_RECOMPILES:
        settings["recompile_limit"] = max(config.recompile_limit, _MANY)
    silent = _Silent()
    for logger in talkative:
        logger.addFilter(silent)
    try:
        with config.patch(settings), _loggable_config():
            yield
    finally:
        for logger in talkative:
            logger.removeFilter(silent)


@contextmanager
def _loggable_config() -> Iterator[None]:
    """Leave dynamo's settings out of its compilation metrics where torch cannot write them down.

    torch 2.11 sorts each set among the settings, and functions have no order: each compilation would log
    an error with a traceback.
    """
    from torch._dynamo import utils

    if _config_is_loggable():
        yield
        return
    name = "_get_dynamo_config_for_logging"
    original = getattr(utils, name)
    setattr(utils, name, lambda: None)
    try:
        yield
    finally:
        setattr(utils, name, original)


@functools.cache
def _config_is_loggable() -> bool:
    from torch._dynamo import utils

    written = getattr(utils, "_get_dynamo_config_for_logging", None)
    try:
        if written is not None:
            written()
    except TypeError:
        return False
    return True


class _Silent(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return False


_MANY = 1 << 16

ISOLATES_RECOMPILES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether ``torch.compile`` can count compilations of one caller apart from those of others."""
