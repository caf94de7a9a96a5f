"""What the documentation shows is run: the code blocks of each README in order, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fused_elbo

REPO = Path(__file__).parents[2]
READMES = [REPO / folder / "README.md" for folder in ("", "examples", "examples/recipes")]
MODULES = ["fused_elbo", "fused_elbo.functional", "fused_elbo.modules", "fused_elbo.sigma", "fused_elbo.backends"]


def run_readmes(_: int, folder: str) -> None:
    """Runs as if torchrun had started this process alone."""
    options = {"init_method": f"file://{folder}/rendezvous", "rank": 0, "world_size": 1}
    dist.init_process_group = partial(dist.init_process_group, "gloo", **options)
    for readme in READMES:
        namespace: dict[str, object] = {}
        for block in blocks(readme):
            exec(compile(block, str(readme), "exec"), namespace)
    os._exit(0)  # as in tests/distributed/test_ranks.py


def blocks(readme: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_readme_code_runs(tmp_path: Path) -> None:
    assert all(len(blocks(readme)) >= least for readme, least in zip(READMES, (3, 2, 2), strict=True))
    mp.spawn(run_readmes, args=(str(tmp_path),), nprocs=1)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "fused_elbo": fused_elbo})
    assert found.attempted > 0
    assert found.failed == 0


def test_what_the_pages_link_to_is_there() -> None:
    """Files, and headings in them as GitHub names them."""
    pages = [*READMES, REPO / "CONTRIBUTING.md", REPO / "bench" / "proof" / "README.md"]
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.M)
                assert heading in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], link


def test_the_files_of_an_option_are_those_that_contributing_names() -> None:
    """One more of them would say that something between the public functions and the formulas knows an option."""
    said = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- (\S+): ", said.partition("<!-- min_log_sigma -->")[2].partition("<!--")[0], re.MULTILINE)
    code = (path for folder in ("fused_elbo", "kernels", "csrc") for path in (REPO / folder).rglob("*.*"))
    naming = {
        path.resolve().relative_to(REPO).as_posix()  # fused_elbo/kernels and fused_elbo/csrc are links
        for path in code
        if path.suffix in {".py", ".h", ".cuh", ".cpp", ".cu"} and "min_log_sigma" in path.read_text(encoding="utf-8")
    }
    assert set(listed) == naming
    assert len(listed) == len(set(listed)) <= 10
