"""Stores that several attentions write into: decoders are models whose rows were joined by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional

import graphopt
from graphopt import InputsError, VerificationError
from graphopt.decoding.assignment import store_named
from graphopt.decoding.masks import MaskSpec
from graphopt.decoding.stores import SiteSpec
from graphopt.errors import PluginError
from graphopt.plugins import default_host, hookimpl
from graphopt_kernels import attend_joint
from graphopt_kernels.cache_codes import rounded_keys, rounded_values
from graphopt_kernels.joined_stores import Merged, SharedBasis
from graphopt_kernels.joint_blocks import JointRows, Kinds
from graphopt_kernels.joint_known import joint_store
from graphopt_kernels.joint_store import JointStore
from tests.decoders import family, plain, tokens

ROWS = 72
SITE = SiteSpec(4, 4, 16, 16, torch.float64, MaskSpec(), 0.25, members=2)
TWICE = ["sliding_attention", "full_attention"] * 2
Joined = Callable[[str, list[torch.Tensor]], list[torch.Tensor]]


def optimized(model: torch.nn.Module, *steps: Any, **options: Any) -> graphopt.Optimized:
    rows = options.pop("rows", ROWS)
    return graphopt.optimize(
        model, options.pop("inputs", (tokens(),)), generate=graphopt.Generate(rows, 2), emit="eager",
        on_error="raise", pipeline=steps, **options,
    )  # fmt: skip


def joining(store: str, **options: Any) -> Any:
    return graphopt.use("join-kv", store=store, **options)


def merged_by_hand(keep: int, later: float, bits: int = 0) -> Joined:
    """Row by row, as MiniCache's equations have it: slerp of directions, lengths, positions that stay."""

    def joined(what: str, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        one, other = rows
        direction, angles = torch.zeros_like(one), torch.zeros(one.shape[:3])
        for place in itertools.product(*map(range, one.shape[:3])):
            u, w = one[place] / one[place].norm(), other[place] / other[place].norm()
            angle = torch.acos(torch.dot(u, w))
            between = torch.sin((1 - later) * angle) * u + torch.sin(later * angle) * w
            direction[place] = between / angle.sin()
            angles[place] = angle
        if bits:
            rounded = rounded_keys(direction, bits, one.shape[2])
            direction = rounded if what == "keys" else rounded_values(direction, bits, 32)
        stays = torch.zeros_like(angles, dtype=torch.bool)
        stays.scatter_(2, angles.topk(keep, -1).indices, True)
        return [
            torch.where(stays[..., None], x, direction * x.norm(dim=-1, keepdim=True)) for x in (one, other)
        ]

    return joined


def projected_by_hand(bases: Mapping[str, torch.Tensor]) -> Joined:
    """Rows of all attentions and heads side by side, projected on the columns of one basis."""

    def joined(what: str, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        columns = bases[what].flatten(0, 2)
        beside = torch.cat([x.transpose(1, 2).flatten(2) for x in rows], -1)
        parts = (beside @ columns @ columns.T).chunk(len(rows), -1)
        return [part.unflatten(2, (rows[0].shape[1], -1)).transpose(1, 2) for part in parts]

    return joined


def joined_model(
    model: torch.nn.Module, layers: list[int], block: int, joined: Joined, ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> torch.Tensor:  # fmt: skip
    """Logits of the model itself, block after block: attentions ``layers`` read what was joined of blocks
    before, and their own rows of the block."""
    kept: dict[tuple[str, int], list[torch.Tensor]] = {(w, i): [] for w in ("keys", "values") for i in layers}
    own: dict[tuple[str, int], torch.Tensor] = {}
    attend, found, calls = functional.scaled_dot_product_attention, [], itertools.count()

    def attending(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
        index = next(calls)
        if index not in layers:
            return attend(query, key, value, **options)
        read = []
        for what, rows in (("keys", key), ("values", value)):
            before = kept[what, index]
            own[what, index] = rows[:, :, sum(part.shape[2] for part in before) :]
            read.append(torch.cat([*before, own[what, index]], 2))
        return attend(query, *read, **options)

    for start in range(0, ids.shape[1], block):
        calls = itertools.count()
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(functional, "scaled_dot_product_attention", attending)
            found.append(model(ids[:, : start + block])[:, start:])
        for what in ("keys", "values"):
            parts = joined(what, [own[what, index] for index in layers])
            for index, part in zip(layers, parts, strict=True):
                kept[what, index].append(part)
    return torch.cat(found, 1)


def by_steps(fast: graphopt.Optimized, ids: torch.Tensor, *counts: int) -> torch.Tensor:
    """Logits of the decoder behind parts of ``counts`` tokens, then token after token."""
    decoder = fast._generator.built.decoder
    decoder.reset(ids.shape[0])
    start, found = 0, []
    for count in [*counts, *[1] * (ids.shape[1] - sum(counts))]:
        found.append(decoder(ids[:, start : start + count]))
        start += count
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("store", "block", "joined"),
    [
        ("merged{block=8,keep=1}", 8, merged_by_hand(1, 0.6)),
        ("merged{block=8,keep=0,later=0.25}", 8, merged_by_hand(0, 0.25)),
        ("merged{block=32,keep=3,bits=4}", 32, merged_by_hand(3, 0.6, 4)),
    ],
    ids=["merged", "none-apart", "rounded"],
)
def test_a_decoder_is_the_model_whose_rows_were_merged_by_hand(
    store: str, block: int, joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain("fused", layers=3).double()
    fast = optimized(model, joining(store, plan={2: 1}))
    ids = tokens(2, 70, seed=5)
    expected = joined_model(model, [1, 2], block, joined, ids, monkeypatch)
    # In parts and one by one: the rule knows positions alone.
    for counts in ((20,), (3, 41, 9), ()):
        found, rows = by_steps(fast, ids, *counts), list(range(70))
        ends = [sum(counts[: i + 1]) - 1 for i in range(len(counts))]
        assert torch.allclose(found, expected[:, ends + rows[sum(counts) :]], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, model(ids), atol=1e-3)
    record = fast.report.decoding
    assert record.off <= record.lossy.allowed and record.lossy.attentions == 2
    assert [site.source for site in record.sites] == [0, 1, 1] and record.chunk == block


def test_rows_of_the_basis_are_those_of_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain("fused", layers=3).double()
    calibration = [tokens(8, 32, seed=4)]
    text = "shared-basis{block=8,key_rank=90,value_rank=100}"
    fast = optimized(model, joining(text, size=3, start=0, calibration=calibration))
    bases = fast._generator.built.decoder.sites[0].spec.fitted
    assert {name: list(basis.shape) for name, basis in bases.items()} == {
        "keys": [3, 4, 16, 90], "values": [3, 4, 16, 100]
    }  # fmt: skip
    ids = tokens(2, 40, seed=5)
    expected = joined_model(model, [0, 1, 2], 8, projected_by_hand(bases), ids, monkeypatch)
    assert torch.allclose(by_steps(fast, ids), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, model(ids), atol=1e-3)
    sizes = 2 * 8 * (9 * 8 * (90 + 100) + 3 * 4 * 8 * (16 + 16)) + 8 * 3 * 4 * 16 * (90 + 100)
    assert fast.report.decoding.cache_bytes == fast._generator.built.decoder.cache_bytes == sizes


def test_the_basis_is_that_of_least_error() -> None:
    """Rows of rank 20 side by side come back, and what is left out of others is the tail of the SVD."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(20, 2, 4, 16, generator=generator, dtype=torch.float64)
    low = torch.einsum("rk,kmhd->mhrd", torch.randn(200, 20, generator=generator).double(), mixing)
    noisy = low + 0.1 * torch.randn(low.shape, generator=generator, dtype=torch.float64)
    store = SharedBasis(block=8, key_rank=20, value_rank=20)
    made = store.fit(SITE, low, low, noisy)
    spec = JointRows("keys", 2, 4, 16, torch.float64)
    blocks = low[:, None].unflatten(3, (-1, 8))
    for member in (0, 1):
        kept = store.join(spec, blocks, None, made["keys"])
        assert torch.allclose(store.part(spec, kept, member, made["keys"]), blocks[member], atol=1e-9)
    kept = store.join(spec, noisy[:, None].unflatten(3, (-1, 8)), None, made["values"])
    parts = [store.part(spec, kept, m, made["values"])[0].flatten(1, 2) for m in (0, 1)]
    beside = noisy.permute(2, 0, 1, 3).flatten(1)
    tail = torch.linalg.svdvals(beside)[20:].square().sum()
    assert torch.allclose((torch.stack(parts) - noisy).square().sum(), tail, rtol=1e-9)


def test_bytes_are_those_of_one_direction_lengths_and_what_stays() -> None:
    fast = optimized(plain("fused", layers=2), joining("merged{block=8,keep=1}", plan={1: 0}))
    block = 4 * (8 * 16 + 2 * 8 + 2 * 16) * 4 + 4 * 4
    sizes = 2 * (9 * 2 * block + 2 * 2 * 4 * 8 * 16 * 4)
    record = fast.report.decoding
    decoder = fast._generator.built.decoder
    assert record.cache_bytes == decoder.cache_bytes == sizes < 2 * 2 * 2 * 4 * ROWS * 16 * 4
    assert [site.bytes for site in record.sites] == [sizes, 0]
    text = str(fast.report)
    assert "merged{block=8,keep=1}: 2 attentions" in text and "2 attentions keep less" in text
    # Rounded, directions are words of 4 bits, with a scale and a zero of two bytes each.
    spec = replace(SITE, dtype=torch.bfloat16)
    rounded = Merged(block=32, keep=0, bits=4).tensors(spec, 1, 64)
    keys, values = 4 * (4 * 16 * 4 + 2 * 16 * 2), 4 * (32 * 2 * 4 + 32 * 2 * 2)
    lengths = 2 * 4 * 32 * 2
    assert rounded["key_blocks"] == ((1, 2, keys + lengths), torch.uint8)
    assert rounded["value_blocks"] == ((1, 2, values + lengths), torch.uint8)


def test_sequences_change_places_with_all_that_is_kept() -> None:
    fast = optimized(plain("fused", layers=2).double(), joining("merged{block=8,keep=1}", plan={1: 0}))
    decoder, ids = fast._generator.built.decoder, tokens(2, 30, seed=6)
    expected = by_steps(fast, torch.cat([ids[:, :21], ids.flip(0)[:, 21:]], 1).flip(0), 21)
    decoder.reset(2)
    decoder(ids[:, :21])
    decoder.reorder(torch.tensor([1, 0]))
    found = torch.cat([decoder(ids[:, i : i + 1]) for i in range(21, 30)], 1)
    assert torch.allclose(found, expected[:, 1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "plan", "options"),
    [
        ("qwen2", {1: 0}, {}),
        ("gemma2", {2: 0, 3: 1}, {"num_hidden_layers": 4, "layer_types": TWICE}),
    ],
)
def test_families_decode_with_padding_beams_and_windows(name: str, plan: Any, options: Any) -> None:
    """Checked with padding as they are made; beams of one sequence alone and beside a padded one."""
    model = family(name, **options)
    ids = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    fast = graphopt.optimize(
        model, ids, generate=graphopt.Generate(96, 4), emit="eager", on_error="raise",
        pipeline=[joining("merged{block=16,keep=1}", plan=plan)],
    )  # fmt: skip
    record = fast.report.decoding
    assert record.off <= record.lossy.allowed and sum(site.joins for site in record.sites) == 2 * len(plan)
    prompt = tokens(2, 21, seed=7)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    both = fast.generate(prompt, attention_mask=mask, num_beams=2, max_new_tokens=40, do_sample=False)
    alone = fast.generate(prompt[:1], num_beams=2, max_new_tokens=40, do_sample=False)
    assert torch.equal(both[:1], alone)


@pytest.mark.parametrize(("kind", "block"), [("softcap", 8), ("sinks", 8), ("linear-bias", 8), ("window", 4)])
def test_attentions_of_any_kind_are_joined(kind: str, block: int) -> None:
    record = optimized(plain(kind), joining(f"merged{{block={block},keep=1}}", plan={1: 0})).report.decoding
    assert record.off <= record.lossy.allowed and [site.source for site in record.sites] == [0, 0]


@pytest.mark.parametrize(
    "shared", [{"plan": {1: 0}}, {"preset": "swiftkv", "early": 1}], ids=["shared", "early"]
)
def test_models_that_share_join_what_is_left(shared: dict[str, Any]) -> None:
    step = joining("merged{block=8,keep=1}", plan={3: 2})
    record = optimized(plain("fused", layers=4), graphopt.use("share-kv", **shared), step).report.decoding
    assert [site.source for site in record.sites] == [0, 0 if "plan" in shared else 1, 2, 2]
    assert record.off <= record.lossy.allowed
    assert record.sharing.cache_bytes.realised == record.sharing.cache_bytes.promised


def test_half_precision_is_checked_in_float32() -> None:
    model = family("llama", num_hidden_layers=3).bfloat16()
    step = joining("shared-basis{block=32,key_rank=80,value_rank=80,bits=8}", start=0, size=3,
                   calibration=[tokens(4, 40, seed=4)])  # fmt: skip
    record = optimized(model, step, inputs={"input_ids": tokens()}).report.decoding
    assert record.off <= record.lossy.allowed and record.lossy.attentions == 3


def test_padding_is_never_kept_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 1, 4, 1, 8, 16, generator=generator, dtype=torch.float64)
    rows[1, :, :, :, 2] = -rows[0, :, :, :, 2]
    spec = JointRows("keys", 2, 4, 16, torch.float64)
    store, shown = Merged(block=8, keep=1), torch.ones(1, 1, 8, dtype=torch.bool)
    assert (store.join(spec, rows, shown, None)["places"] == 2).all()
    shown[..., 2] = False
    made = store.join(spec, rows, shown, None)
    assert not (made["places"] == 2).any()
    # Opposite directions have none between them, rows of zeros have none at all.
    assert torch.allclose(store.part(spec, made, 1, None)[:, :, :, 2], rows[1, :, :, :, 2], atol=1e-9)
    rows[1, :, :, :, 5] = 0
    made = store.join(spec, rows, None, None)
    parts = [store.part(spec, made, member, None)[:, :, :, 5] for member in (0, 1)]
    assert torch.allclose(parts[0], rows[0, :, :, :, 5], atol=1e-9) and not parts[1].any()
    rows[1, :, :, :, 5] = rows[0, :, :, :, 5]
    assert torch.allclose(
        store.part(spec, store.join(spec, rows, None, None), 0, None)[:, :, :, 5], rows[0, :, :, :, 5]
    )


def test_groups_that_are_most_alike_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calibration = plain("fused", layers=5), tokens(3, 40, seed=8)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    attend = functional.scaled_dot_product_attention

    def attending(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
        seen.append((key, value))
        return attend(query, key, value, **options)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "scaled_dot_product_attention", attending)
        model(calibration)
    alike = [
        sum(float(torch.cosine_similarity(x, y, -1).mean()) for x, y in zip(*both, strict=True))
        for both in itertools.pairwise(seen)
    ]
    best = alike.index(max(alike))
    fast = optimized(model, joining("merged{block=8}", start=0, groups=1, calibration=[calibration]))
    sources = [site.source for site in fast.report.decoding.sites]
    assert sources == [best if i == best + 1 else i for i in range(5)]
    said = f"1 groups of attentions, of 4 those most alike, cosine {max(alike) / 2:.2f} or more"
    assert said in fast.report.steps[0].reason
    # The deeper half, where nothing is said.
    fast = optimized(model, joining("merged{block=8}"))
    assert [site.source for site in fast.report.decoding.sites] == [0, 1, 2, 2, 4]


@pytest.mark.parametrize(
    ("store", "options", "reason"),
    [
        ("merged", {"plan": {1: 0}}, "the newest 128 positions are kept as they are, and 72 are read"),
        ("merged{block=8}", {"start": 0, "size": 3}, "a direction lies between two others, and 3 attentions"),
        ("merged{block=8,keep=8}", {"plan": {1: 0}}, "keep=8, later=0.6: expected 0 to 7 positions"),
        ("merged{block=8,bits=4}", {"plan": {1: 0}}, "block=8, group=32: expected .* a multiple of 32"),
        ("merged{block=32,bits=5}", {"plan": {1: 0}}, "bits=5: expected 0, 2, 3, 4, 8"),
        ("merged{block=8}", {"plan": {0: 1}}, r"comes no earlier(.|\n)*\{1: 0\}"),
        ("merged{block=8}", {"plan": {1: 0, 2: 1}}, r"which writes into that of attention 0(.|\n)*\{2: 0\}"),
        ("merged{block=8}", {"plan": {7: 0}}, "a part in a joint store: the model attends 3 times"),
        ("merged{block=8}", {"plan": {1: 0}, "groups": 1}, "is given plan and groups"),
        ("merged{block=8}", {"groups": 1}, "found on calibration, and there is none"),
        ("merged{block=8}", {"size": 1}, "size=1: expected 2 or more"),
        ("merged{block=8}", {"start": 2}, "finds no 2 attentions that go together from attention 2 on, of 3"),
        ("merged{block=8}", {"calibration": [tokens(1, 40)]}, "is not fitted to calibration tokens"),
        ("full", {"plan": {1: 0}}, r"store full takes rows of one attention alone(.|\n)*such as merged"),
        ("shared-basis{block=8,key_rank=4,value_rank=4}", {"plan": {1: 0}}, "join-kv was given none"),
        (
            "shared-basis{block=8,key_rank=128,value_rank=4}",
            {"plan": {1: 0}, "calibration": [tokens(4, 40)]},
            "key_rank=128: expected 1 to 127, of 128 numbers side by side",
        ),
        (
            "shared-basis{block=8,key_rank=4,value_rank=4}",
            {"plan": {1: 0}, "calibration": [tokens(2, 40)]},
            "is fitted to 80 tokens of calibration: expected 128 or more",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused(store: str, options: Any, reason: str) -> None:
    with pytest.raises(InputsError, match=reason):
        optimized(plain("fused", layers=3), joining(store, **options))


def test_passes_that_do_not_go_together_are_refused() -> None:
    model = plain("fused", layers=4)
    with pytest.raises(InputsError, match="several attentions write into one store of its kind"):
        optimized(model, graphopt.use("keep-kv", store="merged{block=8}"))
    share, join = graphopt.use("share-kv", plan={1: 0}), joining("merged{block=8}", plan={2: 0})
    with pytest.raises(InputsError, match="0 cannot write into a joint store: attention 1 reads its keys"):
        optimized(model, share, join)
    lossy = graphopt.use("lossy-cache", max_kl=0.1, calibration="none")
    with pytest.raises(InputsError, match="cannot price attention 3, which writes into the store of"):
        optimized(model, joining("merged{block=8}"), lossy, allow=("lossy-cache",))
    # Stores of the others are named as ever, before or after.
    quant = graphopt.use("keep-kv", store="quant{group=8}")
    for steps in ((quant, joining("merged{block=8}")), (joining("merged{block=8}"), quant)):
        sites = optimized(model, *steps).report.decoding.sites
        assert [site.store.partition("{")[0] for site in sites] == ["quant", "quant", "merged", "merged"]


def test_attentions_that_do_not_fit_are_refused() -> None:
    model = family("gemma3_text", num_hidden_layers=4, layer_types=TWICE)
    with pytest.raises(InputsError, match=r"its mask is causal(.|\n)*with which it goes together: \{3: 1\}"):
        optimized(model, joining("merged{block=8}", plan={3: 2}), inputs={"input_ids": tokens()})
    shared = family("gemma3n_text")
    with pytest.raises(InputsError, match="reads its keys and values too"):
        optimized(shared, joining("merged{block=8}", plan={1: 0}), inputs={"input_ids": tokens()})


def _other_lengths(member: int, made: torch.Tensor) -> torch.Tensor:
    return made * 1.01


def _other_block(member: int, made: torch.Tensor) -> torch.Tensor:
    return made.roll(1, 2)


def _other_attention(member: int, made: torch.Tensor) -> torch.Tensor:
    return made.flip(1)


@pytest.mark.parametrize("fault", [_other_lengths, _other_block, _other_attention])
@pytest.mark.parametrize("member", [0, 1])
def test_operators_that_read_something_else_are_refused(
    member: int, fault: Callable[[int, torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = attend_joint.parted_rows

    def reading(store: Any, spec: Any, records: Any, which: int, basis: Any) -> torch.Tensor:
        made = read(store, spec, records, which, basis)
        # Of keys alone: a block in the place of another, its values with it, is read as well.
        return fault(which, made) if which == member and spec.what == "keys" else made

    monkeypatch.setattr(attend_joint, "parted_rows", reading)
    with pytest.raises(VerificationError, match=f"of attention {member} does not give what it says"):
        optimized(plain("fused"), joining("merged{block=8,keep=1}", plan={1: 0}))


def test_operators_need_not_look_at_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: with rows of an earlier sequence in the stores, which no position is to reach."""
    fast = optimized(plain("fused").double(), joining("merged{block=8,keep=1}", plan={1: 0}))
    ids = tokens(2, 70, seed=5)
    expected = by_steps(fast, ids, 20)
    by_steps(fast, tokens(2, 71, seed=6))
    monkeypatch.setattr(attend_joint, "_may_look", lambda positions: False)
    assert torch.allclose(by_steps(fast, ids, 20), expected, rtol=1e-9, atol=1e-9)


def test_rows_of_several_blocks_are_refused() -> None:
    fast = optimized(plain("fused"), joining("merged{block=8,keep=1}", plan={1: 0}))
    decoder = fast._generator.built.decoder
    decoder.step_bounds, decoder.chunk = (), 64
    decoder.reset(1)
    with pytest.raises(ValueError, match="positions 0 to 8 of one call are of several blocks of 8"):
        decoder(tokens(1, 9))


@dataclass(frozen=True)
class Mean(JointStore):
    """Both attentions read the mean of their rows."""

    name = "mean"
    summary = "keeps the mean of the rows of all attentions"

    def kept(self, spec: JointRows) -> Kinds:
        return {"rows": ((spec.heads, self.block, spec.width), spec.dtype)}

    def join(self, spec: JointRows, rows: Any, shown: Any, basis: Any) -> Mapping[str, torch.Tensor]:
        return {"rows": rows.mean(0).movedim(2, 1)}

    def part(self, spec: JointRows, kept: Any, member: int, basis: Any) -> torch.Tensor:
        found: torch.Tensor = kept["rows"].movedim(1, 2)
        return found


class MeanPlugin:
    graphopt_api = 1

    @hookimpl
    def graphopt_stores(self) -> Any:
        return (Mean,)


def test_a_plugin_brings_a_method_in_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plugins = plain("fused", layers=3).double(), (MeanPlugin(),)
    step = joining("mean{block=8}", start=0, size=3, plugins=plugins)
    fast = optimized(model, step, plugins=plugins)
    ids = tokens(2, 40, seed=5)
    mean: Joined = lambda what, rows: [torch.stack(rows).mean(0)] * len(rows)  # noqa: E731
    expected = joined_model(model, [0, 1, 2], 8, mean, ids, monkeypatch)
    assert torch.allclose(by_steps(fast, ids, 11), expected[:, 10:], rtol=1e-9, atol=1e-9)
    with pytest.raises(PluginError, match=r"store 'merged' is .*joined_stores.Merged in this process, and"):
        type("Merged", (JointStore,), {"name": "merged"})
    assert joint_store("merged{keep=2}") == store_named("merged{keep=2}", default_host().stores())


@pytest.mark.slow
def test_compiled_steps_give_the_tokens_of_operators() -> None:
    model = plain("fused", layers=2)
    step = joining("merged{block=8,keep=1}", plan={1: 0})
    made = [
        graphopt.optimize(
            model, (tokens(),), generate=graphopt.Generate(ROWS, 2), emit=emit, on_error="raise",
            pipeline=[step],
        ).generate(tokens(2, 20), max_new_tokens=40)
        for emit in ("eager", "inductor")
    ]  # fmt: skip
    assert torch.equal(*made)
