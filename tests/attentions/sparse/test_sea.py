"""SEA against its estimate, its convolutions tap by tap, its choice of cells and its mixture, query by query."""

import math

import pytest
import torch
import torch.nn.functional as F

from attentions.base import LayerSpec, auxiliary_losses
from attentions.dense.softmax import Softmax
from attentions.sparse.sea import SEA

B, M, H, D, CELLS = 2, 30, 6, 5, 12
SMALL = {"dim": M, "top_k": 2, "num_cells": CELLS}
PREDICTOR = ("row", "decoder")  # what only the losses train in causal forms
PATTERNS = [(False, False), (True, False), (False, True), (True, True)]  # causal, cross


def stream(length, seed=1):
    return torch.randn(B, length, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_keys(length):
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :2] = False  # the first causal queries see nothing
    return mask


def convolved(image, convolution, rows, columns):
    """sum over taps (a, b) of W[:, :, a, b] image[:, row + rows[a], column + columns[b]]; zeros outside."""
    _, height, width = image.shape
    stride = convolution.stride[0]
    out = []
    for t in range(0, height, stride):
        for c in range(width):
            total = image.new_zeros(len(convolution.weight)) if convolution.bias is None else convolution.bias
            for a, down in enumerate(rows):
                for b, right in enumerate(columns):
                    if 0 <= t + down < height and 0 <= c + right < width:
                        total = total + convolution.weight[:, :, a, b] @ image[:, t + down, c + right]
            out.append(total)
    return torch.stack(out, dim=1).unflatten(1, (-1, width))


def resized(row, width):
    """A row of numbers drawn in `width` columns, bilinearly between the middles of its own."""
    out = []
    for c in range(width):
        place = max(0.0, (c + 0.5) * len(row) / width - 0.5)
        left = int(place)
        right = min(left + 1, len(row) - 1)
        out.append(row[left] + (place - left) * (row[right] - row[left]))
    return torch.stack(out)


def drawn(layer, image):
    """Logits [H, T, cells] of an image [channels, T, columns]."""
    decoder, height = layer.decoder, image.shape[1]
    if layer.spec.causal:
        x = F.layer_norm(image, image.shape[-1:], decoder.norm.weight, decoder.norm.bias)
        for convolution in decoder.convolutions:
            x = convolved(x, convolution, (-4, -2, 0), (-2, 0, 2)).relu()
        wide = torch.stack([x[..., c // 4] for c in range(CELLS)], dim=-1)
        logits = convolved(wide, decoder.head, (0,), (0,))
        return F.layer_norm(logits, (CELLS,), decoder.norm_out.weight, decoder.norm_out.bias)
    near = (-1, 0, 1)
    x = convolved(convolved(image, decoder.down, near, near).relu(), decoder.middle, near, near).relu()
    x = convolved(torch.stack([x[:, t // 2] for t in range(2 * x.shape[1])], dim=1), decoder.head, near, near)
    rows = torch.stack([torch.stack([resized(row, CELLS) for row in head]) for head in x])
    return torch.stack([torch.stack([resized(column, height) for column in head.T], dim=1) for head in rows])


def one(layer, x, source, mask):
    """Output [T, M], logits [H, T, cells] and, for every query, its visible keys with their cells."""
    spec, (length, num_keys) = layer.spec, (len(x), len(source))
    group, causal = H // spec.kv_heads, spec.causal and not spec.cross
    q = (x @ layer.q_proj.weight.T).view(length, H, D)
    k, v = ((source @ proj.weight.T).view(num_keys, -1, D) for proj in (layer.k_proj, layer.v_proj))
    k, v = (heads.repeat_interleave(group, dim=1) for heads in (k, v))
    shown = [j for j in range(num_keys) if mask is None or mask[j]]
    seen = [[j for j in shown if not causal or j <= t] for t in range(length)]

    def features(y):
        y = y * D**-0.25
        return torch.exp(layer.performer.projection @ y - y @ y / 2)

    def place(j):
        if layer.places is not None:
            return layer.places[j]
        where = shown.index(j) * (D - 1) / max(1, len(shown) - 1)
        return torch.tensor([max(0.0, 1 - abs(where - c)) for c in range(D)], dtype=torch.float64)

    code = torch.zeros(length, H, 2 * D, dtype=torch.float64)
    for t in range(length):
        for h in range(H):
            shares = [features(q[t, h]) @ features(k[j, h]) for j in seen[t]]
            reads = [share * torch.cat([place(j), v[j, h]]) for share, j in zip(shares, seen[t], strict=True)]
            read = sum(reads) / sum(shares) if shares else torch.zeros(2 * D, dtype=torch.float64)
            pair = torch.cat([read, q[t, h] if spec.cross else v[t, h]])
            inner = layer.encode.weight @ pair + layer.encode.bias
            norm = F.layer_norm(inner, (2 * D,), layer.encode_norm.weight, layer.encode_norm.bias)
            code = code.index_put((torch.tensor(t), torch.tensor(h)), F.gelu(norm))
    rows = (code @ layer.row.weight.T + layer.row.bias).view(length, H, 2 if spec.causal else 4, -1)
    mine = [spec.cross or mask is None or bool(mask[t]) for t in range(length)]
    rows = rows * torch.tensor(mine)[:, None, None, None]
    logits = drawn(layer, rows.permute(1, 2, 0, 3).flatten(0, 1))
    estimate = logits.softmax(-1)
    cells = [{j: math.floor((r + 0.5) * CELLS / len(keys)) for r, j in enumerate(keys)} for keys in seen]
    out = []
    for t, keys in enumerate(seen):
        budget = min(H * CELLS, max(1, round(H * layer.top_k * CELLS / max(1, len(keys)))))
        flat = estimate[:, t].flatten().tolist()
        chosen = sorted(range(H * CELLS), key=lambda i: (-flat[i], i))[:budget]
        heads = []
        for h in range(H):
            read, average = torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
            if alive := [j for j in keys if h * CELLS + cells[t][j] in chosen]:
                read = (k[alive, h] @ q[t, h] / math.sqrt(D)).softmax(0) @ v[alive, h]
            if keys and spec.causal:
                average = v[keys, h].mean(0)
            elif keys:
                mean = estimate[h, [i for i in range(length) if mine[i]]].mean(0)
                average = sum(mean[cells[t][j]] * v[j, h] for j in keys)
            scale, share = torch.sigmoid(layer.scales.weight @ code[t, h] + layer.scales.bias)
            heads.append(share * scale * read + (1 - share) * average)
        out.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(out), logits, cells


def naive(layer, x, source, mask=None):
    return torch.stack([one(layer, x[b], source[b], None if mask is None else mask[b])[0] for b in range(B)])


@pytest.mark.parametrize(("num_kv_heads", "masked"), [(6, False), (2, True)])
@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
def test_every_query_reads_what_the_estimate_chooses(causal, cross, num_kv_heads, masked, make_layer, agree):
    layer = make_layer(SEA, causal=causal, cross=cross, num_kv_heads=num_kv_heads, **SMALL)
    x, context = stream(7 if cross else 9), stream(9, seed=2) if cross else None
    source = context if cross else x
    mask = some_keys(9) if masked else None
    reached = [value for name, value in layer.named_parameters() if not (causal and name.split(".")[0] in PREDICTOR)]
    agree(
        lambda: layer(x, context, key_mask=mask),
        lambda: naive(layer, x, source, mask),
        [x, context, *reached] if cross else [x, *reached],
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
def test_the_losses_compare_the_estimate_with_dense_attention(causal, cross, masked, make_layer):
    layer = make_layer(SEA, causal=causal, cross=cross, **SMALL).train()
    x, source = stream(7 if cross else 9), stream(9, seed=2 if cross else 1)
    mask = some_keys(9) if masked else None
    layer(*((x, source) if cross else (x,)), key_mask=mask)
    losses = layer.auxiliary_losses()
    q, (k, _) = layer.query(x), layer.key_value(source)
    divergence, square, rows, pairs = 0.0, 0.0, 0, 0
    for b in range(B):
        _, logits, cells = one(layer, x[b], source[b], None if mask is None else mask[b])
        for t, cell in enumerate(cells):
            if not cell or (mask is not None and not cross and not mask[b, t]):
                continue
            keys = list(cell)
            for h in range(H):
                target = (k[b, keys, h] @ q[b, t, h] / math.sqrt(D)).softmax(0)
                estimate = logits[h, t, list(cell.values())].softmax(0)
                divergence += (target * (target / estimate).log()).sum().item()
                square += (target - estimate).square().sum().item()
                rows, pairs = rows + 1, pairs + len(keys)
    assert losses["divergence"].item() == pytest.approx(0.1 * divergence / rows, rel=1e-6)
    assert losses["distance"].item() == pytest.approx(square / pairs, rel=1e-6)


@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
def test_all_cells_and_open_scales_are_softmax_attention(causal, cross, make_layer):
    layer = make_layer(SEA, causal=causal, cross=cross, num_kv_heads=2, **SMALL | {"top_k": 17})
    torch.nn.init.zeros_(layer.scales.weight)
    torch.nn.init.constant_(layer.scales.bias, 100.0)
    dense = make_layer(Softmax, dim=M, causal=causal, cross=cross, num_kv_heads=2)
    dense.load_state_dict({name: layer.state_dict()[name] for name in dense.state_dict()})
    arguments = (stream(11), stream(17)) if cross else (stream(17),)
    torch.testing.assert_close(layer(*arguments), dense(*arguments))


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_reads_top_k_keys_per_head_on_average(causal, make_layer):
    layer = make_layer(SEA, causal=causal, **SMALL | {"num_cells": 24, "top_k": 3})
    logits = torch.randn(1, H, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    visible = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    selected = layer.select(logits, visible.sum(-1)[:, 0])
    read = selected.gather(-1, layer._cells(visible, None).expand(1, H, 24, 24)) & visible
    count = read.sum((1, 3)).flatten()
    assert count[23] == 3 * H  # as many cells as keys
    assert (read.sum(-1)[0, :, 23] != 3).any()  # the heads share a budget
    assert 0.75 < count[3:].float().mean() / (3 * H) < 1.25
    assert count[:3].tolist() == ([H, 2 * H, 3 * H] if causal else [3 * H] * 3)  # all there are


@pytest.mark.parametrize(("causal", "cross"), PATTERNS)
def test_the_choice_of_cells_stops_the_gradient_of_the_task(causal, cross, make_layer):
    layer = make_layer(SEA, causal=causal, cross=cross, **SMALL).train()
    x = stream(9)
    output = layer(x, stream(9, seed=2)) if cross else layer(x)
    losses, named = auxiliary_losses(layer), dict(layer.named_parameters())
    for result, untouched in (
        (output.square().sum(), PREDICTOR if causal else ()),  # noncausal: through the average
        (losses["divergence"], ("out_proj", "scales")),
        (losses["distance"], ("out_proj", "scales")),
    ):
        gradients = torch.autograd.grad(result, list(named.values()), allow_unused=True, retain_graph=True)
        for name, gradient in zip(named, gradients, strict=True):
            assert (gradient is None) == (name.split(".")[0] in untouched), name


def test_the_losses_fall_when_they_are_followed(make_layer):
    layer, x = make_layer(SEA, **SMALL).train(), stream(13)
    optimiser = torch.optim.AdamW([*layer.row.parameters(), *layer.decoder.parameters()], lr=0.02, weight_decay=0.0)
    found = []
    for _ in range(20):
        layer(x)
        losses = auxiliary_losses(layer)
        found.append([loss.item() for loss in losses.values()])
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
    assert all(last < 0.8 * first for first, last in zip(found[0], found[-1], strict=True))


@pytest.mark.parametrize("cross", [False, True])
def test_the_state_holds_the_keys_a_memory_and_four_rows_per_convolution(cross, make_layer):
    layer = make_layer(SEA, cross=cross, num_kv_heads=2, **SMALL)
    x, context = stream(13), [stream(11, seed=2)] if cross else []
    mask = some_keys(11) if cross else None
    want = layer(x, *context, key_mask=mask)
    output, state = layer.prefill(x[:, :6], *context, key_mask=mask)
    torch.testing.assert_close(output, want[:, :6])
    for t in range(6, 13):
        output, state = layer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(output, want[:, t : t + 1])
    assert [tuple(rows.shape) for rows in state.rows] == [(B, 2 * H, 4, CELLS // 4)] * 2
    masks = B * 11 if cross else 0  # bytes of the mask
    assert state.nbytes == 2 * B * layer.state_bytes(11 if cross else 13) + masks  # float64


def test_published_defaults_and_parameters():
    for causal, row, cnn in ((True, 64, 74), (False, 256, 324)):
        layer = SEA(LayerSpec(dim=48, num_heads=3, causal=causal, max_length=100))
        assert (layer.top_k, layer.num_cells, layer.kl_weight, layer.mse_weight) == (7, 128, 0.1, 1.0)
        assert layer.performer.num_features == round(16 * math.log(16))
        weights = [value for name, value in layer.decoder.named_parameters() if value.dim() == 4]
        assert sum(weight.numel() for weight in weights) == cnn * 3 * 3
        rest = 4 * 48 * 48 + 6 * 16 * 16 + 3 * 2 * 16 + (2 * 16 + 1) * (row + 2) + (100 * 16 if causal else 0)
        biases = 2 * 6 + 2 * 32 + 2 * 128 if causal else 2 * 12
        assert sum(p.numel() for p in layer.parameters()) == rest + cnn * 9 + biases


def test_what_does_not_fit_is_refused(make_layer):
    for change, message in (
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"num_cells": 10}, "num_cells must be a multiple of 4, got 10; nearest: 8, 12"),
        ({"rotary_base": 10.0}, "an even width per head, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            make_layer(SEA, **SMALL | change)
    layer = SEA(LayerSpec(dim=M, num_heads=H, causal=True, max_length=8)).double()
    with pytest.raises(ValueError, match="up to max_length=8, got 9"):
        layer(stream(9))
