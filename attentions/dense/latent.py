"""Multi-head latent attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import LayerSpec, State
from attentions.dense.softmax import KVCache, Softmax


class Latent(Softmax):
    """Softmax attention whose keys and values are projected from one latent per position, which is all it caches (MLA).

        c = RMSNorm(W_DKV x)                               the latent, width d_c, one for all heads
        k_h = [W_UK_h c ; k^R],  v_h = W_UV_h c            k^R = RoPE(W_KR x), width d_R, one for all heads
        q_h = [W_UQ_h c^Q ; RoPE(W_QR_h c^Q)]              c^Q = RMSNorm(W_DQ x), or x itself
        output = W_o concat(softmax(q_h k_h^T / sqrt(D + d_R)) v_h)

    All positions at once: keys and values are projected up and meet in SDPA. Decoding: W_UK moves into the query,
    q^T (W_UK c) = (W_UK^T q)^T c, and W_UV behind the read, so a step is multi-query attention over [c ; k^R] and the
    state holds d_c + d_R numbers per position (softmax attention: 2 H D). The rotary part, which cannot be moved so,
    exists only where the backbone rotates (`spec.rotary_base`, self-attention); else d_R = 0 and the scale sqrt(D).
    Parameters at kv_ratio 1, in softmax attention's: (2 + 3 / H) / 4, with rotary (2.5 + 3.5 / H) / 4, and the norms.
    Grouped heads share the up-projections of their key-value head; the state stays as it is.

    Args:
        kv_ratio: width of the latent over that of a head, d_c / D.
        q_ratio: the same of the queries' latent; None: queries are projected from x.
        rotary_ratio: d_R / D, of which d_R is the even number below, at least 2.
        dropout: probability of dropping an attention weight in training.

    Source: DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434, section 2.1, eqs. 9 to 19; norms on the latents: section
    3.1.2, eps as in transformers' DeepseekV2Attention. Differs: no scaling factors on the latents, which section 3.1.2
    names without values (that code has none either); W_UV is applied after the read, where the paper merges it with
    W_o (equal, and H d_c D numbers instead of H d_c M); rotary pairs are the backbone's (a permutation of that code's);
    without rotary positions there is no rotary part; noncausal, cross and grouped forms are ours.
    """

    paper = "https://arxiv.org/abs/2405.04434"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        kv_ratio: float = 4.0,
        q_ratio: float | None = None,
        rotary_ratio: float = 0.5,
        dropout: float = 0.0,
    ):
        for name, ratio in (("kv_ratio", kv_ratio), ("q_ratio", q_ratio), ("rotary_ratio", rotary_ratio)):
            if ratio is not None and ratio <= 0:
                raise ValueError(
                    f"{name} must be above 0, got {ratio}; nearest: {1 / spec.head_dim:.2g} (a width of 1)"
                )
        super().__init__(spec, dropout=dropout)
        rotated = spec.rotary_base is not None and not spec.cross
        width = spec.head_dim
        self.latent_dim = max(1, round(kv_ratio * width))  # d_c
        self.rotary_dim = max(2, int(rotary_ratio * width) // 2 * 2) if rotated else 0  # d_h^R
        self.key_dim = width + self.rotary_dim
        query_dim = spec.dim if q_ratio is None else max(1, round(q_ratio * width))  # d_c'
        self.q_latent = nn.Identity() if q_ratio is None else Compression(spec.dim, query_dim)
        self.q_proj = nn.Linear(query_dim, spec.num_heads * self.key_dim, bias=False)  # W_UQ and W_QR
        self.kv_latent = Compression(spec.dim, self.latent_dim)
        self.rotary_proj = nn.Linear(spec.dim, self.rotary_dim, bias=False) if rotated else None  # W_KR
        self.k_proj = nn.Linear(self.latent_dim, spec.kv_heads * width, bias=False)  # W_UK
        self.v_proj = nn.Linear(self.latent_dim, spec.kv_heads * width, bias=False)  # W_UV

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        q = self.q_proj(self.q_latent(x)).unflatten(-1, (self.spec.num_heads, self.key_dim))
        content, turned = q.split([self.spec.head_dim, self.rotary_dim], dim=-1)
        return torch.cat([content, self._rotate(turned, start)], dim=-1)

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """What is written: [c ; k^R] as the one key [B, S, 1, d_c + d_R] of all heads, c as the one value."""
        latent = self.kv_latent(source)[:, :, None]
        if self.rotary_proj is None:
            return latent, latent
        return torch.cat([latent, self._rotate(self.rotary_proj(source)[:, :, None], start)], dim=-1), latent

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        latent, turned = k[:, :, 0].split([self.latent_dim, self.rotary_dim], dim=-1)
        groups = self.spec.kv_heads
        content, values = self.k_proj(latent), self.v_proj(v[:, :, 0])
        turned = turned[:, :, None].expand(-1, -1, groups, -1)
        keys = torch.cat([content.unflatten(-1, (groups, -1)), turned], dim=-1)
        return super().attend(q, keys, values.unflatten(-1, (groups, -1)), key_mask=key_mask)

    def init_memory(self, batch_size: int, like: Tensor) -> KVCache:
        empty = like.new_empty(batch_size, 0, 1, self.latent_dim + self.rotary_dim)
        return KVCache(k=empty, v=empty[..., :0])

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> KVCache:
        return super().update(state, k, v[..., :0], key_mask=key_mask)  # the value is a part of the key

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, KVCache)
        content, turned = q.split([self.spec.head_dim, self.rotary_dim], dim=-1)
        absorbed = torch.einsum("bthd,hdc->bthc", content, self._by_head(self.k_proj))
        query = torch.cat([absorbed, turned], dim=-1)
        query = query * math.sqrt(query.shape[-1] / self.key_dim)  # SDPA divides by the root of the latent's width
        visible = None if state.mask is None else state.mask[:, None, None, :]
        read = self._sdpa(query, state.k, state.k[..., : self.latent_dim], visible, False)
        return torch.einsum("bthc,hdc->bthd", read, self._by_head(self.v_proj))

    def _by_head(self, projection: nn.Linear) -> Tensor:
        """The up-projection of each query head: [H, D, d_c]."""
        weight = projection.weight.unflatten(0, (self.spec.kv_heads, -1))
        return weight.repeat_interleave(self.spec.num_heads // self.spec.kv_heads, dim=0)

    def state_bytes(self, length: int) -> int:
        return 4 * length * (self.latent_dim + self.rotary_dim)


class Compression(nn.Module):
    """RMSNorm(W x): [..., M] -> [..., rank]."""

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down_proj = nn.Linear(dim, rank, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(rank))

    def forward(self, x: Tensor) -> Tensor:
        latent = self.down_proj(x)
        return F.rms_norm(latent, latent.shape[-1:], self.norm_weight.to(latent.dtype), eps=1e-6)
