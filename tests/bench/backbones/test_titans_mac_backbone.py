"""The block of Titans MAC around a mechanism under test: strictly causal, and it decodes."""

import pytest
import torch
from hydra.utils import instantiate

from attentions.linear.titans_mac import MemoryAsContext
from bench.backbones.base import build
from bench.config import compose
from tasks.base import Metric, PerToken, TaskSpec, Tokens

B, L, V = 2, 37, 23


@pytest.fixture(params=["softmax", "linear"])
def model(request):
    choice = compose(["backbone=titans_mac", f"attention={request.param}"])
    backbone, attention = (instantiate(choice.parts[part], _convert_="all") for part in ("backbone", "attention"))
    spec = TaskSpec(
        inputs=Tokens(vocab_size=V),
        output=PerToken(num_classes=V),
        length=L,
        causal=True,
        metrics={"accuracy": Metric(unit="fraction", higher_is_better=True)},
        primary="accuracy",
        chance=1 / V,
    )
    made = build(backbone, spec, attention, seed=0).double().eval()
    block = made.layers[1].attention
    assert isinstance(block, MemoryAsContext) and type(block.mixer).__name__.lower() == request.param
    return made


def tokens(seed=1):
    return torch.randint(V, (B, L), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_no_output_sees_a_later_token(model):
    base = model(tokens())
    for t in range(L - 1):
        other = torch.cat([tokens()[:, : t + 1], tokens(2)[:, t + 1 :]], 1)
        torch.testing.assert_close(model(other)[:, : t + 1], base[:, : t + 1], rtol=1e-9, atol=1e-12)
    other = torch.cat([tokens(2)[:, :1], tokens()[:, 1:]], 1)
    assert ((model(other) - base).abs().amax(-1) > 1e-9)[:, 16:].any(), "nothing of an earlier segment is remembered"


@torch.no_grad()
def test_decoding_token_by_token_equals_the_forward_pass(model):
    state, outputs = model.init_state(B), []
    for t in range(L):
        logits, state = model.step(tokens()[:, t : t + 1], state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), model(tokens()))
