"""SEA: linear attention estimates the attention matrix, a small CNN draws it, and softmax reads where it is large."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, State, repeat_heads, rotary
from attentions.dense.softmax import KVCache
from attentions.linear._recurrence import masked, wide
from attentions.linear.performer import Performer, Scaled
from attentions.sparse._budget import largest_mask
from attentions.sparse._selection import masked_softmax
from attentions.sparse._teacher import dense_weights, visible_keys

PAST = 4  # rows that a causal convolution looks back: three taps, two rows apart


@dataclass(kw_only=True)
class SEACache(KVCache):
    """All keys and values, the linear attention's memory, and what the decoder and the average carry along.

    rows: for either convolution its latest inputs [B, C, 4, num_cells / 4]; total: the sum of all values [B, G, D].
    """

    memory: Scaled
    rows: tuple[Tensor, Tensor]
    total: Tensor


class CausalDecoder(nn.Module):
    """Rows of a narrow image [B, 2 H, T, num_cells / 4] to logits [B, H, T, num_cells], none from later rows."""

    def __init__(self, num_heads: int, num_cells: int):
        super().__init__()
        self.channels = 2 * num_heads
        self.norm = nn.LayerNorm(num_cells // 4)
        self.convolutions = nn.ModuleList(nn.Conv2d(self.channels, self.channels, 3, dilation=2) for _ in range(2))
        self.head = nn.Conv2d(self.channels, num_heads, 1, bias=False)  # the norm takes out a constant
        self.norm_out = nn.LayerNorm(num_cells)

    def forward(self, image: Tensor, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The logits, and the rows before the next image; zeros are the rows before the first."""
        x, kept = self.norm(image), []
        for convolution, before in zip(self.convolutions, rows, strict=True):
            x = torch.cat([before, x], dim=2)
            kept.append(x[:, :, -PAST:].clone())  # clone: a view would keep the rest alive
            x = convolution(F.pad(x, (2, 2))).relu()
        return self.norm_out(self.head(x).repeat_interleave(4, dim=-1)), (kept[0], kept[1])

    def empty_rows(self, batch_size: int) -> tuple[Tensor, Tensor]:
        rows = self.head.weight.new_zeros(batch_size, self.channels, PAST, self.norm.weight.shape[0])
        return rows, rows.clone()


class Decoder(nn.Module):
    """An image [B, 4 H, T, num_cells / 2] to logits [B, H, T, num_cells], through half of its rows."""

    def __init__(self, num_heads: int, num_cells: int):
        super().__init__()
        self.channels, self.num_cells = 4 * num_heads, num_cells
        self.down = nn.Conv2d(self.channels, self.channels, 3, padding=1, stride=(2, 1))
        self.middle = nn.Conv2d(self.channels, self.channels, 3, padding=1)
        self.head = nn.Conv2d(self.channels, num_heads, 3, padding=1, bias=False)  # softmax takes out a constant

    def forward(self, image: Tensor) -> Tensor:
        x = self.middle(self.down(image).relu()).relu().repeat_interleave(2, dim=2)
        return F.interpolate(self.head(x), (image.shape[2], self.num_cells), mode="bilinear")


class SEA(Attention):
    """Softmax over the keys of the largest cells of an estimated attention matrix, mixed with an average of the values.

    Linear attention (FAVOR+) of q and k reads v beside a code of the key's position. With the query's own value, what
    it reads, c, becomes t = GELU(LN(W_e [c; v_t])), shared by the heads. A linear map makes t a row of an image, and a
    CNN over rows, columns and heads draws from it the logits of the estimate e, softmax over `num_cells` cells. Of all
    cells of all heads a query with n visible keys takes the round(H top_k num_cells / n) largest, at least one, hence
    top_k keys per head on average; the r-th visible key, from 0, belongs to the cell floor((r + 1/2) num_cells / n).
    What softmax attention reads over these keys is scaled by sigma(s_1), and mixed by sigma(s_2) with an average of v,
    [s_1; s_2] = W_s t. Causal: the average is that of the values so far, the CNN looks back only, and positions have a
    learned code. Noncausal: the average weighs v by e, its mean over the queries, and a position's code is its row of
    the D x D identity, stretched to n rows.

    No gradient passes the choice of cells. In train mode the estimate, its logits spread over the keys, learns from
    the layer's own dense attention, detached: `divergence` is kl_weight times the Kullback-Leibler divergence, a mean
    over queries and heads, and `distance` mse_weight times the mean square. Both reach q, k and v through the estimate,
    as the task does through t.

    Parameters beside softmax's: 6 D^2 + 10 D, a row of D num_cells (noncausal 4 D num_cells) and a CNN of 74 H^2 (324
    H^2), with norms and biases; causal self-attention has D spec.max_length more. For M = 32, H = 2, 32 cells and 64
    positions that makes 1.9 times softmax's.

    Args:
        top_k: keys per query and head, on average.
        num_cells: width of the estimated matrix, a multiple of 4.
        num_features: of the linear attention; None means D ln D.
        kl_weight, mse_weight: of the two losses.
        dropout: probability of dropping an attention weight in training.

    Source: Lee et al. 2023, https://arxiv.org/abs/2310.01777; architecture, sizes and losses from the authors' code,
    not confirmed from the paper's text. Differs: teacher and student are one layer, trained from scratch, so the losses
    between their dense attentions vanish and that of the output is left out; the divergence is a mean over heads, which
    that code's noncausal form sums, and the square one over visible keys, where that code counts hidden ones, too;
    FAVOR+ features are drawn once and serve the causal form, too, where that code redraws them and has a generalised
    ReLU kernel; of the noncausal CNN, which changes between versions of that code, this is the last one, of three
    convolutions, and no older one of residual blocks; in the causal one that code pads its last convolution, of one
    tap, with a column on either side and averages neighbours to the width before, which is left out; a key in the
    middle between two cells belongs to the later, in that code's training to the earlier; the jitter of cells in
    training, the norm behind the average in one variant and the bias of the last convolution, which changes nothing,
    are left out. Cross-attention is ours: q stands for the query's own value, the positions of the context have the
    stretched identity as code, and a causal decoder averages all values. All scores are computed and masked.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2310.01777"
    complexity = "T S"
    selects = True

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 7,
        num_cells: int = 128,
        num_features: int | None = None,
        kl_weight: float = 0.1,
        mse_weight: float = 1.0,
        dropout: float = 0.0,
    ):
        super().__init__(spec)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if num_cells < 4 or num_cells % 4:
            near = max(4, num_cells - num_cells % 4)
            raise ValueError(f"num_cells must be a multiple of 4, got {num_cells}; nearest: {near}, {near + 4}")
        if spec.rotary_base is not None and spec.head_dim % 2:
            raise ValueError(f"rotary positions need an even width per head, got {spec.head_dim}")
        self.top_k, self.num_cells, self.dropout = top_k, num_cells, dropout
        self.kl_weight, self.mse_weight = kl_weight, mse_weight
        heads, groups, width = spec.num_heads, spec.kv_heads, spec.head_dim
        self.q_proj = nn.Linear(spec.dim, heads * width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(spec.dim, groups * width, bias=False) for _ in "kv")
        self.out_proj = nn.Linear(heads * width, spec.dim, bias=False)
        self.performer = Performer(spec, num_features=num_features, redraw_every=0)
        self.performer.value_dim = 2 * width
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            delattr(self.performer, name)  # it is a memory here and gets q, k and v from this layer
        self.encode, self.encode_norm = nn.Linear(3 * width, 2 * width), nn.LayerNorm(2 * width)
        self.decoder = CausalDecoder(heads, num_cells) if spec.causal else Decoder(heads, num_cells)
        self.row = nn.Linear(2 * width, (2 * num_cells // 4) if spec.causal else (4 * num_cells // 2))
        self.scales = nn.Linear(2 * width, 2)
        learned = spec.pattern == Pattern.CAUSAL_SELF
        self.places = nn.Parameter(torch.randn(spec.max_length, width)) if learned else None

    # -- all positions at once --------------------------------------------------------------------

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        source = self._source(x, context)
        q, (k, v) = self.query(x), self.key_value(source)
        with torch.autocast(x.device.type, enabled=False):
            estimate = self.performer.attend(q, k, self._coded(v, 0, key_mask), key_mask=key_mask)
            code = self._encode(estimate, q if self.spec.cross else v)
            image = self._image(code)
            if key_mask is not None and not self.spec.cross:
                image = image.masked_fill(~key_mask[:, None, :, None], 0.0)  # a CNN would carry it to its neighbours
            if isinstance(self.decoder, CausalDecoder):
                logits, _ = self.decoder(image, self.decoder.empty_rows(x.shape[0]))
            else:
                logits = self.decoder(image)
            causal = self.spec.pattern == Pattern.CAUSAL_SELF
            visible = visible_keys(q.shape[1], k.shape[1], causal=causal, key_mask=key_mask, device=x.device)
            cells = self._cells(visible, key_mask)
            rows = None if key_mask is None or self.spec.cross else key_mask[:, None, :, None]
            if self.training:
                self._losses(q, k, logits, cells, visible if rows is None else visible & rows)
            if self.spec.causal:
                average = self._running(masked(wide(v), key_mask), visible)
            else:
                average = self._weighted(v, logits, cells[:, :, :1], visible[:, :, :1], rows)
            return self._merge(q, k, v, logits, cells, visible, code, average)

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        """[B, T, H, D], rotated from position `start` where the spec asks for it."""
        return self._rotate(self.q_proj(x).unflatten(-1, (self.spec.num_heads, -1)), start)

    def key_value(self, source: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, G, D]."""
        k, v = (proj(source).unflatten(-1, (self.spec.kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        return self._rotate(k, start), v

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        if self.spec.rotary_base is None or self.spec.cross:
            return heads
        return rotary(heads, base=self.spec.rotary_base, start=start)

    def _coded(self, v: Tensor, start: int, key_mask: Tensor | None) -> Tensor:
        """Values with the code of their position before them: [B, S, G, 2 D]."""
        length, width = v.shape[1], v.shape[-1]
        if self.places is not None:
            if start + length > len(self.places):
                raise ValueError(f"positions have codes up to max_length={len(self.places)}, got {start + length}")
            places = self.places[start : start + length][None]
        else:
            mask = v.new_ones(1, length, dtype=torch.bool) if key_mask is None else key_mask
            rank, last = mask.cumsum(-1) - 1, (mask.sum(-1, keepdim=True) - 1).clamp_min(1)
            place = rank.to(v.dtype) * (width - 1) / last
            places = (1 - (place[..., None] - torch.arange(width, device=v.device)).abs()).clamp_min(0).to(v.dtype)
        return torch.cat([places[:, :, None].expand_as(v), v], dim=-1)

    def _encode(self, estimate: Tensor, own: Tensor) -> Tensor:
        """t [B, T, H, 2 D]."""
        pair = torch.cat([estimate, repeat_heads(own, self.spec.num_heads)], dim=-1)
        return F.gelu(self.encode_norm(self.encode(pair.to(self.encode.weight.dtype))))

    def _image(self, code: Tensor) -> Tensor:
        """[B, T, H, 2 D] -> [B, H channels, T, columns]."""
        channels = self.decoder.channels // self.spec.num_heads
        return self.row(code).unflatten(-1, (channels, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2)

    def _cells(self, visible: Tensor, key_mask: Tensor | None) -> Tensor:
        """The cell of each key in the row of each query: [B or 1, 1, T, S]; of a key not visible, any."""
        if key_mask is None:
            rank = torch.arange(visible.shape[-1], device=visible.device)
        else:
            rank = (key_mask.cumsum(-1) - 1)[:, None, None]
        count = visible.sum(-1, keepdim=True).clamp_min(1)
        return ((2 * rank + 1) * self.num_cells // (2 * count)).clamp(0, self.num_cells - 1)

    def select(self, logits: Tensor, count: Tensor) -> Tensor:
        """The cells that a query reads [B, H, T, num_cells] bool; count [B or 1, T]: its visible keys."""
        flat = wide(logits).detach().softmax(-1).transpose(1, 2).flatten(2)
        most = flat.shape[-1]
        budget = (self.spec.num_heads * self.top_k * self.num_cells / count.clamp_min(1).double()).round().long()
        selected = largest_mask(flat, budget.clamp(1, most)[..., None], most)
        return selected.unflatten(-1, (self.spec.num_heads, -1)).transpose(1, 2)

    def _merge(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits: Tensor,
        cells: Tensor,
        visible: Tensor,
        code: Tensor,
        average: Tensor,
    ) -> Tensor:
        """Sparse attention and the average [B, H, T or 1, D], scaled, mixed and back in the stream [B, T, M]."""
        selected = self.select(logits, visible.sum(-1)[:, 0])
        read = selected.gather(-1, cells.expand(*selected.shape[:-1], -1)) & visible
        keys, values = (repeat_heads(heads, self.spec.num_heads).transpose(1, 2) for heads in (k, v))
        weights = masked_softmax((q.transpose(1, 2) * q.shape[-1] ** -0.5) @ keys.mT, read)
        weights = F.dropout(weights, self.dropout, self.training)
        scale, share = self.scales(code).sigmoid().transpose(1, 2).split(1, dim=-1)
        heads = share * scale * (weights.to(values.dtype) @ values) + (1 - share) * average.to(values.dtype)
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def _running(self, v: Tensor, visible: Tensor) -> Tensor:
        """Mean of the visible values: [B, S, G, D] -> [B, H, T or 1, D]."""
        total = v.sum(1, keepdim=True) if self.spec.cross else v.cumsum(1)
        count = visible.sum(-1).clamp_min(1)[..., None]
        return repeat_heads(total, self.spec.num_heads).transpose(1, 2) / count

    def _weighted(self, v: Tensor, logits: Tensor, cells: Tensor, visible: Tensor, rows: Tensor | None) -> Tensor:
        """sum_p e_p v_p with the mean of e over the queries: [B, H, 1, D]."""
        estimate = wide(logits).softmax(-1)
        if rows is None:
            mean = estimate.mean(2, keepdim=True)
        else:
            mean = (estimate * rows).sum(2, keepdim=True) / rows.sum(2, keepdim=True).clamp_min(1)
        weights = mean.gather(-1, cells.expand(*mean.shape[:-1], -1)) * visible
        return weights @ wide(repeat_heads(v, self.spec.num_heads)).transpose(1, 2)

    def _losses(self, q: Tensor, k: Tensor, logits: Tensor, cells: Tensor, visible: Tensor) -> None:
        target = dense_weights(q, k, visible)
        spread = wide(logits).gather(-1, cells.expand(*logits.shape[:-1], -1))
        estimate = spread.masked_fill(~visible, torch.finfo(spread.dtype).min).log_softmax(-1)
        divergence = F.kl_div(estimate, target, reduction="none").sum(-1)
        rows, pairs = visible.any(-1).expand_as(divergence), visible.expand_as(spread)
        square = (estimate.exp() - target).masked_fill(~visible, 0.0).square()
        self.add_auxiliary(
            divergence=self.kl_weight * divergence.masked_fill(~rows, 0.0).sum() / rows.sum().clamp_min(1),
            distance=self.mse_weight * square.sum() / pairs.sum().clamp_min(1),
        )

    # -- position by position ---------------------------------------------------------------------

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> SEACache:
        if not isinstance(self.decoder, CausalDecoder):
            return super().init_state(batch_size, context)  # type: ignore[return-value]  # raises
        empty = self.out_proj.weight.new_empty(batch_size, 0, self.spec.kv_heads, self.spec.head_dim)
        state = SEACache(
            k=empty,
            v=empty.clone(),
            memory=self.performer.init_memory(batch_size, empty),
            rows=self.decoder.empty_rows(batch_size),
            total=wide(empty).sum(1),
        )
        if not self.spec.cross:
            return state
        if context is None:
            raise ValueError("cross-attention decodes over a context: init_state(batch_size, context)")
        return self._write(state, *self.key_value(context), key_mask)

    def _write(self, state: SEACache, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> SEACache:
        memory = self.performer.update(state.memory, k, self._coded(v, state.position, key_mask), key_mask=key_mask)
        return dataclasses.replace(
            state,
            k=torch.cat([state.k, k], dim=1),
            v=torch.cat([state.v, v], dim=1),
            mask=key_mask,
            memory=memory,
            total=state.total + masked(wide(v), key_mask).sum(1),
            position=state.position + k.shape[1],
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, SEACache]:
        assert isinstance(state, SEACache)
        assert isinstance(self.decoder, CausalDecoder)
        q, own = self.query(x, state.position), None
        if not self.spec.cross:
            k, own = self.key_value(x, state.position)
            state = self._write(state, k, own)
        code = self._encode(self.performer.read(q, state.memory), q if own is None else own)
        logits, rows = self.decoder(self._image(code), state.rows)
        visible = visible_keys(1, state.k.shape[1], causal=False, key_mask=state.mask, device=x.device)
        total = repeat_heads(state.total[:, None], self.spec.num_heads).transpose(1, 2)
        average = total / visible.sum(-1).clamp_min(1)[..., None]
        cells = self._cells(visible, state.mask)
        output = self._merge(q, state.k, state.v, logits, cells, visible, code, average)
        return output, dataclasses.replace(state, rows=rows)

    def state_bytes(self, length: int) -> int:
        keys = (2 * length + 1) * self.spec.kv_heads * self.spec.head_dim
        rows = 2 * 2 * self.spec.num_heads * PAST * self.num_cells // 4
        return self.performer.state_bytes(length) + 4 * (keys + rows)
