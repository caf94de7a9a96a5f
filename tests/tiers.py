"""Which tests run when: `make test` proves the library in minutes, `make check` has the rest, but for what only a
release needs, which `make check-release` has, and for what runs in other people's training code, which
`make check-hosts` has.

    pytest                    what `make test` runs; where files are named, all that they have
    pytest --tier=check       the files of CHECK, and the tests that are marked `check`, with the reason
    pytest --tier=release     the tests that are marked `release`, likewise
    pytest --tier=hosts       the files of HOSTS
    pytest --tier=all         everything

Each run says at its end what it left out, and how to run that. conftest.py takes these hooks up.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fused_elbo import backends

COMMANDS = {"test": "make test", "check": "make check", "release": "make check-release", "hosts": "make check-hosts"}
# Files whose tests all wait for `make check`, and why. `make test` does not even import them.
CHECK = {
    "the examples: what they claim, how they resume, what they refuse": (
        "aggregated_posterior", "aligned_posteriors", "beta_images", "beta_input", "calibrated_decoders",
        "conditioning", "disentanglement", "example_data", "examples", "factors", "frechet", "kl_decomposition",
        "kl_parts", "latent_autoencoder", "learned_vs_fixed_sigma", "likelihoods", "linear", "mmd", "objective_slices",
        "phase_diagram", "quadrature", "rd_curve", "rd_curve_runs", "samplers", "sparse_representation", "sweep",
    ),
    "the benchmark and the GPU check": (
        "bench", "gpu_check", "gpu_pages", "gpu_pool", "gpu_sections", "gpu_tools", "results",
    ),
    "the machine code of Triton's kernels": ("compiled",),
    "the library forgotten and imported again": ("reimport",),
    "packages: sdist, wheel": ("packaging", "packaged_library", "wheel"),
    "element loops on every instruction set and compiler": ("lanes",),
    "the finding of mutants": ("mutant_patterns",),
    "compilers and exporters of transforms, all combinations": ("traced_inputs", "transforms"),
}  # fmt: skip
# Likewise, for `make check-hosts`; `make check` does not import them either.
HOSTS = {"the loss in other people's training code": ("accelerate", "diffusers", "lightning", "pythae")}
# Fixtures of a module that take so long that no second process should make them.
MADE_ONCE = {"quick", "library", "expected", "built"}
_FILES = {
    f"test_{stem}.py": (tier, reason)
    for tier, files in (("check", CHECK), ("hosts", HOSTS))
    for reason, stems in files.items()
    for stem in stems
}
_LEFT_OUT = pytest.StashKey[Counter[tuple[str, str]]]()  # (tier, what)


def together(name: str) -> pytest.MarkDecorator:
    """The mark of tests that run in one process. A group with brackets in its name would be none for pytest-xdist."""
    return pytest.mark.xdist_group(name.replace("[", " ").replace("]", ""))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=(*COMMANDS, "all"), help="which tests to run: see tests/tiers.py")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT_OUT] = Counter()
    if config.option.tier is None:
        named = any(Path(argument.partition("::")[0]).is_file() for argument in config.args)
        config.option.tier = "all" if named else "test"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test` imports no file that waits, and none but `make check-hosts` those of HOSTS."""
    tier, reason = _FILES.get(collection_path.name, ("", ""))
    asked = config.option.tier
    if (asked == "test" and tier) or (asked in ("check", "release") and tier == "hosts"):
        config.stash[_LEFT_OUT][tier, f"{reason} (files)"] += 1
        return True
    return None


def tier_of(item: pytest.Item) -> tuple[str, str]:
    """Its tier, and why it is no earlier one."""
    if (mark := item.get_closest_marker("implied")) and backends.triton.runs_on_cpu() == "its interpreter":
        return "release", mark.args[0]
    for tier in ("release", "check"):
        if mark := item.get_closest_marker(tier):
            return tier, mark.args[0]
    return _FILES.get(item.path.name, ("test", "the tests that prove the library"))


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of the tier that is asked for; those of a file's MADE_ONCE in one process."""
    for item in items:
        if MADE_ONCE.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(together(item.path.stem))
    if config.option.tier == "all":
        return
    tiers = [(item, tier_of(item)) for item in items]
    left = [(item, tier) for item, tier in tiers if tier[0] != config.option.tier]
    config.stash[_LEFT_OUT].update(tier for _, tier in left)
    config.hook.pytest_deselected(items=[item for item, _ in left])
    items[:] = [item for item, tier in tiers if tier[0] == config.option.tier]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: each worker has collected the same tests
        session.config.workeroutput["left_out"] = list(session.config.stash[_LEFT_OUT].elements())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[_LEFT_OUT] = Counter(map(tuple, getattr(node, "workeroutput", {}).get("left_out", [])))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for tier, command in COMMANDS.items():
        left = {reason: n for (other, reason), n in config.stash[_LEFT_OUT].most_common() if other == tier}
        if left:
            terminalreporter.section(f"left to `{command}`", sep="-")
            for reason, count in left.items():
                terminalreporter.write_line(f"{count:5}  {reason}")
