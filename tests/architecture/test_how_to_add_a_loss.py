"""The worked example of docs/how-to-add-a-loss.md, run as it stands there."""

import copy

import pytest
import torch
from repository import ROOT, code_blocks

from prefloop.losses import dpo, registry
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import TrainingStep

PAGE = ROOT / "docs" / "how-to-add-a-loss.md"


def blocks():
    function, line, setting, training = ("\n".join(block) for block in code_blocks(PAGE, ("py",)))
    return function, line, setting, training


@pytest.fixture
def added(monkeypatch):
    """The function in its family's file and the line in the registry, until the test ends."""
    function, line, _, _ = blocks()
    family = dict(vars(dpo))
    exec(compile(function, PAGE.name, "exec"), family)
    (entry,) = eval(compile("{" + line + "}", PAGE.name, "eval"), dict(vars(registry))).items()
    monkeypatch.setattr(dpo, "squared_hinge", family["squared_hinge"], raising=False)
    monkeypatch.setitem(registry.OBJECTIVES, *entry)
    assert entry[0] == "squared_hinge"


def run_blocks(*sources):
    names = {}
    for source in sources:
        exec(compile(source, PAGE.name, "exec"), names)
    return names


def logprob(model, paths):
    """The summed log-prob of the sampled tokens of one path, from plain logits of the whole vocabulary."""
    (path,) = paths
    token = torch.from_numpy(path.token).long()[None]
    logprobs = model(input_ids=token).logits.log_softmax(-1)[0, :-1].gather(1, token[0, 1:, None])[:, 0]
    return logprobs[torch.from_numpy(path.loss_mask[1:])].sum()


def plain_loss(policy, reference, pairs, beta):
    values = []
    for pair in pairs:
        a, b = (logprob(policy, side) - logprob(reference, side).detach() for side in (pair.chosen, pair.rejected))
        values.append(torch.clamp(1 - beta * (a - b), min=0) ** 2)
    return torch.stack(values).mean()


def test_the_example_trains_and_its_gradient_is_that_of_plain_tensors(added):
    _, _, setting, training = blocks()
    names = run_blocks(setting)
    policy, reference, pairs = (copy.deepcopy(names[key]) for key in ("policy", "reference", "pairs"))
    exec(compile(training, PAGE.name, "exec"), names)
    expected = plain_loss(policy, reference, pairs, beta=0.5)
    assert names["losses"][0] == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    theirs = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    algorithm = make_algorithm("squared_hinge", beta=0.5)
    TrainingStep(policy, reference, algorithm, torch.optim.AdamW(policy.parameters())).gradient(pairs)
    for p, gradient in zip(policy.parameters(), theirs, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_what_the_page_promises_for_the_line_works(added):
    names = run_blocks(blocks()[2])
    knobs = {"label_smoothing": 0.1, "mixture": {"dpo": 0.5}, "nll_coef": 0.2}
    step = TrainingStep(
        names["policy"],
        names["reference"],
        make_algorithm("squared_hinge", **knobs),
        torch.optim.AdamW(names["policy"].parameters()),
    )
    assert step(names["pairs"])["nll_loss"] > 0


def test_without_the_line_there_is_no_such_objective():
    assert "squared_hinge" not in registry.OBJECTIVES
