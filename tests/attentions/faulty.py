"""Planted faults: tiny mechanisms, each wrong in one way that was published or shipped somewhere or nearly.

`@caught("check", "words of the error")` says which check of the contract must find it, and what it must say.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attentions.base import Attention, LayerSpec, Pattern, QKVAttention, State, UnsupportedPattern, repeat_heads
from attentions.dense.softmax import KVCache, Softmax
from attentions.linear._recurrence import Memory
from attentions.linear.linear import Linear
from attentions.local.sliding_window import SlidingWindow


@dataclass(frozen=True)
class Fault:
    name: str
    factory: Callable[..., Attention]
    check: str
    saying: str
    config: dict[str, Any] | None


FAULTS: list[Fault] = []


def caught(check: str, saying: str, config: dict[str, Any] | None = None, **keywords: Any) -> Callable[[Any], Any]:
    """Enter a class in the list; keywords are its hyper-parameters."""

    def enter(cls: Any) -> Any:
        FAULTS.append(Fault(cls.__name__, functools.partial(cls, **keywords), check, saying, config))
        return cls

    return enter


def target(name: str, **keys: Any) -> dict[str, Any]:
    """A YAML row that names a class of this file."""
    return {"_target_": f"{__name__}.{name}", "_partial_": True, **keys}


# -- the future -----------------------------------------------------------------------------------


@caught("no_look_ahead", r"T=37, inputs after 0 replaced: an output up to 0: differs by .* first at row 0, position 0")
class RowMean(Softmax):
    """Adds the mean over the whole row."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k, v, **keywords) + repeat_heads(v, q.shape[2]).mean(1, keepdim=True).mean(
            3, keepdim=True
        )


@caught("no_look_ahead", "inputs after 0 replaced: an output up to 0")
class OffByOneMask(Softmax):
    """Position t reads t + 1."""

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(diagonal=1)


@caught("no_look_ahead", "inputs after 0 replaced", window=4)
class NoncausalWindow(SlidingWindow):
    """A window built without causality inside a causal layer (Zoology's NSA)."""

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return (torch.arange(num_queries)[:, None] - torch.arange(num_keys)).abs() < self.window


@caught("no_look_ahead", "train mode")
class TimeBatchNorm(Softmax):
    """Batch norm over batch and time: statistics of the future, in train mode only."""

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, dropout=dropout, bias=bias)
        self.norm = nn.BatchNorm1d(spec.dim)

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.norm(super().merge(x, heads).mT).mT


@caught("no_look_ahead", "inputs after")
class RankedKeys(Softmax):
    """Reads the keys of the past that are among the largest of the row: a leak without a gradient."""

    patterns = Pattern.CAUSAL_SELF

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        size = k.square().sum((2, 3))
        largest = torch.zeros_like(size).scatter(1, size.topk(max(1, k.shape[1] // 2)).indices, 1.0).bool()
        visible = largest[:, None, None, :] & torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        return self._sdpa(q, k, v, visible | torch.eye(k.shape[1], dtype=torch.bool), False)


@caught("no_look_ahead", "inputs after")
class GlobalStabiliser(QKVAttention):
    """FAVOR+ features stabilised by the maximum over all keys, not cancelled because of an eps (CAB's Performer)."""

    patterns = Pattern.CAUSAL_SELF
    paper = "https://arxiv.org/abs/2009.14794"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        q, k = ((x - x.amax((1, 3), keepdim=True)).exp() + 1e-4 for x in (q, repeat_heads(k, q.shape[2])))
        scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
        return torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), repeat_heads(v, q.shape[2]))


@caught("no_look_ahead", "cut off")
class LengthLeak(Softmax):
    """Scores scaled by the length of the row: no content leaks, but no decoder knows it (cosFormer's M)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q * q.shape[1] / 37, k, v, **keywords)


@caught("no_look_ahead", "T=131, inputs after 64 replaced: an output up to 64: differs by .* position 64")
class LeakyChunk(Softmax):
    """From position 64 on, a chunk sees all of itself: right for every row of one chunk."""

    patterns = Pattern.CAUSAL_SELF

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        chunk = torch.arange(num_keys) // 64
        same = (chunk[:num_queries, None] == chunk) & (chunk > 0)
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril() | same


@caught("no_look_ahead", "T=11, inputs after 0 replaced", fewer=True)
@caught("no_look_ahead", "T=37, inputs after 0 replaced", fewer=False)
class MixedQueries(Softmax):
    """Causal cross-attention whose queries are averaged with the next, where they are fewer (more) than the keys."""

    patterns = Pattern.CAUSAL_CROSS

    def __init__(self, spec: LayerSpec, *, fewer: bool):
        super().__init__(spec)
        self.fewer = fewer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        applies = self.fewer == (q.shape[1] < k.shape[1])
        return super().attend((q + q.roll(-1, dims=1)) / 2 if applies else q, k, v, **keywords)


# -- mixing ---------------------------------------------------------------------------------------


@caught("mixing", "outputs ignore the values of all earlier inputs")
class UnsummedMemory(QKVAttention):
    """CAB's causal ABC: a slot holds exp(a_t - lse_{i<=t} a_i) k_t, not its sum over i <= t; the past only weighs."""

    patterns = Pattern.CAUSAL_SELF
    paper = "https://arxiv.org/abs/2110.02488"

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.slots = nn.Linear(self.key_dim, 5, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        logits = self.slots(k)
        share = (logits - logits.logcumsumexp(1))[..., None].exp()
        keys, values = share * k[..., None, :], share * v[..., None, :]  # both lack .cumsum(1)
        weights = torch.einsum("bthk,bthck->bthc", q, keys).softmax(-1)
        return torch.einsum("bthc,bthcv->bthv", weights, values)


@caught("mixing", "outputs ignore all later inputs")
class SecretlyCausal(Softmax):
    """Declares noncausal and computes causal (S4D without its second direction)."""

    patterns = Pattern.NONCAUSAL_SELF

    def visible(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril()


@caught("mixing", "outputs ignore all earlier context")
class IgnoredContext(Softmax):
    """Cross-attention that attends to its own queries."""

    patterns = Pattern.CROSS

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, x)


@caught("mixing", 'declared as paper = "control", but earlier inputs matter')
class MixingControl(Softmax):
    """Says that it mixes nothing."""

    paper = "control"


# -- decoding -------------------------------------------------------------------------------------


@caught("step_by_step", "T=37, step against forward: differs by .* position 1")
class OverwrittenState(Softmax):
    """A step replaces what was written instead of adding to it."""

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> KVCache:
        return KVCache(k=k, v=v, mask=keywords.get("key_mask"), position=state.position + k.shape[1])


@caught("step_by_step", "rotary positions")
class ForgetfulRotation(Softmax):
    """Every step turns its query as if it stood at position 0."""

    def query(self, x: Tensor, start: int = 0) -> Tensor:
        return super().query(x, 0)


@caught("step_by_step", "masked context")
class UnmaskedDecoding(Softmax):
    """Decoding forgets which keys of the context are padding."""

    def init_state(self, batch_size: int, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> State:
        return super().init_state(batch_size, context)


@caught("step_by_step", "has no decode state; write init_state and step")
class NoDecoding(Softmax):
    """Causal, and silent about why it cannot decode."""

    def init_memory(self, batch_size: int, like: Tensor) -> KVCache:
        raise UnsupportedPattern(f"{type(self).__name__} has no decode state")


@caught("prefill", "prompt of 1: steps after prefill against forward")
class ShortPrefill(Softmax):
    """The state after a prompt lacks its last position."""

    patterns = Pattern.CAUSAL_SELF

    def prefill(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        output, _ = super().prefill(x)
        return output, super().prefill(x[:, :-1])[1] if x.shape[1] > 1 else self.init_state(x.shape[0])


@caught("state_apart", "step changes the state it was given .*state.memory")
class InPlaceStep(Linear):
    """Writes into the state that it was passed."""

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> State:
        new = super().update(state, k, v, **keywords)
        assert isinstance(state, Memory) and isinstance(new, Memory)
        return dataclasses.replace(new, memory=state.memory.copy_(new.memory))


@caught("state_apart", "two branches of a state|two decodes side by side|passed twice")
class StateOnTheModule(Softmax):
    """Keeps the cache on itself and hands out a token for it."""

    def init_memory(self, batch_size: int, like: Tensor) -> KVCache:
        self.cache = super().init_memory(batch_size, like)
        return self.cache

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> KVCache:
        self.cache = super().update(self.cache, k, v, **keywords)
        return self.cache


@dataclass(kw_only=True)
class Hoard(KVCache):
    """State whose tensors stand in a dictionary, which `nbytes` does not look into."""

    more: dict[str, Tensor] = field(default_factory=dict)


@caught("state_bytes", "after 64 positions the state holds .* bytes and reports")
class UncountedState(Softmax):
    """Carries more than it reports."""

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> KVCache:
        new = super().update(state, k, v, **keywords)
        return Hoard(k=new.k, v=new.v, mask=new.mask, position=new.position, more={"spare": torch.zeros(1000)})


@caught("state_bytes", "views keep .* bytes alive behind the", window=4)
class WindowAsView(SlidingWindow):
    """A slice of the cache keeps all of it alive."""

    def update(self, state: State, k: Tensor, v: Tensor, **keywords: Any) -> KVCache:
        cache = Softmax.update(self, state, k, v, **keywords)
        return dataclasses.replace(cache, k=cache.k[:, -self.window :], v=cache.v[:, -self.window :])


# -- masks, rows, heads ---------------------------------------------------------------------------


@caught("key_mask", "inputs masked left replaced: differs")
class IgnoredMask(Softmax):
    """Padding is read like anything else."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        return super().attend(q, k, v)


@caught("key_mask", "gradient of .*: not finite")
class EmptyRows(Softmax):
    """The softmax of a row of -inf, patched after the fact: its gradient is NaN."""

    patterns = Pattern.CAUSAL_SELF

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        scores = torch.einsum("bthk,bshk->bhts", q, k) / self.key_dim**0.5
        if is_causal:
            visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        if visible is not None:
            scores = scores + torch.zeros_like(scores).masked_fill(~visible, -torch.inf)
        return torch.einsum("bhts,bshv->bthv", scores.softmax(-1).nan_to_num(), v)


@caught("batch_rows", "other rows replaced: row 0")
class MixedBatch(Softmax):
    """Values are centred over the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k, v - v.mean(0, keepdim=True), **keywords)


@caught("batch_rows", "rows in another order")
class NumberedRows(Softmax):
    """Treats a row by its place in the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k, v, **keywords) * torch.arange(1, len(q) + 1).to(q)[:, None, None, None]


@caught("batch_rows", "a row on its own")
class DividedByBatch(Softmax):
    """Scales by the size of the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k, v, **keywords) / len(q)


@caught("key_mask", "a mask of all ones against none")
class BiasedMask(Softmax):
    """A mask is added to the values, ones included."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, **terms: Tensor) -> Tensor:
        return super().attend(q, k, v if key_mask is None else v + key_mask[..., None, None], key_mask=key_mask)


@caught("heads", "H=3, G=3: other weights for head 0 of k_proj and v_proj change heads .* instead of \\[0\\]")
class SwappedHeadAxis(Softmax):
    """Heads split off by `view` where a transpose was due; shapes agree."""

    patterns = Pattern.NONCAUSAL_SELF

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        q, k, v = (x.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).reshape(q.shape[0], q.shape[2], q.shape[1], -1)


@caught("heads", "H=6, G=2")
class WrongGroups(Softmax):
    """Query head h reads key-value head h mod G."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        times = q.shape[2] // k.shape[2]
        return super().attend(q, k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1), **keywords)


@caught("heads", "merge moves position 18 to others")
class SwappedMerge(Softmax):
    """The heads are joined with time as the inner axis."""

    patterns = Pattern.NONCAUSAL_SELF

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.out_proj(heads.transpose(1, 2).reshape(heads.shape[0], heads.shape[1], -1))


# -- shapes, numbers, seeds -----------------------------------------------------------------------


@caught("patterns", "noncausal self is not declared, yet not refused")
class NeverRefuses(Softmax):
    """Takes any slot and computes what it can."""

    patterns = Pattern.CAUSAL_SELF

    def __init__(self, spec: LayerSpec):
        super().__init__(dataclasses.replace(spec, causal=True, cross=False))


@caught("patterns", r"became \[2, 37, 36\] torch.float32")
class AlwaysFloat32(Softmax):
    """The output has a dtype of its own."""

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return super().merge(x, heads).float()


@caught("shapes", "B=1, T=1, .*: output: not finite")
class Standardised(Softmax):
    """Standardised over positions: 0 / 0 for one position."""

    patterns = Pattern.NONCAUSAL_SELF

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        centred = heads - heads.mean(1, keepdim=True)
        return super().merge(x, centred / centred.square().mean(1, keepdim=True).sqrt())


@caught("gradients", "parameter unused gets no gradient")
class UnusedParameter(Softmax):
    """Counts a parameter that does nothing."""

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.unused = nn.Parameter(torch.zeros(spec.dim))


@caught("precision", "output for inputs of size 100: not finite")
class UnstableSoftmax(Softmax):
    """exp without its maximum."""

    patterns = Pattern.NONCAUSAL_SELF

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        scores = torch.einsum("bthk,bshk->bhts", q, repeat_heads(k, q.shape[2])).exp()
        return torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), repeat_heads(v, q.shape[2]))


@caught("precision", "torch.bfloat16 is off")
class NarrowCounter(QKVAttention):
    """A running mean whose sum and count are kept in the dtype of the values: a bfloat16 count stands still at 256."""

    patterns = Pattern.CAUSAL_SELF
    paper = "ours"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        v = repeat_heads(v, q.shape[2])
        total, count, outputs = torch.zeros_like(v[:, 0]), v.new_zeros(()), []
        for t in range(v.shape[1]):
            total, count = total + v[:, t], count + 1
            outputs.append(total / count)
        return torch.stack(outputs, dim=1)


@caught("precision", "torch.float32 is off")
class HalfInside(Softmax):
    """Works in float16, whatever it is given."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return (
            super().attend(q, k.half().to(k), v, **keywords)
            if k.dtype == torch.float32
            else super().attend(q, k, v, **keywords)
        )


@caught("full_budget", "output against softmax attention: differs")
class UnscaledLogits(Softmax):
    """Scores without 1 / sqrt(K)."""

    full_budget = staticmethod(lambda length: {"dropout": 0.0})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q * self.key_dim**0.5, k, v, **keywords)


@caught("full_budget", "gradient against softmax attention: differs")
class DetachedKeys(Softmax):
    """The right values with the wrong gradient."""

    full_budget = staticmethod(lambda length: {"dropout": 0.0})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k.detach(), v, **keywords)


@caught("same_seed", "a second forward in eval mode")
class RedrawnFeatures(Softmax):
    """Draws its random projection anew in every forward, also in evaluation (Zoology's BigBird blocks)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k @ torch.randn(self.key_dim, self.key_dim).to(k), v, **keywords)


@caught("same_seed", "two constructions under one seed differ in shift")
class OwnGenerator(Softmax):
    """Draws its start from a generator that nobody seeds."""

    generator = torch.Generator().manual_seed(0)

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.shift = nn.Parameter(torch.randn(spec.dim, generator=self.generator))

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return super().merge(x, heads) + self.shift


@caught("state_dict", "loaded from another's state dict")
class HiddenProjection(Softmax):
    """A random matrix that the state dict lacks (CAB's Performer)."""

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.projection = torch.randn(self.key_dim, self.key_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return super().attend(q, k @ self.projection.to(k), v, **keywords)


@caught("dropout", "changes nothing in train mode")
class SilentDropout(Softmax):
    """Takes a dropout and ignores it (six of CAB's mechanisms)."""

    def __init__(self, spec: LayerSpec, *, dropout: float = 0.0):
        super().__init__(spec)


@caught("dropout", "eval mode with dropout=0.5")
class EndlessDropout(Softmax):
    """Drops in evaluation as well."""

    def merge(self, x: Tensor, heads: Tensor) -> Tensor:
        return super().merge(x, F.dropout(heads, self.dropout))


# -- YAML -----------------------------------------------------------------------------------------


@caught("yaml_keys", "has no keyword widnow", target("StaleKey", window=4, widnow=4), window=4)
class StaleKey(NoncausalWindow):
    def __init__(self, spec: LayerSpec, *, window: int):
        super().__init__(spec, window=window)


@caught("yaml_keys", "its YAML hides: bias, dropout", target("HiddenKeys", window=4), window=4)
class HiddenKeys(SlidingWindow):
    def __init__(self, spec: LayerSpec, *, window: int, dropout: float = 0.0, bias: bool = False):
        super().__init__(spec, window=window, dropout=dropout, bias=bias)


@caught("yaml_keys", "takes \\*args or \\*\\*kwargs", target("AnyKeyword"))
class AnyKeyword(Softmax):
    def __init__(self, spec: LayerSpec, **kwargs: Any):
        super().__init__(spec, **kwargs)


@caught("yaml_keys", "defines no", target("Missing"))
class MissingTarget(Softmax):
    """Its row names a class that is not there."""
