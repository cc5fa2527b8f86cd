import io
from pathlib import Path

import pytest
import requests

from experiments.datasets import load
from experiments.runtime.errors import UserError


@pytest.fixture
def host(monkeypatch):
    """A dict of the contents that hosts send, by address. Other addresses give status 404."""
    files = {}

    def send(self, request, **kwargs):
        response = requests.Response()
        response.url, response.request = request.url, request
        response.status_code = 200 if request.url in files else 404
        response.raw = io.BytesIO(files.get(request.url, b""))
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    return files


@pytest.fixture
def load_error(host):
    """Gets the one-line error of loading a data set; checks that no file is left behind."""

    def message(name: str, data_dir: Path) -> str:
        before = sorted(data_dir.rglob("*"))
        with pytest.raises(UserError) as caught:
            load(name, str(data_dir))
        assert "\n" not in str(caught.value)
        assert sorted(data_dir.rglob("*")) == before
        return str(caught.value)

    return message
