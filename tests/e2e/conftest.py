import pytest

from tests.e2e.shared import copied, retrained


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A copy of the run's one retraining, which the tests of one file may change.

    Files run on different workers at the same time, and several move the champion.
    """
    return copied(retrained(tmp_path_factory), tmp_path_factory.mktemp("e2e") / "h")
