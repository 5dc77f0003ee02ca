"""How much of what a language model lacks to softmax it lacks at AR hits, n-grams that only its context has shown.

With T the scored tokens, H the hits among them and d the difference of the mean loss to the reference's in nats:

    share = d(H) |H| / (d(T) |T|)

1: all of the gap is recall. Above 1: it is better than the reference elsewhere. The paper prints such shares as 100 %.

Source: Arora et al. 2023, https://arxiv.org/abs/2312.04927, section 3 and table 1; the formula as the project's notes
on that paper give it, not confirmed from the paper's text.
"""

from __future__ import annotations

import pandas as pd

HIT, OTHER = "hit", "other"  # values of the slice "recall"
COLUMNS = ["attention", "loss", "hit_loss", "other_loss", "hits", "hit_tokens", "gap", "share", "seeds"]


def recall_gaps(runs: pd.DataFrame, scores: pd.DataFrame, reference: str = "softmax") -> pd.DataFrame:
    """The gap of every mechanism to the reference and the share of AR hits in it, smallest loss first.

    Args:
        runs: run_id, attention, good and chosen, as `Board.runs`; scores: as `Frames.scores`.
        reference: row name of the mechanism that gaps are measured to.

    Returns:
        COLUMNS: mean losses over seeds in nats per token of test, over all, hits and others; hits, their number;
        hit_tokens, their share among tokens; gap; share, missing for the reference, and where there is no gap to
        explain. Empty when the board has no slice "recall" or no hit; gap and share are missing when it has no
        reference.
    """
    chosen = runs.loc[runs["chosen"] & runs["good"], ["run_id", "attention"]]
    parts = scores[(scores["split"] == "test") & (scores["metric"] == "loss") & (scores["slice_key"] == "recall")]
    wide = parts.merge(chosen, on="run_id").pivot_table(
        index=["attention", "run_id"], columns="slice_value", values=["value", "count"]
    )
    if wide.empty or not {HIT, OTHER} <= set(wide["count"]):
        return pd.DataFrame(columns=COLUMNS)
    wide = wide.astype("float64").groupby("attention").mean()
    hits, others = wide["count"][HIT], wide["count"][OTHER]
    table = pd.DataFrame(
        {
            "loss": (wide["value"][HIT] * hits + wide["value"][OTHER] * others) / (hits + others),
            "hit_loss": wide["value"][HIT],
            "other_loss": wide["value"][OTHER],
            "hits": hits,
            "hit_tokens": hits / (hits + others),
            "seeds": chosen.groupby("attention").size().reindex(wide.index),
        }
    )
    base = table.loc[reference] if reference in table.index else pd.Series(dtype="float64")
    table["gap"] = table["loss"] - base.get("loss", float("nan"))
    share = (table["hit_loss"] - base.get("hit_loss", float("nan"))) * table["hit_tokens"] / table["gap"]
    table["share"] = share.where(table["gap"] > 0)
    return table.sort_values("loss").reset_index()[COLUMNS]
