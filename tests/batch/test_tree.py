import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.batch import tree
from prefloop.batch.tree import build_forest
from prefloop.records import PrefloopError

token_paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=10)


def forest_of(paths):
    return build_forest([np.array(path, dtype=np.int32) for path in paths])


def walked(forest, node):
    """The tokens from the root to a node."""
    tokens = []
    while node >= 0:
        tokens.append(int(forest.token_T[node]))
        node = forest.parent_T[node]
    return tokens[::-1]


@given(token_paths)
def test_every_distinct_prefix_is_one_node_and_paths_visit_their_own(paths):
    forest = forest_of(paths)
    prefixes = {tuple(path[: i + 1]) for path in paths for i in range(len(path))}
    assert sorted(tuple(walked(forest, t)) for t in range(len(forest.token_T))) == sorted(prefixes)
    for start, path in zip(forest.path_start_N, paths, strict=True):
        visits = forest.visit_token_V[start : start + len(path)]
        assert [walked(forest, node) for node in visits] == [path[: i + 1] for i in range(len(path))]


@given(token_paths)
def test_mask_is_ancestor_or_self(paths):
    forest = forest_of(paths)
    num = len(forest.token_T)
    for q in range(num):
        ancestors, node = set(), q
        while node >= 0:
            ancestors.add(node)
            node = int(forest.parent_T[node])
        assert {k for k in range(num) if k <= q < forest.end_T[k]} == ancestors
        assert forest.depth_T[q] == len(ancestors) - 1


def test_a_worked_example():
    forest = forest_of([[5, 6, 8], [5, 6, 7], [9], [5, 6]])
    assert forest.token_T.tolist() == [5, 6, 7, 8, 9]
    assert forest.parent_T.tolist() == [-1, 0, 1, 1, -1]
    assert forest.depth_T.tolist() == [0, 1, 2, 2, 0]
    assert forest.end_T.tolist() == [4, 4, 3, 4, 5]
    assert forest.visit_token_V.tolist() == [0, 1, 3, 0, 1, 2, 4, 0, 1]
    assert forest.path_start_N.tolist() == [0, 3, 6, 7]


def test_equal_paths_and_prefixes_take_no_new_nodes():
    forest = forest_of([[1, 2, 3], [1, 2, 3], [1, 2], [1, 2, 3, 4], [1, 2]])
    assert forest.token_T.tolist() == [1, 2, 3, 4]
    assert [forest.visit_token_V[start] for start in forest.path_start_N] == [0] * 5


@given(token_paths)
def test_it_is_the_same_forest_in_whatever_order_paths_come(paths):
    one, other = forest_of(paths), forest_of(paths[::-1])
    for name in ("token_T", "parent_T", "depth_T", "end_T"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("shape", ["comb", "prompts", "one prefix"])
def test_each_token_is_compared_a_constant_number_of_times(shape, monkeypatch):
    compared = count_comparisons(monkeypatch)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, 4000)
    paths = {
        "comb": lambda i: [*tokens[: 10 * i], 1000 + i],
        "prompts": lambda i: [i % 10, *tokens[:1000], *rng.integers(0, 1000, 200)],
        "one prefix": lambda i: [*tokens, *rng.integers(0, 1000, 20)],
    }[shape]
    paths = [np.array(paths(i), dtype=np.int32) for i in range(300)]
    build_forest(paths)
    assert sum(compared) < 2.5 * sum(map(len, paths)) + 64 * len(compared)
    assert len(compared) < 30 * len(paths)


def count_comparisons(monkeypatch):
    """A list that will hold how many tokens each comparison of two paths read, at most."""
    compared, agreement = [], tree._agreement

    def counted(one, other, depth):
        agreed = agreement(one, other, depth)
        compared.append(2 * (agreed - depth) + 64)
        return agreed

    monkeypatch.setattr(tree, "_agreement", counted)
    return compared


@pytest.mark.slow
def test_two_thousand_paths_of_one_long_prefix(monkeypatch):
    compared = count_comparisons(monkeypatch)
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 150_000, 32_000).astype(np.int32)
    paths = [np.append(prefix, rng.integers(0, 150_000, 64).astype(np.int32)) for _ in range(2000)]
    forest = build_forest(paths)
    assert len(forest.token_T) <= 32_000 + 64 * 2000
    assert len(forest.visit_token_V) == 2000 * 32_064
    assert sum(compared) < 2.5 * len(forest.visit_token_V)


def test_large_token_ids_sort_as_numbers():
    forest = forest_of([[256], [255], [70000], [1]])
    assert forest.token_T.tolist() == [1, 255, 256, 70000]


def test_empty_paths_are_refused():
    with pytest.raises(PrefloopError, match="path 1 of 2 has no tokens"):
        forest_of([[1], []])
    with pytest.raises(PrefloopError, match="no paths"):
        build_forest([])
