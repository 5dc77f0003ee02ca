"""The recurrence under every linear mechanism, and the layer that its members fill in.

    S_t = exp(g_t) S_{t-1} + k_t u_t^T      o_t = S_t^T q_t      per head, S [K, V]
    u_t = v_t                                                    linear attention
    u_t = beta_t (v_t - (exp(g_t) S_{t-1})^T k_t)                the delta rule

The log decay g_t <= 0 is one number per head or one per key channel, or absent. `scan` gives every o_t at once,
chunk by chunk; `write` moves S over any number of positions. A member computes q, k, v, g and beta, no more.

Source: the chunked form is that of Yang et al. 2023, https://arxiv.org/abs/2312.06635, section 4; with the delta
rule Yang et al. 2024, https://arxiv.org/abs/2406.06484, section 3, and 2024b, https://arxiv.org/abs/2412.06464,
section 3.3. Differs: decays enter as exp(g_i - g_j) with i >= j only, so nothing can overflow, where the papers
divide by a cumulative product; chunks follow from the length, so that little is padded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attentions.base import LayerSpec, Pattern, QKVAttention, State, repeat_heads

# -- the recurrence -------------------------------------------------------------------------------


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    chunk_size: int = 64,
    features: Callable[[Tensor], Tensor] | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Every output of a causal sequence, from an empty memory.

    Args:
        q, k: [B, T, H, K], or [B, T, 1, K] where all heads share them; v: [B, T, H, V].
        log_decay: [B, T, H] or [B, T, H, K], at most 0.
        beta: write strength of the delta rule, [B, T, H].
        chunk_size: most positions of a chunk; the result does not depend on it.
        features: feature map of q and k.
        score: f with f(q.k) = features(q).features(k), where that is cheaper inside a chunk; no decay, no beta.

    Returns:
        [B, T, H, V].
    """
    length = q.shape[1]
    num_chunks = math.ceil(length / chunk_size)
    q, k, v, g, b = (chunked(x, num_chunks) for x in (q, k, v, log_decay, beta))
    g = None if g is None else g.cumsum(-2)
    if score is not None:
        scores = score(q @ k.mT).tril()
    if features is not None and (score is None or num_chunks > 1):
        q, k = features(q), features(k)
    if score is None:
        scores = _scores(q, k, g)
    u, w = (v, None) if b is None else _solve(k, v, g, b)
    output = scores @ u
    if num_chunks > 1:
        query = q if g is None else q * g.exp()
        if w is not None:
            query = query - scores @ w
        empty = k.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
        before = memories(empty, k, u, w, g)[:-1]
        output = output + query @ torch.stack(before, dim=2)
    return output.flatten(2, 3)[:, :, :length].transpose(1, 2)


def write(
    memory: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """The memory [B, H, K, V] after S further positions; arguments as in `scan`."""
    num_chunks = 1 if beta is None else math.ceil(k.shape[1] / chunk_size)
    k, v, g, b = (chunked(x, num_chunks) for x in (k, v, log_decay, beta))
    g = None if g is None else g.cumsum(-2)
    u, w = (v, None) if b is None else _solve(k, v, g, b)
    return memories(memory, k, u, w, g)[-1]


def chunked(x, num_chunks: int):
    """[B, T, H] or [B, T, H, D] -> [B, H, N, C, 1 or D], zeros behind the end: they write nothing and decay nothing."""
    if x is None:
        return None
    x = x[..., None] if x.dim() == 3 else x
    size = math.ceil(x.shape[1] / num_chunks)
    if num_chunks * size > x.shape[1]:
        x = F.pad(x, (0, 0, 0, 0, 0, num_chunks * size - x.shape[1]))
    return x.transpose(1, 2).unflatten(2, (num_chunks, size))


def _scores(q: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    """sum_c q_ic k_jc exp(g_ic - g_jc) for j <= i, else 0: [..., C, C]; g [..., C, 1 or K], cumulative."""
    if g is None:
        return (q @ k.mT).tril()
    future = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device).triu(1)
    if g.shape[-1] == 1:  # masked before exp: a future difference is positive and may overflow
        return (q @ k.mT) * (g - g.mT).masked_fill(future, -math.inf).exp()
    decay = (g[..., :, None, :] - g[..., None, :, :]).masked_fill(future[..., None], -math.inf).exp()
    return (q[..., :, None, :] * decay * k[..., None, :, :]).sum(-1)


def _solve(k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor) -> tuple[Tensor, Tensor]:
    """u = u_0 - w S, what the delta rule writes in a chunk that starts with memory S: u_0 [..., C, V], w [..., C, K].

    (I + A) u = beta (v - exp(g) k S) with A_ij = beta_i k_i.k_j exp(g_i - g_j), j < i: the papers' UT transform.
    """
    right = beta * torch.cat([v, k if g is None else k * g.exp()], dim=-1)
    if k.shape[-2] > 1:
        strict = (beta * _scores(k, k, g)).tril(-1)
        right = torch.linalg.solve_triangular(strict, right, upper=False, unitriangular=True)
    u, w = right.split([v.shape[-1], k.shape[-1]], dim=-1)
    return u, w


def memories(memory: Tensor, k: Tensor, u: Tensor, w: Tensor | None, g: Tensor | None) -> list[Tensor]:
    """The memory [B, H, K, V] before each chunk and after the last."""
    keep = None
    if g is not None:
        k = k * (g[..., -1:, :] - g).exp()
        keep = g[..., -1, :, None].exp()  # [B, H, N, 1 or K, 1]
    added = k.mT @ u
    erased = None if w is None else k.mT @ w
    passed = [memory]
    for n in range(k.shape[2]):
        new = added[:, :, n] + (memory if keep is None else memory * keep[:, :, n])
        memory = new if erased is None else new - erased[:, :, n] @ memory
        passed.append(memory)
    return passed


# -- the layer ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Memory(State):
    """What a linear mechanism remembers: S [B, G, F, V] (V + 1 with a normaliser), float32 or the module's float64."""

    memory: Tensor


class Recurrent(QKVAttention):
    """A mechanism whose whole memory is one matrix per key-value head.

    A member says how q and k become features and which `terms` travel with them: `log_decay` [G] (fixed), [B, S, G]
    or [B, S, G, K], and `beta` [B, S, G]. Grouped heads share a memory, hence also its terms. A masked position
    writes nothing, and a decay that depends on its content is skipped; a fixed decay counts positions and goes on.

    Noncausal self-attention of an `ordered` member is bidirectional: the causal recurrence runs over the sequence from
    either end with the same weights, and the two outputs are averaged. In cross-attention the context is written in
    its order, once, and every query reads the memory at its end.

    Class attributes:
        normalised: divide by the summed features, phi(q).sum phi(k).
        ordered: what is remembered depends on the order of writing (decay, delta rule); else it is one sum.
        chunk_size: most positions of a chunk; changes speed only.
    """

    patterns = Pattern.ALL
    complexity = "T"
    normalised: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    chunk_size: int = 64

    def features(self, heads: Tensor) -> Tensor:
        """phi: [..., K] -> [..., F]; the identity unless overridden."""
        return heads

    score: ClassVar[Callable[..., Tensor] | None] = None  # phi(q).phi(k) as a function of q.k, where there is one

    def heads(
        self, x: Tensor, source: Tensor, key_mask: Tensor | None, backward: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v; `backward`: for the run from the end, which matters where neighbours enter them."""
        return self.query(x), *self.key_value(source)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        source = self._source(x, context)
        terms = self.terms(source)
        heads = self.attend(*self.heads(x, source, key_mask), key_mask=key_mask, **terms)
        if self.ordered and self.spec.pattern == Pattern.NONCAUSAL_SELF:
            q, k, v = (y.flip(1) for y in self.heads(x, source, key_mask, backward=True))
            terms = {name: y if y.dim() == 1 else y.flip(1) for name, y in terms.items()}  # a fixed decay has no order
            mask = None if key_mask is None else key_mask.flip(1)
            heads = (heads + self.attend(q, k, v, key_mask=mask, **terms).flip(1)) / 2
        return self.merge(x, heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        k, v, terms = self._prepare(k, v, key_mask, terms)
        with torch.autocast(q.device.type, enabled=False):
            if self.spec.cross or not (self.spec.causal or self.ordered):
                empty = self.empty_memory(k.shape[0], k)
                return self._read(q, write(empty, self.features(k), v, chunk_size=self.chunk_size, **terms))
            k, v = (repeat_heads(x, self.spec.num_heads) for x in (k, v))
            terms = {name: repeat_heads(x, self.spec.num_heads) for name, x in terms.items()}
            forms: dict[str, Any] = {"features": self.features, "score": self.score, **terms}
            heads = scan(wide(q), k, v, chunk_size=self.chunk_size, **forms)
            return self._normalise(heads).to(q.dtype)

    def init_memory(self, batch_size: int, like: Tensor) -> State:
        return Memory(memory=self.empty_memory(batch_size, like))

    def empty_memory(self, batch_size: int, like: Tensor) -> Tensor:
        """Zeros [B, G, F, V], V + 1 with a normaliser."""
        feature_dim = self.features(like.new_zeros(1, self.key_dim)).shape[-1]
        shape = batch_size, self.spec.kv_heads, feature_dim, self.value_dim + self.normalised
        return wide(like.new_zeros(shape))

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> State:
        assert isinstance(state, Memory)
        k, v, terms = self._prepare(k, v, key_mask, terms)
        with torch.autocast(k.device.type, enabled=False):
            memory = write(state.memory, self.features(k), v, chunk_size=self.chunk_size, **terms)
        return dataclasses.replace(state, memory=memory, position=state.position + k.shape[1])

    def state_bytes(self, length: int) -> int:
        return 4 * self.empty_memory(1, self.out_proj.weight).numel()

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, Memory)
        with torch.autocast(q.device.type, enabled=False):
            return self._read(q, state.memory)

    def _read(self, q: Tensor, memory: Tensor) -> Tensor:
        memory = memory.repeat_interleave(self.spec.num_heads // self.spec.kv_heads, dim=1)
        return self._normalise((self.features(wide(q)).transpose(1, 2) @ memory).transpose(1, 2)).to(q.dtype)

    def _normalise(self, heads: Tensor) -> Tensor:
        if not self.normalised:
            return heads
        return heads[..., :-1] / heads[..., -1:].clamp_min(1e-12)  # nothing written: 0 / 1e-12

    def _prepare(
        self, k: Tensor, v: Tensor, key_mask: Tensor | None, terms: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """In the memory's precision, with the normaliser's column of ones, and zero where masked."""
        if self.normalised:
            v = F.pad(v, (0, 1), value=1.0)
        terms = {
            name: wide(x).expand(*k.shape[:2], -1) if x.dim() == 1 else masked(wide(x), key_mask)
            for name, x in terms.items()
        }
        return masked(wide(k), key_mask), masked(wide(v), key_mask), terms


def width(spec: LayerSpec, expand: float) -> int:
    """Width of one head: `expand` times M / H, rounded down, at least 1."""
    return max(1, int(expand * spec.head_dim))


def step_bias(count: int) -> Tensor:
    """b [count] with softplus(b) log-uniform in [0.001, 0.1]: how Mamba-2 and its heirs start the step of a decay."""
    step = torch.exp(math.log(0.001) + math.log(100) * torch.rand(count))
    return step + torch.log(-torch.expm1(-step))


def wide(x: Tensor) -> Tensor:
    """At least float32: sums over thousands of positions drift in bf16."""
    return x if x.dtype == torch.float64 else x.float()


def masked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """x [B, S, ...] with zeros where key_mask [B, S] is False, whatever stood there."""
    return x if key_mask is None else x.masked_fill(~key_mask[(...,) + (None,) * (x.dim() - 2)], 0.0)
