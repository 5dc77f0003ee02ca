"""Bi-level routing against regions and blocks written out, and softmax over the tokens of those that are chosen."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.sparse import _selection
from attentions.sparse.biformer import BiFormer

B, M, H, SIZE = 2, 30, 6, 3
GRID = (5, 7)  # 3 x 3 regions of 2 x 3 positions, the last ones cut


@pytest.fixture(params=["gathered", "masked"])
def form(request, monkeypatch):
    monkeypatch.setattr(_selection, "GATHER_COST", -math.inf if request.param == "gathered" else math.inf)


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(grid=None, *, causal=False, cross=False, num_kv_heads=None, seed=0, **keywords):
    spec = LayerSpec(dim=M, num_heads=H, num_kv_heads=num_kv_heads, causal=causal, cross=cross, grid=grid)
    torch.manual_seed(seed)
    keywords = {"num_regions": 3, "block_size": SIZE, "top_k": 2, "lepe_kernel": 3, **keywords}
    layer = BiFormer(spec, **keywords).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def regions(layer, length):
    """Positions of each region."""
    if layer.grid is None:
        return [list(range(start, min(start + SIZE, length))) for start in range(0, length, SIZE)]
    rows, columns = GRID
    return [
        [r * columns + c for r in range(top, min(top + 2, rows)) for c in range(left, min(left + 3, columns))]
        for top in range(0, rows, 2)
        for left in range(0, columns, 3)
    ]


def heads_of(layer, x, source):
    """q, k, v [B, T or S, H, D], keys and values as each query head reads them."""
    G = layer.spec.kv_heads
    q = (x @ layer.q_proj.weight.T).unflatten(-1, (H, -1))
    k, v = (
        (source @ w.weight.T).unflatten(-1, (G, -1)).repeat_interleave(H // G, 2) for w in (layer.k_proj, layer.v_proj)
    )
    return q, k, v  # fmt: skip


def lepe(layer, v, mask):
    """The convolution of the values, tap by tap: [B, T, H, D]."""
    G, width = layer.spec.kv_heads, layer.lepe.weight.shape[-1]
    v, out = v[:, :, :: H // G].flatten(2), []
    for b in range(B):
        for t in range(v.shape[1]):
            total = layer.lepe.bias
            for i in range(width):
                if layer.grid is None:
                    taps = [(t + i - (width - 1 if layer.spec.causal else width // 2), layer.lepe.weight[:, i])]
                    taps = [tap for tap in taps if 0 <= tap[0] < v.shape[1]]
                else:
                    (row, column), taps = divmod(t, GRID[1]), []
                    for j in range(width):
                        r, c = row + i - width // 2, column + j - width // 2
                        if 0 <= r < GRID[0] and 0 <= c < GRID[1]:
                            taps.append((r * GRID[1] + c, layer.lepe.weight[:, 0, i, j]))
                total = total + sum(weight * v[b, at] for at, weight in taps if mask is None or mask[b, at])
            out.append(total)
    return torch.stack(out).view(B, -1, G, M // H).repeat_interleave(H // G, 2)


def naive(layer, x, source, mask=None):
    q, k, v = heads_of(layer, x, source)
    scale, everything = (M if layer.factor < 1 else M // H) ** -0.5, regions(layer, source.shape[1])
    heads = torch.zeros_like(q)
    for b in range(B):
        real = [[j for j in region if mask is None or mask[b, j]] for region in everything]
        for t in range(x.shape[1]):
            own = next((n for n, region in enumerate(everything) if t in region), None)
            causal = layer.spec.causal and not layer.spec.cross
            if layer.spec.causal or layer.spec.cross:
                query = q[b, t]
            else:
                query = q[b, real[own]].mean(0) if real[own] else 0 * q[b, 0]
            gates = {n: (query * k[b, keys].mean(0)).sum().item() for n, keys in enumerate(real) if keys}
            if causal:
                gates = {n: math.inf if n == own else gate for n, gate in gates.items() if n <= own}
            chosen = sorted(gates, key=lambda n: (-gates[n], n))[: layer.top_k]
            keys = [j for n in chosen for j in real[n] if not causal or j <= t]
            if keys:
                weights = (torch.einsum("hd,nhd->hn", q[b, t], k[b, keys]) * scale).softmax(-1)
                heads[b, t] = torch.einsum("hn,nhd->hd", weights, v[b, keys])
    if layer.lepe is not None:
        heads = heads + lepe(layer, v, mask)
    return heads.flatten(2) @ layer.out_proj.weight.T


@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize(("grid", "causal"), [(None, False), (None, True), (GRID, False), (GRID, True)])
def test_tokens_read_the_regions_that_their_region_chooses(grid, causal, num_kv_heads, form, agree):
    layer = build(grid, causal=causal, num_kv_heads=num_kv_heads, scale="full" if num_kv_heads == 6 else "head")
    x = stream(35 if grid else 14)
    mask = torch.rand(B, x.shape[1], generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :4] = False  # a whole block, and queries without a key
    for seen in (None, mask):
        agree(lambda m=seen: layer(x, key_mask=m), lambda m=seen: naive(layer, x, x, m), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_each_token_routes_itself_to_a_context(causal, form, agree):
    layer, x, context = build(causal=causal, cross=True, num_kv_heads=2), stream(5), stream(14, seed=2)
    mask = torch.rand(B, 14, generator=torch.Generator().manual_seed(3)) > 0.4
    for seen in (None, mask):
        agree(
            lambda m=seen: layer(x, context, key_mask=m),
            lambda m=seen: naive(layer, x, context, m),
            [x, context, *layer.parameters()],
        )


@pytest.mark.parametrize(("grid", "causal"), [(None, False), (None, True), (GRID, False)])
def test_all_regions_without_lepe_are_softmax(grid, causal):
    layer = build(grid, causal=causal, top_k=40, lepe_kernel=0, scale="head")
    reference, x = Softmax(layer.spec).double(), stream(35)
    reference.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), reference(x))


@pytest.mark.parametrize("grid", [None, (4, 6)])  # regions of equal size, so that they can change places
def test_regions_in_another_order_give_outputs_in_that_order(grid):
    layer, x = build(grid, lepe_kernel=0, num_regions=2), stream(24)
    order = torch.arange(24) if grid is None else layer._order(x.device)
    order = order.view(-1, layer.block_size)
    other = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(1))]
    moved = torch.empty_like(x)
    moved[:, order.flatten()] = x[:, other.flatten()]
    got, want = layer(moved)[:, order.flatten()], layer(x)[:, other.flatten()]
    torch.testing.assert_close(got, want)
    assert not torch.equal(order, other)


def test_the_choice_has_no_gradient(monkeypatch):
    layer, x = build(lepe_kernel=0), stream(14).requires_grad_()
    want = torch.autograd.grad(layer(x).square().sum(), x)[0]
    blocks = []
    select = layer.select
    monkeypatch.setattr(layer, "select", lambda *a, **k: blocks.append(select(*a, **k)) or blocks[-1])
    layer(x)
    monkeypatch.setattr(layer, "select", lambda *a, **k: blocks[0])  # the choice as a constant
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x)[0], want)


def test_decoding_needs_no_state_for_the_convolution():
    layer, x = build(causal=True, num_kv_heads=2, lepe_kernel=5), stream(17)
    want, (output, state) = layer(x), layer.prefill(x[:, :2])
    torch.testing.assert_close(output, want[:, :2])
    for t in range(2, 17):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    assert state.nbytes == B * 8 * 2 * 5 * (17 + 17 + 6)  # keys, values, means


def test_the_published_defaults_parameters_and_bad_values():
    spec = LayerSpec(dim=M, num_heads=H, causal=False, grid=(49, 49))
    layer = BiFormer(spec)
    assert (layer.region, layer.top_k, layer.lepe.kernel_size) == ([7, 7], 4, (5, 5))
    assert sum(p.numel() for p in layer.parameters()) == 4 * M * M + 26 * M
    assert sum(p.numel() for p in build(lepe_kernel=5).parameters()) == 4 * M * M + 6 * M
    for keywords, words in (
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"num_regions": 0}, "num_regions must be at least 1, got 0"),
        ({"lepe_kernel": 4}, "lepe_kernel must be 0 or positive, odd when noncausal, got 4; nearest: 3, 5"),
        ({"scale": "half"}, "scale must be one of full, head, got half"),
        ({"grid": (2, 3, 4)}, "regions need a grid of rows and columns"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**keywords)
    with pytest.raises(ValueError, match=r"a grid of \(5, 7\) needs 35 positions, got 14"):
        build(GRID)(stream(14))
