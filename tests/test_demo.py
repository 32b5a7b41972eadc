"""`make demo` in small: every job of the line in turn, and a photograph with the model that comes with the project."""

from pathlib import Path

import pytest

from jobs import demo
from pipeline.config import DemoConfig, TrackingConfig
from pipeline.errors import ConfigError


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("local_ray")
def test_the_whole_line_ends_with_a_page_of_what_it_trained_and_one_of_a_photograph(tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    result = demo.run(DemoConfig(output=str(tmp_path / "demo"), pictures=64, iterations=30, tracking=tracking))

    assert result["train"]["promotion"]["moved"]
    assert result["annotate"]["counts"]["pictures"] == result["evaluate"]["counts"]["pictures"] == demo.VAL_PICTURES
    assert result["photograph"]["counts"]["persons"] == 1
    for page in (result["page"], result["photograph_page"]):
        assert "<html" in Path(page).read_text()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        demo.run(DemoConfig(output=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
