"""Where the weights of an expert come from: the rows of the paper's Tables 5 and 6, at the same places.

    hyper    generated from the guidance, see hypernet.py                        the paper's own
    static   learned as they are: b^(n) alone                                    "Adapter"
    latent   generated from a learned z^(n), the same for all inputs             "Hypernetwork+Adapter", as in hyperformer
    mlp      a whole matrix, generated from the guidance, in place of W_d, W_u   "Hypernetwork+MLP"
    lora     a learned low-rank change of the block's own linears                "LoRA"

Of each source: the network that all sites of a modality share, the expert of one site, and the class of a block's own linears.
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn

from hypernet import Encoder, Expert, HyperNetwork, turns_of


class MatrixNetwork(nn.Module):
    """The hypernetwork of "Hypernetwork+MLP": its W_2 writes a whole matrix, E * inputs * outputs numbers. For small models.

    e        float[B, U, E]
    returns  (float[B, U, inputs * outputs],)
    """

    def __init__(self, inputs, outputs, embed, rank):
        super().__init__()
        self.trunk = nn.Linear(embed, embed)
        self.up = nn.Linear(embed, inputs * outputs, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        self.trunk.reset_parameters()
        nn.init.zeros_(self.up.weight)

    def forward(self, e):
        return self.up(F.silu(self.trunk(e)) * e.shape[-1] ** -0.5),  # (B, U, inputs * outputs)


class Latent(nn.Module):
    """z^(n) in the place of e, as in Eq. 2: float[1, 1, E], whatever the guidance."""

    def __init__(self, guide, embed):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, embed))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)  # hyperformer's

    def forward(self, guidance):
        return self.weight


class MatrixExpert(nn.Module):
    """One linear map from inputs to outputs, generated whole: what `Expert` is without a bottleneck, and so without SwiGLU.

    forward  as Expert's, with the one matrix float[B, U, inputs, outputs] as weights
    """

    def __init__(self, guide, inputs, outputs, embed, rank):
        super().__init__()
        self.encoder = Encoder(guide, embed)
        self.up = nn.Parameter(torch.empty(inputs, outputs))  # b^(n)
        self.reset_parameters()

    def reset_parameters(self):
        self.encoder.reset_parameters()
        nn.init.zeros_(self.up)

    def weights(self, guidance, hypernet):
        matrix, = hypernet(self.encoder(guidance))
        return self.up + matrix.unflatten(-1, self.up.shape),

    def forward(self, x, weights, use_id=None):
        matrix, = weights
        U = matrix.shape[1]
        x = x[:, :, None].expand(-1, -1, U, -1)                                  # (B, T, U, inputs)
        if use_id is not None:
            x = x.masked_fill(~turns_of(use_id, U)[..., None], 0)
        return x.flatten(2) @ matrix.flatten(1, 2)                               # (B, T, outputs)


class LoRA(nn.Module):
    """The low-rank change of one linear layer, x A B: float[.., inputs] -> float[.., outputs] (arXiv 2106.09685)."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.down = nn.Parameter(torch.empty(inputs, rank))
        self.up = nn.Parameter(torch.empty(rank, outputs))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.uniform_(self.down, -self.down.shape[0] ** -0.5, self.down.shape[0] ** -0.5)  # peft's
        nn.init.zeros_(self.up)

    def forward(self, x):
        return 2 * (x @ self.down) @ self.up  # alpha is twice the rank, as in LLaVA's finetune_lora.sh


class LoRALinear(nn.Linear):
    """A Llama's linear layer with LoRA beside it."""

    def __init__(self, inputs, outputs, bias, rank):
        super().__init__(inputs, outputs, bias)
        self.lora = LoRA(inputs, outputs, rank)

    def forward(self, x):
        return super().forward(x) + self.lora(x)


# ---- By the name of the source of weights: what a modality shares, what a site owns, what a block's own linears are

GUIDED = ("hyper", "mlp")  # the weights of these depend on the input
NETWORKS = {"hyper": HyperNetwork, "latent": HyperNetwork, "mlp": MatrixNetwork}


ADAPTERS = {"hyper": Expert, "mlp": MatrixExpert, "static": functools.partial(Expert, encoder=None),
            "latent": functools.partial(Expert, encoder=Latent)}


def network_of(source, inputs, outputs, embed, rank):
    """The hypernetwork that all sites of a modality share, or None where nothing is generated."""
    return NETWORKS[source](inputs, outputs, embed, rank) if source in NETWORKS else None


def expert_of(source, guide, inputs, outputs, embed, rank):
    """The expert of one site, or None where the change is inside the block's own linears."""
    return ADAPTERS[source](guide, inputs, outputs, embed, rank) if source in ADAPTERS else None


def linear_of(source, rank):
    """The class of the linears of a block that is tuned from this source."""
    return functools.partial(LoRALinear, rank=rank) if source == "lora" else nn.Linear
