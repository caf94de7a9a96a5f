"""How mutants find what they replace: tests/mutants.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import Mutant, copy, mutated, switch_in

MEMBERS = """
struct Part {
  const Span& span;
  char* at;  // null: there is no such tensor

  __device__ Part(const Span& span, const Piece& p)
      : span(span), at(span.base ? span.at(p.sample, p.first) : nullptr) {}

  __device__ int vector() const {
    const unsigned address = static_cast<unsigned>(reinterpret_cast<uintptr_t>(at)) | 16;
    return at == nullptr ? 16 : address;
  }
};
"""
PYTHON = """
def sums(rows, n):
    inside = rows < n
    return load(rows, inside & (rows < 4))


def other(rows, n):
    return rows < n
"""
CUDA = """
template <class A>
__device__ inline A& sum(Places& places, int n) {
  for (int k = 0; k < n; ++k) places.total += places.at[k] * 2;
  __syncthreads();
  return places.total;
}
"""


def test_a_rename_costs_nothing() -> None:
    mutant = Mutant("f.py", "sums", "load($P, $M & ($R < $N))", "load($P, $M & ($R <= $N))")
    assert "load(rows, inside & (rows <= 4))" in mutated(PYTHON, mutant)
    renamed = PYTHON.replace("inside", "tile.mask").replace("rows", "data.rows")
    assert "load(data.rows, tile.mask & (data.rows <= 4))" in mutated(renamed, mutant)
    mutant = Mutant("f.cuh", "sum", "$K < $N", "$K < $N - 1")
    assert "k < batch.size - 1;" in mutated(CUDA.replace("< n", "< batch.size"), mutant)


def test_a_member_with_cudas_macros() -> None:
    mutant = Mutant("f.cuh", "vector", "$A | 16", "$A")
    assert "reinterpret_cast<uintptr_t>(at));" in mutated(MEMBERS, mutant)


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (Mutant("f.py", "sums", "$A <= $B", ""), r"'\$A <= \$B' matches 0 times, not 1, in sums of f.py"),
        (Mutant("f.py", "sums", "$A < $B", ""), "matches 2 times, not 1"),
        (Mutant("f.py", "sums", "$A < $B", "", place=(0, 3)), "matches 2 times, not 3"),
        (Mutant("f.py", "", "$A < $B", ""), "matches 3 times, not 1, in the whole of f.py"),
        (Mutant("f.py", "sum", "$A < $B", ""), "matches 0 times"),
        (Mutant("f.py", "other", "$A < $B", "$A <= $C"), r"\$C of '\$A <= \$C' is in no pattern"),
        (Mutant("f.py", "other", "return $A < $B", "$C", beside="$C > $D"), "'.C > .D' matches 0 times, not once"),
    ],
)
def test_code_that_has_changed_is_an_error(mutant: Mutant, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        mutated(PYTHON, mutant)


def test_all_in_one(tmp_path: Path) -> None:
    """Also where one lies inside another, or at its place."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "f.cuh").write_text(CUDA)
    mutants = {
        "less": Mutant("f.cuh", "sum", "$K < $N", "$K < $N - 1"),
        "no loop": Mutant("f.cuh", "sum", "for (int $K = 0; $K < $N; ++$K) $BODY", ""),
        "once": Mutant("f.cuh", "sum", "$X * 2", "$X"),
        "thrice": Mutant("f.cuh", "sum", "$X * 2", "$X * 3"),
        "no barrier": Mutant("f.cuh", "sum", "__syncthreads();", ""),
    }
    folder = copy(tmp_path / "csrc", tmp_path / "copy")
    assert switch_in(folder, mutants, "m") == {"less": 1, "no loop": 2, "once": 3, "thrice": 4, "no barrier": 5}
    expected = """
template <class A>
__device__ inline A& sum(Places& places, int n) {
  { if (m == 2) {  } else for (int k = 0; (m == 1 ? (k < n - 1) : (k < n)); ++k) places.total += ONCE; }
  { if (m == 5) {  } else __syncthreads(); }
  return places.total;
}
"""
    thrice = "(m == 4 ? (places.at[k] * 3) : (places.at[k] * 2))"
    assert (folder / "f.cuh").read_text() == expected.replace("ONCE", f"(m == 3 ? (places.at[k]) : ({thrice}))")
    mutants["more"] = Mutant("f.cuh", "sum", "$K > $N", "$N")
    with pytest.raises(AssertionError, match=r"more: '.K > .N' matches 0 times"):
        switch_in(copy(tmp_path / "csrc", tmp_path / "again"), mutants, "m")
