"""Windows of a text in the place of example ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt import InputsError
from graphopt.text_batches import encoder_of, text_batches

TEXT = "".join(chr(97 + number % 26) for number in range(100))


def letters(text: str) -> list[int]:
    return [ord(letter) - 97 for letter in text]


def test_windows_do_not_overlap_and_reach_over_the_whole_text() -> None:
    example = torch.zeros(2, 8, dtype=torch.int64)
    found = text_batches((example,), TEXT, letters)
    assert len(found) == 6 and all(len(batch) == 1 and batch[0].shape == (2, 8) for batch in found)
    ids = torch.tensor(letters(TEXT))
    rows = torch.cat([batch[0] for batch in found])
    assert torch.equal(rows[0], ids[:8]) and torch.equal(rows[-1], ids[-8:])
    few = text_batches((example,), TEXT, letters, tokens=40)
    assert len(few) == 2
    assert torch.equal(few[-1][0][-1], ids[-8:])
    assert len(text_batches((example,), TEXT, letters, tokens=1)) == 1


def test_labels_follow_ids_and_masks_stay() -> None:
    inputs = {
        "input_ids": torch.zeros(1, 10, dtype=torch.int64),
        "attention_mask": torch.ones(1, 10, dtype=torch.int64),
        "labels": torch.full((1, 10), -100),
        "scale": 2.0,
    }
    found = text_batches(inputs, TEXT, letters)
    assert len(found) == 10
    for batch in found:
        assert list(batch) == list(inputs)
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["attention_mask"] is inputs["attention_mask"] and batch["scale"] == 2.0
    other = {"tokens": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(text_batches(other, TEXT, letters)[0]["tokens"][0], torch.arange(10))


def test_bad_input_is_named() -> None:
    ids = torch.zeros(2, 60, dtype=torch.int64)
    with pytest.raises(
        InputsError, match="the text has 100 ids; one batch like the example inputs takes 2 x 60"
    ):
        text_batches((ids,), TEXT, letters)
    for inputs, count in (((torch.ones(2, 3),), 0), ((ids, ids), 2)):
        with pytest.raises(InputsError, match=f"hold {count} int64 tensors of two dimensions"):
            text_batches(inputs, TEXT, letters)
    with pytest.raises(InputsError, match=r"a tokenizer is a function or has encode\(\), got int"):
        encoder_of(3)
    with pytest.raises(InputsError, match="the tokenizer gives str: expected a list of ids"):
        encoder_of(lambda text: text)("abc")


def test_tokenizers_of_several_kinds_are_taken() -> None:
    class Encoding:
        ids = [1, 2]

    def tokenizer(result: Any) -> Any:
        class Tokenizer:
            def encode(self, text: str) -> Any:
                return result

        return Tokenizer()

    for made in (
        tokenizer([1, 2]),
        tokenizer(Encoding()),
        tokenizer(torch.tensor([[1, 2]])),
        lambda text: (1, 2),
    ):
        assert encoder_of(made)("") == [1, 2]
