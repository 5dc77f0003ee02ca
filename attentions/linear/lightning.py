"""Lightning attention: linear attention with a fixed decay, by chunks (2) or by tiles of scores (1)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attentions.base import LayerSpec, repeat_heads
from attentions.linear._recurrence import Recurrent, chunked, scan, wide

DECAYS = ("paper", "repo", "fla", "none")
SCHEDULES = ("chunk", "tiled")


class LightningAttention(Recurrent):
    """O = Norm([(Q K^T) * M] V), M_ij = lambda^(i - j) for j <= i: no softmax, no scale, no denominator, but a norm.

    lambda is fixed, one per key-value head. The norm is x / rms(x) over all heads together, without a weight. Two
    schedules compute the same function: `chunk` (Lightning-2) multiplies scores inside a chunk and reads the memory
    S = lambda S + k v^T between chunks, linear in T; `tiled` (Lightning-1) forms all scores, a tile at a time and anew
    in the backward pass, so that no T x T matrix is ever held. Decoding is the recurrence in either case.

    Noncausal self-attention has M_ij = lambda^|i - j|: the runs from both ends, added, less the diagonal that both
    count; without decay that is Q (K^T V). In cross-attention queries and context have no distance, so nothing decays.

    Args:
        decay: -log lambda of head h of H in layer l of L, both from 0. `repo`: slope_h (1 - l / (L - 1) + 1e-5) with
            ALiBi's slopes 2^(-8 (h + 1) / H); `paper`: 8 (h + 1) / H (1 - l / L); `fla`: 8 h / H (1 - l / L), so that
            head 0 keeps all; `none`: 0.
        schedule: chunk or tiled.

    Source: Qin et al. 2024, https://arxiv.org/abs/2405.17381, eqs. 1 to 8 and 10. Lightning-2 by that name is Qin et
    al. 2024, https://arxiv.org/abs/2401.04658, eqs. 1 to 10 and algorithm 1; by its account Lightning-1, Qin et al.
    2023, https://arxiv.org/abs/2307.14995, adds up blocks of scores at quadratic cost. `repo` is the rule of the
    released TransNormerLLM models, `fla` that of flash-linear-attention's operator, which also scales scores by
    1 / sqrt(K) unless told not to. Differs: eq. 10 does not say where h and l start; with L = 1 the repo's rule divides
    by zero, here l / (L - 1) is then 0; with grouped heads H counts key-value heads; noncausal and cross forms are
    ours. Rotary positions of the backbone turn q and k. The activation and the gate of the paper's layer are in the row
    `transnormer`.
    """

    paper = "https://arxiv.org/abs/2401.04658"
    complexity = "T, tiled: T^2"

    def __init__(self, spec: LayerSpec, *, decay: str = "repo", schedule: str = "chunk"):
        super().__init__(spec)
        for name, word, words in (("decay", decay, DECAYS), ("schedule", schedule, SCHEDULES)):
            if word not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {word}")
        self.schedule = schedule
        self.log_decays = log_decays(decay, spec.kv_heads, spec.layer, spec.num_layers)

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return wide(super().query(x, start))  # until the norm: sums without a denominator leave float16's range

    def terms(self, source: Tensor) -> dict[str, Tensor]:
        if self.spec.cross or not any(self.log_decays):
            return {}
        return {"log_decay": torch.tensor(self.log_decays, dtype=wide(source).dtype, device=source.device)}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        if self.spec.cross or not (self.spec.causal or terms):
            return super().attend(q, k, v, key_mask=key_mask, **terms)
        k, v, _ = self._prepare(k, v, key_mask, {})
        k, v = (repeat_heads(x, self.spec.num_heads) for x in (k, v))
        log_decay = terms["log_decay"] if terms else k.new_zeros(self.spec.kv_heads)
        log_decay = log_decay.repeat_interleave(self.spec.num_heads // self.spec.kv_heads)
        with torch.autocast(q.device.type, enabled=False):
            heads = self._run(q, k, v, log_decay)
            if not self.spec.causal:
                backward = self._run(q.flip(1), k.flip(1), v.flip(1), log_decay).flip(1)
                heads = heads + backward - (q * k).sum(-1, keepdim=True) * v
        return heads

    def _run(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        if self.schedule == "tiled":
            return tiled(q, k, v, log_decay, tile_size=self.chunk_size)
        return scan(q, k, v, log_decay=log_decay.expand(*q.shape[:2], -1), chunk_size=self.chunk_size)

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj(self.normed(heads).to(self.out_proj.weight.dtype))

    def normed(self, heads: Tensor) -> Tensor:
        """[B, T, H, V] -> [B, T, H V], divided by the root mean square over all heads."""
        return F.rms_norm(heads.flatten(2), (heads.shape[-2] * heads.shape[-1],), eps=1e-6)


def log_decays(kind: str, num_heads: int, layer: int, num_layers: int) -> tuple[float, ...]:
    """log lambda of every head, at most 0; see `LightningAttention`."""
    if kind == "none":
        return (0.0,) * num_heads
    if kind == "repo":
        depth = 1 - layer / max(1, num_layers - 1) + 1e-5
        return tuple(-slope * depth for slope in alibi_slopes(num_heads))
    first = 1 if kind == "paper" else 0
    return tuple(-8 * (h + first) / num_heads * (1 - layer / num_layers) for h in range(num_heads))


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8 h / H), h = 1 .. H, for a power of two; else those of the next lower one, then every second of its double.

    Source: Press et al. 2021, https://arxiv.org/abs/2108.12409, and the authors' code for other numbers of heads.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return slopes + [2 ** (-8 * (h + 0.5) / power) for h in range(num_heads - power)]


def tiled(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, tile_size: int) -> Tensor:
    """[(Q K^T) * M] V from tiles of scores, one diagonal of tiles at a time, formed again for the gradient.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V]; log_decay: [H], at most 0.
        tile_size: most positions of a tile's side; the result does not depend on it.

    Returns:
        [B, T, H, V].
    """
    length = q.shape[1]
    num_tiles = math.ceil(length / tile_size)
    q, k, v = (chunked(x, num_tiles) for x in (q, k, v))  # [B, H, N, C, D]
    place = torch.arange(q.shape[3], device=q.device)
    output = torch.zeros_like(v)
    for behind in range(num_tiles):  # keys so many tiles behind the queries
        distance = behind * len(place) + place[:, None] - place
        decay = (log_decay[:, None, None] * distance).masked_fill(distance < 0, -math.inf).exp()[:, None]
        parts = q[:, :, behind:], k[:, :, : num_tiles - behind], v[:, :, : num_tiles - behind]
        read = checkpoint(_tile, *parts, decay, use_reentrant=False, preserve_rng_state=False)
        output = output + F.pad(read, (0, 0, 0, 0, behind, 0))
    return output.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _tile(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return ((q @ k.mT) * decay) @ v
