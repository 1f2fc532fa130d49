"""Attention of one new token over what a store holds, on one GPU, beside ``scaled_dot_product_attention``.

    python benchmarks/gpu_decode_attention.py --out benchmarks/results/gpu_decode_attention.json
    python benchmarks/gpu_decode_attention.py --tune --kinds graphopt,quant-4 --batches 1 --capacities 32768

The second tries launches of graphopt's kernels and prints the best ones.

32 heads of queries and 8 of keys, of 128 elements, bf16. ``graphopt`` is ``graphopt::attend_full``, which
writes the new key and value and attends; ``sdpa-gqa`` and ``sdpa-expanded`` do what a static cache does, two
``index_copy_`` and ``scaled_dot_product_attention`` over the whole capacity with a boolean mask, heads of
keys shared (``enable_gqa``) or repeated before. ``filled`` positions of ``capacity`` are there.

``quant-8`` and ``quant-4`` are ``graphopt::attend_quant`` over keys and values of that many bits, the newest
``residual`` rows exact; their ``filled_bytes`` are what is packed of the positions that are there, scales
included, and the exact rows.

``us`` is the time of a call in a CUDA graph of as many calls as it takes to go through ``COLD`` bytes of
stores, so that none is read from the cache of the device; the median of replays. ``gb_per_second`` counts
``filled_bytes``, keys and values of filled positions once each, whatever a kernel reads, and ``of_read`` is
its share of ``read_gb_per_second``, which the same run measures by summing a vector of 1 GiB
(``graphopt::probe_read``). ``error`` is the distance of the output from float64, that of rounding keys and
values included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.atomic import write_atomically
from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import SiteSpec
from graphopt_kernels import attend_launch, attend_quant_launch, bandwidth
from graphopt_kernels.attend_full import attend_full
from graphopt_kernels.attend_operator import Asked, RowStores
from graphopt_kernels.attend_quant import ALONE, attend_quant
from graphopt_kernels.attend_reference import allowed_keys, attention_over
from graphopt_kernels.cache_codes import round_keys, round_values
from graphopt_kernels.quant_store import Quant

HEADS, GROUPS, WIDTH = 32, 8, 128
COLD = 384 * 2**20
"""Bytes of exact rows: several times the cache of a device, rounded ones too."""

MOST_COPIES = 64
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One token of ``batch`` sequences at the last of ``filled`` positions."""

    batch: int
    capacity: int
    filled: int

    @property
    def held(self) -> int:
        """Bytes of keys and values of the whole store."""
        return 2 * self.batch * GROUPS * self.capacity * WIDTH * 2

    @property
    def filled_bytes(self) -> int:
        return self.held // self.capacity * self.filled


@dataclass(frozen=True)
class Held:
    """What a call is given: new rows, stores, and where the token is."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor

    @staticmethod
    def drawn(case: Case) -> Held:
        def numbers(heads: int, rows: int) -> torch.Tensor:
            return torch.randn(case.batch, heads, rows, WIDTH, device="cuda", dtype=BF16)

        positions = torch.tensor([case.filled - 1], device="cuda")
        places = torch.arange(case.capacity, device="cuda")
        return Held(
            numbers(HEADS, 1), numbers(GROUPS, 1), numbers(GROUPS, 1), numbers(GROUPS, case.capacity),
            numbers(GROUPS, case.capacity), positions, (places <= positions)[None, None, None],
        )  # fmt: skip


def graphopt_call(given: Held) -> torch.Tensor:
    return attend_full(
        given.query, given.key, given.value, given.keys, given.values, given.positions, None, None, None,
        WIDTH**-0.5, 0.0, 0, given.keys.shape[2],
    )  # fmt: skip


def static_cache(given: Held, *, expanded: bool) -> torch.Tensor:
    given.keys.index_copy_(2, given.positions, given.key)
    given.values.index_copy_(2, given.positions, given.value)
    keys, values = given.keys, given.values
    if expanded:
        keys, values = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (keys, values))
    return F.scaled_dot_product_attention(
        given.query, keys, values, given.mask, scale=WIDTH**-0.5, enable_gqa=not expanded
    )


EXACT: dict[str, Callable[[Held], torch.Tensor]] = {
    "graphopt": graphopt_call,
    "sdpa-gqa": lambda given: static_cache(given, expanded=False),
    "sdpa-expanded": lambda given: static_cache(given, expanded=True),
}


QUANT = {f"quant-{bits}": Quant(bits=bits) for bits in (8, 4)}
KINDS = (*EXACT, *QUANT)


@dataclass(frozen=True)
class Rounded:
    """The same over a store of rounded keys and values."""

    held: Held
    store: Quant
    stores: tuple[torch.Tensor, ...]

    @staticmethod
    def of(held: Held, store: Quant) -> Rounded:
        """What ``held`` has before its token, packed; the newest rows are in the rings."""
        batch, capacity = held.keys.shape[0], held.keys.shape[2]
        site = SiteSpec(HEADS, GROUPS, WIDTH, WIDTH, BF16, MaskSpec(), WIDTH**-0.5)
        kinds = store.tensors(site, batch, capacity).values()
        stores = tuple(torch.zeros(shape, dtype=dtype, device="cuda") for shape, dtype in kinds)
        seen = int(held.positions[0])
        blocks = max(0, (seen - store.residual) // store.block + 1)
        newest = torch.arange(max(0, seen - store.residual), seen, device="cuda")
        for number in range(batch):
            if blocks:
                keys = held.keys[number, :, : blocks * store.block].unflatten(1, (blocks, store.block))
                values = held.values[number, :, : blocks * store.block]
                packed = (
                    *round_keys(keys, store.widths[0]),
                    *round_values(values, store.widths[1], store.group),
                )
                for into, each in zip(stores, packed, strict=False):
                    into[number, :, : each.shape[1]] = each
            for into, rows in zip(stores[4:], (held.keys, held.values), strict=True):
                into[number, :, newest % store.residual] = rows[number, :, newest]
        return Rounded(held, store, stores)

    def __call__(self) -> torch.Tensor:
        held = self.held
        return attend_quant(
            held.query, held.key, held.value, *self.stores, held.positions, None, None, None, WIDTH**-0.5,
            0.0, 0, held.keys.shape[2], *self.store.widths, self.store.group, ALONE,
        )  # fmt: skip

    @property
    def filled_bytes(self) -> int:
        """Of packed rows that the token reads, and of rings."""
        rows = max(0, int(self.held.positions[0]) // self.store.block + 1) * self.store.block
        rows = max(0, rows - self.store.residual)
        share = rows / self.stores[2].shape[2]
        return int(share * sum(x.nbytes for x in self.stores[:4]) + sum(x.nbytes for x in self.stores[4:]))


def microseconds(calls: Sequence[Callable[[], Any]], seconds: float = 0.05) -> float:
    """Of one of ``calls``, all of them in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], calls[-1]):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    taken: list[float] = []
    started = time.perf_counter()
    for number in range(40):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number:
            taken.append(start.elapsed_time(end) * 1e3 / len(calls))
        if len(taken) >= 5 and time.perf_counter() - started > seconds:
            break
    return statistics.median(taken)


def read_bandwidth() -> float:
    """Bytes a second."""
    data = torch.empty(2**30 // 4, device="cuda")
    return 2**30 / microseconds([lambda: bandwidth.probe_read(data)] * 4) * 1e6


def exact(given: Held) -> torch.Tensor:
    """The first sequence in float64, the new row written."""
    filled = int(given.positions[0]) + 1
    keys, values = (x[:1, :, :filled].double() for x in (given.keys, given.values))
    for store, new in ((keys, given.key), (values, given.value)):
        store[:, :, -1:] = new[:1].double()
    allowed = allowed_keys(given.positions, torch.arange(filled, device="cuda"), None, 1, 0)
    return attention_over(given.query[:1].double(), keys, values, allowed, None, None, WIDTH**-0.5, 0.0)


def row_of(
    case: Case, kind: str, taken: float, bandwidth: float, filled: int = 0, **more: Any
) -> dict[str, Any]:
    filled = filled or case.filled_bytes
    reached = filled / taken * 1e6
    return {
        "batch": case.batch, "capacity": case.capacity, "filled": case.filled, "kind": kind,
        "filled_bytes": filled, "us": round(taken, 2), "gb_per_second": round(reached / 1e9, 1),
        "of_read": round(reached / bandwidth, 3), **more,
    }  # fmt: skip


def measured(case: Case, kinds: Sequence[str], bandwidth: float) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    copies = max(2, min(MOST_COPIES, -(-COLD // case.filled_bytes)))
    given = [Held.drawn(case) for _ in range(copies)]
    truth = exact(given[0])
    for kind in kinds:
        filled = 0
        try:
            if kind in QUANT:
                rounded = [Rounded.of(held, QUANT[kind]) for held in given]
                calls: list[Callable[[], torch.Tensor]] = list(rounded)
                filled = rounded[0].filled_bytes
            else:
                calls = [partial(EXACT[kind], held) for held in given]
            found = calls[0]()[:1].double()
            error = float((found - truth).norm() / truth.norm())
            taken = microseconds(calls)
        except Exception as failure:  # the other cases are to be measured still
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            yield {**asdict(case), "kind": kind, "failed": f"{type(failure).__name__}: {failure}"[:300]}
            continue
        yield row_of(case, kind, taken, bandwidth, filled, error=float(f"{error:.2e}"))


def tuned(case: Case, kind: str, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The launches of graphopt's kernels for one row that take the least time, and the one by rule."""
    copies = max(2, min(MOST_COPIES, -(-COLD // case.filled_bytes)))
    given = [Held.drawn(case) for _ in range(copies)]
    rounded = [Rounded.of(held, QUANT[kind]) for held in given] if kind in QUANT else []
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    problem = attend_launch.problem_of(given[0].query, given[0].keys, given[0].values, case.capacity)
    usual = attend_launch.launch_for(problem, processors)
    if rounded:
        bits = QUANT[kind].widths[0]
        sizes = (case.batch, GROUPS, HEADS, case.capacity, WIDTH, BF16, bits, processors)
        usual = attend_quant_launch.launch_for(*sizes)
    most, programs = max(1, case.capacity // 64), case.batch * GROUPS
    parts = {min(most, max(1, n * processors // programs)) for n in (1, 2, 3, 4, 6, 8)} | {usual.parts}
    found = []
    for width, count, warps, stages in product((32, 64, 128), sorted(parts), (2, 4, 8), (2, 3, 4, 5)):
        # Over rounded rows each warp has a tile of its own.
        size = width * warps if rounded else width
        launch = attend_launch.AttendLaunch(usual.rows, size, count, warps, stages)
        if not rounded and size * WIDTH * 4 * (stages - 1) > 200 * 1024:
            continue
        calls: list[Callable[[], torch.Tensor]] = [partial(launched, x, launch) for x in rounded or given]
        try:
            found.append((microseconds(calls, 0.0), launch))
        except Exception as failure:  # launches that do not fit
            yield {
                "kind": kind,
                "launch": list(launch),
                "failed": f"{type(failure).__name__}: {failure}"[:200],
            }
    filled = rounded[0].filled_bytes if rounded else 0
    for taken, launch in sorted(found)[:5] + [pair for pair in found if pair[1] == usual]:
        yield row_of(
            case, kind, taken, bandwidth, filled, launch=list(launch), by_rule=launch == usual
        )  # fmt: skip


def launched(given: Held | Rounded, launch: attend_launch.AttendLaunch) -> torch.Tensor:
    """A call by a launch of its own."""
    held = given.held if isinstance(given, Rounded) else given
    asked = Asked(
        held.query, held.key, held.value, held.positions, None, None, None, WIDTH**-0.5, 0.0, 0,
        held.keys.shape[2],
    )  # fmt: skip
    if isinstance(given, Rounded):
        stores = attend_quant_launch.QuantStores(*given.stores)
        bits = attend_quant_launch.QuantBits(*given.store.widths, given.store.group, ALONE)
        kernels = attend_quant_launch.jitted()
        return attend_quant_launch.row_on_gpu(kernels, asked, stores, bits, takes=True, launch=launch)
    stored = RowStores(held.keys, held.values)
    return attend_launch.attend_on_gpu(attend_launch.jitted(), asked, stored, ring=False, launch=launch)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_decode_attention.json"))
    options.add_argument("--batches", default="1,4,16", help="numbers of sequences, by commas")
    options.add_argument("--capacities", default="4096,32768", help="positions of stores, by commas")
    options.add_argument("--kinds", default=",".join(KINDS), help="what is measured, by commas")
    options.add_argument(
        "--seconds", type=float, default=50, help="cases that would begin later are left out"
    )
    options.add_argument("--tune", action="store_true", help="try launches of graphopt's kernels instead")
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("gpu_decode_attention needs a CUDA device")
        return
    started = time.perf_counter()
    read = read_bandwidth()
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/gpu_decode_attention.py" + (" --tune" if given.tune else ""),
        "read_gb_per_second": round(read / 1e9, 1),
        "rows": [],
        "left_out": [],
    }
    sizes = product(map(int, given.batches.split(",")), map(int, given.capacities.split(",")), (2, 1))
    for batch, capacity, share in sizes:
        case = Case(batch, capacity, capacity // share)
        if time.perf_counter() - started > given.seconds:
            document["left_out"].append({**asdict(case), "why": "no time is left"})
            continue
        try:
            kinds = given.kinds.split(",")
            tunings = (tuned(case, kind, read) for kind in kinds if not kind.startswith("sdpa"))
            for row in chain.from_iterable(tunings) if given.tune else measured(case, kinds, read):
                print(json.dumps(row), flush=True)
                document["rows"].append(row)
        except Exception as error:  # the other cases are to be measured still
            document["left_out"].append({**asdict(case), "why": f"{type(error).__name__}: {error}"[:300]})
        torch.cuda.empty_cache()
        if not given.tune:
            write_atomically(given.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps({"seconds": round(time.perf_counter() - started, 1), "left_out": document["left_out"]}))


if __name__ == "__main__":
    main()
