"""What the paper compares its experts with: the rows of Tables 5 and 6, at the same places; and a
form of our own.

    static   b^(n) only: weights that are learned as they are                    "Adapter"
    latent   generated from a learned z^(n), the same for all inputs
             "Hypernetwork+Adapter"
    mlp      a whole matrix, generated from the guidance, instead of W_d, W_u    "Hypernetwork+MLP"
    lora     a learned low-rank change of the block's own linear layers          "LoRA"
    gates    learned weights, with one factor from the guidance for each of the R hidden units; ours

`BaselineVLM` builds a HyperLLaVA and puts these modules in the place of its experts. weights.py
builds without storage, so the discarded experts cost nothing. The latent source is
hyperformer's (arXiv 2106.04489).
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError
from hypernet import Encoder, Expert, HyperNetwork, turn_mask
from model import VLM, Llama, VLMConfig


@dataclass
class BaselineConfig(VLMConfig):
    """A VLMConfig whose experts get their weights elsewhere. Raises UserError on what cannot be
    built.
    """
    weight_source: Literal["static", "latent", "mlp", "lora", "gates"] = "static"

    def __post_init__(self):
        super().__post_init__()
        if self.weight_source == "lora" and self.visual_expert != "none":
            raise UserError(f"visual_expert {self.visual_expert}: weight_source lora changes only "
                            f"the Llama, so it must be none")
        width = self.llm.width  # the largest matrix: of E_L or E_V2
        if self.weight_source == "mlp" and self.expert_embed * width ** 2 > 2**27:
            raise UserError(
                f"weight_source mlp generates whole matrices, with "
                f"{self.expert_embed * width ** 2:,} numbers for one of {width} x {width}; "
                f"it is meant for small models, up to {2**27:,}")


GUIDED = ("hyper", "mlp", "gates")  # sources whose weights depend on the input


def source_of(cfg):
    """Where the experts' weights come from: "hyper" in the paper's model, else one of the rows
    above.
    """
    return cfg.weight_source if isinstance(cfg, BaselineConfig) else "hyper"


def is_guided(cfg):
    """Whether the experts' weights depend on the input."""
    return source_of(cfg) in GUIDED


class StaticExpert(Expert):
    """The adapter of Eq. 5 with learned weights: b^(n) only. One set of weights serves all rows and
    turns.
    """

    def __init__(self, guidance_dim, inputs, outputs, embed, rank):
        nn.Module.__init__(self)
        self.down = nn.Parameter(torch.empty(2 * rank, inputs))
        self.up = nn.Parameter(torch.empty(rank, outputs))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)

    def weights(self, guidance, hypernet):
        return self.down[None, None], self.up[None, None]  # B = U = 1

    def forward(self, x, weights, use_id=None):
        return super().forward(x, weights, None if use_id is None else use_id.clamp(max=0))


class LatentExpert(StaticExpert):
    """An expert with a learned z^(n) in the place of e, as in Eq. 2: the same for all inputs."""

    def __init__(self, guidance_dim, inputs, outputs, embed, rank):
        super().__init__(guidance_dim, inputs, outputs, embed, rank)
        self.encoder = nn.Module()
        self.encoder.weight = nn.Parameter(torch.empty(1, 1, embed))  # z^(n)
        self.reset_parameters()

    def reset_parameters(self):
        if hasattr(self, "encoder"):  # not yet in StaticExpert.__init__
            nn.init.normal_(self.encoder.weight)  # as in hyperformer
        super().reset_parameters()

    def weights(self, guidance, hypernet):
        down, up = hypernet(self.encoder.weight)
        return (self.down + down.unflatten(-1, self.down.shape),
                self.up + up.unflatten(-1, self.up.shape))


class MatrixNetwork(nn.Module):
    """The hypernetwork of "Hypernetwork+MLP": W_2 writes a whole matrix, E * inputs * outputs
    numbers.

    e        float[B, U, E]
    returns  float[B, U, inputs * outputs]
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
        return self.up(F.silu(self.trunk(e)) * e.shape[-1] ** -0.5)


class MatrixExpert(nn.Module):
    """One generated linear map: what `Expert` is without a bottleneck, and so without SwiGLU.

    `weights` returns a tuple with one matrix float[B, U, inputs, outputs]; `forward` is as
    Expert's.
    """

    def __init__(self, guidance_dim, inputs, outputs, embed, rank):
        super().__init__()
        self.encoder = Encoder(guidance_dim, embed)
        self.up = nn.Parameter(torch.empty(inputs, outputs))  # b^(n)
        self.reset_parameters()

    def reset_parameters(self):
        self.encoder.reset_parameters()
        nn.init.zeros_(self.up)

    def weights(self, guidance, hypernet):
        matrix = hypernet(self.encoder(guidance))
        return (self.up + matrix.unflatten(-1, self.up.shape),)

    def forward(self, x, weights, use_id=None):
        matrix, = weights
        U = matrix.shape[1]
        x = x[:, :, None].expand(-1, -1, U, -1)                                  # (B, T, U, inputs)
        if use_id is not None:
            x = x.masked_fill(~turn_mask(use_id, U)[..., None], 0)
        return x.flatten(2) @ matrix.flatten(1, 2)                               # (B, T, outputs)


class GatedExpert(Expert):
    """An expert that generates R numbers only: W_u = diag(1 + P SiLU(e)) b_u, and W_d = b_d.

    e is scaled up, and P down, by `gain`: Adam moves each weight by about the rate, so a step then
    moves P e about as far as W_d x, which has more inputs. Why: docs/tables.md.
    """

    def __init__(self, guidance_dim, inputs, outputs, embed, rank):
        nn.Module.__init__(self)
        self.gain = inputs / embed
        self.encoder = Encoder(guidance_dim, embed)
        self.project = nn.Linear(embed, rank)  # P
        self.down = nn.Parameter(torch.empty(2 * rank, inputs))
        self.up = nn.Parameter(torch.empty(rank, outputs))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        bound = self.project.in_features ** -0.5
        nn.init.uniform_(self.project.weight, -bound / self.gain, bound / self.gain)
        nn.init.uniform_(self.project.bias, -bound, bound)

    def weights(self, guidance, hypernet):
        e = self.encoder(guidance)                                               # (B, U, E)
        factors = 1 + self.project(self.gain * F.silu(e))                        # (B, U, R)
        return (self.down.expand(*factors.shape[:2], -1, -1),                    # as Expert's
                factors[..., None] * self.up)


class LoRA(nn.Module):
    """The low-rank change of a linear layer, x A B: float[.., inputs] -> float[.., outputs]
    (arXiv 2106.09685)."""
    dropout = 0.0  # share of x that is set to zero, only while gradients are computed

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.down = nn.Parameter(torch.empty(inputs, rank))
        self.up = nn.Parameter(torch.empty(rank, outputs))
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.down.shape[0] ** -0.5  # as in peft
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)

    def forward(self, x):
        x = F.dropout(x, self.dropout, torch.is_grad_enabled())
        return 2 * (x @ self.down) @ self.up  # alpha = 2 R, as in LLaVA's finetune_lora.sh


class LoRALinear(nn.Linear):
    """A Llama's linear layer with LoRA beside it."""

    def __init__(self, inputs, outputs, rank):
        super().__init__(inputs, outputs, bias=False)
        self.lora = LoRA(inputs, outputs, rank)

    def forward(self, x):
        return super().forward(x) + self.lora(x)


# ---- Putting them in the experts' places

EXPERTS = {"static": StaticExpert, "latent": LatentExpert, "mlp": MatrixExpert,
           "gates": GatedExpert}
HYPERNETWORKS = {"latent": HyperNetwork, "mlp": MatrixNetwork}


class BaselineLlama(Llama):
    """A Llama with one of the baselines in the blocks of its experts."""

    def __init__(self, cfg):
        super().__init__(cfg)
        D, E, R, source = cfg.llm.width, cfg.expert_embed, cfg.expert_rank, cfg.weight_source
        self.source = source
        for n in cfg.expert_blocks():
            block = self.layers[n]
            block.expert = EXPERTS[source](D, D, D, E, R) if source in EXPERTS else None
            if source == "lora":
                add_lora(block, R)
        if cfg.expert_blocks():
            self.hypernet = HYPERNETWORKS[source](D, D, E, R) if source in HYPERNETWORKS else None
            self.guidance_norm = self.guidance_norm if source in GUIDED else None

    def guidance(self, x, batch):
        if self.source in GUIDED:
            return super().guidance(x, batch)
        return None, batch.use_id, self.hypernet


def add_lora(block, rank):
    """Replace the seven linear layers of a Llama block by LoRALinear."""
    for part in (block.self_attn, block.mlp):
        for name, linear in list(part.named_children()):
            setattr(part, name, LoRALinear(linear.in_features, linear.out_features, rank))


class BaselineVLM(VLM):
    """LLaVA with the baseline `cfg.weight_source` where HyperLLaVA has its generated experts."""

    def __init__(self, cfg):
        super().__init__(cfg)
        E, R, source = cfg.expert_embed, cfg.expert_rank, cfg.weight_source
        for visual in (self.projector.expert_1, self.projector.expert_2):
            if visual is not None:
                inputs, outputs = visual.hypernet.inputs, self.projector.linear_1.out_features
                network = HYPERNETWORKS.get(source)
                visual.hypernet = network(inputs, outputs, E, R) if network else None
                visual.expert = EXPERTS[source](inputs, inputs, outputs, E, R)
        self.llm = BaselineLlama(cfg)
