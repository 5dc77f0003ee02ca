"""Rotary positions: what makes them positions is that inner products depend on distance alone."""

import torch

from attentions.base import rotary

B, T, H, K = 2, 37, 3, 14


def test_inner_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, B, 1, H, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(m, n):
        return (rotary(q, base=100.0, start=m) * rotary(k, base=100.0, start=n)).sum(-1)

    for shift in (1, 13, 400):
        # float32 angles: at 400 radians one is off by 1.5e-5
        torch.testing.assert_close(product(9, 2), product(9 + shift, 2 + shift), rtol=1e-4, atol=2e-4)
    assert not torch.allclose(product(9, 2), product(9, 3), atol=1e-2)


def test_each_pair_turns_by_its_own_frequency():
    x = torch.randn(B, T, H, K, dtype=torch.float64)
    turned = rotary(x, base=100.0, start=5)
    for t in range(T):
        for j in range(K // 2):
            angle = torch.tensor((5 + t) * 100.0 ** (-2 * j / K), dtype=torch.float64)
            first, second = x[:, t, :, j], x[:, t, :, j + K // 2]
            want = first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()
            got = turned[:, t, :, j], turned[:, t, :, j + K // 2]
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5)  # float32 angles up to 41


def test_rotation_keeps_lengths_and_the_first_position():
    x = torch.randn(B, T, H, K, dtype=torch.float64)
    # cos^2 + sin^2 is 1 to float32
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rotary(x)[:, 0], x[:, 0], rtol=0, atol=0)
