"""What the fault tests share."""

from __future__ import annotations

import pytest
from season import Season, make_season


@pytest.fixture(scope="session")
def season(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, ray_session: None) -> Season:
    """Drawn and embedded once; tests copy what they change."""
    return make_season(tmp_path_factory.mktemp("season"), tiny_model)
