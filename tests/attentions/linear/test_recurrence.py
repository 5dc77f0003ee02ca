"""The shared recurrence against its definition, one position and one head at a time."""

import pytest
import torch

from attentions.linear._recurrence import scan, write

B, T, H, K, V = 2, 37, 3, 5, 7


def draw(decay=None, delta=False, length=T, strength=1.0):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"q": normal(B, length, H, K), "k": normal(B, length, H, K), "v": normal(B, length, H, V)}
    if decay is not None:
        shape = (B, length, H) if decay == "head" else (B, length, H, K)
        inputs["log_decay"] = -strength * normal(*shape).abs()
    if delta:
        inputs["k"] = inputs["k"] / inputs["k"].norm(dim=-1, keepdim=True)
        inputs["beta"] = normal(B, length, H).sigmoid()
    return inputs


def naive(q, k, v, log_decay=None, beta=None, memory=None):
    """S_t = a_t (I - beta k k^T) S_{t-1} + beta k v^T, o = S^T q, head by head, position by position."""
    outputs, memories = [], []
    for h in range(H):
        state = q.new_zeros(B, K, V) if memory is None else memory[:, h]
        column = []
        for t in range(q.shape[1]):
            q_t, k_t, v_t = q[:, t, h], k[:, t, h], v[:, t, h]
            if log_decay is not None:
                state = state * log_decay[:, t, h].exp().reshape(B, -1, 1)
            if beta is None:
                state = state + k_t[:, :, None] * v_t[:, None, :]
            else:
                b_t = beta[:, t, h, None]
                recalled = (state * k_t[:, :, None]).sum(1)
                state = state + k_t[:, :, None] * (b_t * (v_t - recalled))[:, None, :]
            column.append((state * q_t[:, :, None]).sum(1))
        outputs.append(torch.stack(column, 1))
        memories.append(state)
    return torch.stack(outputs, 2), torch.stack(memories, 1)


FORMS = [(decay, delta) for decay in (None, "head", "channel") for delta in (False, True)]


@pytest.mark.parametrize("chunk_size", [8, 64])
@pytest.mark.parametrize(("decay", "delta"), FORMS)
def test_scan_equals_the_recurrence(decay, delta, chunk_size, agree):
    inputs = draw(decay, delta)
    agree(lambda: scan(**inputs, chunk_size=chunk_size), lambda: naive(**inputs)[0], inputs.values())


@pytest.mark.parametrize(("decay", "delta"), FORMS)
def test_write_equals_the_recurrence(decay, delta, agree):
    inputs = draw(decay, delta, strength=0.1)  # weak enough that the first memory is still felt after 37 positions
    memory = torch.randn(B, H, K, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    q = inputs.pop("q")
    agree(
        lambda: write(memory, **inputs, chunk_size=8),
        lambda: naive(q, **inputs, memory=memory)[1],
        [memory, *inputs.values()],
    )


@pytest.mark.parametrize(("decay", "delta"), FORMS)
def test_the_chunk_size_does_not_matter(decay, delta):
    inputs = draw(decay, delta)
    want = scan(**inputs, chunk_size=T)
    for chunk_size in (1, 2, 5, 16, 36):
        torch.testing.assert_close(scan(**inputs, chunk_size=chunk_size), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 64, 100])
@pytest.mark.parametrize("delta", [False, True])
def test_lengths_off_the_chunk_grid_work(length, delta):
    inputs = draw("head", delta, length=length)
    torch.testing.assert_close(scan(**inputs, chunk_size=16), naive(**inputs)[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("decay", "delta"), [form for form in FORMS if form[0] is not None])
def test_strong_decays_neither_overflow_nor_turn_into_nan(decay, delta):
    inputs = draw(decay, delta, length=100)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -20.0)
    inputs["log_decay"][:, ::3] = -1e-3  # weak decays between strong ones
    single = {name: tensor.float().requires_grad_() for name, tensor in inputs.items()}
    output = scan(**single, chunk_size=64)
    # float32; cumulative decays reach -900, whose last digit is 6e-5 and enters as a relative error
    torch.testing.assert_close(output.double(), naive(**inputs)[0], rtol=1e-3, atol=1e-4)
    output.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in single.values())
    memory = write(torch.zeros(B, H, K, V), **{name: tensor for name, tensor in single.items() if name != "q"})
    torch.testing.assert_close(memory.double(), naive(**inputs)[1], rtol=1e-3, atol=1e-4)
