"""From CLIP's features to the Llama's width: LLaVA-1.5's two-layer MLP with visual experts beside
it (Eq. 6, Figure 2a).

    none   V = L2(L1(f))
    1      V = L2(L1(f) + E_V1(f))                        the paper's choice
    2      V = L2(L1(f)) + E_V2(L1(f))
    both   V = L2(L1(f) + E_V1(f)) + E_V2(L1(f))          as in Eq. 6; Figure 2 differs

The paper does not say where the GELU is. Here it belongs to L1, so an expert's output is added
after it. Next: model.py.
"""
import torch.nn.functional as F
from torch import nn

from hypernet import Expert, HyperNetwork


class VisualExpert(nn.Module):
    """E_V of Eq. 6: an expert guided by the mean over the patches of its own input (in Eq. 6:
    f for E_V1, L1(f) for E_V2). To `Expert` a picture is a row with one turn: B = M, T = N, U = 1.

    x        float[M, N, inputs]
    returns  float[M, N, outputs]
    """

    def __init__(self, inputs, outputs, embed, rank):
        super().__init__()
        self.hypernet = HyperNetwork(inputs, outputs, embed, rank)
        self.expert = Expert(inputs, inputs, outputs, embed, rank)

    def forward(self, x):
        guidance = x.float().mean(1, keepdim=True).to(x.dtype)  # (M, 1, inputs), f of Eq. 3
        return self.expert(x, self.expert.weights(guidance, self.hypernet))


class Projector(nn.Module):
    """f float[M, N, C] -> visual tokens float[M, N, D]."""

    def __init__(self, inputs, outputs, visual_expert, embed, rank):
        super().__init__()
        has_1, has_2 = visual_expert in ("1", "both"), visual_expert in ("2", "both")
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs)
        self.expert_1 = VisualExpert(inputs, outputs, embed, rank) if has_1 else None
        self.expert_2 = VisualExpert(outputs, outputs, embed, rank) if has_2 else None

    def forward(self, f):
        first = F.gelu(self.linear_1(f))                                        # L1(f)
        shifted = first if self.expert_1 is None else first + self.expert_1(f)  # + E_V1(f)  Eq. 6
        tokens = self.linear_2(shifted)                                         # L2(.)
        return tokens if self.expert_2 is None else tokens + self.expert_2(first)  # + E_V2(L1(f))
