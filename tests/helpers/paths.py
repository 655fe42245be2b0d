"""Where things lie in the checkout that the tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
