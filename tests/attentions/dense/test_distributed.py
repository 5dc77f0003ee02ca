"""Attention over two and three processes on one machine against attention in one, values and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from attentions.base import LayerSpec
from attentions.dense.distributed import head_parallel, sequence_parallel
from attentions.dense.softmax import Softmax

B, T, S, M, H, G, D = 2, 13, 7, 120, 12, 6, 5
ROOT = Path(__file__).parents[3]
TIMEOUT = 240


def stream(length, seed):
    return torch.randn(B, length, M, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outcome(output, inputs):
    """The output and the gradients of a random functional of it."""
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(3))
    return [output.detach(), *torch.autograd.grad((output * direction).sum(), inputs)]


def heads_over_ranks(group):
    """All heads' outputs and gradients from a few heads per rank, for every pattern, with a bias and a mask."""
    for causal, cross in ((True, False), (False, False), (False, True)):
        torch.manual_seed(0)
        spec = LayerSpec(dim=M, num_heads=H, num_kv_heads=G, causal=causal, cross=cross, rotary_base=10000.0)
        layer = Softmax(spec, bias=True).double()
        inputs = [stream(T, 1).requires_grad_(), *([stream(S, 2).requires_grad_()] if cross else [])]
        mask = torch.rand(B, S if cross else T, generator=torch.Generator().manual_seed(4)) > 0.3
        parameters = list(layer.parameters())
        expected = outcome(layer(*inputs, key_mask=mask), [*inputs, *parameters])
        got = outcome(head_parallel(layer, *inputs, key_mask=mask, group=group), [*inputs, *parameters])
        for gradient in got[1 + len(inputs) :]:
            dist.all_reduce(gradient, group=group)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def keys_over_ranks(group):
    """A piece of the sequence per rank, of unequal lengths, causal or not, with and without masked keys."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    starts = [0, 3, 8][:size]
    own = slice(starts[rank], [*starts[1:], T][rank])
    for causal in (True, False):
        torch.manual_seed(0)
        q = torch.randn(B, T, H, D, dtype=torch.float64)
        k, v = torch.randn(2, B, T, G, D, dtype=torch.float64)
        q[:, 4] *= 1000  # one query whose scores overflow exp unless the maximum is taken off
        layer = Softmax(LayerSpec(dim=M, num_heads=H, num_kv_heads=G, causal=causal)).double()
        mask = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) > 0.3
        mask[0, :5] = False  # a rank without any key, and causal queries that see none
        for key_mask in (None, mask):
            whole = [part.clone().requires_grad_() for part in (q, k, v)]
            expected = outcome(layer.attend(*whole, key_mask=key_mask), whole)
            pieces = [part[:, own].clone().requires_grad_() for part in (q, k, v)]
            own_mask = None if key_mask is None else key_mask[:, own]
            output = sequence_parallel(*pieces, causal=causal, key_mask=own_mask, group=group)
            direction = torch.randn(expected[0].shape, dtype=q.dtype, generator=torch.Generator().manual_seed(3))
            got = [output, *torch.autograd.grad((output * direction[:, own]).sum(), pieces)]
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other[:, own], rtol=1e-8, atol=1e-9)


def refusals(group):
    layer = Softmax(LayerSpec(dim=M, num_heads=5, causal=True))
    with pytest.raises(ValueError, match=r"processes must divide the key-value heads, got \d processes and 5 heads"):
        head_parallel(layer, torch.randn(B, T, M), group=group)
    with pytest.raises(ValueError, match="needs a key per query on each rank, got 3 and 4"):
        sequence_parallel(*(torch.randn(B, n, H, D) for n in (4, 3, 3)), causal=True, group=group)


def main(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    for check in (heads_over_ranks, keys_over_ranks, refusals):
        check(None)
        if rank < 2:
            check(pair)
    dist.destroy_process_group()


def test_two_and_three_processes_equal_one(tmp_path):
    """A world of three, and a group of two of them; they meet in a file and talk over the loopback device."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        reports = [worker.communicate(timeout=TIMEOUT)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0, 0], "\n".join(reports)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
