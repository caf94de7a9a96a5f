"""The C++ sources, shipped inside the package: ROOT is the folder that holds them, installed or not."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
