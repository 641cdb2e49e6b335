"""A network that writes the weights of another: HyperLLaVA's experts (paper §3.2–3.3, Eqs. 2–5).

    guidance g ──E_n──> e ──W_1, SiLU, W_2──> + b^(n) ──> W_d, W_u        the weights of one small adapter
                                                           │
                         x ──> W_d ──> SwiGLU ──> W_u ──> shift of the static path

`HyperNetwork` is what all sites of a modality share (W_1, B_1, W_2), `Expert` what one site owns (E_n, b^(n)) and the
adapter itself. Guidance is made by `pool`. A row of a batch may hold several turns, each with guidance and weights of
its own; two integers per token say which:

    pool_id[b, i]   the turn whose guidance token i is averaged into     -1: none
    use_id[b, i]    the turn whose generated weights token i runs with   -1: none, the expert adds nothing

Letters are explained at the top of model.py. Next: projector.py, then model.py. What the paper compares with is in sources.py.
"""
import torch
import torch.nn.functional as F
from torch import nn


def rms(x, eps=1e-6):
    """x divided by the root of its mean square over the last axis: a norm without weights."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def pool(x, pool_id, turns):
    """Guidance of each turn: the mean of the tokens that `pool_id` gives to it, in fp32.

    x        float[B, T, G]
    pool_id  int64[B, T], -1 .. turns - 1
    returns  float32[B, U, G] with U = turns; zeros for a turn without tokens
    """
    member = pool_id[..., None] == torch.arange(turns, device=x.device)  # (B, T, U)
    member = member.float()
    total = member.mT @ x.float()                                        # (B, U, G)
    return total / member.sum(1).clamp(min=1)[..., None]


class HyperNetwork(nn.Module):
    """H_M of Eq. 4, shared by all sites of a modality: W_2 (W_1 e + B_1), here with a SiLU in between.

    As printed, Eq. 4 is linear in e and W_1 folds into W_2; the text calls it a two-layer MLP, so we put the
    non-linearity where an MLP has one. B_2 is left out: the bias b^(n) of each site holds it already.

    The 1/sqrt(E) keeps the optimiser stable. A step of Adam moves every entry of W_2 by about lr, hence a generated
    weight by up to lr * sum|a|, which grows with E; a learning rate that suits the static layers would rewrite the adapter.

    e        float[B, U, E]  embedding of the guidance at one site
    returns  float[B, U, 2R * inputs], float[B, U, R * outputs]  the generated parts of W_d and W_u, as they are written
    """

    def __init__(self, inputs, outputs, embed, rank):
        super().__init__()
        self.inputs = inputs
        self.trunk = nn.Linear(embed, embed)                         # W_1, B_1
        self.down = nn.Linear(embed, 2 * rank * inputs, bias=False)  # W_2, the rows that write W_d
        self.up = nn.Linear(embed, rank * outputs, bias=False)       # W_2, the rows that write W_u
        self.reset_parameters()

    def reset_parameters(self):
        self.trunk.reset_parameters()
        nn.init.normal_(self.down.weight, std=self.inputs ** -0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, e):
        a = F.silu(self.trunk(e)) * e.shape[-1] ** -0.5              # (B, U, E)  Eq. 4, the inner layer
        return self.down(a), self.up(a)                              # Eq. 4, the outer layer


class Encoder(nn.Linear):
    """E_n of Eq. 3: guidance float[B, U, G] -> e float[B, U, E]."""

    def forward(self, guidance):
        return super().forward(rms(guidance))


def turns_of(use_id, U):
    """bool[B, T, U]: whether token i uses weights u; weights that no input changes (U = 1) serve every turn."""
    return use_id.clamp(max=U - 1)[..., None] == torch.arange(U, device=use_id.device)


class Expert(nn.Module):
    """Adapter of one site whose weights are generated anew for every turn (Eq. 3 and 5), without biases.

    "SwiGLU" with a bottleneck of R wants gate and value, so W_d is 2R wide and W_u starts from R. b^(n) is the part of
    the weights that no input changes. W_u is zero at the start: the model *is* LLaVA until it has learnt otherwise.

    encoder  the class of E_n; None: b^(n) are the weights
    """

    def __init__(self, guide, inputs, outputs, embed, rank, encoder=Encoder):
        super().__init__()
        self.encoder = encoder and encoder(guide, embed)         # E_n of Eq. 3
        self.down = nn.Parameter(torch.empty(2 * rank, inputs))  # b^(n) of Eq. 4, for W_d
        self.up = nn.Parameter(torch.empty(rank, outputs))       # b^(n) of Eq. 4, for W_u
        self.reset_parameters()

    def reset_parameters(self):
        if self.encoder is not None:
            self.encoder.reset_parameters()
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)

    def weights(self, guidance, hypernet):
        """W_d float[B, U, 2R, inputs] and W_u float[B, U, R, outputs] for guidance float[B, U, G].

        B = U = 1 where no input changes them: static and latent, for which guidance may be None.
        """
        if self.encoder is None:
            return self.down[None, None], self.up[None, None]
        down, up = hypernet(self.encoder(guidance))                  # of e, (B, U, E)  Eq. 3
        return (self.down + down.unflatten(-1, self.down.shape),     # K = w + b^(n)  Eq. 4
                self.up + up.unflatten(-1, self.up.shape))

    def forward(self, x, weights, use_id=None):
        """Eq. 5: the shift that each token gets from the weights of its turn.

        x        float[B, T, inputs]
        weights  W_d float[B, U, 2R, inputs], W_u float[B, U, R, outputs]
        use_id   int64[B, T], -1 .. U - 1; None: one turn, used by all tokens
        returns  float[B, T, outputs]; exactly zero where use_id is -1
        """
        (B, T, _), (down, up) = x.shape, weights
        U, R = up.shape[1:3]
        # All turns' weights side by side make two batched products; each token then keeps the part of its own turn.
        gate, value = (x @ down.flatten(1, 2).mT).view(B, T, U, 2 * R).chunk(2, dim=-1)
        hidden = F.silu(gate) * value                                            # (B, T, U, R)
        if use_id is not None:
            hidden = hidden.masked_fill(~turns_of(use_id, U)[..., None], 0)
        return hidden.flatten(2) @ up.flatten(1, 2)                              # (B, T, outputs)
