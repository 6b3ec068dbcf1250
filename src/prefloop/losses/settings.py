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
    center_coef: float | None = Field(default=None, ge=0, description="weight of the centring of scores")
