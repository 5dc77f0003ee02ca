"""Linformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, State, repeat_heads
from attentions.dense.softmax import KVCache, Softmax
from attentions.linear._recurrence import masked, wide

SHARING = ("none", "headwise", "key_value")
CHUNK = 64  # most positions of a chunk of the causal form; changes speed only


class Linformer(Softmax):
    """Softmax attention over `rank` learned mixtures of the keys and of the values, whatever the length.

    K' = E K and V' = F V with E, F [k, n] over positions, o_i = softmax(q_i K'^T / sqrt(D)) V'. A sequence shorter than
    n = spec.max_keys uses the first columns; masked positions are left out of both sums. Since both are sums over
    positions, the causal form is a memory that grows by a rank-one term per position,

        K'_t = K'_{t-1} + E_t k_t^T      V'_t = V'_{t-1} + F_t v_t^T      o_t = softmax(q_t K'_t^T / sqrt(D)) V'_t,

    so the state is K' and V'. Columns of positions that training never reached keep their initial values.

    4 M^2 parameters and 2 k n more (half of that with "key_value", G times with "none"): 1.06 of softmax at the paper's
    M = 768, n = 512, k = 128, but 2.0 at M = 32, n = 128, k = 16.

    Args:
        rank: rows k of the projections.
        sharing: "headwise": E and F for all heads; "key_value": one E = F; "none": E_h and F_h per key-value head.
        dropout, bias: as in softmax attention.

    Source: Wang et al. 2020, https://arxiv.org/abs/2006.04768, section 4, eq. 7; first columns and initial values as in
    the attention layer of the authors' code, whose default is "headwise"; their RoBERTa then draws every Linear layer,
    E and F too, from N(0, 0.02^2). Causal form: Peng et al. 2021 (ABC),
    https://arxiv.org/abs/2110.02488.
    Differs: no sharing across layers, since a layer here does not know the others; E and F are no Linear layers, so
    that a backbone that re-initialises those keeps their start; with a bias, keys are mixed after it is added, in that
    code before.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2006.04768"
    complexity = "(T + S) rank"

    def __init__(
        self, spec: LayerSpec, *, rank: int = 256, sharing: str = "headwise", dropout: float = 0.0, bias: bool = False
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if sharing not in SHARING:
            raise ValueError(f"sharing must be one of {', '.join(SHARING)}, got {sharing!r}")
        self.rank = rank
        shape = spec.kv_heads if sharing == "none" else 1, rank, spec.max_keys
        bound = math.sqrt(3 / (rank + spec.max_keys))  # Glorot's with gain 1 / sqrt(2)
        self.key_map = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))  # E
        self.value_map = (
            self.key_map if sharing == "key_value" else nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        )  # F

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            if self.spec.pattern == Pattern.CAUSAL_SELF:
                return self._causal(wide(q), masked(wide(k), key_mask), masked(wide(v), key_mask)).to(q.dtype)
            mixed = self._compress(self.key_map, k, 0, key_mask), self._compress(self.value_map, v, 0, key_mask)
            return self._sdpa(wide(q), *mixed, None, False).to(q.dtype)

    def init_memory(self, batch_size: int, like: Tensor) -> KVCache:
        shape = batch_size, self.rank, self.spec.kv_heads
        return KVCache(k=wide(like.new_zeros(*shape, self.key_dim)), v=wide(like.new_zeros(*shape, self.value_dim)))

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> KVCache:
        assert isinstance(state, KVCache)
        with torch.autocast(k.device.type, enabled=False):
            return KVCache(
                k=state.k + self._compress(self.key_map, k, state.position, key_mask),
                v=state.v + self._compress(self.value_map, v, state.position, key_mask),
                position=state.position + k.shape[1],
            )

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(self.rank)

    def read(self, q: Tensor, state: State) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return super().read(wide(q), state).to(q.dtype)

    def _columns(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """Columns of the projection for these positions: [1 or G, k, stop - start]."""
        if stop > self.spec.max_keys:
            raise ValueError(f"the projections cover max_keys={self.spec.max_keys} positions, got {stop}")
        return wide(weights[..., start:stop])

    def _compress(self, weights: Tensor, heads: Tensor, start: int, key_mask: Tensor | None) -> Tensor:
        """Weighted sums over positions: [B, S, G, D] -> [B, k, G, D]."""
        columns = self._columns(weights, start, start + heads.shape[1])
        return (columns @ masked(wide(heads), key_mask).transpose(1, 2)).transpose(1, 2)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Chunk by chunk: what came before through K' and V', the chunk itself through its own columns."""
        length, heads = q.shape[1], self.spec.num_heads
        maps = [self._columns(weights, 0, length) for weights in (self.key_map, self.value_map)]
        if maps[0].shape[0] > 1:
            maps = [weights.repeat_interleave(heads // weights.shape[0], dim=0) for weights in maps]
        e, f = (_chunks(weights.mT[None]) for weights in maps)  # [1, 1 or H, N, C, k]
        q, k, v = (_chunks(x.transpose(1, 2)) for x in (q, repeat_heads(k, heads), repeat_heads(v, heads)))
        # the order (q k^T) E^T keeps K'_t of every position out of memory
        scores = q @ _before(e.mT @ k).mT + (q @ k.mT).tril() @ e
        weights = (scores / math.sqrt(self.key_dim)).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        output = weights @ _before(f.mT @ v) + (weights @ f.mT).tril() @ v
        return output.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _chunks(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, H, N, C, D], zeros behind the end."""
    num_chunks = math.ceil(x.shape[2] / CHUNK)
    size = math.ceil(x.shape[2] / num_chunks)
    return F.pad(x, (0, 0, 0, num_chunks * size - x.shape[2])).unflatten(2, (num_chunks, size))


def _before(added: Tensor) -> Tensor:
    """From what each chunk adds [B, H, N, k, D], the sum before each."""
    return F.pad(added.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]
