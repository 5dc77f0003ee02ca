"""Core-context-aware attention: the latest positions directly, groups of earlier ones as one core each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attentions.base import LayerSpec, Pattern, State, repeat_heads
from attentions.linear._recurrence import wide
from attentions.lowrank._blocks import segments, tiles
from attentions.lowrank._coarse import Pooling, cut, highest, known
from attentions.sparse._selection import masked_softmax

POOLS = "attention", "mean", "max"


@dataclass(kw_only=True)
class CCAState(State):
    """Cores of complete groups, keys and values [B, N, H or G, D], and the positions that are read directly, k and v
    [B, n, G, D], with n from s to s + g - 1 once there are s. `seen` [B, N]: cores of a masked context with a position.
    """

    cores: tuple[Tensor, ...]
    k: Tensor
    v: Tensor
    seen: Tensor | None = None


class CCA(Pooling):
    """One softmax over the s latest positions and over a core for each group of g positions before them.

    The core of a group is the mean of its keys, and of its values, under what the last query of the group gives them:
    pi = softmax_j(q_last . k_j / sqrt(K)), for each query head. With i positions up to the query, its own included,
    the first floor((i - s) / g) groups are cores and all later positions are read directly: each position once. With
    s >= T or g = 1 it is softmax attention.

    Noncausal: groups that meet the positions i - s / 2 ... i + s / 2 are read directly, the others as cores, the last
    one too if it is short; of windows, s >= 2 T is softmax attention. Cross: every group of the context is a core,
    pooled by the query projection of the context.

    No parameters beside softmax attention's. Decoding keeps the cores of complete groups and s to s + g - 1 positions.

    Args:
        group_size: positions g in a group.
        window: positions s that are read directly at the least, own included.
        pool: "attention" as above; "mean" and "max", of keys and of values, are the paper's ablations.
        dropout: of the weights, in training.
        bias: bias on the four projections.

    Source: Chen et al. 2024, https://arxiv.org/abs/2412.12465, after the authors' code (section and equation numbers
    not confirmed from the paper's text): g = 16, s = 1024.
    Differs: as in that code and not in the paper, rotated keys and values are pooled in place of the inputs of their
    projections (equal without rotary positions), and no position is both in a core and read directly (where the
    paper's window starts, one may be). The code for Qwen2, with a number of cores that depends on the whole length, is
    not followed. The noncausal and cross forms are ours. A group's last unmasked query pools its unmasked positions.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2412.12465"
    complexity = "T (window + S / group_size)"
    full_budget = staticmethod(lambda length: {"group_size": 1})

    def __init__(
        self,
        spec: LayerSpec,
        *,
        group_size: int = 16,
        window: int = 1024,
        pool: str = "attention",
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(spec, dropout=dropout, bias=bias)
        for name, value in (("group_size", group_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool}")
        self.group_size, self.window, self.pool = group_size, window, pool
        self.core_heads = spec.num_heads if pool == "attention" else spec.kv_heads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        length, size = q.shape[1], self.group_size
        *cores, seen = self._all_cores(terms.get("own", q), k, v, key_mask)
        with torch.autocast(q.device.type, enabled=False):
            core_k, core_v = (self._heads(x) for x in cores)
            scaled = self._heads(q * self.key_dim**-0.5)
            if self.spec.cross:
                heads = self._weights(scaled @ core_k.mT, seen[:, :, None]) @ core_v
                return heads.transpose(1, 2).to(q.dtype)

            # blocks of queries of about a window, in whole groups; the groups first ... last of each place in a block,
            # counted from the first group of the block, are read directly
            behind, ahead = (self.window - 1, 0) if self.spec.causal else (self.window // 2, self.window // 2)
            count = seen.shape[2]
            before, after = (min(-(-reach // size), count) for reach in (behind, ahead))
            block = max(1, before) * size
            place = torch.arange(block, device=q.device)[:, None]
            first, last = (place - behind) // size, (place + ahead) // size
            around = block, before * size, after * size
            near_k, near_v = (tiles(self._heads(x), *around) for x in (k, v))
            key = torch.arange(-before * size, block + after * size, device=q.device)  # its place
            direct = (first <= key // size) & (key // size <= last)
            scaled = segments(scaled, block)
            start = torch.arange(scaled.shape[2], device=q.device)[:, None, None] * (block // size)
            group = torch.arange(count, device=q.device) - start
            pooled = group < first
            if self.spec.causal:
                direct = direct & (key <= place)
            else:
                pooled = pooled | (group > last)
            near_seen = tiles(known(k, key_mask)[..., None], *around) & direct
            far_seen = seen[:, :, None, None] & pooled
            scores = torch.cat([scaled @ near_k, scaled @ core_k[:, :, None].mT], dim=-1)
            weights = self._weights(scores, torch.cat([near_seen, far_seen], dim=-1))
            near, far = weights.split([near_k.shape[-1], count], dim=-1)
            heads = (near @ near_v.mT + far @ core_v[:, :, None]).flatten(2, 3)[:, :, :length]
            return heads.transpose(1, 2).to(q.dtype)

    def _all_cores(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, ...]:
        """Cores of all groups, the last perhaps short: keys and values [B, N, H or G, D], and `seen` [B or 1, 1, N].

        Args:
            q: [B, S, H, K], of the positions of k and v.
        """
        seen = cut(known(k, key_mask), self.group_size)
        place = torch.arange(self.group_size, device=q.device)
        last = (seen * place).amax(-1)[..., None, None]  # place of the last unmasked position
        queries = segments(self._heads(q), self.group_size).take_along_dim(last, dim=3).squeeze(3)
        return *self._cores(queries.transpose(1, 2), k, v, seen), seen.any(-1)

    def _cores(self, last: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Groups as a key and a value each [B, N, H or G, D].

        Args:
            last: [B, N, H, K], the last query of each group; k, v: [B, S, G, D], from the first group on.
            seen: [B or 1, 1, N, g].
        """
        with torch.autocast(k.device.type, enabled=False):
            k, v = (repeat_heads(wide(x), self.core_heads).transpose(1, 2) for x in (k, v))
            k, v = segments(k, self.group_size), segments(v, self.group_size)  # [B, H or G, N, g, D]
            if self.pool == "max":
                cores = highest(k, seen), highest(v, seen)
            else:
                scores = k.new_zeros(k.shape[:-1])
                if self.pool == "attention":
                    scores = (k @ self._heads(last)[..., None]).squeeze(-1) * self.key_dim**-0.5
                weights = masked_softmax(scores, seen)[..., None, :]
                cores = (weights @ k).squeeze(-2), (weights @ v).squeeze(-2)
            return cores[0].transpose(1, 2), cores[1].transpose(1, 2)

    def init_memory(self, batch_size: int, like: Tensor) -> CCAState:
        k, v = (like.new_empty(batch_size, 0, self.spec.kv_heads, width) for width in (self.key_dim, self.value_dim))
        cores = (like.new_empty(batch_size, 0, self.core_heads, width) for width in (self.key_dim, self.value_dim))
        return CCAState(cores=tuple(wide(x) for x in cores), k=k, v=v)

    def update(
        self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor
    ) -> CCAState:
        assert isinstance(state, CCAState)
        own, size, position = terms["own"], self.group_size, state.position + k.shape[1]
        if self.spec.cross:  # written once
            *cores, any_seen = self._all_cores(own, k, v, key_mask)
            seen = None if key_mask is None else any_seen[:, 0]
            return CCAState(cores=tuple(cores), k=state.k, v=state.v, seen=seen, position=position)
        start = state.position - state.k.shape[1]  # of the positions that are read directly
        k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)
        complete, count = state.position // size, position // size - state.position // size
        new = slice(complete * size - start, (complete + count) * size - start)
        last = own[:, (complete + 1) * size - 1 - state.position :: size][:, :count]
        added = self._cores(last, k[:, new], v[:, new], known(k[:, new], None).unflatten(-1, (count, size)))
        pooled = max(0, position - self.window) // size * size - start
        return CCAState(  # cloned: a view would keep dropped positions alive
            cores=tuple(torch.cat(pair, dim=1) for pair in zip(state.cores, added, strict=True)),
            k=k[:, pooled:].clone(),
            v=v[:, pooled:].clone(),
            position=position,
        )

    def state_bytes(self, length: int) -> int:
        pair = self.key_dim + self.value_dim
        if self.spec.cross:
            return 4 * -(-length // self.group_size) * self.core_heads * pair
        direct = length - max(0, length - self.window) // self.group_size * self.group_size
        return 4 * pair * (length // self.group_size * self.core_heads + direct * self.spec.kv_heads)

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, CCAState)
        k, v = state.cores
        if not self.spec.cross:
            pooled = max(0, state.position - self.window) // self.group_size
            heads = self.core_heads
            k, v = (
                torch.cat([core[:, :pooled], repeat_heads(wide(x), heads)], dim=1)
                for core, x in zip(state.cores, (state.k, state.v), strict=True)
            )
        seen = k.new_ones(1, 1, k.shape[1], dtype=torch.bool) if state.seen is None else state.seen[:, None]
        with torch.autocast(q.device.type, enabled=False):
            scores = self._heads(q * self.key_dim**-0.5) @ self._heads(k).mT
            return (self._weights(scores, seen[:, None]) @ self._heads(v)).transpose(1, 2).to(q.dtype)
