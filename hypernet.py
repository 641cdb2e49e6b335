"""A network that writes the weights of another: HyperLLaVA's experts (paper §3.2-3.3, Eqs. 3-5;
Eq. 2 is "latent" in baselines.py).

    guidance f ──E_n──> e ──W_1, SiLU, W_2──> + b^(n) ──> W_d, W_u      weights of one small adapter
                                                             │
                               x ──> W_d ──> SwiGLU ──> W_u ──> shift of a static layer's output

All language experts share one `HyperNetwork` (W_1, B_1, W_2); a visual expert has one of its own,
since E_V1 and E_V2 differ in width. Each `Expert` owns its encoder E_n and its bias b^(n). `pool`
makes the guidance. A conversation has several turns, and each turn has its own guidance and its own
generated weights. Two integers per token say which:

    pool_id[b, i]   the turn whose guidance includes token i             -1: none
    use_id[b, i]    the turn whose generated weights token i runs with   -1: none, zero shift

Letters in the shapes, the same in every file but vlora.py:
    B batch             T sequence (text + image tokens)   N image tokens        V vocabulary
    D width of Llama    C width of CLIP                    U turns               L layers
    H heads             K width of one head                R rank of an expert   G width of guidance
    S side of the image, px   E width of the hypernetwork's embedding   M pictures in a batch
    P positions with logits   k blocks before guidance is taken (guidance_after)

Next: projector.py.
"""
import torch
import torch.nn.functional as F
from torch import nn


def rms(x, eps=1e-6):
    """x divided by its root mean square over the last axis: RMSNorm without a learned weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def turn_mask(turn_id, turns):
    """bool[B, T, U]: whether token i has turn u in `turn_id` int64[B, T], a pool_id or use_id."""
    return turn_id[..., None] == torch.arange(turns, device=turn_id.device)


def pool(x, pool_id, turns):
    """The guidance of each turn: the mean of the tokens with that `pool_id`, in fp32 (f in Eq. 3).

    x        float[B, T, G]
    pool_id  int64[B, T], -1 .. turns - 1
    returns  float32[B, U, G] with U = turns; zeros for a turn without tokens
    """
    member = turn_mask(pool_id, turns).float()  # (B, T, U)
    total = member.mT @ x.float()               # (B, U, G)
    return total / member.sum(1).clamp(min=1)[..., None]


class Encoder(nn.Linear):
    """E_n of Eq. 3: from the guidance f, float[B, U, G], to its embedding e, float[B, U, E].

    The guidance is scaled by sqrt(E)/G, and the weights start larger by G/sqrt(E), so e starts as
    that of a plain nn.Linear. Without the factor, one Adam step at rate lr would move every number
    of e by about 0.8 G lr: with G = 4096 and lr 1e-3 by 3.3, and e starts with a standard deviation
    of 0.6. With it, the step is 0.8 sqrt(E) lr at every G (docs/readings.md).
    """

    @property
    def scale(self):
        return self.out_features ** 0.5 / self.in_features  # of the guidance

    def reset_parameters(self):
        bound = self.in_features ** -0.5  # the range of nn.Linear's own values
        nn.init.uniform_(self.weight, -bound / self.scale, bound / self.scale)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, guidance):
        # rms: the norm of a mean depends on how alike the tokens are, and should not matter
        return super().forward(rms(guidance) * self.scale)


class HyperNetwork(nn.Module):
    """W_1, B_1, W_2 of Eq. 4.

    It computes w = (W_1 e + B_1) W_2, with a SiLU between the layers.

    As printed, Eq. 4 is linear in e, so W_1 would fold into W_2. The text speaks of "two MLP
    layers", so we add the non-linearity that an MLP has. B_2 is left out: the bias b^(n) of each
    expert already plays its part.

    The factor 1/sqrt(E) keeps training stable. Without it, one Adam step at rate lr changes a
    generated weight by up to lr times the sum of the hidden layer's absolute values, which grows
    with E: at the rate of a static layer, one step would replace the adapter.

    e        float[B, U, E]  embedding of the guidance
    returns  float[B, U, 2R * inputs], float[B, U, R * outputs]  the generated parts of W_d and W_u,
             flat
    """

    def __init__(self, inputs, outputs, embed, rank):
        super().__init__()
        self.inputs = inputs
        self.trunk = nn.Linear(embed, embed)                         # W_1, B_1
        self.down = nn.Linear(embed, 2 * rank * inputs, bias=False)  # part of W_2 that writes W_d
        self.up = nn.Linear(embed, rank * outputs, bias=False)       # part of W_2 that writes W_u
        self.reset_parameters()

    def reset_parameters(self):
        self.trunk.reset_parameters()
        nn.init.normal_(self.down.weight, std=self.inputs ** -0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, e):
        a = F.silu(self.trunk(e)) * e.shape[-1] ** -0.5              # (B, U, E)  Eq. 4, inner layer
        return self.down(a), self.up(a)                              # Eq. 4, outer layer


class Expert(nn.Module):
    """An adapter whose weights are generated for every turn (Eqs. 3-5): E(x) = W_u SwiGLU(W_d x).

    SwiGLU in a bottleneck of width R needs a gate and a value, so W_d is 2R wide and W_u has R
    inputs. W_u is zero at the start: before training, the model *is* LLaVA. b^(n) is added to the
    generated weights; the two products have no bias.
    """

    def __init__(self, guidance_dim, inputs, outputs, embed, rank):
        super().__init__()
        self.encoder = Encoder(guidance_dim, embed)              # E_n of Eq. 3
        self.down = nn.Parameter(torch.empty(2 * rank, inputs))  # b^(n) of Eq. 4, for W_d
        self.up = nn.Parameter(torch.empty(rank, outputs))       # b^(n) of Eq. 4, for W_u
        self.reset_parameters()

    def reset_parameters(self):
        self.encoder.reset_parameters()
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)

    def weights(self, guidance, hypernet):
        """W_d float[B, U, 2R, inputs] and W_u, transposed, float[B, U, R, outputs] for guidance
        float[B, U, G] (H_M(x) in Eq. 5, which calls the guidance x, like the input).
        """
        e = self.encoder(guidance)                                   # (B, U, E)  Eq. 3
        down, up = hypernet(e)                                       # w^(n)  Eq. 4
        return (self.down + down.unflatten(-1, self.down.shape),     # K^(n) = w^(n) + b^(n)  Eq. 4
                self.up + up.unflatten(-1, self.up.shape))

    def forward(self, x, weights, use_id=None):
        """The shift that each token gets from the weights of its turn (Eq. 5).

        x        float[B, T, inputs]
        weights  W_d float[B, U, 2R, inputs], W_u transposed float[B, U, R, outputs]
        use_id   int64[B, T], -1 .. U - 1; None: there is one turn, and all tokens use it
        returns  float[B, T, outputs]; exactly zero where use_id is -1
        """
        w_d, w_u = weights
        # Apply every turn's W_d to every token and set the results of other turns to zero. The last
        # product sums over turns, so that only the token's own turn is left.
        gate, value = (x @ w_d.flatten(1, 2).mT).unflatten(-1, w_d.shape[1:3]).chunk(2, dim=-1)
        hidden = F.silu(gate) * value                 # (B, T, U, R)  SwiGLU(W_d x)
        if use_id is not None:
            hidden = hidden.masked_fill(~turn_mask(use_id, w_u.shape[1])[..., None], 0)
        return hidden.flatten(2) @ w_u.flatten(1, 2)  # (B, T, outputs)  Eq. 5
