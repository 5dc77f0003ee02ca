"""The Routing Transformer: tokens attend within clusters of a k-means that runs along with training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State, UnsupportedPattern, repeat_heads, rotary
from attentions.sparse._selection import Selection, largest, masked_softmax, nearby, sparse_attention

Points = tuple[Tensor, Tensor, Tensor]  # x [B, T, R, K], how each centroid fits it [B, R, T, C], unmasked ones [B, T]
Heads = tuple[Tensor, Tensor, Tensor]  # q, k, v


@dataclass(kw_only=True)
class Clusters(State):
    """Keys [B, R, C, w, K] and values of the routing heads, rings by cluster, and a window [B, n, G', K] of the local.

    count: [B, R, C] int32, members that each cluster has had so far, of a context at most w.
    """

    k: Tensor
    v: Tensor
    count: Tensor
    local_k: Tensor
    local_v: Tensor


class RoutingTransformer(Attention):
    """Queries and keys on a sphere; C centroids per head; a token attends to members of its cluster. Others are local.

        q, k = LayerNorm without parameters      cluster of x: argmax over c of mu_c . x

    Causal: keys are the queries, and a token reads the last w members of its cluster up to itself. Sorted by (cluster,
    position), those are a window of w positions. The published form lets each cluster take the w tokens of the whole
    sequence that fit it best and masks the future among them: which tokens it takes depends on later ones. That is the
    class `RoutingOfficial`; the form here sees no future, at the same cost, and decodes from rings of w per cluster.
    Noncausal, as published: each cluster takes the w queries and the w keys that fit it best and reads within; a query
    in several clusters gets the mean, in none zero. Causal cross: a query reads the w keys of its own cluster.

    In training mu_c <- decay mu_c + (1 - decay) mean of the q and k whose argmax is c, once the output is made from
    those before, and `commitment` times the mean of (x - mu of x)^2 joins the loss. Local heads come last, read a
    window (|i - j| < window) and have keys of their own; in cross-attention every head routes.

    Args:
        num_clusters: C, about sqrt(T).
        cluster_window: w, about T / C.
        local_heads: None: half of the heads, rounded down.
        window: of the local heads, own position included.
        share_qk: noncausal self: keys are the queries, as they always are in the causal form and never in cross.
        decay: of the centroids; commitment: weight of that loss.
        dropout: probability of dropping an attention weight in training.

    Grouped heads share values and keys that are not queries. Causal, half of the heads have no key projection:
    3.5 M^2 parameters where softmax attention has 4 M^2.

    Source: Roy et al. 2020, https://arxiv.org/abs/2003.05997, as in the authors' code,
    https://github.com/google-research/google-research/tree/master/routing_transformer (WikiText-103: C = 8, w = 512,
    half of the heads local over blocks of 256).
    Differs: scores are divided by sqrt(K), where the code normalises after it scales, which undoes it; the mean over
    clusters is exact, the code divides by their number + 0.01; one running mean, the code keeps those of sums and
    counts; where keys are queries it adds the commitment loss twice; its local heads read their own and the previous
    block and exist in cross-attention too; it maps the output of each head by one more matrix, the same for all, which
    out_proj contains here; rotary positions turn q and k after they are routed, the code has relative ones. Masked
    tokens join no cluster.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2003.05997"
    complexity = "T (cluster_window + num_clusters + window)"
    selects = True
    strict: ClassVar[bool] = True  # the causal form that sees no future

    centroids: Tensor  # mu [R, C, K]

    def __init__(
        self,
        spec: LayerSpec,
        *,
        num_clusters: int = 8,
        cluster_window: int = 512,
        local_heads: int | None = None,
        window: int = 256,
        share_qk: bool = False,
        decay: float = 0.999,
        commitment: float = 1e-4,
        dropout: float = 0.0,
    ):
        super().__init__(spec)
        for name, value in (("num_clusters", num_clusters), ("cluster_window", cluster_window), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if local_heads is not None and not 0 <= local_heads < spec.num_heads:
            raise ValueError(f"local_heads must be 0 to {spec.num_heads - 1}, got {local_heads}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be 0 to 1, got {decay}")
        if commitment < 0:
            raise ValueError(f"commitment must be at least 0, got {commitment}")
        if spec.rotary_base is not None and spec.head_dim % 2:
            raise ValueError(f"rotary positions need an even width per head, got {spec.head_dim}")
        self.num_clusters, self.cluster_window, self.window = num_clusters, cluster_window, window
        self.decay, self.commitment, self.dropout = decay, commitment, dropout
        heads, groups, width = spec.num_heads, spec.kv_heads, spec.head_dim
        self.local = 0 if spec.cross else heads // 2 if local_heads is None else local_heads
        self.routed = heads - self.local
        self.shared = not spec.cross and (spec.causal or share_qk)
        self.first_local = self.routed * groups // heads if self.local else groups  # key-value heads of local heads
        key_groups = groups - self.first_local if self.shared else groups
        self.q_proj = nn.Linear(spec.dim, heads * width, bias=False)
        self.k_proj = nn.Linear(spec.dim, key_groups * width, bias=False) if key_groups else None
        self.v_proj = nn.Linear(spec.dim, groups * width, bias=False)
        self.out_proj = nn.Linear(heads * width, spec.dim, bias=False)
        centroids = torch.randn(self.routed, num_clusters, width)
        self.register_buffer("centroids", F.layer_norm(centroids, (width,)))

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        source = self._source(x, context)
        (q, k, v), near = self._heads(x, source)
        real = source.new_ones(source.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
        queries = q, self._fits(q), x.new_ones(x.shape[:2], dtype=torch.bool) if self.spec.cross else real
        keys = queries if self.shared else (k, self._fits(k), real)
        if not self.spec.causal or not self.strict:
            heads = self._within(queries, keys, v)
        elif self.spec.cross:
            heads = self._fitting(queries, keys, v)
        else:
            heads = self._latest(queries, v)
        if self.training:
            self._learn([queries] if self.shared else [queries, keys])
        if near is not None:
            window = nearby(x.shape[1], self.window, causal=self.spec.causal, device=x.device)
            heads = torch.cat([heads, self._local(near, window, key_mask)], dim=2)
        return self.out_proj(heads.flatten(2))

    # -- heads --------------------------------------------------------------------------------------

    def _heads(self, x: Tensor, source: Tensor, start: int = 0) -> tuple[Heads, Heads | None]:
        """q, k and v of the routing heads [B, T, R, D], on the sphere and not turned yet, and of the local heads.

        The latter are turned, and their k and v grouped.
        """
        q, v = self.q_proj(x).unflatten(-1, (self.spec.num_heads, -1)), self._grouped(self.v_proj(source))
        k = v[:, :, :0] if self.k_proj is None else self._grouped(self.k_proj(source))
        routing = keys = F.layer_norm(q[:, :, : self.routed], q.shape[-1:])
        if not self.shared:
            keys = F.layer_norm(self._repeated(k)[:, :, : self.routed], k.shape[-1:])
        own = routing, keys, self._repeated(v)[:, :, : self.routed]
        if not self.local:
            return own, None
        near, k = q[:, :, self.routed :], k[:, :, k.shape[2] - v.shape[2] + self.first_local :]
        return own, (self._turned(near, start), self._turned(k, start), v[:, :, self.first_local :])

    def _local(self, near: Heads, selection: Selection, key_mask: Tensor | None = None) -> Tensor:
        k, v = (self._repeated(x)[:, :, -self.local :] for x in near[1:])
        return sparse_attention(near[0], k, v, selection, key_mask=key_mask, dropout=self._dropout)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.spec.head_dim))

    def _repeated(self, x: Tensor) -> Tensor:
        """Each key-value head for the query heads of its group."""
        return repeat_heads(x, x.shape[2] * self.spec.num_heads // self.spec.kv_heads)

    def _turned(self, heads: Tensor, start: int = 0) -> Tensor:
        if self.spec.rotary_base is None or self.spec.cross:
            return heads
        return rotary(heads, base=self.spec.rotary_base, start=start)

    def _fits(self, x: Tensor) -> Tensor:
        """mu_c . x of x [B, T, R, K]: [B, R, T, C]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return x.transpose(1, 2).to(wide) @ self.centroids.mT.to(wide)

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    # -- who reads whom -----------------------------------------------------------------------------

    def _best(self, points: Points) -> Tensor:
        """The tokens that fit each cluster best, -1 where there are too few: [B, R, C, min(w, T)]."""
        _, fits, real = points
        return largest(fits.mT.masked_fill(~real[:, None, None], -math.inf), self.cluster_window)

    def _within(self, queries: Points, keys: Points, v: Tensor) -> Tensor:
        """Each cluster's best queries read its best keys; the mean over the clusters of a query [B, T, R, V]."""
        (q, _, _), (k, _, _) = queries, keys
        readers = self._best(queries)
        read = readers if self.shared else self._best(keys)
        scores = _members(self._turned(q), readers) @ _members(self._turned(k), read).mT * q.shape[-1] ** -0.5
        visible = (read >= 0)[..., None, :]
        if self.spec.causal and not self.spec.cross:
            visible = visible & (read[..., None, :] <= readers[..., None])
        weights = F.dropout(masked_softmax(scores, visible), self._dropout).to(v.dtype)
        heads = (weights @ _members(v, read)).flatten(2, 3)
        length = q.shape[1]
        place = (readers % (length + 1)).flatten(2)[..., None]  # -1 goes to an extra place at the end
        total = heads.new_zeros(*heads.shape[:2], length + 1, heads.shape[-1])
        total = total.scatter_add(2, place.expand(heads.shape), heads)
        number = heads.new_zeros(*total.shape[:3], 1).scatter_add(2, place, torch.ones_like(heads[..., :1]))
        return (total / number.clamp_min(1))[:, :, :length].transpose(1, 2)

    def _fitting(self, queries: Points, keys: Points, v: Tensor) -> Tensor:
        """Each query reads the best keys of its own cluster [B, T, R, V]."""
        (q, fits, _), best = queries, self._best(keys)
        cluster = fits.argmax(-1)[..., None].expand(-1, -1, -1, best.shape[-1])
        return sparse_attention(q, keys[0], v, Selection(best.gather(2, cluster), 1), dropout=self._dropout)

    def _latest(self, queries: Points, v: Tensor) -> Tensor:
        """Each token reads the last w tokens of its cluster, itself included [B, T, R, V]."""
        q, fits, real = queries
        length, size = q.shape[1], min(self.cluster_window, q.shape[1])
        q, v = self._turned(q).transpose(1, 2), v.transpose(1, 2)
        real = real[:, None].expand(q.shape[:3])
        cluster = fits.argmax(-1).masked_fill(~real, self.num_clusters)  # masked tokens take no place
        order = cluster.sort(dim=-1, stable=True).indices
        place = order.argsort(dim=-1)
        code = (2 * length * cluster + place)[..., None]  # 0 to w - 1 ahead: the same cluster and within the window
        k, keys = q, v
        if blocked := length > 4 * size:  # a block of the sorted tokens reads itself and the one before
            q, code, real = (_sorted(x, order, size) for x in (q, code, real[..., None]))
            k, keys = _with_before(q), _with_before(_sorted(v, order, size))
            ahead, real = code - _with_before(code).mT, _with_before(real)[..., 0]
        else:
            ahead = code - code.mT
        visible = (ahead >= 0) & (ahead < size) & real[..., None, :]
        weights = masked_softmax(q @ k.mT * q.shape[-1] ** -0.5, visible)
        heads = F.dropout(weights, self._dropout).to(v.dtype) @ keys
        if blocked:
            heads = heads.flatten(2, 3).gather(2, place[..., None].expand(*place.shape, heads.shape[-1]))
        return heads.transpose(1, 2)

    # -- k-means ------------------------------------------------------------------------------------

    def _learn(self, sets: list[Points]) -> None:
        """Leave the commitment loss and move the centroids, in place: the outputs are made from those before."""
        count = self.centroids.new_zeros(*self.centroids.shape[:2], 1)
        total, loss = torch.zeros_like(self.centroids), self.centroids.new_zeros(())
        for x, fits, real in sets:
            member = F.one_hot(fits.argmax(-1), self.num_clusters).to(x.dtype) * real[:, None, :, None]
            x = x.transpose(1, 2)
            away = (x - member @ self.centroids.to(x.dtype)).square() * real[:, None, :, None]
            loss = loss + away.sum() / (real.sum() * away.shape[1] * away.shape[3]).clamp_min(1)
            with torch.no_grad():
                count += member.sum((0, 2))[..., None]
                total += torch.einsum("brtc,brtk->rck", member, x)
        self.add_auxiliary(commitment=self.commitment * loss)
        with torch.no_grad():
            moved = self.decay * self.centroids + (1 - self.decay) * total / count.clamp_min(1)
            self.centroids.copy_(torch.where(count > 0, moved, self.centroids))

    # -- decoding -----------------------------------------------------------------------------------

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Clusters:
        like, width, local = self.out_proj.weight, self.spec.head_dim, self.spec.kv_heads - self.first_local
        empty = like.new_empty(batch_size, 0, local, width)
        if self.spec.cross:
            if context is None:
                raise ValueError("cross-attention decodes over a context: init_state(batch_size, context)")
            real = context.new_ones(context.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
            (_, k, v), _ = self._heads(context[:, :1], context)
            best = self._best((k, self._fits(k), real))
            count = (best >= 0).sum(-1, dtype=torch.int32)
            return Clusters(k=_members(k, best), v=_members(v, best), count=count, local_k=empty, local_v=empty)
        ring = like.new_zeros(batch_size, self.routed, self.num_clusters, self.cluster_window, width)
        count = torch.zeros(ring.shape[:3], dtype=torch.int32, device=like.device)
        return Clusters(k=ring, v=ring.clone(), count=count, local_k=empty, local_v=empty)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, Clusters]:
        assert isinstance(state, Clusters)
        (q, _, v), near = self._heads(x, x[:, :0] if self.spec.cross else x, state.position)
        cluster = self._fits(q)[:, :, 0].argmax(-1)  # [B, R]
        q = self._turned(q, state.position)[:, 0]
        mine = torch.arange(len(x), device=x.device)[:, None], torch.arange(self.routed, device=x.device), cluster
        if not self.spec.cross:
            state = self._written(state, (q, v[:, 0]), mine, near)
        k, values = state.k[mine], state.v[mine]  # [B, R, w, D]
        visible = torch.arange(k.shape[2], device=x.device) < state.count[mine][..., None]
        weights = masked_softmax((k @ q[..., None])[..., 0] * q.shape[-1] ** -0.5, visible)
        heads = F.dropout(weights, self._dropout).to(values.dtype)[:, None, :, None] @ values[:, None]
        heads = heads[..., 0, :]
        if near is not None:
            everything = Selection(torch.zeros(1, 1, 1, 1, dtype=torch.long, device=x.device), state.local_k.shape[1])
            heads = torch.cat([heads, self._local((near[0], state.local_k, state.local_v), everything)], dim=2)
        return self.out_proj(heads.flatten(2)), state

    def _written(
        self, state: Clusters, pair: tuple[Tensor, Tensor], mine: tuple[Tensor, ...], near: Heads | None
    ) -> Clusters:
        """The state with one more key and value [B, R, D] in the clusters `mine`, over the oldest where w are there."""
        k, v, count = state.k.clone(), state.v.clone(), state.count.clone()
        at = (*mine, count[mine].long() % self.cluster_window)
        k[at], v[at] = pair
        count[mine] += 1
        kept = [state.local_k, state.local_v]
        if near is not None:  # clone: a view would keep the dropped positions alive
            kept = [torch.cat(both, dim=1)[:, -self.window :].clone() for both in zip(kept, near[1:], strict=True)]
        return Clusters(k=k, v=v, count=count, local_k=kept[0], local_v=kept[1], position=state.position + 1)

    def state_bytes(self, length: int) -> int:
        members = min(length, self.cluster_window) if self.spec.cross else self.cluster_window
        near = 0 if self.spec.cross else min(length, self.window) * (self.spec.kv_heads - self.first_local)
        width = 2 * self.spec.head_dim
        return 4 * (self.routed * self.num_clusters * (members * width + 1) + near * width)


class RoutingOfficial(RoutingTransformer):
    """The Routing Transformer as published: causal, too, each cluster takes the w tokens that fit it best of all.

    Among them the future is masked by position. In causal cross each cluster takes the best of all queries. A query
    that no cluster takes reads zero. The noncausal forms are those of `RoutingTransformer`, whose keywords it has.

    Source: see RoutingTransformer. Differs: decoding is left out; the code's lets clusters take from the past alone.
    """

    patterns = Pattern.CAUSAL_SELF | Pattern.CAUSAL_CROSS
    impossible: ClassVar = {
        Pattern.NONCAUSAL_SELF
        | Pattern.NONCAUSAL_CROSS: "it is the published causal form; the others are RoutingTransformer"
    }
    leaks = "whether a cluster takes a token depends on how well later tokens fit it"
    stepwise = "a cluster takes the best tokens of the whole sequence, which decoding does not have yet"
    strict = False

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Clusters:
        raise UnsupportedPattern(f"RoutingOfficial has no decode state: {self.stepwise}")


def _members(x: Tensor, sets: Tensor) -> Tensor:
    """The tokens of x [B, T, R, D] that are in sets [B, R, C, w], the first one for -1: [B, R, C, w, D]."""
    at = sets.clamp_min(0).flatten(2)[..., None]
    return x.transpose(1, 2).gather(2, at.expand(*at.shape[:3], x.shape[-1])).unflatten(2, sets.shape[2:])


def _sorted(x: Tensor, order: Tensor, size: int) -> Tensor:
    """x [B, R, T, D] in another order [B, R, T], in blocks with zeros behind the end: [B, R, N, size, D]."""
    x = x.gather(2, order[..., None].expand(*order.shape, x.shape[-1]))
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def _with_before(x: Tensor) -> Tensor:
    """Each block of x [B, R, N, size, D] behind the one before, zeros before the first: [B, R, N, 2 size, D]."""
    return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3)
