"""``optimize``, ``plan`` and ``pareto``: the verbs of the library."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import graphopt
from graphopt import _torch
from graphopt.agreement import Agreement
from graphopt.budget import Budget, format_bytes
from graphopt.capture.driver import Driver
from graphopt.capture.inputs import bind_inputs
from graphopt.cost import CostModel
from graphopt.decoding.assigning import Assigned, assign, smaller_stores
from graphopt.decoding.generator import Generator
from graphopt.decoding.options import Generate
from graphopt.device import DeviceSpec
from graphopt.emit import resolve_emitter
from graphopt.emit.eager import EagerEmitter
from graphopt.emit.replacing import proposed
from graphopt.errors import InputsError, LoweringError, PipelineError, PluginError, UnknownNameError, brief
from graphopt.explanation import MemoryExplanation
from graphopt.guard import GUARDS, Guard
from graphopt.hand_over import is_watched
from graphopt.operator_costs import with_operator_costs
from graphopt.optimized import Optimized
from graphopt.options import OptionError
from graphopt.packing.fit import WeightFit
from graphopt.pareto_front import Pareto
from graphopt.passes import Pass, pass_text
from graphopt.pipeline import Pipeline, parse_items
from graphopt.plans import Plan
from graphopt.plugins.host import PluginHost, default_host
from graphopt.plugins.loading import GUARDED
from graphopt.ranks import ranks_of
from graphopt.rewrites import checked_rewrites
from graphopt.session import Session

__all__ = ["cost_model_for", "dry_run", "explain_memory", "make_session", "optimize", "pareto", "plan"]

_VERIFY = ("off", "structure", "numeric")
_ON_ERROR = ("rollback", "raise")


def optimize(
    model: torch.nn.Module,
    inputs: Any = None,
    *,
    budget: Budget | int | str | None = None,
    allow: Sequence[str] = (),
    pipeline: str | Pipeline | Iterable[Pass | str] | None = None,
    emit: str = "auto",
    verify: str = "structure",
    device: str | torch.device | None = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    dynamic_shapes: bool | None = None,
    plugins: Sequence[object] = (),
    on_error: str = "rollback",
    plan: Plan | None = None,
    policy: str | None = None,
    cost_model: str = "roofline",
    step: Callable[[torch.nn.Module], object] | None = None,
    cuda_graphs: bool = True,
    cache: bool = True,
    generate: Generate | None = None,
    rewrites: Sequence[str] | None = None,
    guard: str | None = None,
    process_group: Any = "auto",
) -> Optimized:
    """The fastest version of ``model`` whose step fits ``budget``, with the same call.

    ``inputs``: a tuple of positional or a dict of keyword arguments; without it capture happens
    on the first call. ``budget``: bytes of the whole step's peak (an int, ``"8GiB"``, ``"60%"`` of
    the baseline peak, or a ``Budget``); ``None`` minimises time. ``allow`` names passes that
    change results, with options where wanted: ``"quantize-linear{schemes=[int8]}"`` packs weights of the
    model in place where no plan fits without, as few and as little as does (docs/quantization.md).
    ``pipeline``: a preset, a YAML file, text or passes. ``emit``: ``"eager"`` runs op by op, ``"inductor"``
    compiles, ``"auto"`` compiles where a compiler is found. ``verify``: ``"off"``,
    ``"structure"`` (each rewrite, and once what was captured beside the model) or ``"numeric"`` (outputs and
    gradients against the model too, needs ``inputs``). ``device`` names the device to
    plan for, by default the model's. ``loss_fn(output)`` gives the scalar to differentiate where the model
    returns no loss. ``dynamic_shapes``: a call of other input shapes is captured and planned again, under the
    same budget; ``None`` keeps the sizes that changed symbolic from then on, ``True`` keeps all symbolic from
    the start, ``False`` makes a program for each shape (as ``torch.compile``'s ``dynamic``). A plan with
    symbolic sizes is made for those it was captured with: larger ones may take more.
    ``on_error``: ``"rollback"`` records what failed and goes on, ``"raise"`` raises, as is always done where
    a pass is asked for another model (``Pass.asked``). ``plan`` replays a stored plan.
    ``policy`` names who picks a schedule for each program within the budget, by default the planner, which
    takes the fastest (docs/plugins.md); the names come from plugins. ``cost_model`` names what prices
    operators and steps, likewise.

    ``step(module)`` runs one whole step where that is more than one call and its backward: several calls
    before a backward (``loss(module(a), module(b)).backward()``), several backwards (gradient
    accumulation). It is run three times with the optimized module as its argument, parameters' gradients,
    buffers and random state put back, and must not update parameters. The budget then bounds all of it.

    ``cuda_graphs``: on CUDA, replay a step from a CUDA graph from its third call on, so that the GPU does not
    wait for the host. Training steps are replayed where gradients stay in place
    (``zero_grad(set_to_none=False)``); what a graph keeps counts against the budget. The report says whether
    steps are replayed, or why not. ``False`` launches kernel by kernel.

    ``cache``: keep what was planned and compiled for later processes, and take over what earlier ones kept of
    the same program under the same options. The report says which. ``False``, and ``GRAPHOPT_CACHE=0`` for a
    whole process, neither reads nor writes.

    ``generate``: optimize generation, not a step: ``Optimized.generate`` runs on programs that decode, with
    stores of keys and values for ``max_tokens`` positions of ``max_batch`` sequences (docs/decoding.md).
    ``inputs`` are example tokens. The budget bounds weights, stores and the largest step;
    ``Budget(cache=...)`` the stores alone.

    ``rewrites``: apply these alone of what passes would choose, by the names in ``report.rewrites``; passes
    that programs cannot do without run anyway. ``None`` applies all.

    ``guard="measure"``: at the first call for training, and at the first for inference, a few steps of the
    program and of the model as it was are measured in turns, all that they change put back. Where the model
    is faster (and fits the budget) it runs as it did from then on; the report says what was measured.
    ``"off"`` measures nothing. By default programs that are compiled for a GPU are measured.

    ``process_group``: the ranks that have to run the same programs under the same plan, each within the
    ``budget``, which is per rank (docs/distributed.md). ``"auto"``: those that the model is spread over
    (``fully_shard``, ``parallelize_module``, ``DistributedDataParallel``), a ``torch.distributed`` group:
    its members, ``"off"``: each rank decides alone. All of them have to capture at the same point.

    Gradients that the parameters carry when ``optimize`` is called count as held throughout (as in
    gradient accumulation); without them a step is taken to begin with none.

    Raises ``BudgetError`` if nothing allowed fits, ``BudgetSyntaxError``, ``InputsError``,
    ``UnknownNameError`` (pass, option, device, emitter, policy, cost model), ``StalePlanError``,
    ``UnevenRanksError`` (on every rank, where ranks differ or one fails), and with
    ``on_error="raise"`` ``CaptureError`` and whatever a pass raises.
    """
    return _prepared(
        model,
        inputs,
        verify=verify,
        device=device,
        loss_fn=loss_fn,
        dynamic_shapes=dynamic_shapes,
        replay=plan,
        dry_run=False,
        budget=budget,
        allow=allow,
        pipeline=pipeline,
        emit=emit,
        plugins=plugins,
        on_error=on_error,
        policy=policy,
        cost_model=cost_model,
        step=step,
        cuda_graphs=cuda_graphs,
        cache=cache,
        generate=generate,
        rewrites=rewrites,
        guard=guard,
        process_group=process_group,
    )


def plan(model: torch.nn.Module, inputs: Any, **options: Any) -> Plan:
    """What ``optimize`` would do, without compiling anything. Same arguments; ``inputs`` needed."""
    return dry_run(model, inputs, options, "plan").plan


def pareto(model: torch.nn.Module, inputs: Any, **options: Any) -> Pareto:
    """Peak bytes of the whole step against predicted seconds, over all plans found.

    Same arguments as ``optimize`` but ``budget``, ``plan`` and ``policy``.
    """
    for name in ("budget", "plan", "policy"):
        if name in options:
            raise InputsError(f"pareto() takes no {name}=: it shows what every budget gives")
    optimized = dry_run(model, inputs, options, "pareto", every=True)
    plan = optimized.plan
    return Pareto(optimized.frontier(), plan.device, plan.emit)


def explain_memory(model: torch.nn.Module, inputs: Any, **options: Any) -> MemoryExplanation:
    """What holds the peak of a step: of the model as it is, and of what ``optimize`` would make of it.

    Same arguments as ``optimize``; nothing is compiled.
    """
    return dry_run(model, inputs, options, "explain_memory").explain_memory()


def dry_run(
    model: torch.nn.Module,
    inputs: Any,
    options: dict[str, Any],
    caller: str = "dry_run",
    *,
    every: bool = False,
) -> Optimized:
    """``optimize`` up to the point where code would be generated: programs, plan and report are there, it
    cannot be called. ``caller`` names it in errors. ``every``: with the schedules of all budgets."""
    if options.get("generate") is not None:
        raise InputsError(f"{caller}() takes no generate=: plans are of steps, not of generation")
    if inputs is None and options.get("step") is None:
        raise InputsError(
            f"{caller}() needs inputs: a tuple of positional arguments or a dict of keyword arguments"
        )
    try:
        chosen = inspect.signature(optimize).bind(model, inputs, **options)
    except TypeError as error:
        raise TypeError(f"{caller}() {error}") from None
    chosen.apply_defaults()
    arguments = dict(chosen.arguments)
    arguments["replay"] = arguments.pop("plan")
    return _prepared(**arguments | {"dry_run": True, "every": every, "verify": "off"})


def _prepared(
    model: torch.nn.Module,
    inputs: Any,
    *,
    verify: str,
    step: Callable[[torch.nn.Module], object] | None,
    **options: Any,
) -> Optimized:
    _check_kinds(model, options["loss_fn"], options["replay"], options["generate"])
    if options["replay"] is not None and options["policy"] is not None:
        raise InputsError("plan= replays what was chosen: policy= would choose again; give one of them")
    if step is not None and not callable(step):
        raise InputsError(f"step is {step!r}: expected a function of the module that runs one whole step")
    if options["guard"] is not None and options["guard"] not in GUARDS:
        raise UnknownNameError("value of guard", options["guard"], GUARDS)
    if verify not in _VERIFY:
        raise UnknownNameError("value of verify", verify, _VERIFY)
    if verify == "numeric" and inputs is None:
        raise InputsError(
            'verify="numeric" needs inputs: a tuple of positional arguments or a dict of keyword arguments'
        )
    optimized = _uncaptured(model, inputs, compare=verify != "off", **options)
    if optimized._generator is not None:
        if step is not None:
            raise InputsError("step= and generate= exclude each other: a step is not what generates")
        optimized._generator.prepare()
        return optimized
    try:
        _prepare(optimized, model, inputs, step)
    except LoweringError as error:
        if options["emit"] != "auto" or options["on_error"] == "raise":
            raise
        # Code whose memory cannot be told, or that is none: operators are planned and run one by one.
        optimized = _uncaptured(model, inputs, compare=verify != "off", **options | {"emit": "eager"})
        optimized._driver.remark(f"runs operator by operator: {brief(error)}")
        _prepare(optimized, model, inputs, step)
    if inputs is not None and verify == "numeric":
        if asked := optimized._driver.session.asked:
            raise InputsError(
                f'verify="numeric" compares with the model as it is, and pass {asked!r} makes another of it, '
                "as it was asked to",
                hint='verify="structure" checks each rewrite',
            )
        from graphopt.verify import verify_numerically

        verify_numerically(model, optimized, inputs)
    return optimized


def _prepare(
    optimized: Optimized,
    model: torch.nn.Module,
    inputs: Any,
    step: Callable[[torch.nn.Module], object] | None,
) -> None:
    """Capture what ``inputs`` and ``step`` run."""
    if step is not None:
        optimized._driver.prepare_step(partial(step, optimized))
    if inputs is not None:
        optimized._driver.prepare(*bind_inputs(model, inputs))


def _uncaptured(
    model: torch.nn.Module,
    example: Any,
    *,
    device: str | torch.device | None,
    loss_fn: Callable[[Any], torch.Tensor] | None,
    dynamic_shapes: bool | None,
    replay: Plan | None,
    dry_run: bool,
    every: bool = False,
    generate: Generate | None = None,
    assigned: Assigned | None = None,
    guard: str | None = None,
    compare: bool = False,
    process_group: Any = "auto",
    **choices: Any,
) -> Optimized:
    """An optimized module that captures on its first call; its copies are made the same way, from a model
    that shares what was ``assigned``."""
    if isinstance(choices["pipeline"], Iterator):
        choices["pipeline"] = tuple(choices["pipeline"])
    where = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    budget = choices["budget"]
    rest = {name: value for name, value in choices.items() if name != "budget"}

    def fresh(of: torch.nn.Module, within: Any) -> Session:
        session = make_session(
            device if device is not None else where, runs_on=where, budget=within, **rest
        )
        session.replay, session.dry_run, session.every = replay, dry_run, every
        _see_model(session, of)
        return session

    def attempt(of: torch.nn.Module, within: Budget, args: Any, kwargs: Any) -> Session:
        trial = fresh(of, within)
        trial.dry_run = True
        Driver(of, trial, dynamic=dynamic_shapes, loss_fn=loss_fn).prepare(args, kwargs)
        return trial

    if generate is not None and assigned is None:
        assigned = assign(model, example, generate, fresh(model, budget))
    elif assigned is not None:
        assigned = replace(assigned, model=model, uncached=None)
    if assigned is not None:
        model = assigned.model
    session = fresh(model, budget)
    fit = WeightFit(model, session, fresh, attempt, dry_run)
    driver = Driver(
        model, session, inputs=example, dynamic=dynamic_shapes, loss_fn=loss_fn, fit=fit,
        compare=compare and not dry_run,
    )  # fmt: skip
    compiled = where.type == "cuda" and session.emitter.name != "eager"
    if not dry_run and (guard or ("measure" if compiled else "off")) == "measure":
        driver.guard = Guard(driver.remark)
    ranks = ranks_of(model, process_group)
    if generate is not None:
        if process_group not in ("auto", "off"):
            raise InputsError("process_group= and generate= exclude each other: ranks agree on steps alone")
        ranks = None
    if ranks is not None:
        asked = {
            "options": f"emit={session.emitter.name}, on_error={session.on_error}, dynamic={dynamic_shapes}",
            "passes": ", ".join(map(_spelt, session.passes)),
            "allowed passes": ", ".join(sorted(session.allow)),
            "rewrites": "all" if session.only is None else ", ".join(sorted(session.only)),
            "device": session.cost.device.name,
            "policy": choices["policy"] or "none",
            "versions": f"graphopt {graphopt.__version__}, torch {torch.__version__}",
        }
        session.agreement = Agreement(ranks, asked, str(session.budget), driver.remark)
    again = partial(
        _uncaptured,
        device=device,
        loss_fn=loss_fn,
        dynamic_shapes=dynamic_shapes,
        replay=replay,
        dry_run=dry_run,
        every=every,
        generate=generate,
        assigned=assigned,
        guard=guard,
        compare=compare,
        process_group=process_group,
        **choices,
    )
    if buckets := _torch.bucket_bytes(model):
        driver.apart = f"buckets of DistributedDataParallel are not counted: {format_bytes(buckets)}"
    generator = None
    if generate is not None and assigned is not None:
        smaller = smaller_stores(assigned, example, generate, partial(fresh, model), budget)
        generator = Generator(assigned, example, generate, fresh(model, budget), smaller)
    return Optimized(model, driver, loss_fn, again, generator)


def _spelt(step: Pass) -> str:
    """A pass with its options, as far as they have a spelling."""
    try:
        return pass_text(step)
    except OptionError:
        return step.name


def _see_model(session: Session, model: torch.nn.Module) -> None:
    """What is to be known of a model before it is captured: names and bytes."""
    session.names = {
        **{id(b): ("buffer", name) for name, b in model.named_buffers()},
        **{id(p): ("parameter", name) for name, p in model.named_parameters()},
    }
    session.weight_bytes = _torch.storage_bytes([*model.parameters(), *model.buffers()])
    session.held_gradient_bytes = _torch.storage_bytes([p.grad for p in model.parameters()])
    session.all_gradients_held = all(p.grad is not None or not p.requires_grad for p in model.parameters())
    session.watched_gradients = any(map(is_watched, model.parameters()))


def make_session(
    device: str | torch.device,
    *,
    budget: Budget | int | str | None = None,
    allow: Sequence[str] = (),
    pipeline: str | Pipeline | Iterable[Pass | str] | None = None,
    emit: str = "auto",
    plugins: Sequence[object] = (),
    on_error: str = "rollback",
    policy: str | None = None,
    cost_model: str = "roofline",
    cuda_graphs: bool = True,
    cache: bool = True,
    rewrites: Sequence[str] | None = None,
    runs_on: torch.device | None = None,
) -> Session:
    """A session with everything looked up by name; raises before any work is done."""
    if on_error not in _ON_ERROR:
        raise UnknownNameError("value of on_error", on_error, _ON_ERROR)
    host = PluginHost(tuple(plugins)) if plugins else default_host()
    chosen = Pipeline.of("default" if pipeline is None else pipeline, host)
    names, steps = _allowed(allow, chosen, host)
    if any(step.asked for step in steps):
        # Where it fails, what would run is not the model that was asked for.
        on_error = "raise"
    spec = _device_spec(host, device)
    runs_on = runs_on or (device if isinstance(device, torch.device) else torch.device("cpu"))
    only = checked_rewrites(rewrites, {step.name for step in steps}, host.replacements())
    cost = _cost_model(host, cost_model, spec)
    return Session(
        budget=Budget.of(budget),
        cost=cost,
        emitter=resolve_emitter(emit, runs_on, lambda gm: proposed(gm, host, cost, only), cost),
        provisional_emitter=EagerEmitter(),
        host=host,
        passes=steps,
        allow=names,
        only=only,
        on_error=on_error,
        policy=None if policy is None else host.policy(policy),
        cuda_graphs=cuda_graphs,
        keeps=cache,
    )


def cost_model_for(
    model: torch.nn.Module, device: str | torch.device | None, host: PluginHost
) -> CostModel:
    """The cost model of ``device``, by default the one that the model is on."""
    where = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return _cost_model(host, "roofline", _device_spec(host, where if device is None else device))


def _cost_model(host: PluginHost, name: str, device: DeviceSpec) -> CostModel:
    """The cost model of that name with plugins' prices. Raises ``UnknownNameError``, ``PluginError``."""
    factory = host.cost_model(name)
    try:
        with host.using("graphopt_cost_models", name):
            cost = factory.build(device)
        missing = [what for what in ("device", "node", "memory", "observed") if not hasattr(cost, what)]
        if missing:
            expected = "expected a graphopt.cost.CostModel"
            raise PluginError(f"cost model {name!r} gives {cost!r}, without {missing[0]!r}: {expected}")
    except GUARDED as error:
        raise PluginError(host.blame("graphopt_cost_models", name, error)) from error
    return with_operator_costs(cost, host)


def _check_kinds(model: object, loss_fn: object, replay: object, generate: object) -> None:
    if isinstance(model, type):
        raise InputsError(f"model is the class {model.__name__}: expected a torch.nn.Module, not its class")
    if not isinstance(model, torch.nn.Module):
        raise InputsError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if generate is not None and not isinstance(generate, Generate):
        raise InputsError(
            f"generate is {generate!r}: expected graphopt.Generate(max_tokens=..., max_batch=...)"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise InputsError(f"loss_fn is {loss_fn!r}: expected a function of the model's output")
    if replay is not None and not isinstance(replay, Plan):
        raise InputsError(
            f"plan is a {type(replay).__name__}: expected a graphopt.Plan",
            hint="read a stored one with graphopt.Plan.load(path)",
        )


def _allowed(
    allow: Sequence[str], pipeline: Pipeline, host: PluginHost
) -> tuple[frozenset[str], tuple[Pass, ...]]:
    """The passes that ``allow`` names, and those of the pipeline with the options that it gives them."""
    if isinstance(allow, str):
        raise InputsError(
            f"allow is the text {allow!r}: expected names of passes", hint=f"write ({allow!r},)"
        )
    steps = pipeline.steps
    # A pass given as an object need not be registered.
    known = {*host.passes(), *(step.name for step in steps)}
    names = set()
    for text in allow:
        items = parse_items(text, "allowed pass", "pass") if "{" in str(text) else [(text, {})]
        for name, options in items:
            if name not in known:
                raise UnknownNameError("pass", name, known)
            if options and all(step.name != name for step in steps):
                raise PipelineError(f"allow gives options to {name!r}, which is not in the pipeline")
            names.add(name)
            if options:
                steps = tuple(type(s).configured(**options) if s.name == name else s for s in steps)
    return frozenset(names), steps


def _device_spec(host: PluginHost, device: str | torch.device) -> Any:
    """What is known of the device that a name, or torch's word for the one at hand, stands for."""
    if isinstance(device, str) and device.partition(":")[0] not in ("cuda", "cpu"):
        return host.device(device)
    if not isinstance(device, (str, torch.device)):
        raise InputsError(f"device is {device!r}: expected a name such as 'h100', or a torch.device")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputsError(f"device is {device!r}: {str(error).splitlines()[0]}") from error
    if place.type != "cuda":
        return host.device(place.type)
    if not torch.cuda.is_available():
        raise InputsError(
            f"device is {str(device)!r}: torch sees no CUDA device here",
            hint=f"name the one to plan for: {', '.join(sorted(host.devices()))}",
        )
    return host.device(torch.cuda.get_device_name(place))
