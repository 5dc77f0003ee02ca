"""Neighborhood attention against a loop over the positions that a window holds, on a line and on an image."""

import math

import pytest
import torch

from attentions.base import LayerSpec
from attentions.dense.softmax import Softmax
from attentions.local.neighborhood import Neighborhood
from attentions.local.sliding_window import SlidingWindow
from attentions.sparse import _selection

B, T, S, M, H = 2, 17, 11, 20, 4
GRID = (5, 7)


def stream(length=T, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(grid=None, *, causal=False, cross=False, num_kv_heads=None, seed=0, **keywords):
    spec = LayerSpec(
        dim=M, num_heads=H, num_kv_heads=num_kv_heads, causal=causal, cross=cross, grid=grid, max_length=22,
        context_length=S if cross else None,
    )  # fmt: skip
    torch.manual_seed(seed)
    layer = Neighborhood(spec, **keywords).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def window(i, n, kernel, dilation, causal):
    """Keys of position i of an axis, each with its offset in units of the dilation: NATTEN's rule, clamped."""
    if causal:
        return [(i - a * dilation, -a) for a in range(kernel) if i - a * dilation >= 0]
    dilation = max(1, min(dilation, n // kernel))
    group = list(range(i % dilation, n, dilation))
    at, size, width = group.index(i), len(group), min(kernel, n)
    left, right = width // 2, width // 2 + width % 2 - 1
    start = max(at - left, 0) + ((size - right - at - 1) if at + right >= size else 0)
    return [(group[j], j - at) for j in range(start, start + width)]


def each(value, axis):
    return value if isinstance(value, int) else value[axis]


def windows(layer, t, num_queries, num_keys, kernel, dilation):
    """Keys of query t with their offsets on each axis."""
    grid, causal = layer.grid, layer.spec.causal and not layer.spec.cross
    if grid is None:
        if layer.spec.cross:
            t = min(t * S // 22 if layer.spec.causal else t * num_keys // num_queries, num_keys - 1)
        return [(j, (o,)) for j, o in window(t, num_keys, each(kernel, 0), each(dilation, 0), causal)]
    rows, columns = (
        window(i, n, each(kernel, axis), each(dilation, axis), causal)
        for axis, (i, n) in enumerate(zip(divmod(t, grid[1]), grid, strict=True))
    )
    return [(r * grid[1] + c, (y, x)) for r, y in rows for c, x in columns]


def naive(layer, x, source, *, kernel, dilation=1, mask=None):
    causal, rows = layer.spec.causal and not layer.spec.cross, []
    q = (x @ layer.q_proj.weight.T).unflatten(-1, (H, -1))
    k, v = ((source @ w.weight.T).unflatten(-1, (layer.spec.kv_heads, -1)) for w in (layer.k_proj, layer.v_proj))
    k, v = (part.repeat_interleave(H // layer.spec.kv_heads, 2) for part in (k, v))
    sizes = [each(kernel, axis) for axis in range(len(layer.kernel))]
    table = layer.relative_bias
    if table is not None:  # [H, 2 L - 1, ...], causal [H, L, ...]
        table = table.view(H, *(size if causal else 2 * size - 1 for size in sizes))
    for b in range(B):
        for t in range(x.shape[1]):
            keys = windows(layer, t, x.shape[1], source.shape[1], kernel, dilation)
            keys = [(j, offset) for j, offset in keys if mask is None or mask[b, j]]
            at = [j for j, _ in keys]
            scores = torch.einsum("hd,nhd->hn", q[b, t], k[b, at]) / math.sqrt(M // H)
            if table is not None and keys:
                where = [[o + size - 1 for o, size in zip(offset, sizes, strict=True)] for _, offset in keys]
                scores = scores + torch.stack([table[(slice(None), *place)] for place in where], -1)
            weights = scores.exp()
            read = torch.einsum("hn,nhd->hd", weights, v[b, at])  # an empty sum reads zero
            rows.append(layer.out_proj.weight @ (read / weights.sum(-1, keepdim=True) if keys else read).flatten())
    return torch.stack(rows).view_as(x)


@pytest.fixture(params=["gathered", "masked", "bias"])
def relative_bias(request, monkeypatch):
    """With a bias or without, and then from gathered keys or under a mask."""
    monkeypatch.setattr(_selection, "GATHER_COST", -math.inf if request.param == "gathered" else math.inf)
    return request.param == "bias"


LINE = [(4, 1), (3, 2), (5, 9), (23, 1)]  # the last two are clamped
IMAGE = [(3, 1), ([2, 3], [2, 1]), ([4, 9], 2)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kernel", "dilation"), LINE)
def test_on_a_line_each_query_reads_its_window(kernel, dilation, causal, relative_bias, agree):
    layout = {"kernel": kernel, "dilation": dilation}
    layer = build(causal=causal, relative_bias=relative_bias, **layout)
    x, mask = stream(), torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    agree(lambda: layer(x), lambda: naive(layer, x, x, **layout), [x, *layer.parameters()])
    torch.testing.assert_close(layer(x, key_mask=mask), naive(layer, x, x, mask=mask, **layout))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kernel", "dilation"), IMAGE)
def test_on_an_image_each_query_reads_the_product_of_its_windows(kernel, dilation, causal, relative_bias, agree):
    layout = {"kernel": kernel, "dilation": dilation}
    layer, x = build(GRID, causal=causal, relative_bias=relative_bias, **layout), stream(35)
    agree(lambda: layer(x), lambda: naive(layer, x, x, **layout), [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_and_a_context(causal, relative_bias, agree):
    layout = {"kernel": 4, "dilation": 2}
    layer, x = build(causal=causal, num_kv_heads=2, relative_bias=relative_bias, **layout), stream()
    agree(lambda: layer(x), lambda: naive(layer, x, x, **layout), [x, *layer.parameters()])
    layer = build(causal=causal, cross=True, num_kv_heads=2, relative_bias=relative_bias, **layout)
    context, mask = stream(S, seed=2), torch.rand(B, S, generator=torch.Generator().manual_seed(3)) > 0.2
    for length in (7, T):
        x = stream(length)
        agree(
            lambda x=x: layer(x, context, key_mask=mask),
            lambda x=x: naive(layer, x, context, mask=mask, **layout),
            [x, context, *layer.parameters()],
        )


def read_by(layer, length):
    """[T, T] bool: whether query i reads key j."""
    keys, _ = layer.neighbours(torch.arange(length), length, length)
    seen = torch.zeros(length, length + 1, dtype=torch.bool).scatter(1, keys % (length + 1), True)
    assert (seen[:, :-1].sum(1) == (keys >= 0).sum(1)).all(), "a key is listed twice"
    return seen[:, :-1]


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 4, 5])
def test_every_query_reads_exactly_as_many_keys_itself_among_them(kernel, dilation):
    for length in (kernel * dilation, kernel * dilation + 1, 29):
        seen = read_by(build(kernel=kernel, dilation=dilation), length)
        assert (seen.sum(1) == kernel).all() and seen.diagonal().all()
        behind = torch.arange(length)[:, None] - torch.arange(length)
        assert (behind[seen] % dilation == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_of_an_image_is_the_outer_product_of_the_masks_of_its_axes(causal):
    image = read_by(build(GRID, causal=causal, kernel=[2, 3], dilation=[2, 1]), 35)
    rows = read_by(build(causal=causal, kernel=2, dilation=2), GRID[0])
    columns = read_by(build(causal=causal, kernel=3), GRID[1])
    assert torch.equal(image, torch.kron(rows.int(), columns.int()).bool())
    if causal:
        assert not image.triu(1).any()


def test_shifting_the_input_shifts_the_output_away_from_borders():
    layer, x = build(kernel=5, dilation=2), stream(43)
    got, want = layer(x.roll(4, dims=1)), layer(x).roll(4, dims=1)
    torch.testing.assert_close(got[:, 12:35], want[:, 12:35])
    assert not torch.allclose(got[:, :4], want[:, :4])


def test_a_kernel_of_the_length_is_softmax_and_a_causal_one_a_sliding_window(make_layer):
    x = stream()
    for causal in (False, True):
        layer = build(causal=causal, kernel=T, relative_bias=False)
        reference = Softmax(layer.spec).double()
        reference.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), reference(x))
    layer = build(causal=True, kernel=6, relative_bias=False)
    window = SlidingWindow(layer.spec, window=6).double()
    window.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), window(x))


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize(("grid", "kernel", "dilation", "held"), [
    (None, 4, 1, 4), (None, 4, 2, 7), (GRID, 2, 1, 9), (GRID, [2, 3], [2, 1], 17),
])  # fmt: skip
def test_decoding_keeps_the_window_only(grid, kernel, dilation, held, relative_bias):
    layer = build(grid, causal=True, kernel=kernel, dilation=dilation, relative_bias=relative_bias)
    x = stream(35)
    want, (output, state) = layer(x), layer.prefill(x[:, :3])
    torch.testing.assert_close(output, want[:, :3])
    for t in range(3, 35):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
        assert state.nbytes == 2 * B * layer.state_bytes(t + 1)  # float64
        assert state.k.untyped_storage().nbytes() == state.k.nbytes, "a view keeps the dropped positions alive"
    assert state.k.shape[1] == held


def test_the_published_defaults_and_the_size_of_the_bias():
    layer = build()
    assert (layer.kernel, layer.dilation, layer.relative_bias.shape) == ([7], [1], (H, 13))
    assert build(GRID).relative_bias.shape == (H, 13 * 13)
    assert build(GRID, causal=True).relative_bias.shape == (H, 7 * 7)
    assert sum(p.numel() for p in build(relative_bias=False).parameters()) == 4 * M * M


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"kernel": 0}, "kernel must be at least 1, got 0"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"kernel": [3, 3]}, "kernel needs one number or 1, one per axis, got 2"),
        ({"grid": GRID, "dilation": [1, 2, 1]}, "dilation needs one number or 2, one per axis, got 3"),
    ],
)
def test_bad_values_are_refused(keywords, words):
    with pytest.raises(ValueError, match=words):
        build(**keywords)


def test_a_sequence_must_fill_the_grid():
    with pytest.raises(ValueError, match=r"a grid of \(5, 7\) needs 35 positions, got 17"):
        build(GRID)(stream())
