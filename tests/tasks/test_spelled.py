"""Tokens as a reader knows them."""

from __future__ import annotations

import pytest
import torch

from tasks._documents import byte_ids, spelled
from tasks.listops import ListOps
from tasks.lm import LanguageModeling
from tasks.mlm import MaskedLanguageModeling

TEXT = "In the beginning was the word.\nAnd the word was short.\n" * 40
SIZES = dict(min_length=4, max_length=12, max_depth=3, max_args=3, train=8, valid=4, test=8)


def test_bytes_give_each_character_at_its_last_byte():
    assert spelled(byte_ids("naïve", 20).tolist()) == ["n", "a", "", "ï", "v", "e"]
    assert spelled([*byte_ids("ab", 20).tolist(), 0]) == ["a", "b", ""]


@pytest.mark.parametrize("protocol", ["fixed", "lra", "s4"])
def test_an_expression_of_listops_reads_the_same_in_every_protocol(protocol):
    task = ListOps(protocol=protocol, **SIZES)
    row = task.segments("test", 0)[0].inputs[0]
    fixed = ListOps(protocol="fixed", **SIZES)
    text = "".join(task.spelled(row))
    assert text == "".join(fixed.spelled(fixed.segments("test", 0)[0].inputs[0]))
    assert text.startswith(" [") and text.endswith(" ]") and text.count("[") == text.count("]")


@pytest.mark.parametrize(("level", "vocab_size"), [("byte", None), ("char", None), ("bpe", 260)])
def test_the_windows_of_a_text_put_together_are_the_text(tmp_path, level, vocab_size):
    (tmp_path / "text.txt").write_text(TEXT)
    settings = dict(corpus="text", path=str(tmp_path / "text.txt"), level=level, vocab_size=vocab_size, length=8)
    task = LanguageModeling(**settings)
    found = "".join(task.spelled(task.segments("train", 0)[0].inputs.flatten().long()))
    assert found[0] == ">" and len(found) > 100 and TEXT.startswith(found[1:])
    masked = MaskedLanguageModeling(**settings)
    assert masked.spelled(torch.tensor([masked.mask, masked.tokenizer.start])) == ["_", ">"]
