"""Two sources that no hub has, and their rows, for tests of local copies and of fetching."""

from tasks._origins import Hub

ROWS = {
    "train": {"text": ['a "quoted" tab\there', "NA", "", "two\nlines"], "label": [0, 1, 1, 0]},
    "valid": {"text": ["café", "null"], "label": [1, 0]},
    "test": {"text": ["c", "d", "e"], "label": [0, 0, 1]},
}
REVIEWS = Hub(
    repository="o/reviews", revision="r", splits={"train": "train", "valid": "dev", "test": "test"}, num_bytes=1
)
PAIRS = Hub(
    repository="o/pairs",
    revision="r",
    files={"train": "d/pairs.train.tsv", "valid": "d/pairs.eval.tsv", "test": "d/pairs.test.tsv"},
    options={"delimiter": "\t", "quoting": 3, "column_names": ["text", "label"]},
    num_bytes=1,
)
