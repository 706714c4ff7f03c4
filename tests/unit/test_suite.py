"""The suite itself."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process")
@pytest.mark.xdist_group("together")
def test_tests_that_share_a_costly_fixture_are_sent_to_one_worker(request):
    # pytest 9.2 and pytest-xdist 3.8 lose the mark, and each worker made the fixtures for itself.
    assert request.node.nodeid.endswith("@together")
