"""The registry: names, knobs and where they go."""

import inspect

import pytest

from prefloop.config import parse_settings
from prefloop.losses.registry import ADDED, CREDITED, OBJECTIVES, objective, resolve_knobs, resolve_parts
from prefloop.losses.settings import LossSettings
from prefloop.records import PrefloopError
from prefloop.training.algorithms import make_algorithm


def settings(**knobs):
    return parse_settings(LossSettings, knobs, "loss")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_knobs_of_an_objective_are_those_of_its_function(name):
    found = objective(name)
    arguments = {
        key
        for key, parameter in inspect.signature(found.load()).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY
    }
    if found.records == "rollouts":  # its algorithm chooses the function by its knobs
        assert set(found.knobs) >= (arguments - {"exponent", "weight_U"}) | set(CREDITED)
        return
    of_the_algorithm = ADDED if found.records == "pairs" and found.of_policy else {"kl"} if name == "kto" else {}
    assert set(found.knobs) == arguments | set(of_the_algorithm)
    assert set(found.knobs) <= set(LossSettings.model_fields)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_defaults_are_values_that_may_be_set(name):
    assert make_algorithm(name, **objective(name).knobs).name == name


@pytest.mark.parametrize(
    "knobs",
    [
        {"beta": 0.0},
        {"label_smoothing": 0.5},
        {"label_smoothing": -0.1},
        {"gamma": -1.0},
        {"tau": 0.0},
        {"tau": 1.5},
        {"divergence": "total_variation"},
        {"divergence_alpha": 0.0},
        {"divergence_alpha": 1.0},
        {"reduction": "max"},
        {"ld_alpha": 1.2},
        {"nll_coef": -1.0},
        {"nll_reduction": "sum"},
        {"nll_scope": "prompt"},
        {"mixture": {"ipo": 0.0}},
        {"kl": "all"},
        {"desirable_weight": 0.0},
        {"undesirable_weight": -1.0},
        {"ties": "skip"},
        {"tie_strength": 0.0},
        {"center_coef": -0.1},
    ],
    ids=str,
)
def test_knobs_outside_their_range_are_refused_by_name(knobs):
    with pytest.raises(PrefloopError, match=next(iter(knobs))):
        settings(**knobs)


def test_a_knob_that_the_objective_does_not_have_is_refused():
    with pytest.raises(PrefloopError, match="gamma: objective 'dpo' has no such knob; it has nll_coef, "):
        resolve_knobs("dpo", settings(gamma=1.0))
    with pytest.raises(PrefloopError, match="beta: objective 'process_reward' has no such knob; it has no knobs"):
        resolve_knobs("process_reward", settings(beta=1.0))
    with pytest.raises(PrefloopError, match=r"'dop' is not one of .*; did you mean 'dpo'"):
        resolve_knobs("dop", settings())


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("grpo", {"baseline": "leave_one_out", "scale": "group"}, "scale says nothing where baseline is"),
        ("rloo", {"ratio": "none", "clip_low": 0.1}, "clip_low says nothing where ratio is 'none'"),
        ("reinforce", {"clip_high": 0.1}, "where ratio is 'none': leave it out, or take 'token' or "),
        ("grpo", {"kl_as": "k2", "kl_target": 1.0}, "kl_target says nothing where kl_as is 'k2'"),
        ("ppo", {"kl_coef": 0.0, "kl_target": 1.0}, "kl_target adapts kl_coef"),
        ("grpo", {"kl_horizon": 5}, "kl_horizon says nothing without kl_target"),
        ("grpo", {"mismatch_low": 0.9}, "mismatch_low says nothing where mismatch is 'truncate'"),
        ("grpo", {"mismatch": "none", "mismatch_high": 3.0}, "mismatch_high says nothing where mismatch is 'none'"),
        ("grpo", {"mismatch": "mask", "mismatch_low": 3.0}, "mismatch_low 3.0 is above mismatch_high 2.0"),
    ],
)  # fmt: skip
def test_knobs_that_others_silence_are_refused(name, knobs, said):
    with pytest.raises(PrefloopError, match=said):
        resolve_knobs(name, settings(**knobs))


def test_a_knob_at_its_default_may_be_written_down():
    given = {
        "baseline": "leave_one_out",
        "scale": "none",
        "mismatch": "none",
        "mismatch_low": 0.5,
    }
    assert resolve_knobs("grpo", settings(**given)) == {**OBJECTIVES["grpo"].knobs, **given}


def test_a_knob_that_is_set_counts_for_every_loss_of_a_mixture_and_one_that_is_not_is_each_one_s_own():
    given = settings(label_smoothing=0.2, gamma=0.5, mixture={"simpo": 0.3, "ipo": 0.1})
    parts = resolve_parts("dpo", given)
    assert {name: part.weight for name, part in parts.items()} == {"dpo": 1.0, "simpo": 0.3, "ipo": 0.1}
    assert parts["dpo"].arguments == {"beta": 0.1, "label_smoothing": 0.2}
    assert parts["simpo"].arguments == {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.2}
    assert parts["ipo"].arguments == {"beta": 0.1, "reduction": "sum"}
    assert "gamma" not in resolve_knobs("dpo", given)


def test_a_mixture_may_weigh_the_objective_s_own_loss():
    parts = resolve_parts("dpo", settings(mixture={"dpo": 0.8, "bco": 0.2}))
    assert {name: part.weight for name, part in parts.items()} == {"dpo": 0.8, "bco": 0.2}


@pytest.mark.parametrize("name", ["sft", "kto", "reward"])
def test_only_losses_of_pairs_are_mixed(name):
    with pytest.raises(PrefloopError, match=f"mixture: '{name}' is not a loss of preference pairs, which are dpo, "):
        resolve_knobs("dpo", settings(mixture={name: 1.0}))
    with pytest.raises(PrefloopError, match=f"mixture: objective '{name}' has no such knob"):
        resolve_knobs(name, settings(mixture={"dpo": 1.0}))


def test_a_mixture_needs_what_its_losses_need():
    assert not make_algorithm("simpo").needs_reference and make_algorithm("simpo", mixture={"ipo": 1.0}).needs_reference
    assert not make_algorithm("dpo").couples and make_algorithm("dpo", mixture={"aot": 1.0}).couples
