"""Hungry hungry hippos."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attentions.base import LayerSpec, Pattern, QKVAttention, State, repeat_heads
from attentions.linear._recurrence import masked, wide
from attentions.ssm._diagonal import DiagonalSSM
from attentions.ssm._fft import by_distance, long_conv


@dataclass(kw_only=True)
class HippoState(State):
    """The diagonal SSM's states [B, G, D * D, N/2], complex, and the shift SSM's last keys [B, N - 1, G, D]."""

    memory: Tensor
    tail: Tensor


@dataclass(kw_only=True)
class ReadOut(State):
    """Cross-attention: what the end of the context holds, one matrix per head [B, G, D, D]."""

    matrix: Tensor


class ShiftSSM(nn.Module):
    """A state-space model that remembers its last N inputs: y_t = sum_{i < N} C_i k_{t-i} + D k_t, per channel.

    Args:
        shape: of the channels.
        state_dim: N.
        causal: otherwise a second C reads the N inputs that come next.
    """

    def __init__(self, *shape: int, state_dim: int, causal: bool):
        super().__init__()
        self.reach = state_dim - 1
        bound = state_dim**-0.5
        self.C = nn.Parameter(torch.empty(1 if causal else 2, *shape, state_dim).uniform_(-bound, bound))
        self.D = nn.Parameter(torch.randn(*shape))

    def forward(self, k: Tensor, tail: Tensor | None = None) -> Tensor:
        """[B, T, ...] -> the same; `tail` [B, N - 1, ...] holds the inputs before k, None means zeros."""
        seen = k if tail is None else torch.cat([tail, k], dim=1)
        taps = self.C[..., : seen.shape[1]]
        y = long_conv(seen, taps[0], taps[1] if len(taps) > 1 else None)
        return y[:, seen.shape[1] - k.shape[1] :] + k * wide(self.D)


class H3(QKVAttention):
    """q * SSM_diag(SSM_shift(k) v^T), per head: a shift recalls recent keys, a diagonal SSM keeps their outer products.

    With K the diagonal SSM's kernel, one per head, y_t = q_t^T sum_{s <= t} K_{t-s} SSM_shift(k)_s v_s^T: linear
    attention whose weights depend on the distance through a learned kernel. Short sequences are computed in this form,
    long ones by FFT over the D^2 entries of the outer product. The state holds N D^2 numbers per head and N - 1 keys.
    Noncausal: both SSMs have a second kernel for later positions. In cross-attention queries have no position in the
    context: all of them read at its end, a D x D matrix per head. The backbone's rotary positions do not enter.

    At state_dim 64 the two SSMs add 66 M parameters and 129 a head to softmax attention's 4 M^2: 1.6 times as many at
    width 32, 1.3 at width 64.

    Args:
        state_dim: N of both SSMs, even.
        init, dt_min, dt_max: start of the diagonal SSM, see `DiagonalSSM`.
        bias: bias on the four projections.

    Source: Fu et al. 2022, https://arxiv.org/abs/2212.14052, section 3.1 and algorithm 1; initialisations, biases and
    the skips D of both SSMs as in the authors' code. Differs: heads are the slot's (the code's default head_dim is 1);
    zero-order hold, where the code's default is bilinear; the shift SSM's B stays e_1 and the diagonal one's 1, where
    the code starts and trains them; one learning rate and weight decay for all parameters; noncausal, cross and
    grouped forms are ours.
    """

    patterns = Pattern.ALL
    paper = "https://arxiv.org/abs/2212.14052"
    complexity = "D T log T (T <= 3 D^2: T^2)"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        state_dim: int = 64,
        init: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bias: bool = True,
    ):
        super().__init__(replace(spec, rotary_base=None), bias=bias)
        one_way = spec.causal or spec.cross
        self.ssm = DiagonalSSM(
            spec.kv_heads, state_dim=state_dim, init=init, dt_min=dt_min, dt_max=dt_max, causal=one_way
        )
        self.shift = ShiftSSM(spec.kv_heads, self.key_dim, state_dim=state_dim, causal=one_way)
        self.longest_in_scores = 3 * self.key_dim**2  # there T^2 scores cost as much as D^2 transforms

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        k, v = (masked(wide(x), key_mask) for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            k = self.shift(k)
            if self.spec.cross:
                return self._read(q, self._matrix(self._advance(None, k, v), k, v))
            if q.shape[1] > self.longest_in_scores:
                return self._read(q, self.ssm(self._outer(k, v)).unflatten(-1, (self.key_dim, self.value_dim)))
            return self._scores(q, k, v)

    def init_memory(self, batch_size: int, like: Tensor) -> State:
        heads, reach = (self.spec.kv_heads, self.key_dim), self.shift.reach
        if self.spec.cross:
            return ReadOut(matrix=wide(like.new_zeros(batch_size, *heads, self.value_dim)))
        memory = self.ssm.empty_state(batch_size, self.key_dim * self.value_dim)
        return HippoState(memory=memory, tail=wide(like.new_zeros(batch_size, reach, *heads)))

    def update(self, state: State, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> State:
        k, v, position = masked(wide(k), key_mask), masked(wide(v), key_mask), state.position + k.shape[1]
        with torch.autocast(k.device.type, enabled=False):
            if isinstance(state, ReadOut):  # the context comes whole
                keys = self.shift(k)
                return ReadOut(matrix=self._matrix(self._advance(None, keys, v), keys, v), position=position)
            assert isinstance(state, HippoState)
            memory = self._advance(state.memory, self.shift(k, state.tail), v)
            inputs = torch.cat([state.tail, k], dim=1)
        tail = inputs[:, inputs.shape[1] - self.shift.reach :].clone()  # clone: a view would keep all inputs alive
        return HippoState(memory=memory, tail=tail, position=position)

    def state_bytes(self, length: int) -> int:
        matrix = self.spec.kv_heads * self.key_dim * self.value_dim
        if self.spec.cross:
            return 4 * matrix
        return 8 * matrix * self.ssm.frequency.shape[1] + 4 * self.shift.reach * self.spec.kv_heads * self.key_dim

    def read(self, q: Tensor, state: State) -> Tensor:
        assert isinstance(state, ReadOut)
        with torch.autocast(q.device.type, enabled=False):
            return self._read(q, state.matrix)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self.spec.cross:
            return super().step(x, state)
        assert isinstance(state, HippoState)
        q, (k, v) = self.query(x), self.key_value(x)
        after = self.update(state, k, v)
        assert isinstance(after, HippoState)
        with torch.autocast(x.device.type, enabled=False):
            heads = self._read(q, self._matrix(after.memory, self.shift(wide(k), state.tail), wide(v)))
        return self.merge(x, heads), after

    def _scores(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Weights q_t.k_s K_{t-s} for all pairs of positions."""
        kernels = self.ssm.kernels(q.shape[1])
        weights = by_distance(kernels[0], None if len(kernels) == 1 else kernels[1])
        weights = weights + wide(self.ssm.D)[:, None, None] * torch.eye(
            q.shape[1], dtype=weights.dtype, device=q.device
        )
        num_heads = self.spec.num_heads
        weights = weights.repeat_interleave(num_heads // len(weights), dim=0)
        k, v = (repeat_heads(x, num_heads).transpose(1, 2) for x in (k, v))
        return ((wide(q).transpose(1, 2) @ k.mT * weights) @ v).transpose(1, 2).to(q.dtype)

    def _outer(self, k: Tensor, v: Tensor) -> Tensor:
        """k v^T as channels of the diagonal SSM: [B, S, G, K * V]."""
        return (k[..., :, None] * v[..., None, :]).flatten(3)

    def _advance(self, memory: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        outer = self._outer(k, v)
        return self.ssm.advance(self.ssm.empty_state(len(k), outer.shape[-1]) if memory is None else memory, outer)

    def _matrix(self, memory: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What a query at the last position meets: [B, G, K, V]; k, v [B, S, G, .], of which the last counts."""
        own = self.ssm.skip(self._outer(k[:, -1:], v[:, -1:]))[:, 0]
        return (self.ssm.read(memory) + own).unflatten(-1, (self.key_dim, self.value_dim))

    def _read(self, q: Tensor, matrix: Tensor) -> Tensor:
        """q [B, T, H, K] times matrices [B, G, K, V] or [B, T, G, K, V]."""
        grouped = wide(q).unflatten(2, (self.spec.kv_heads, -1))  # [B, T, G, H / G, K]
        return (grouped @ (matrix if matrix.dim() == 5 else matrix[:, None])).flatten(2, 3).to(q.dtype)
