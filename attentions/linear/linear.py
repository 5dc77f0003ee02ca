"""Linear attention."""

from __future__ import annotations

from torch import Tensor

from attentions.linear._recurrence import Recurrent


class Linear(Recurrent):
    """Softmax's exp(q.k) replaced by phi(q).phi(k) with phi(x) = elu(x) + 1, normalised.

    Causal self-attention is a running sum of phi(k) v^T; the other patterns are phi(Q) (phi(K)^T V). The state is
    G * D * (D + 1) numbers per sequence.

    Source: Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236, eqs. 5 to 7 and 9 to 12.
    Differs: where the backbone asks for rotary positions, they turn q and k before phi.
    """

    paper = "https://arxiv.org/abs/2006.16236"
    normalised = True

    def features(self, heads: Tensor) -> Tensor:
        return heads.relu() + heads.clamp(max=0).exp()  # elu(x) + 1, which itself rounds to 0 below -17 in float32
