"""The check of decoders with lossy stores: every fault that is put into an operator is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt
from graphopt import VerificationError
from graphopt.decoding.check_decoder import check_decoder
from graphopt.decoding.decoder import Decoder
from graphopt_kernels.attend_evict import attend_evict
from graphopt_kernels.attend_quant import attend_quant
from graphopt_kernels.evict_store import Evict
from graphopt_kernels.quant_store import Quant
from tests.decoders import plain, tokens

Fault = Callable[[list[Any], list[Tensor]], None]
FAULT: list[Fault] = []
"""What is done to the arguments of single rows, told what stores held before them."""

KEY, KEY_CODES, KEY_SCALES, VALUE_CODES, VALUE_SCALES, KEY_RING, VALUE_RING = 1, 3, 4, 5, 6, 7, 8
POSITIONS, VALID, SCALE, WINDOW = 9, 10, 13, 15
REST = (
    "Tensor positions, Tensor? valid, Tensor? slopes, Tensor? sinks, float scale, float softcap, "
    "SymInt window, SymInt length, "
)
NEW = "(Tensor query, Tensor? key, Tensor? value, "


def defined(name: str, stores: str, constants: str, reference: Callable[..., Tensor]) -> Any:
    """An operator that gives what ``reference`` does, but for the fault there is."""
    names = stores.split()
    held = "".join(f"Tensor(a{i}!) {store}, " for i, store in enumerate(names))
    end = 3 + len(names)

    def attend(*given: Any) -> Tensor:
        before = [store.clone() for store in given[3:end]]
        made = reference(*given)
        if not FAULT or given[0].shape[2] > 1:
            return made
        read = [x.clone() if 3 <= i < end else x for i, x in enumerate(given)]
        FAULT[0](read, before)
        return reference(*read)

    schema = f"{NEW}{held}{REST}{constants}) -> Tensor"
    made = torch.library.custom_op(f"graphopt_tests::{name}", attend, mutates_args=names, schema=schema)
    made.register_fake(lambda query, *given: query.new_empty((*query.shape[:3], given[1].shape[3])))
    return made._opoverload


PACKED = "key_codes key_scales value_codes value_scales key_ring value_ring"
BITS = "SymInt key_bits, SymInt value_bits, SymInt group, SymInt turn"
faulty_quant = defined("attend_quant", PACKED, BITS, attend_quant.reference)
SLOTS = "key_store value_store place_store score_store"
faulty_evict = defined("attend_evict", SLOTS, "str policy, SymInt recent", attend_evict.reference)


@dataclass(frozen=True)
class FaultyQuant(Quant):
    attend_op = "graphopt_tests::attend_quant"


@dataclass(frozen=True)
class FaultyEvict(Evict):
    attend_op = "graphopt_tests::attend_evict"


def decoding(text: str, store: Any, operator: Any, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder whose attentions run ``operator`` over stores ``store``, which ``text`` spells."""
    fast = graphopt.optimize(
        plain("fused").to(dtype), (tokens(1, 6),), generate=graphopt.Generate(128, 2), emit="eager",
        pipeline=["default", graphopt.use("keep-kv", store=text)], on_error="raise",
    )  # fmt: skip
    decoder: Decoder = fast._generator.built.decoder
    before = {getattr(torch.ops.graphopt, site.store.attend_op[10:]).default for site in decoder.sites}
    for node in decoder.general.graph.nodes:
        if node.target in before:
            node.target = operator
    decoder.general.recompile()
    decoder.sites = tuple(replace(site, store=store) for site in decoder.sites)
    return decoder


@pytest.fixture(scope="module")
def quant() -> Decoder:
    return decoding("quant{bits=8,group=8}", FaultyQuant(bits=8, group=8), faulty_quant)


@pytest.fixture(scope="module")
def half() -> Decoder:
    store = FaultyQuant(bits=8, group=8)
    return decoding("quant{bits=8,group=8}", store, faulty_quant, torch.bfloat16)


@pytest.fixture(scope="module")
def evict() -> Decoder:
    return decoding("evict{keep=40,recent=8}", FaultyEvict(keep=40, recent=8), faulty_evict)


@pytest.fixture(autouse=True)
def _no_fault() -> Iterator[None]:
    FAULT.clear()
    yield
    FAULT.clear()


def _rolled(index: int) -> Fault:
    def fault(read: list[Any], before: list[Tensor]) -> None:
        read[index].copy_(read[index].roll(1, 2))

    return fault


def _of_other_heads(index: int) -> Fault:
    def fault(read: list[Any], before: list[Tensor]) -> None:
        read[index].copy_(read[index].flip(1))

    return fault


def _one_is_lost(read: list[Any], before: list[Tensor]) -> None:
    read[VALID] = torch.ones(2, 128, dtype=torch.bool)
    read[VALID][:, 17] = False


def _the_first_is_lost(read: list[Any], before: list[Tensor]) -> None:
    read[WINDOW] = int(read[POSITIONS][-1])


def _low_bits_are_lost(read: list[Any], before: list[Tensor]) -> None:
    read[VALUE_CODES].bitwise_and_(0x7F7F7F7F)


def _zeros_are_lost(read: list[Any], before: list[Tensor]) -> None:
    read[KEY_SCALES][:, :, :, 1] = 0


FAULTS: dict[str, Fault] = {
    "scales-of-another-block": _rolled(KEY_SCALES),
    "scales-of-another-row": _rolled(VALUE_SCALES),
    "codes-of-another-block": _rolled(KEY_CODES),
    "keys-in-another-slot": _rolled(KEY_RING),
    "values-of-other-heads": _of_other_heads(VALUE_RING),
    "codes-of-other-heads": _of_other_heads(VALUE_CODES),
    "one-position-lost": _one_is_lost,
    "the-first-position-lost": _the_first_is_lost,
    "highest-bits-lost": _low_bits_are_lost,
    "zeros-lost": _zeros_are_lost,
}


def refused(decoder: Decoder, fault: Fault, text: str) -> None:
    FAULT.append(fault)
    with pytest.raises(VerificationError, match=text):
        check_decoder(decoder)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_rounded_stores_are_refused(quant: Decoder, fault: str) -> None:
    refused(quant, FAULTS[fault], "store quant.* of attention 0 does not give what it says, at position")


def test_without_a_fault_logits_are_as_close_as_those_of_exact_stores(quant: Decoder, half: Decoder) -> None:
    checked = check_decoder(quant)
    assert checked.off < 1e-5 and checked.allowed < 1e-3
    check_decoder(half)


@pytest.mark.parametrize("fault", ["one-position-lost", "scales-of-another-row", "scales-of-another-block"])
def test_faults_are_refused_in_bfloat16(half: Decoder, fault: str) -> None:
    refused(half, FAULTS[fault], "store quant.* of attention 0 does not give what it says")


def _a_slot_is_skipped(read: list[Any], before: list[Tensor]) -> None:
    read[5][:, :, 0] = 0


def test_faults_of_dropping_stores_are_refused(evict: Decoder) -> None:
    check_decoder(evict)
    refused(evict, _a_slot_is_skipped, "store evict.* of attention 0 does not give what it says")


@pytest.mark.parametrize(
    "store", [FaultyEvict(keep=40, recent=8, policy="knorm"), FaultyEvict(keep=40, recent=24)], ids=str
)
def test_what_is_dropped_by_another_rule_is_refused(evict: Decoder, store: FaultyEvict) -> None:
    sites = evict.sites
    evict.sites = tuple(replace(site, store=store) for site in sites)
    try:
        with pytest.raises(VerificationError, match="does not give what it says"):
            check_decoder(evict)
    finally:
        evict.sites = sites


def test_keys_that_are_not_the_models_are_refused(quant: Decoder) -> None:
    general = quant.general
    (first, *_) = [node for node in general.graph.nodes if node.target is faulty_quant]
    with general.graph.inserting_before(first):
        moved = general.graph.call_function(torch.ops.aten.mul.Tensor, (first.args[KEY], 1.01))
    first.update_arg(KEY, moved)
    general.recompile()
    try:
        with pytest.raises(VerificationError, match="keys of attention 0 are not those of the model without"):
            check_decoder(quant)
    finally:
        first.update_arg(KEY, moved.args[0])
        general.graph.erase_node(moved)
        general.recompile()
