import pytest

from tests.evaluation import synthetic


@pytest.fixture(scope="session")
def compared():
    """Six methods, four numbers of shots, three seeds; one run failed, one method was refused at 64 shots."""
    return synthetic.comparison()


@pytest.fixture(scope="session")
def reported(compared, tmp_path_factory):
    """The folder of its report."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    from lightning_faast.evaluation.report import write_report

    directory = tmp_path_factory.mktemp("report")
    write_report(compared, directory)
    return directory
