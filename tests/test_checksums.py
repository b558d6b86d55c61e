"""Checksums of tensors: what they tell apart, and that parts add up."""

import pytest
import torch
from torch import Tensor

from cipo_fast.rollout.checksums import added, checksum, differing, to_ints


def weight(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(96, 40, generator=torch.Generator().manual_seed(0)).to(dtype)


def value(tensor: Tensor, row: int = 0, column: int = 0) -> int:
    return int(checksum(tensor, row, column))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_unit_in_the_last_place_anywhere_shows(dtype: torch.dtype) -> None:
    w = weight(dtype)
    found = {value(w)}
    for place in [(0, 0), (0, 39), (95, 0), (50, 20)]:
        changed = w.clone()
        changed[place] = torch.nextafter(w[place], torch.tensor(torch.inf, dtype=dtype))
        assert changed[place] != w[place]
        found.add(value(changed))
    assert len(found) == 5


def test_small_regular_changes_do_not_cancel() -> None:
    """Ones that a plain weighted sum would miss: +1, -2, +1 in a row, a sign, a transposed or shifted matrix."""
    w = torch.arange(40 * 40).reshape(40, 40).to(torch.int32)
    bent = w.clone()
    bent[3, 4:7] += torch.tensor([1, -2, 1], dtype=torch.int32)
    bent_down = w.clone()
    bent_down[4:7, 3] += torch.tensor([1, -2, 1], dtype=torch.int32)
    twice = w.clone()
    twice[3, 4:6] += torch.tensor([1, -1], dtype=torch.int32)
    twice[4, 4:6] += torch.tensor([-1, 1], dtype=torch.int32)
    others = [bent, bent_down, twice, w.T, w.flip(0), w.flip(1), w.roll(1, 0), w.roll(1, 1), w[torch.randperm(40)]]
    assert len({value(x) for x in [w, *others]}) == 1 + len(others)
    assert value(weight()) != value(-weight())


def test_parts_of_any_cut_add_up_to_the_whole() -> None:
    w = weight()
    whole = {"w": value(w)}
    rows = [{"w": value(w[a:b], a)} for a, b in [(0, 10), (10, 90), (90, 96)]]
    columns = [{"w": value(w[:, a:b], 0, a)} for a, b in [(0, 1), (1, 40)]]
    assert added(rows) == added(columns) == whole
    assert added([{"w": value(w[:48])}, {"w": value(w[48:])}]) != whole  # at the wrong place


def test_chunks_are_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight()
    whole = value(w)
    monkeypatch.setattr("cipo_fast.rollout.checksums.CHUNK", 100)
    assert value(w) == whole


def test_equal_values_are_equal_whatever_the_type_zeros_and_layout() -> None:
    w = weight()
    assert value(w) == value(w.float()) == value(w.T.contiguous().T)
    zeros = torch.zeros(4)
    assert value(zeros) == value(-zeros) == value(torch.full((4,), 1e-40))  # a product cannot tell them apart
    assert value(torch.ones(3, 2, 2)) == value(torch.ones(6, 2))
    assert value(torch.tensor(torch.nan)) != value(torch.tensor(1.0))
    assert value(torch.empty(0)) == 0


def test_what_the_engine_lacks_differs() -> None:
    w = to_ints({"a": checksum(weight()), "b": checksum(weight() * 2)})
    assert differing(w, w | {"more": 1}) == []
    assert differing(w, {"a": w["a"]}) == ["b"]
    assert differing(w, {"a": w["b"], "b": w["a"]}) == ["a", "b"]
