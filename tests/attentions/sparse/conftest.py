"""The oracle of mechanisms that choose keys: softmax over the keys that a function allows, query by query."""

import math

import pytest
import torch


@pytest.fixture
def softmax_over():
    """softmax_over(layer, x, source, allowed): allowed(b, h, t, queries, keys) gives the key positions of a query.

    queries [B, T, H, K] and keys [B, S, G, K] are there for rules that look at the contents.
    """

    def attention(layer, x, source, allowed):
        spec = layer.spec
        q = (x @ layer.q_proj.weight.T).unflatten(-1, (spec.num_heads, -1))
        k = (source @ layer.k_proj.weight.T).unflatten(-1, (spec.kv_heads, -1))
        v = (source @ layer.v_proj.weight.T).unflatten(-1, (spec.kv_heads, -1))
        rows = []
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                heads = []
                for h in range(spec.num_heads):
                    g, keys = h * spec.kv_heads // spec.num_heads, allowed(b, h, t, q, k)
                    weights = torch.exp(k[b, keys, g] @ q[b, t, h] / math.sqrt(q.shape[-1]))
                    read = weights @ v[b, keys, g]
                    heads.append(read / weights.sum() if keys else read)  # an empty sum reads zero
                rows.append(layer.out_proj.weight @ torch.cat(heads))
        return torch.stack(rows).view_as(x)

    return attention
