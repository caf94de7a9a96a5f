"""The benchmark: that it times only what is right, says what its numbers mean, and refuses those that mean nothing.

No test looks at how long anything takes.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parents[2]
BENCH = REPO / "bench"
sys.path.insert(0, str(BENCH))

import limit  # noqa: E402
import losses  # noqa: E402
import measure  # noqa: E402
import peak  # noqa: E402
import providers  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402
import workloads  # noqa: E402
from timing import Ratio, Timing  # noqa: E402
from workloads import Case  # noqa: E402

BY_NAME = {provider.name: provider for provider in providers.ALL}
SMALL = [Case((4, 3, 8, 8), (5,), sigma=sigma) for sigma in providers.DATA]


@pytest.fixture(autouse=True)
def not_deterministic(poison: None) -> None:
    """F.gaussian_nll_loss and torch.compile are slow, or warn, in the mode that poisons torch.empty."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_levels(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(workloads, "LEVELS", {1: 1, 4: 2})
    return Case((2,), (), sigma="levels")


def step(provider: str, case: Case) -> providers.Step:
    return providers.Step(BY_NAME[provider], case, case.tensors())


# ------------------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("dtype", workloads.DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.sigma)
def test_every_provider_agrees_with_fp64(case: Case, dtype: str) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    serving = [p for p in providers.chosen(None, case) if not p.compiled]
    assert {"single_pass", "reference", "limit"} < {p.name for p in serving}
    assert any(p.kind == "baseline" for p in serving)
    for provider in serving:
        providers.check(step(provider.name, case), case)


def test_every_provider_of_levels_agrees_with_fp64(few_levels: Case) -> None:
    serving = [p for p in providers.chosen(None, few_levels) if not p.compiled]
    assert {"eager_levels", "reference", "limit"} <= {p.name for p in serving}
    for provider in serving:
        providers.check(step(provider.name, few_levels), few_levels)


@pytest.mark.parametrize("batch", [3, 70])
def test_every_provider_of_the_aggregate_agrees_with_fp64(batch: int) -> None:
    """Also where the fp64 code goes in parts."""
    case = Case((batch, 5), (), sigma="aggregate", limit=False)
    serving = [p for p in providers.chosen(None, case) if not p.compiled]
    assert {"eager_aggregate", "reference"} < {p.name for p in serving}
    for provider in serving:
        providers.check(step(provider.name, case), case)


def test_an_evaluation_has_no_backward() -> None:
    """And its baseline in parts agrees too, where there are several."""
    case = dataclasses.replace(workloads.EVALUATION, shape=(70, 5))
    serving = [p for p in providers.chosen(None, case) if not p.compiled]
    assert {"eager_aggregate", "eager_aggregate_in_parts", "reference"} < {p.name for p in serving}
    records, faults = measure.measure(case, serving, 1, 0.0)
    assert not faults
    assert [own["provider"] for own in records] == [p.name for p in serving]
    for own in records:
        assert own["backward_s"] is None
        assert own["forward_s"]["median"] <= own["step_s"]["median"]
        assert own["saved_bytes"] == 0
    tensors = case.tensors()
    assert workloads.step_bytes(tensors) == workloads.size(tensors) == 3 * 70 * 5 * 4


def test_what_is_too_large_to_broadcast_is_not() -> None:
    (case,) = workloads.chosen(["2048x128-aggregate"])
    assert {p.kind for p in providers.chosen(None, case)} == {"ours"}


def test_compiled_baselines_are_the_eager_ones() -> None:
    for name, provider in BY_NAME.items():
        if provider.compiled:
            eager = BY_NAME[name.removesuffix("_compiled")]
            assert dataclasses.replace(eager, name=name, compiled=True) == provider


def test_the_formula_is_the_librarys() -> None:
    """Two independent writings of it, fp64."""
    for case in SMALL:
        given = case.tensors()
        tensors = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in given]
        ours, exact = losses.fused(case.sigma, *tensors), losses.exact(case.sigma, False, *tensors)
        torch.testing.assert_close(ours, exact)


def wrong_loss(*tensors: torch.Tensor) -> torch.Tensor:
    return losses.one_liner(*tensors) + 1.0


def wrong_gradient(*tensors: torch.Tensor) -> torch.Tensor:
    recon, *rest = tensors
    return losses.one_liner(recon, *rest) + 0.01 * (recon - recon.detach()).sum()


@pytest.mark.parametrize(
    ("loss", "complaint"), [(wrong_loss, "the loss differs"), (wrong_gradient, "gradient 0 differs")]
)
def test_a_wrong_provider_is_refused_by_name(
    loss: object, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = dataclasses.replace(BY_NAME["one_liner"], name="wrong", loss=loss)
    case = SMALL[0]
    with pytest.raises(providers.Disagrees, match=rf"wrong at {case.name}: {complaint}"):
        providers.check(providers.Step(wrong, case, case.tensors()), case)

    monkeypatch.setattr(providers, "ALL", [BY_NAME["one_liner"], wrong])
    monkeypatch.setattr(workloads, "registry", lambda device="cpu": {case.name: case})
    assert run.main(["--rounds", "1", "--out", str(tmp_path)]) == 1
    assert f"NOT TIMED: wrong at {case.name}: {complaint}" in capsys.readouterr().err
    assert [r["provider"] for r in json.loads((tmp_path / "results.json").read_text())["results"]] == ["one_liner"]


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_bytes_and_rates() -> None:
    tensors = Case((2, 3, 4), (5,)).tensors()
    n, l = 2 * 3 * 4 * 4, 2 * 5 * 4
    assert workloads.forward_bytes(tensors) == 2 * n + 2 * l
    assert workloads.backward_bytes(tensors) == 3 * n + 4 * l
    assert workloads.step_bytes(tensors) == 5 * n + 6 * l
    half = Case((2, 3, 4), (5,), dtype="bf16").tensors()
    assert 2 * workloads.step_bytes(half) == workloads.step_bytes(tensors)
    pixel = Case((2, 3, 4), (5,), sigma="pixel").tensors()
    assert workloads.step_bytes(pixel) == 8 * n + 6 * l
    assert measure.gb_per_s(3_000_000_000, 1.5) == 2.0


def test_the_limit_reads_and_writes_every_word() -> None:
    for case in (case for case in SMALL if case.sigma not in ("mask", "decoder")):  # of several dtypes: no limit
        tensors = case.tensors()
        moved = limit.Limit(tensors, case.sigma)
        recon, target, mu, logvar = (t.detach().view(torch.int32) for t in tensors[:4])
        data = [recon ^ target]
        if case.sigma == "pixel":
            mixed = recon ^ target ^ tensors[4].detach().view(torch.int32)
            data = [mixed, mixed + 1]
        expected = [*data, mu ^ logvar, (mu ^ logvar) + 1]
        got = [t.view(torch.int32) for group in moved.backward() for t in group]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        read = [data[0].long().sum(), (mu ^ logvar).long().sum()]
        assert moved.forward() == sum(int(part) for part in read) % 2**32
        bytes_of = sum(t.numel() * t.element_size() for group in moved.groups for t in group)
        assert bytes_of == workloads.forward_bytes([t for t in tensors if t.numel() > 1])


def test_without_a_compiler_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "available", lambda: False)
    assert "limit" not in [p.name for p in providers.chosen(None, SMALL[0])]


# -------------------------------------------------------------------------------------------------------------- spread


def rounds(*seconds: float, waits: tuple[float, ...] = ()) -> Timing:
    return Timing(list(seconds), [0.0] * len(seconds), list(waits) or [0.0] * len(seconds))


def noisy(centre: float, width: float, count: int = 30) -> Timing:
    """Evenly between centre ∓ width/2, in random order."""
    values = [centre + width * (i / (count - 1) - 0.5) for i in range(count)]
    random.Random(0).shuffle(values)
    return rounds(*values)


ONES = rounds(*[1.0] * 30)


def test_a_ratio_needs_rounds_that_agree() -> None:
    assert Ratio.of_rounds(noisy(2.0, 0.4), ONES).hidden is None
    assert "median apart" in (Ratio.of_rounds(noisy(2.0, 3.0), ONES).hidden or "")
    assert "either may be faster" in (Ratio.of_rounds(noisy(1.02, 0.4), ONES).hidden or "")
    assert Ratio.of_rounds(noisy(1.0, 0.05), ONES).hidden is None  # equal, and known to be
    assert "median apart" in (Ratio.of_rounds(noisy(2.0, 1.6, 5), rounds(*[1.0] * 5)).hidden or "")  # too few rounds
    assert Ratio.of_rounds(rounds(2.0, float("nan")), rounds(1.0, 1.0)).hidden is not None


def test_rounds_in_which_others_had_the_processors_are_left_out() -> None:
    waits = (0.0, 0.5, 0.0)
    ratio = Ratio.of_rounds(rounds(2.0, 50.0, 2.0, waits=waits), rounds(1.0, 1.0, 1.0))
    assert (ratio.low, ratio.high, ratio.hidden) == (2.0, 2.0, None)
    assert Ratio.of_rounds(rounds(1.0, 1.0, 1.0), rounds(2.0, 50.0, 2.0, waits=waits)).low == 0.5
    mostly = rounds(2.0, 2.0, 2.0, waits=(0.5, 0.0, 0.5))
    assert "others had the processors" in (Ratio.of_rounds(mostly, rounds(1.0, 1.0, 1.0)).hidden or "")
    assert mostly.calm_share < timing.CALM


def test_ratios_are_of_rounds_and_not_of_medians() -> None:
    slow_rounds = [1.0, 10.0, 100.0]
    assert Ratio.of_rounds(rounds(*(3 * s for s in slow_rounds)), rounds(*slow_rounds)).median == 3.0


def test_the_interval_holds_the_median() -> None:
    """Against the binomial distribution's table: 95% for n = 30 are the 10th to the 21st value, none below six."""
    assert [timing.outside(n) for n in (1, 5, 6, 10, 30, 100)] == [0, 0, 0, 1, 9, 39]
    ratio = Ratio.of_rounds(rounds(*range(1, 31)), ONES)
    assert (ratio.low, ratio.median, ratio.high) == (10, 15.5, 21)


def test_a_sample_is_taken_again_while_others_have_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([(1.0, 0.0, 0.9), (0.5, 0.5, 0.5), (0.2, 0.0, 0.0), (1.0, 0.0, 0.9), (0.3, 0.0, 0.8)])
    monkeypatch.setattr(timing, "sample", lambda *arguments: next(seen))
    found = Timing()
    for _ in range(2):
        timing.take_turn(None, SMALL[0], 1, found)  # type: ignore[arg-type]
    assert found.forward == [0.2, 0.3]  # the second, though disturbed, when patience was over
    assert found.repeated == timing.PATIENCE == 3.0
    assert found.calm == [True, False]


# -------------------------------------------------------------------------------------------------------------- memory


def test_memory_kept_for_backward() -> None:
    case = Case((64, 3, 16, 16))
    recon = case.elements * 4
    for name in ("cpp", "reference"):
        if name in providers.available("cpu"):
            assert measure.saved_bytes(step(name, case)) < 2000  # O(B)
    assert measure.saved_bytes(step("single_pass", case)) == 0
    assert measure.saved_bytes(step("stock", case)) >= 3 * recon
    assert recon <= measure.saved_bytes(step("one_liner", case)) < 2 * recon


@pytest.mark.skipif(not peak.available(), reason="needs Linux's /proc/self/clear_refs")
def test_peak_memory() -> None:
    """The one-liner's peak is little more than its gradients; stock code has its tensors beside them."""
    case = workloads.registry()["128x3x64x64"]
    recon = case.elements * 4
    one_liner = peak.in_a_process(case, "one_liner", 1)
    # What else is resident may shrink beside it, by some pages in a thousand.
    assert 0.95 * recon < one_liner < 8 * recon
    assert one_liner < peak.in_a_process(case, "stock", 1)


def test_operators() -> None:
    case = SMALL[0]
    assert measure.operators(step("stock", case)) > measure.operators(step("one_liner", case)) > 10
    if "cpp" in providers.available("cpu"):
        assert measure.operators(step("cpp", case)) == 3  # forward, ones_like, grads


# --------------------------------------------------------------------------------------------------------------- names


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--cases", "128x3x64x65"], ["--providers", "one-liner"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            run.parse(arguments)
        assert arguments[1] in capsys.readouterr().err or arguments[0] == "--rounds"
    assert {c.name for c in run.parse(["--cases", "16x3x256x256*"]).cases} >= {"16x3x256x256", "16x3x256x256-bf16"}


def test_names_are_unique() -> None:
    for device in ("cpu", "cuda"):
        for name, case in workloads.registry(device).items():
            assert (name, device) == (case.name, case.device)
    assert len(BY_NAME) == len(providers.ALL)
