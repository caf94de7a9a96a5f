"""Prints what the installed fused-elbo requires on this machine, a line each: for `pip install -r`.

python .ci/requirements.py --extra examples --without triton
"""

from __future__ import annotations

import argparse
from importlib import metadata

from pip._vendor.packaging.requirements import Requirement  # pip is in every environment that a Makefile made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", default="", help="one of pyproject.toml's")
    parser.add_argument("--without", nargs="*", default=[], help="names that are left out")
    args = parser.parse_args()
    for requirement in map(Requirement, metadata.requires("fused-elbo") or []):
        here = requirement.marker is None or requirement.marker.evaluate({"extra": args.extra})
        if here and requirement.name not in args.without:
            print(f"{requirement.name}{requirement.specifier}")


if __name__ == "__main__":
    main()
