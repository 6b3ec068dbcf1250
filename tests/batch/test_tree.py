import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_large_token_ids_sort_as_numbers():
    forest = forest_of([[256], [255], [70000], [1]])
    assert forest.token_T.tolist() == [1, 255, 256, 70000]


def test_empty_paths_are_refused():
    with pytest.raises(PrefloopError, match="path 1 of 2 has no tokens"):
        forest_of([[1], []])
    with pytest.raises(PrefloopError, match="no paths"):
        build_forest([])
