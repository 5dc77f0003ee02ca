"""The diagonal-plus-low-rank recurrence against its definition, one position and one head at a time."""

import pytest
import torch

from attentions.linear._dplr import scan

B, T, H, K, V = 2, 37, 3, 5, 7


def draw(length=T, strength=1.0):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key = normal(B, length, H, K)
    key = key / key.norm(dim=-1, keepdim=True)
    return {
        "memory": normal(B, H, K, V),
        "q": normal(B, length, H, K),
        "k": normal(B, length, H, K),
        "v": normal(B, length, H, V),
        "log_decay": -strength * torch.rand(B, length, H, K, generator=generator, dtype=torch.float64),
        "recall": -key,
        "rewrite": key * normal(B, length, H, K).sigmoid(),
    }


def naive(memory, q, k, v, log_decay, recall, rewrite):
    """S_t = diag(w) S_{t-1} + b (a^T S_{t-1}) + k v^T, o = S^T q, head by head, position by position."""
    outputs, ends = [], []
    for h in range(H):
        state, column = memory[:, h], []
        for t in range(q.shape[1]):
            transition = torch.diag_embed(log_decay[:, t, h].exp())
            transition = transition + rewrite[:, t, h, :, None] * recall[:, t, h, None, :]
            state = transition @ state + k[:, t, h, :, None] * v[:, t, h, None, :]
            column.append((q[:, t, h, None, :] @ state)[:, 0])
        outputs.append(torch.stack(column, 1))
        ends.append(state)
    return torch.stack(outputs, 2), torch.stack(ends, 1)


@pytest.mark.parametrize("which", ["outputs", "memory"])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_scan_equals_the_recurrence(chunk_size, which, agree):
    inputs, index = draw(strength=0.2), ["outputs", "memory"].index(which)
    moved = [inputs[name] for name in inputs if name != "q" or which == "outputs"]
    agree(lambda: scan(**inputs, chunk_size=chunk_size)[index], lambda: naive(**inputs)[index], moved)


@pytest.mark.parametrize("length", [1, 2, 64, 100])
def test_lengths_off_the_chunk_grid_work(length):
    inputs = draw(length)
    for got, want in zip(scan(**inputs, chunk_size=16), naive(**inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_the_strongest_decay_stays_in_the_range_of_float32():
    inputs = draw(100)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -1.0)
    single = {name: tensor.float().requires_grad_() for name, tensor in inputs.items()}
    output, memory = scan(**single)
    # float32; cumulative decays reach -32 in a chunk, whose last digit is 2e-6 and enters as a relative error
    torch.testing.assert_close(output.double(), naive(**inputs)[0], rtol=1e-4, atol=1e-5)
    (output.square().sum() + memory.square().sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in single.values())


def test_with_full_rates_and_no_decay_a_write_replaces_what_the_key_held():
    key = torch.nn.functional.one_hot(torch.tensor([2, 2, 4]), K).double()[None, :, None].expand(B, -1, H, -1)
    values = torch.randn(B, 3, H, V, dtype=torch.float64)
    terms = {"log_decay": torch.zeros_like(key), "recall": -key, "rewrite": key}
    output, _ = scan(torch.zeros(B, H, K, V, dtype=torch.float64), key, key, values, **terms)
    torch.testing.assert_close(output, values)
