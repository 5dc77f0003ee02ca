"""Softmax attention with fewer key-value heads than query heads: one (multi-query) or one per group (grouped-query)."""

from __future__ import annotations

import dataclasses

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax


class GroupedQuery(Softmax):
    """Softmax attention in which `queries_per_kv` query heads share a key-value head, whatever the backbone's number.

    G = H / queries_per_kv key-value heads: the state holds G / H of softmax attention's bytes, the layer
    2 M^2 (1 + G / H) parameters. Where queries_per_kv does not divide H it rises to the next divisor, at most H, so
    the state is never larger than asked for: H = 6 and 4 give one group of 6; H = 2 and 2 or more are multi-query.

    Args:
        queries_per_kv: query heads H / G that share a key-value head, at least 1; 1 is softmax attention.
        dropout, bias: as in softmax attention.

    Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245, section 2.2 (T5 XXL: H = 64, G = 8). Differs: trained
    from the start, where the paper averages the heads of a trained model and trains on; the rounding is ours.
    """

    paper = "https://arxiv.org/abs/2305.13245"

    def __init__(self, spec: LayerSpec, *, queries_per_kv: int, dropout: float = 0.0, bias: bool = False):
        if queries_per_kv < 1:
            raise ValueError(f"queries_per_kv must be at least 1, got {queries_per_kv}; nearest: 1")
        heads = spec.num_heads
        shared = next(n for n in range(min(queries_per_kv, heads), heads + 1) if heads % n == 0)
        super().__init__(dataclasses.replace(spec, num_kv_heads=heads // shared), dropout=dropout, bias=bias)


class MultiQuery(GroupedQuery):
    """Softmax attention whose query heads all read one key-value head: G = 1.

    The state is H times smaller than softmax attention's, the layer has 2 M^2 (1 + 1 / H) parameters.

    Args:
        dropout, bias: as in softmax attention.

    Source: Shazeer 2019, https://arxiv.org/abs/1911.02150, section 3.
    """

    paper = "https://arxiv.org/abs/1911.02150"

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, queries_per_kv=spec.num_heads, dropout=dropout, bias=bias)
