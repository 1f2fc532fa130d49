"""Parts of prompts whose length comes again are replayed: the same tokens. Graphs of the CPU stand in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphopt
from graphopt.decoding import prompts
from graphopt.decoding.decoder import Decoder
from graphopt.decoding.prompts import Prompts
from tests.decoders import greedy, plain, tokens


class _Work:
    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


class HostGraphs:
    """Runs recorded work again, into the memory that it returned; recording leaves what lasts as it was."""

    def __init__(self, lasting: Callable[[], list[torch.Tensor]], share: float = 1.0) -> None:
        self.lasting, self.share = lasting, share
        self.recorded = self.replayed = 0

    def record(self, work: Callable[[], Any]) -> tuple[_Work, Any]:
        kept = [(x, x.clone()) for x in self.lasting()]
        made = work()
        for x, value in kept:
            x.copy_(value)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for one, other in zip(made, work(), strict=True):
                one.copy_(other)

        return _Work(replay), made

    def watch(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        return work(), lambda: self.share

    def pool_bytes(self) -> int:
        return 1 << 10

    def release(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 40


class Case:
    """A decoder whose prompts may be replayed."""

    def __init__(self, share: float = 1.0, room: int | None = None, **options: Any) -> None:
        self.model = plain("fused")
        given = graphopt.Generate(**{"max_tokens": 64, "max_batch": 3, **options})
        self.fast = graphopt.optimize(self.model, (tokens(1, 6),), generate=given, emit="eager")
        generator = self.fast._generator
        assert generator is not None
        self.decoder: Decoder = generator.built.decoder
        self.graphs = HostGraphs(lambda: list(self.decoder.held.values()), share)
        self.prompts = Prompts(
            generator.session, torch.device("cpu"), self.decoder.chunk, 1 << 20, room, lambda _: self.graphs
        )
        self.decoder.several = self.prompts

    def is_right(self, rows: int, length: int) -> bool:
        torch.manual_seed(length)
        ids = tokens(rows, length)
        return torch.equal(self.fast.generate(ids, max_new_tokens=8), greedy(self.model, ids, 8))


def test_the_third_prompt_of_a_length_is_replayed_whatever_its_tokens_are() -> None:
    case = Case()
    assert all(case.is_right(2, 7) for _ in range(2))
    assert case.graphs.recorded == 0
    for _ in range(3):
        ids = torch.randint(0, 50, (2, 7))
        assert torch.equal(case.fast.generate(ids, max_new_tokens=8), greedy(case.model, ids, 8))
    assert (case.graphs.recorded, case.graphs.replayed) == (1, 3)
    assert "prompts, 7 tokens at once: steps are replayed from a CUDA graph" in str(
        case.fast.report.diagnostics
    )


def test_other_lengths_and_batches_have_graphs_of_their_own() -> None:
    case = Case()
    for rows, length in ((2, 7), (3, 7), (2, 9)):
        assert all(case.is_right(rows, length) for _ in range(4))
    assert case.graphs.recorded == 3
    assert all(case.is_right(rows, length) for rows, length in ((2, 9), (2, 7), (3, 7)))
    assert case.graphs.recorded == 3


def test_later_parts_of_a_prompt_are_replayed_where_they_are() -> None:
    case = Case()
    case.decoder.chunk = 4
    assert all(case.is_right(1, 12) for _ in range(2))
    assert case.graphs.recorded == 1, "three parts of four tokens are one program"
    assert case.is_right(1, 10)


def test_lengths_that_did_not_come_for_long_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_MOST", 2)
    case = Case()
    for length in (5, 6, 7):
        assert all(case.is_right(1, length) for _ in range(3))
    assert case.graphs.recorded == 3
    assert case.is_right(1, 5) and case.graphs.recorded == 3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"share": 0.5}, "7 tokens at once: steps are launched kernel by kernel: queueing them takes 50 %"),
        ({"room": 1000}, "a graph would keep about 123.20 KiB, the budget leaves 1000 B"),
    ],
    ids=["device-bound", "budget"],
)
def test_prompts_that_gain_nothing_or_do_not_fit_are_not_recorded(change: dict[str, Any], text: str) -> None:
    case = Case(**change)
    assert all(case.is_right(1, 7) for _ in range(4))
    assert case.graphs.recorded == 0
    assert text in str(case.fast.report.diagnostics)


def test_modules_that_train_do_so_again_after_they_generated() -> None:
    case = Case()
    first, *rest = case.model.modules()
    case.model.train()
    rest[0].eval()
    case.fast.generate(tokens(1, 5), max_new_tokens=2)
    assert first.training and not rest[0].training and rest[-1].training
