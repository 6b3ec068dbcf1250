"""The knobs of losses; free of torch, so that a run file can be checked without it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prefloop.config import Settings

Weight = Annotated[float, Field(gt=0)]


class LossSettings(Settings):
    """What may be set of an objective; a knob left out has the objective's own default (`prefloop.losses.registry`).

    A knob has one meaning wherever it appears. One that the chosen objective does not have is an error.
    """

    beta: float | None = Field(default=None, gt=0, description="strength of the pull to the reference")
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5, description="assumed share of flipped labels")
    gamma: float | None = Field(default=None, ge=0, description="target margin of simpo's rewards")
    tau: float | None = Field(default=None, gt=0, le=1, description="temperature of discopop's mixing")
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = Field(
        default=None, description="f-divergence to the reference"
    )
    divergence_alpha: float | None = Field(
        default=None, gt=0, lt=1, description="of the alpha divergence, between reverse KL (0) and forward KL (1)"
    )
    reduction: Literal["sum", "mean"] | None = Field(default=None, description="of a completion's log-probs")
    ld_alpha: float | None = Field(
        default=None, ge=0, le=1, description="weight of tokens beyond the length that both completions have"
    )
    nll_coef: float | None = Field(default=None, ge=0, description="weight of the chosen's own likelihood")
    nll_reduction: Literal["pair", "token"] | None = Field(
        default=None, description="that likelihood is a mean over each pair's tokens, or over all tokens"
    )
    nll_scope: Literal["completion", "sequence"] | None = Field(
        default=None, description="that likelihood counts the policy's own tokens, or the prompt's and tools' too"
    )
    mixture: dict[str, Weight] | None = Field(
        default=None, description="further losses of pairs, each with its weight, such as --mixture.ipo 0.5"
    )
    dft: bool | None = Field(default=None, description="weigh each token by its probability (dynamic fine-tuning)")
    kl: Literal["derangement", "rotation", "samples", "none"] | None = Field(
        default=None, description="where the reference point comes from"
    )
    desirable_weight: float | None = Field(default=None, gt=0, description="weight of desirable samples")
    undesirable_weight: float | None = Field(default=None, gt=0, description="weight of undesirable samples")
    ties: Literal["half", "davidson"] | None = Field(default=None, description="what a tie says")
    tie_strength: float | None = Field(default=None, gt=0, description="ν of Davidson's model")
    baseline: Literal["leave_one_out", "group_mean", "running", "none"] | None = Field(
        default=None, description="what an attempt's reward is compared with"
    )
    scale: Literal["none", "group", "batch"] | None = Field(
        default=None, description="whose standard deviation group_mean's advantages are divided by"
    )
    min_spread: Annotated[float, Field(ge=0)] | Literal["noise"] | None = Field(
        default=None,
        description="a group whose rewards' standard deviation is below teaches nothing; 'noise': the judge's own, "
        "measured from its replicates",
    )
    ratio: Literal["none", "token", "sequence", "sequence_mean"] | None = Field(
        default=None, description="what is clipped: no ratio, each token's, a sample's, or its mean over tokens (GSPO)"
    )
    clip_low: float | None = Field(default=None, gt=0, le=1, description="the ratio is clipped at 1 less this")
    clip_high: float | None = Field(default=None, gt=0, description="the ratio is clipped at 1 plus this")
    denominator: Literal["samples", "sequences", "tokens", "constant"] | None = Field(
        default=None,
        description="token losses are summed over a sample, meant over it, meant over all tokens, or summed and "
        "divided by the longest reply",
    )
    gae_lambda: float | None = Field(
        default=None, ge=0, le=1, description="λ: 1 compares with what came, below 1 more with what the critic expects"
    )
    discount: float | None = Field(default=None, gt=0, le=1, description="γ, what a reward counts a token earlier")
    turn_discount: float | None = Field(
        default=None, gt=0, le=1, description="what a reward of a step (such as a turn) counts a step earlier"
    )
    whiten_advantages: bool | None = Field(
        default=None, description="advantages over all own tokens get mean 0 and variance 1"
    )
    clip_value: float | None = Field(
        default=None, gt=0, description="how far an iteration moves the critic's values, in the unit of the reward"
    )
    kl_coef: float | None = Field(default=None, ge=0, description="β, the price of a nat of KL to the reference")
    kl_target: float | None = Field(
        default=None, gt=0, description="nats a trajectory to which kl_coef is adapted, from one iteration to the next"
    )
    kl_horizon: int | None = Field(
        default=None, ge=1, description="trajectories over which kl_coef is adapted; left out: those of an iteration"
    )
    kl_as: Literal["reward", "k2", "k3"] | None = Field(
        default=None, description="KL as part of the reward, or as a loss of each token (another optimum)"
    )
    entropy_coef: float | None = Field(default=None, ge=0, description="bonus for a nat of entropy of a token")
    mismatch: Literal["none", "truncate", "mask", "sequence"] | None = Field(
        default=None, description="how tokens are weighed whose sampler's probabilities differ from the trainer's"
    )
    mismatch_low: float | None = Field(default=None, ge=0, description="the least weight that is not left out")
    mismatch_high: float | None = Field(default=None, gt=0, description="the largest weight")
    center_coef: float | None = Field(default=None, ge=0, description="weight of the centring of scores")
