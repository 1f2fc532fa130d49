"""Optimized models train with other ranks as plain ones do, bit for bit."""

from __future__ import annotations

import pytest

from tests.distributed_cases import around_data_parallel, data_parallel, document, sharded, tensor_parallel
from tests.ranks import Pair
from tests.test_documents import blocks

LATE = 3 * 512 * 32 * 8
"""Bytes that Gloo's thread may let go of some time after a collective was waited for: what the largest of
the collectives here reads and makes."""


def test_data_parallel_around_an_optimized_model(pair: Pair) -> None:
    for said in pair(data_parallel, {"gradient_as_bucket_view": True}):
        assert said.difference == 0.0
        assert said.recomputed and said.peak < said.baseline
        assert "ranks 0-1 run the same programs and plan" in said.notes
        assert "not counted" not in said.notes


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}])
def test_data_parallel_however_it_is_set(pair: Pair, options: dict[str, bool]) -> None:
    assert [said.difference for said in pair(data_parallel, options)] == [0.0, 0.0]


@pytest.mark.slow
def test_an_optimized_data_parallel_model(pair: Pair) -> None:
    for said in pair(around_data_parallel):
        assert said.difference == 0.0
        # Dynamo would cut the model where buckets end.
        assert said.programs == 1
        assert "ranks 0-1 run the same programs and plan" in said.notes
        assert "buckets of DistributedDataParallel are not counted: 141.81 KiB" in said.notes


def test_a_sharded_model_within_a_budget_of_each_rank(pair: Pair) -> None:
    for said in pair(sharded, True, False, True):
        assert said.difference == 0.0
        assert said.recomputed and said.peak < said.baseline
        # Half of the weights are this rank's.
        assert said.weights == 145216 // 2
        assert said.measured <= said.peak + LATE
        assert "ranks 0-1 run the same programs and plan" in said.notes


@pytest.mark.slow
@pytest.mark.parametrize(("reshard", "mixed"), [(False, False), (True, True)])
def test_a_sharded_model_however_it_is_set(pair: Pair, reshard: bool, mixed: bool) -> None:
    assert [said.difference for said in pair(sharded, reshard, mixed, False)] == [0.0, 0.0]


def test_tensor_parallel_layers_and_their_collectives(pair: Pair) -> None:
    for said, traced, runs in pair(tensor_parallel, "eager"):
        assert said.difference == 0.0
        assert said.recomputed and said.peak < said.baseline
        assert said.weights < 145216 * 0.6
        # Each runs once, in the order in which it was traced.
        assert len(traced) >= 8 and runs == traced
        assert "passes of the semantic level see no operators" in said.notes


@pytest.mark.slow
def test_tensor_parallel_layers_with_generated_code(pair: Pair) -> None:
    for said, traced, runs in pair(tensor_parallel, "inductor"):
        assert said.difference < 1e-13
        assert runs == traced


def test_the_blocks_of_the_document_run(pair: Pair) -> None:
    texts = [text for _, text in blocks("docs/distributed.md", "python")]
    assert len(texts) == 1
    pair(document, texts)
