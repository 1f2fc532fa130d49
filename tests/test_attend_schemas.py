"""Schemas of the operators that decoding calls: artefacts and emitted programs name them, so each stays what
it is to the letter."""

from __future__ import annotations

import pytest
import torch

from graphopt.plugins import default_host

SCHEMAS = (
    "graphopt::attend_cross(Tensor query, Tensor? key, Tensor? value, Tensor key_store, Tensor "
    "value_store, Tensor positions, Tensor? valid, Tensor? slopes, Tensor? sinks, float scale, float "
    "softcap, SymInt window, SymInt length) -> Tensor",
    "graphopt::attend_evict(Tensor query, Tensor? key, Tensor? value, Tensor(a3!) key_store, "
    "Tensor(a4!) value_store, Tensor(a5!) place_store, Tensor(a6!) score_store, Tensor positions, "
    "Tensor? valid, Tensor? slopes, Tensor? sinks, float scale, float softcap, SymInt window, SymInt "
    "length, str policy, SymInt recent) -> Tensor",
    "graphopt::attend_full(Tensor query, Tensor? key, Tensor? value, Tensor(a3!) key_store, "
    "Tensor(a4!) value_store, Tensor positions, Tensor? valid, Tensor? slopes, Tensor? sinks, float "
    "scale, float softcap, SymInt window, SymInt length) -> Tensor",
    "graphopt::attend_joint(Tensor query, Tensor? key, Tensor? value, Tensor(a3!) key_blocks, "
    "Tensor(a4!) value_blocks, Tensor(a5!) key_ring, Tensor(a6!) value_ring, Tensor positions, Tensor? "
    "valid, Tensor? slopes, Tensor? sinks, float scale, float softcap, SymInt window, SymInt length, "
    "Tensor? key_basis, Tensor? value_basis, str store, SymInt member) -> Tensor",
    "graphopt::attend_latent(Tensor query, Tensor? key, Tensor? value, Tensor(a3!) key_store, Tensor "
    "positions, Tensor? valid, Tensor? slopes, Tensor? sinks, float scale, float softcap, SymInt "
    "window, SymInt length, SymInt value_width) -> Tensor",
    "graphopt::attend_quant(Tensor query, Tensor? key, Tensor? value, Tensor(a3!) key_codes, "
    "Tensor(a4!) key_scales, Tensor(a5!) value_codes, Tensor(a6!) value_scales, Tensor(a7!) key_ring, "
    "Tensor(a8!) value_ring, Tensor positions, Tensor? valid, Tensor? slopes, Tensor? sinks, float "
    "scale, float softcap, SymInt window, SymInt length, SymInt key_bits, SymInt value_bits, SymInt "
    "group, SymInt turn) -> Tensor",
    "graphopt::attend_relative(Tensor query, Tensor? key, Tensor? value, Tensor(a3!) key_store, "
    "Tensor(a4!) value_store, Tensor positions, Tensor? valid, Tensor? slopes, Tensor? sinks, float "
    "scale, float softcap, SymInt window, SymInt length, Tensor table) -> Tensor",
    "graphopt::attend_ring(Tensor query, Tensor? key, Tensor? value, Tensor(a3!) key_store, "
    "Tensor(a4!) value_store, Tensor positions, Tensor? valid, Tensor? slopes, Tensor? sinks, float "
    "scale, float softcap, SymInt window, SymInt length) -> Tensor",
    "graphopt::attend_split(Tensor query, Tensor? key, Tensor? value, Tensor(a3!) key_all, Tensor(a4!) "
    "value_all, Tensor(a5!) key_near, Tensor(a6!) value_near, Tensor positions, Tensor? valid, Tensor? "
    "slopes, Tensor? sinks, float scale, float softcap, SymInt window, SymInt length, SymInt[] whole, "
    "SymInt first) -> Tensor",
    "graphopt::causal_convolution(Tensor x, Tensor weight, Tensor? bias, Tensor(a3!) history, Tensor "
    "positions, SymInt dilation, SymInt groups) -> Tensor",
    "graphopt::rotary_to_cache(Tensor input, Tensor(a1!) key_cache, Tensor(a2!) value_cache, Tensor "
    "positions, Tensor cos, Tensor sin, Tensor? query_weight, Tensor? key_weight, SymInt[] heads, "
    "SymInt width, bool interleaved, float? eps, float weight_offset) -> Tensor",
    "graphopt::rotary_to_stores(Tensor query, Tensor key, Tensor value, Tensor(a3!) key_store, "
    "Tensor(a4!) value_store, Tensor positions, Tensor cos, Tensor sin, Tensor? query_weight, Tensor? "
    "key_weight, SymInt width, bool interleaved, float? eps, float weight_offset, bool ring) -> Tensor",
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Operators are there once the kernels that name them are."""
    default_host().kernels()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.split("(")[0].split("::")[1])
def test_schemas_are_what_they_were(schema: str) -> None:
    packet = getattr(torch.ops.graphopt, schema.split("(")[0].split("::")[1])
    assert packet.overloads() == ["default"]
    assert str(packet.default._schema) == schema


def test_every_operator_over_stores_is_pinned() -> None:
    found = {spec.op for spec in default_host().kernels().values() if "::attend_" in spec.op}
    assert found == {schema.split("(")[0] for schema in SCHEMAS if "::attend_" in schema}
