"""Over-optimisation: a proxy of few preferences is pushed by best-of-n and by RL, and the true reward turns.

    python benchmarks/overoptimisation.py [--json PATH] [--only PATTERN] [--quick] [--seed N]

The single-turn task of `_language.py`, whose true reward is known. A seed draws a language, its start policy, the
preferences of a noisy rater and the proxies that are trained on the first 100, 400 or 1,600 of them. `bon-*`: the best
of up to 1,000 completions by each proxy. `rl-*`: RLOO against a proxy at several prices β of KL, at β = 0 with 0.3 of
the learning rate, too, and against the mean or the lower bound of an ensemble. All settings were chosen on another
language (seed 1). The plots lie in out/benchmarks/overoptimisation/.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import transformers

import _overoptimisation_plots as plots
from _common import STATE, Cell, Measured, Options, parse_options, run_cells, versions
from _language import NUM_PROMPT, World
from _language_online import train_online
from _overoptimisation_curves import Curve, Recorder, best_of_n_curve, pooled_fit
from _overoptimisation_proxy import NUM_MEMBERS, Fitting, Proxy, quality, train_proxy
from prefloop.stats.intervals import Interval, mean_interval
from prefloop.stats.overoptimisation import bootstrap_fit

NUM_SEEDS = 5
FIRST_SEED = 31  # not used while tuning
PLACE = STATE / "overoptimisation"
RATE, SLOW = 1e-3, 3e-4
PAIRS = (100, 400, 1600)
HELD_OUT = 400  # pairs that say how good a proxy is
FITTINGS = {100: Fitting(3e-3, 30), 400: Fitting(3e-3, 80), 1600: Fitting(3e-3, 150)}
BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
BON_DRAW = 50
KL_LEVELS = (1.0, 2.0, 4.0, 6.0)


@dataclass(frozen=True)
class Condition:
    """One training: how many preferences its proxy has seen, the price of KL, and whose word is taken.

    `bound_z` is None for a single reward model, 0 for the mean of an ensemble, above for its lower bound.
    """

    num_pairs: int
    kl_coef: float = 0.0
    learning_rate: float = RATE
    bound_z: float | None = None

    @property
    def num_steps(self) -> int:
        return 50 if self.learning_rate == RATE else 80

    @property
    def name(self) -> str:
        if self.bound_z is not None:
            return f"n{self.num_pairs}_ensemble_{f'bound{self.bound_z:g}' if self.bound_z else 'mean'}"
        return f"n{self.num_pairs}_{'slow_' if self.learning_rate == SLOW else ''}beta{self.kl_coef:g}"


CONDITIONS = (
    *(Condition(n) for n in PAIRS),
    *(Condition(n, kl_coef=beta) for n in (100, 1600) for beta in (0.05, 0.2)),
    *(Condition(n, learning_rate=SLOW) for n in (100, 1600)),
    *(Condition(100, bound_z=z) for z in (0.0, 1.0, 3.0)),
)


# --- what a seed has ---------------------------------------------------------------------------------------------


def place_of(seed: int, quick: bool) -> Path:
    return PLACE / f"{seed}{'-quick' if quick else ''}"


@lru_cache(maxsize=1)
def world_of(seed: int, quick: bool) -> World:
    """The language of a seed, its start policy and preferences; made once for all cells of the seed."""
    return World(seed, num_pairs=200, sft_steps=60) if quick else World(seed, num_pairs=PAIRS[-1] + HELD_OUT)


@lru_cache(maxsize=len(PAIRS) + 1)
def proxy_of(seed: int, num_pairs: int, quick: bool, *, ensemble: bool = False) -> Proxy:
    """A proxy of the first preferences of a seed; made once, too."""
    world = world_of(seed, quick)
    num_members = NUM_MEMBERS if ensemble else 1
    return train_proxy(world, world.pairs[:num_pairs], FITTINGS[num_pairs], num_members=num_members)


# --- cells -------------------------------------------------------------------------------------------------------


def measured(kind: str, name: str, curve: Curve, seed: int, quick: bool) -> Measured:
    """The figures of a curve, which is kept for the plots; those of its fits where it is fitted."""
    curve.save(curve_file(f"{kind}_{name}", seed, quick))
    found = curve.figures()
    if is_fitted(f"{kind}_{name}"):
        found |= curve.fits()
    return Measured({f"{kind}_{name}_{key}_seed_{seed}": value for key, value in found.items()}, [row_of(found)])


def is_fitted(name: str) -> bool:
    """Whether the forms are fitted to a curve: to best-of-n, and to RL where nothing holds KL."""
    return name.startswith("bon_") or "beta0" in name.split("_")


def curve_file(name: str, seed: int, quick: bool) -> Path:
    return place_of(seed, quick) / "curves" / f"{name}.json"


def row_of(found: Mapping[str, float]) -> dict[str, str]:
    """A curve as people read it."""
    columns = {"gold_peak": "peak", "kl_at_peak": "at KL", "gold_end": "end", "kl_end": "at KL ", "fall": "fall"}
    columns |= {"proxy_end": "proxy at end", "fit_r2": "R²", "fit_turning_kl": "turns at KL"}
    return {title: f"{found[key]:.2f}" for key, title in columns.items() if key in found}


def train(seed: int, condition: Condition, options: Options) -> Measured:
    """RLOO against a proxy."""
    quick = options.quick
    world = world_of(seed, quick)
    proxy = proxy_of(seed, condition.num_pairs, quick, ensemble=condition.bound_z is not None)
    recorder = Recorder(world)
    train_online(
        world,
        "rloo",
        proxy.with_bound(condition.bound_z or 0.0),
        num_steps=8 if quick else condition.num_steps,
        prompts_per_step=4 if quick else 32,
        samples_per_prompt=4,
        learning_rate=condition.learning_rate,
        kl_coef=condition.kl_coef,
        at=recorder,
    )
    return measured("rl", condition.name, recorder.curve(), seed, quick)


def best_of_many(seed: int, options: Options) -> Measured:
    """The best of n by every proxy, from one pool of completions; and how good the proxies are."""
    quick = options.quick
    world = world_of(seed, quick)
    num_prompts, most, chunk = (4, 16, 2) if quick else (24, BEST_OF[-1], 4)
    sizes = [n for n in BEST_OF if n <= most]
    prompts = np.repeat(world.language.sentences(num_prompts, BON_DRAW, NUM_PROMPT), most, axis=0)
    parts = np.split(prompts, num_prompts // chunk)
    completions = [c for i, part in enumerate(parts) for c in world.sample(world.start, part, BON_DRAW + i)]
    gold_PN = world.gold(prompts, completions).reshape(num_prompts, most)
    figures, rows = {}, []
    for num_pairs, ensemble in proxies(quick):
        proxy = proxy_of(seed, num_pairs, quick, ensemble=ensemble)
        score_PNH = proxy.members(prompts, completions).reshape(num_prompts, most, -1)
        name = f"n{num_pairs}{'_ensemble' if ensemble else ''}"
        known = quality(world, proxy, world.pairs[100 if quick else PAIRS[-1] :])
        if ensemble:
            known["disagreement"] = float(score_PNH.std(-1, ddof=1).mean())
        figures |= {f"proxy_{name}_{key}_seed_{seed}": value for key, value in known.items()}
        for z in (0.0, 1.0, 3.0) if ensemble else (0.0,):
            label = name + (f"_bound{z:g}" if z else "_mean" if ensemble else "")
            curve = best_of_n_curve(proxy.with_bound(z).bounded(score_PNH), gold_PN, sizes)
            found = measured("bon", label, curve, seed, quick)
            figures |= found.figures
            rows += [{"proxy": label, **row, "r with truth": f"{known['correlation']:.2f}"} for row in found.rows]
    return Measured(figures, rows)


def proxies(quick: bool) -> list[tuple[int, bool]]:
    """Numbers of preferences, and whether the proxy is an ensemble."""
    return [(100, False), (100, True)] if quick else [*((n, False) for n in PAIRS), (100, True)]


# --- over seeds --------------------------------------------------------------------------------------------------


def over_seeds(quick: bool, figures: dict[str, float]) -> dict[str, float]:
    """Means with 95 % t intervals, in how many seeds the true reward falls, fits to all seeds, paired differences."""
    groups: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for name, value in figures.items():
        stem, seed = name.rsplit("_seed_", 1)
        groups[stem][int(seed)] = value
    found: dict[str, float] = {}
    for stem, values in groups.items():
        found |= with_interval(stem, list(values.values()))
        if stem.endswith("_fall"):
            found[f"{stem}s_in"] = sum(value > FELL for value in values.values())
    curves = curves_of(groups, quick)
    for name, by_seed in curves.items():
        if len(by_seed) > 1 and is_fitted(name):
            found |= pooled(name, list(by_seed.values()))
    found |= differences(groups, curves)
    plots.draw(curves, PLACE)
    return found


FELL = 0.3
"""A true reward that ends this far below its peak (sd of the start policy) has turned: several standard errors of a
mean over five steps."""


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean under a name, and the ends of its interval."""
    if len(values) < 2:
        return {name: float(np.mean(values))}
    return ends(name, mean_interval(values))


def curves_of(groups: Mapping[str, Mapping[int, float]], quick: bool) -> dict[str, dict[int, Curve]]:
    """The kept curves of everything measured, by name and seed."""
    seeds_of = {stem.removesuffix("_gold_peak"): list(v) for stem, v in groups.items() if stem.endswith("_gold_peak")}
    return {
        name: {seed: Curve.load(curve_file(name, seed, quick)) for seed in seeds} for name, seeds in seeds_of.items()
    }


def pooled(name: str, curves: Sequence[Curve]) -> dict[str, float]:
    """The fits of both forms to the curves of all seeds, with intervals of a bootstrap over seeds.

    A turning point, or an end of its interval, beyond the largest KL that was seen is left out.
    """
    found: dict[str, float] = {}
    farthest = max(max(curve.kl) for curve in curves)
    for label, form in (("pooled", curves[0].form), ("pooled_other_form", curves[0].other_form)):
        found[f"{name}_{label}_r2"] = pooled_fit(curves, form).r_squared
        intervals = bootstrap_fit(form, [curve.points for curve in curves])
        for key in ("alpha", "beta"):
            found |= ends(f"{name}_{label}_{key}", intervals[key])
        turning = ends(f"{name}_{label}_turning_kl", intervals["turning_kl"])
        found |= {key: value for key, value in turning.items() if value <= farthest}
    return found


def ends(name: str, interval: Interval) -> dict[str, float]:
    """An interval as figures."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def differences(
    groups: Mapping[str, Mapping[int, float]], curves: Mapping[str, Mapping[int, Curve]]
) -> dict[str, float]:
    """What more preferences, the lower bound and β change, each seed with itself."""
    found: dict[str, float] = {}

    def compare(name: str, end: str, start: str, keys: Sequence[str]) -> None:
        for key in keys:
            one, other = groups.get(f"{end}_{key}", {}), groups.get(f"{start}_{key}", {})
            gaps = [one[seed] - other[seed] for seed in one if seed in other]
            if gaps:
                found.update(with_interval(f"change_{name}_{key}", gaps))

    both = ("gold_peak", "gold_end", "fall")
    compare("rl_n1600_over_n100", "rl_n1600_beta0", "rl_n100_beta0", both)
    compare("bon_n1600_over_n100", "bon_n1600", "bon_n100", both)
    for n in (100, 1600):
        for z in (1, 3):
            for kind in ("rl", "bon"):
                compare(
                    f"{kind}_n{n}_bound{z}_over_mean",
                    *(f"{kind}_n{n}_ensemble_{a}" for a in (f"bound{z}", "mean")),
                    both,
                )
        compare(f"rl_n{n}_slow_over_fast", f"rl_n{n}_slow_beta0", f"rl_n{n}_beta0", both)
        for beta in (0.05, 0.2):
            compare(f"rl_n{n}_beta{beta:g}_over_beta0", f"rl_n{n}_beta{beta:g}", f"rl_n{n}_beta0", both)
            for free in ("beta0", "slow_beta0"):
                found |= at_equal_kl(n, beta, free, curves)
    return found


def at_equal_kl(n: int, beta: float, free: str, curves: Mapping[str, Mapping[int, Curve]]) -> dict[str, float]:
    """True reward with β less that without, at KL levels that both come to, and at the KL where β ends."""
    name = f"frontier_n{n}_beta{beta:g}_over_{free}"
    paid, unpaid = curves.get(f"rl_n{n}_beta{beta:g}", {}), curves.get(f"rl_n{n}_{free}", {})
    gaps: defaultdict[str, list[float]] = defaultdict(list)
    for seed in paid.keys() & unpaid.keys():
        path = paid[seed].smooth
        places: list[tuple[str, float, float | None]] = [("at_end", path.kl[-1], path.gold[-1])]
        places += [(f"at_kl_{level:g}", level, paid[seed].gold_at(level)) for level in KL_LEVELS]
        for key, kl, gold in places:
            other = unpaid[seed].gold_at(kl)
            if gold is not None and other is not None:
                gaps[key].append(gold - other)
    found: dict[str, float] = {}
    for key, values in gaps.items():
        found |= with_interval(f"{name}_{key}", values) | {f"{name}_{key}_num_seeds": len(values)}
    return found


def cells(options: Options) -> dict[str, Cell]:
    """All cells by name, seed by seed."""
    first = options.first_seed(FIRST_SEED)
    found: dict[str, Cell] = {}
    for seed in range(first, first + (1 if options.quick else NUM_SEEDS)):
        conditions = [Condition(100), Condition(100, bound_z=1.0)] if options.quick else CONDITIONS
        found |= {f"rl-{one.name}-{seed}": partial(train, seed, one) for one in conditions}
        found[f"bon-{seed}"] = partial(best_of_many, seed)
    return found


def main(options: Options) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    caption = "true reward and proxy in sd of the start policy, KL in nats; "
    caption += versions("prefloop", "torch", "transformers")
    run_cells("overoptimisation", cells(options), options, caption, summary=partial(over_seeds, options.quick))


if __name__ == "__main__":
    main(parse_options(__doc__, default_seed=None))
