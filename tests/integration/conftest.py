from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for helpers beside the tests

from guarded_runs import Poison, make_poison


@pytest.fixture(scope="session")
def poison(demo_data, tmp_path_factory) -> Poison:
    """Real data and a language model in which one sample of one step meets an embedding that is not finite."""
    return make_poison(demo_data, tmp_path_factory.mktemp("poison"))
