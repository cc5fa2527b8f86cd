import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """A folder with original data, to be read only: `BNLSTM_DATA_DIR`, else `../shared/data`."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BNLSTM_DATA_DIR", default))
    if not folder.is_dir():
        pytest.skip(f"needs original data: {folder} is no folder (set BNLSTM_DATA_DIR)")
    return folder
