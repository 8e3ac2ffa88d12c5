"""A record that a real run wrote: the launches of these tests read it as `REAL_RECORD`."""

import os

import pytest

from tests.fake_launcher import real_record


@pytest.fixture(scope="session", autouse=True)
def written_by_a_real_run(tmp_path_factory):
    os.environ["REAL_RECORD"] = str(real_record(tmp_path_factory.mktemp("real")))
