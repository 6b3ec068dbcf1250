"""A small policy on disk with a tokenizer of its own, trajectories of it, and transformers' way to score paths."""

import itertools
from functools import cache

import torch

from prefloop.chat import ChatRenderer, render_demonstration
from prefloop.models.initial import initial_model, train_tokenizer
from prefloop.models.load import Policy
from prefloop.models.settings import InitialModelSettings
from prefloop.records import AuthorKind, Ended, Message, Role, Task, Trajectory

SMALL = InitialModelSettings(hidden_size=32, num_heads=2, intermediate_size=48, num_layers=2, vocab_size=400)
QUESTIONS = ("Where is the station?", "What is 2 + 3?", "Name a colour.")
ANSWERS = ("It is next to the river.", "5", "Red, or perhaps blue; I am not sure.", "I do not know.")


@cache
def small_tokenizer():
    """Shared by tests that leave it as it is."""
    said = [(Message(Role.USER, q), Message(Role.ASSISTANT, a)) for q, a in itertools.product(QUESTIONS, ANSWERS)]
    return train_tokenizer(((messages, ()) for messages in said), SMALL.vocab_size)


def saved_policy(directory, *, settings=SMALL, **shape):
    """The path of a random policy."""
    tokenizer = small_tokenizer()
    model = initial_model(tokenizer, settings.model_copy(update=shape))
    Policy(model, tokenizer).save(directory)
    return str(directory)


def conversation(question, answer, name=""):
    """A task and a trajectory of it."""
    task = Task("made", {"question": question}, messages=(Message(Role.USER, question),))
    messages = (*task.messages, Message(Role.ASSISTANT, answer))
    name = name or f"{question} {answer}"
    return task, Trajectory(name, task.id, messages, 1, Ended.IMPORTED, AuthorKind.IMPORT, "test")


def conversations():
    """All questions with all answers."""
    return [conversation(question, answer) for question, answer in itertools.product(QUESTIONS, ANSWERS)]


def rendered(tokenizer, trajectory):
    """The one path of a trajectory."""
    (path,) = render_demonstration(ChatRenderer(tokenizer), trajectory.messages, (), 1, trajectory.id)
    return path


@torch.no_grad()
def padded_scores(model, paths, pad):
    """What a sequence classification model of transformers gives for right-padded rows; [N, H]."""
    longest = max(len(path.token) for path in paths)
    ids = torch.full((len(paths), longest), pad)
    mask = torch.zeros(len(paths), longest, dtype=torch.long)
    for i, path in enumerate(paths):
        ids[i, : len(path.token)] = torch.from_numpy(path.token)
        mask[i, : len(path.token)] = 1
    return model(input_ids=ids, attention_mask=mask).logits.double().numpy()
