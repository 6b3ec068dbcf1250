"""Every objective once more, from the papers' equations and plain padded sequences; calls nothing of prefloop's losses.

The loss of an optimizer step is, for each term, the weighted mean over its units.
"""

from inspect import signature

import torch

from packed_examples import padded, padded_logprobs


def log_sigmoid(x):
    return -torch.logaddexp(torch.zeros_like(x), -x)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def weighted_mean(values, weights):
    values = torch.stack(list(values))
    weights = torch.as_tensor(weights, dtype=values.dtype)
    return (weights * values).sum() / weights.sum()


class Completion:
    """One sample under one model: the log-probs of its tokens, path after path, and which of them are its own."""

    def __init__(self, paths, logprobs):
        self.every = torch.cat(list(logprobs))
        self.own = self.every[torch.cat([torch.from_numpy(one.loss_mask[1:]) for one in paths])]


def completions(model, examples):
    """One tuple of completions for each example."""
    paths = [one for example in examples for sample in example.samples for one in sample]
    logprobs = iter(padded_logprobs(model, paths))
    return [
        tuple(Completion(sample, [next(logprobs) for _ in sample]) for sample in example.samples)
        for example in examples
    ]


def sft(model, reference, examples, *, dft=False):
    weights, values = [], []
    for example, [one] in zip(examples, completions(model, examples), strict=True):
        values += (-one.own * one.own.exp().detach() if dft else -one.own).unbind()
        weights += [example.weight] * len(one.own)
    return weighted_mean(values, weights)


# Losses of pairs: lc, lr are summed log-probs of chosen and rejected, a and b their log-ratios to the reference, nc and
# nr their lengths.


def smoothed(logit, eps):
    return -(1 - eps) * log_sigmoid(logit) - eps * log_sigmoid(-logit)


def dpo(p, beta, label_smoothing):
    return smoothed(beta * (p.a - p.b), label_smoothing)


def robust(p, beta, label_smoothing):
    kept, flipped = -log_sigmoid(beta * (p.a - p.b)), -log_sigmoid(beta * (p.b - p.a))
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def dpo_norm(p, beta):
    return -log_sigmoid(beta * (p.a / p.nc - p.b / p.nr))


def hinge(p, beta):
    return torch.maximum(1 - beta * (p.a - p.b), torch.zeros_like(p.a))


def exo(p, beta, label_smoothing):
    q = sigmoid(beta * (p.a - p.b))
    return q * torch.log(q / (1 - label_smoothing)) + (1 - q) * torch.log((1 - q) / label_smoothing)


def discopop(p, beta, tau):
    rho = beta * (p.a - p.b)
    m = sigmoid(rho / tau)
    return (1 - m) * -log_sigmoid(rho) + m * torch.exp(-rho)


def f_dpo(p, beta, divergence, divergence_alpha):
    slope = {
        "reverse_kl": torch.log,
        "forward_kl": lambda u: -1 / u,
        "js": lambda u: torch.log(2 * u / (1 + u)),
        "alpha": lambda u: (1 - u**-divergence_alpha) / divergence_alpha,
    }[divergence]
    return -log_sigmoid(beta * (slope(torch.exp(p.a)) - slope(torch.exp(p.b))))


def ld_dpo(p, beta, ld_alpha):
    def total(own, shorter):
        return own[:shorter].sum() + ld_alpha * own[shorter:].sum()

    logits = []
    for c, r, ref_c, ref_r in zip(*p.given, strict=True):
        n = min(len(c.own), len(r.own))
        logits.append(total(c.own, n) - total(ref_c.own, n) - (total(r.own, n) - total(ref_r.own, n)))
    return -log_sigmoid(beta * torch.stack(logits))


def ipo(p, beta, reduction):
    mean = reduction == "mean"
    return ((p.a / p.nc - p.b / p.nr if mean else p.a - p.b) - 1 / (2 * beta)) ** 2


def sppo(p, beta):
    return (p.a - 1 / (2 * beta)) ** 2 + (p.b + 1 / (2 * beta)) ** 2


def nca(p, beta):
    return -log_sigmoid(beta * p.a) - (log_sigmoid(-beta * p.a) + log_sigmoid(-beta * p.b)) / 2


def bco(p, beta):
    return -log_sigmoid(beta * p.a) - log_sigmoid(-beta * p.b)


def apo_zero(p, beta):
    return 1 - sigmoid(beta * p.a) + sigmoid(beta * p.b)


def apo_down(p, beta):
    return sigmoid(beta * p.a) + 1 - sigmoid(beta * (p.a - p.b))


def by_rank(x):
    """The values in order, each with the gradient of the row that it comes from."""
    return torch.stack([x[i] for i in sorted(range(len(x)), key=lambda i: x[i].item())])


def aot(p, beta, label_smoothing):
    margin, ref_margin = p.lc - p.lr, (p.lc - p.a) - (p.lr - p.b)
    return smoothed(beta * (by_rank(margin) - by_rank(ref_margin.detach())), label_smoothing)


def aot_unpaired(p, beta, label_smoothing):
    return smoothed(beta * (by_rank(p.a) - by_rank(p.b)), label_smoothing)


def simpo(p, beta, gamma, label_smoothing):
    return smoothed(beta * p.lc / p.nc - beta * p.lr / p.nr - gamma, label_smoothing)


def cpo(p, beta, label_smoothing):
    return smoothed(beta * (p.lc - p.lr), label_smoothing)


def orpo(p, beta):
    chosen, rejected = torch.exp(p.lc / p.nc), torch.exp(p.lr / p.nr)
    odds_ratio = chosen / (1 - chosen) / (rejected / (1 - rejected))
    return -beta * log_sigmoid(torch.log(odds_ratio))


LIKELIHOOD = {"cpo": 1.0, "orpo": 1.0}
"""The weight of the chosen's likelihood where it is not 0."""
WITH_REFERENCE = (
    dpo, robust, dpo_norm, hinge, exo, discopop, f_dpo, ld_dpo, ipo, sppo, nca, bco, apo_zero, apo_down, aot,
    aot_unpaired,
)  # fmt: skip
PAIR_LOSSES = {function.__name__: function for function in (*WITH_REFERENCE, simpo, cpo, orpo)}


class Pairs:
    """`given`: the completions of chosen, rejected, and both under the reference."""

    def __init__(self, *given):
        self.given = given
        self.nc, self.nr = (torch.tensor([len(one.own) for one in side], dtype=torch.float64) for side in given[:2])
        self.lc, self.lr, ref_c, ref_r = (torch.stack([one.own.sum() for one in side]) for side in given)
        self.a, self.b = self.lc - ref_c, self.lr - ref_r


def preference(
    name,
    model,
    reference,
    examples,
    *,
    nll_coef=None,
    nll_reduction="pair",
    nll_scope="completion",
    mixture=None,
    **knobs,
):
    chosen, rejected = zip(*completions(model, examples), strict=True)
    with torch.no_grad():
        ref_chosen, ref_rejected = zip(*completions(reference, examples), strict=True)
    pairs = Pairs(chosen, rejected, ref_chosen, ref_rejected)
    swapped = Pairs(rejected, chosen, ref_rejected, ref_chosen)
    weights = [example.weight for example in examples]
    probability = torch.tensor([example.probability for example in examples], dtype=torch.float64)

    def loss_of(name):
        function = PAIR_LOSSES[name]
        arguments = {key: value for key, value in knobs.items() if key in signature(function).parameters}
        there = function(pairs, **arguments)
        if bool((probability == 1).all()):
            return weighted_mean(there, weights)
        return weighted_mean(probability * there + (1 - probability) * function(swapped, **arguments), weights)

    loss = loss_of(name) + sum(coef * loss_of(other) for other, coef in (mixture or {}).items())
    coef = LIKELIHOOD.get(name, 0.0) if nll_coef is None else nll_coef
    tokens = [one.every if nll_scope == "sequence" else one.own for one in chosen]
    if nll_reduction == "pair":
        return loss + coef * weighted_mean([-row.mean() for row in tokens], weights)
    each_token = [w for w, row in zip(weights, tokens, strict=True) for _ in row]
    return loss + coef * weighted_mean([-x for row in tokens for x in row], each_token)


@torch.no_grad()
def reference_point(model, reference, dealt):
    """KTO's: the mean log-ratio over samples, not below 0."""
    both = zip(completions(model, dealt), completions(reference, dealt), strict=True)
    return torch.stack([policy.own.sum() - ref.own.sum() for [policy], [ref] in both]).mean().clamp(min=0)


def kto(
    model, reference, examples, *, beta=0.1, kl="derangement", desirable_weight=1.0, undesirable_weight=1.0, dealt=()
):
    """`dealt`: the samples on which the reference point is estimated."""
    with torch.no_grad():
        fixed = completions(reference, examples)
    point = reference_point(model, reference, dealt) if dealt else 0.0
    values = []
    for example, [one], [ref] in zip(examples, completions(model, examples), fixed, strict=True):
        ratio = one.own.sum() - ref.own.sum()
        gain = ratio - point if example.desirable else point - ratio
        values.append((desirable_weight if example.desirable else undesirable_weight) * (1 - sigmoid(beta * gain)))
    return weighted_mean(values, [example.weight for example in examples])


def sequence_scores(model, examples):
    """The scores [P, H] of each side, by the pooling of transformers' own sequence classification."""
    sides = []
    for side in zip(*(example.samples for example in examples), strict=True):
        ids, mask = padded([sample[-1] for sample in side])
        sides.append(model(input_ids=ids, attention_mask=mask).logits)
    return sides


def reward(model, reference, examples, *, ties="half", tie_strength=1.0, center_coef=0.0):
    values = []
    for example, c, r in zip(examples, *sequence_scores(model, examples), strict=True):
        gap = torch.exp((c - r - example.margin) / 2)
        p, nu = example.probability, tie_strength if ties == "davidson" else 0.0
        total = gap + 1 / gap + nu
        loss = -p * torch.log(gap / total) - (1 - p) * torch.log(1 / gap / total)
        if ties == "davidson" and example.tied:
            loss = -torch.log(nu / total)
        values.append((loss + center_coef * (c + r) ** 2).mean())
    return weighted_mean(values, [example.weight for example in examples])


def process_reward(model, reference, examples):
    paths = [one for example in examples for one in example.samples[0]]
    ids, mask = padded(paths)
    scores = iter(model(input_ids=ids, attention_mask=mask).logits)
    values, weights = [], []
    for example in examples:
        of_path = [next(scores) for _ in example.paths]
        for step in example.steps:
            probability = sigmoid(of_path[step.path][step.token])
            entropy = step.label * torch.log(probability) + (1 - step.label) * torch.log(1 - probability)
            values.append(-entropy.mean())
            weights.append(step.weight * example.weight)
    return weighted_mean(values, weights)


OTHERS = {function.__name__: function for function in (sft, kto, reward, process_reward)}


def plain_loss(name, model, reference, examples, **knobs):
    if name in PAIR_LOSSES:
        return preference(name, model, reference, examples, **knobs)
    return OTHERS[name](model, reference, examples, **knobs)
