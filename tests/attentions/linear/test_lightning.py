"""Lightning attention against eq. 3 with its decayed mask, its two schedules against each other and the recurrence."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attentions.base import LayerSpec
from attentions.linear.lightning import LightningAttention, alibi_slopes, log_decays, tiled

B, T, M, H = 2, 37, 60, 6


def naive(layer, x, context=None, key_mask=None):
    """o_i = sum_j lambda^|i - j| (q_i.k_j) v_j over the visible j (in cross-attention lambda = 1); norm; projection."""
    source = x if context is None else context
    width = layer.key_dim
    rows = []
    for b in range(B):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * layer.spec.kv_heads // H
                own, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
                q, total = layer.q_proj.weight[own] @ x[b, i], torch.zeros(width, dtype=x.dtype)
                for j in range(i + 1 if context is None and layer.spec.causal else source.shape[1]):
                    if key_mask is None or key_mask[b, j]:
                        k, v = (proj.weight[shared] @ source[b, j] for proj in (layer.k_proj, layer.v_proj))
                        kept = 1.0 if layer.spec.cross else math.exp(layer.log_decays[g] * abs(i - j))
                        total = total + kept * (q @ k) * v
                heads.append(total)
            o = torch.cat(heads)
            rows.append(layer.out_proj.weight @ (o / (o.square().mean() + 1e-6).sqrt()))
    return torch.stack(rows).reshape(x.shape)


def stream(length=T):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["chunk", "tiled"])
@pytest.mark.parametrize(("decay", "num_kv_heads"), [("repo", 6), ("paper", 2), ("fla", 3), ("none", 6)])
def test_causal_self_attention_equals_the_decayed_scores(decay, num_kv_heads, schedule, make_layer, agree):
    layer = make_layer(LightningAttention, dim=M, num_kv_heads=num_kv_heads, decay=decay, schedule=schedule)
    layer.chunk_size = 5
    x = stream(17)
    mask = torch.rand(B, 17, generator=torch.Generator().manual_seed(1)) > 0.2
    mask[:, 0] = True
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), [x, *layer.parameters()])


@pytest.mark.parametrize("schedule", ["chunk", "tiled"])
@pytest.mark.parametrize(("decay", "num_kv_heads"), [("repo", 2), ("none", 6)])
def test_noncausal_self_attention_decays_to_either_side_and_counts_itself_once(
    decay, num_kv_heads, schedule, make_layer, agree
):
    layer = make_layer(
        LightningAttention, dim=M, causal=False, num_kv_heads=num_kv_heads, decay=decay, schedule=schedule
    )
    layer.chunk_size = 5
    x = stream(13)
    mask = torch.rand(B, 13, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, key_mask=mask), lambda: naive(layer, x, key_mask=mask), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_reads_the_whole_context_without_decay(causal, make_layer, agree):
    layer = make_layer(LightningAttention, dim=M, causal=causal, cross=True, num_kv_heads=2)
    x, context = stream(5), torch.randn(B, 11, M, dtype=torch.float64)
    mask = torch.rand(B, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    agree(lambda: layer(x, context, key_mask=mask), lambda: naive(layer, x, context, mask), [x, context])


@pytest.mark.parametrize("length", [3 * 16, 3 * 16 + 7, 16 - 5])
@pytest.mark.parametrize("decay", [1.0, 0.99, 0.74])
def test_tiles_chunks_and_the_recurrence_are_one_function(decay, length, make_layer, agree):
    layers = [make_layer(LightningAttention, dim=M, schedule=schedule) for schedule in ("chunk", "tiled")]
    for layer in layers:
        layer.chunk_size = 16
        layer.log_decays = (math.log(decay),) * H
    x = stream(length)
    chunk, tile = layers

    def recurrent():
        q = chunk.q_proj(x).unflatten(-1, (H, -1))
        k, v = (proj(x).unflatten(-1, (H, -1)) for proj in (chunk.k_proj, chunk.v_proj))
        memory, outputs = torch.zeros(B, H, 10, 10, dtype=x.dtype), []
        for t in range(length):
            memory = decay * memory + k[:, t, :, :, None] * v[:, t, :, None]
            outputs.append((q[:, t, :, :, None] * memory).sum(-2))
        return chunk.merge(x, torch.stack(outputs, dim=1))

    agree(lambda: chunk(x), recurrent, [x, *chunk.parameters()])
    agree(lambda: tile(x), lambda: chunk(x), [x])
    state, outputs = tile.init_state(B), []
    for t in range(length):
        output, state = tile.step(x[:, t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), tile(x), rtol=1e-9, atol=1e-9)


def test_the_backward_pass_by_chunks_equals_the_paper_s_equations():
    """dQ, dK and dV of every chunk from the state before it and the gradient of the state after it."""
    size, length, width, decay = 8, 8 * 3 + 5, 5, 0.74
    q, k, v, given = torch.randn(4, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b, c = leaves = [x[None, :, None].clone().requires_grad_() for x in (q, k, v)]
    output = tiled(a, b, c, torch.tensor([math.log(decay)], dtype=torch.float64), tile_size=size)
    got = [grad[0, :, 0] for grad in torch.autograd.grad(output, leaves, given[None, :, None])]
    parts = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    states, state = [], torch.zeros(width, width, dtype=torch.float64)
    for part in parts:
        states.append(state)
        m = part.stop - part.start
        left = decay ** torch.arange(m - 1, -1, -1, dtype=torch.float64)[:, None]
        state = decay**m * state + (left * k[part]).T @ v[part]
    grad_state, want = torch.zeros(width, width, dtype=torch.float64), [torch.zeros_like(q) for _ in range(3)]
    for part, before in zip(reversed(parts), reversed(states), strict=True):
        m = part.stop - part.start
        place = torch.arange(m, dtype=torch.float64)
        mask = (decay ** (place[:, None] - place)).tril()
        passed, left = decay ** (place + 1)[:, None], decay ** (m - 1 - place)[:, None]
        inner = (given[part] @ v[part].T) * mask
        want[0][part] = inner @ k[part] + passed * (given[part] @ before.T)
        want[1][part] = inner.T @ q[part] + left * (v[part] @ grad_state.T)
        want[2][part] = ((q[part] @ k[part].T) * mask).T @ given[part] + left * (k[part] @ grad_state)
        grad_state = decay**m * grad_state + (passed * q[part]).T @ given[part]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """The largest tensor made inside, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_tiles_never_hold_a_matrix_of_all_scores():
    length, size = 256, 8
    q, k, v = (torch.randn(1, length, 1, 3, requires_grad=True) for _ in range(3))
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = tiled(q, k, v, torch.tensor([-0.1]), tile_size=size)
        numbers = sum(storage.nbytes() // 4 for storage in kept.values())
        output.sum().backward()
    assert seen.numbers <= length * size, "a diagonal of tiles is the most there is at a time"
    assert numbers < length * length / 8, "tiles are formed again in the backward pass"


def test_without_decay_it_is_the_running_sum_of_keys_and_values(make_layer):
    layer = make_layer(LightningAttention, dim=M, decay="none")
    q, k, v = torch.randn(3, B, T, H, 10, dtype=torch.float64)
    sums = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    torch.testing.assert_close(layer.attend(q, k, v), torch.einsum("bthk,bthkv->bthv", q, sums))


def test_the_three_conventions_of_the_decay():
    def rates(kind, *arguments):
        return [-rate for rate in log_decays(kind, *arguments)]

    # eq. 10 at the third of four layers, H = 4: 8 h / H (1 - l / L), l = 2
    assert rates("paper", 4, 2, 4) == pytest.approx([1, 2, 3, 4])
    assert rates("fla", 4, 2, 4) == pytest.approx([0, 1, 2, 3])
    assert rates("repo", 4, 0, 4) == pytest.approx([s * (1 + 1e-5) for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256)])
    assert rates("repo", 4, 3, 4) == pytest.approx([s * 1e-5 for s in (1 / 4, 1 / 16, 1 / 64, 1 / 256)])
    assert rates("repo", 2, 0, 1) == pytest.approx([(1 + 1e-5) / 16, (1 + 1e-5) / 256])
    assert log_decays("none", 3, 1, 4) == (0.0, 0.0, 0.0)
    # ALiBi's slopes for 6 heads: those of 4, then the first and the third of 8
    assert alibi_slopes(6) == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert alibi_slopes(8) == pytest.approx([2.0**-h for h in range(1, 9)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float64(dtype, make_layer):
    layer, x = make_layer(LightningAttention, dim=M), stream(3 * 64 + 7)
    want = layer(x).detach()
    got = layer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    # bfloat16 keeps 8 bits: a few roundings of 2^-8 in a row
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))


def test_it_has_the_parameters_of_softmax_and_a_state_of_key_times_value(make_layer):
    layer = make_layer(LightningAttention, dim=M).float()
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * M * M
    assert layer.init_state(B).nbytes == B * layer.state_bytes(T) == B * H * 10 * 10 * 4


@pytest.mark.parametrize("keyword", ["decay", "schedule"])
def test_an_unknown_word_is_refused_with_the_valid_ones(keyword):
    with pytest.raises(ValueError, match=rf"{keyword} must be one of .*, got quick"):
        LightningAttention(LayerSpec(dim=M, num_heads=H, causal=True), **{keyword: "quick"})
