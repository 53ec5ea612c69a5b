import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_installs_nothing_under_plain_names(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_unlearn"}


def test_wheel_holds_mapped_folders_types_configs_and_sample_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in (
        "py.typed",
        "report/report.html.jinja",
        "callbacks/fisher_accumulator.py",
        "datamodules/attribution.py",
        "datamodules/sample/model.safetensors",
        "datamodules/sample/fisher.safetensors",
        "datamodules/sample/shards/manifest.json",
        "datamodules/sample/queries/manifest.json",
        "datamodules/sample/README.md",
        "configs/sample.yaml",
    ):
        assert f"lightning_unlearn/{name}" in names


def test_every_module_of_the_repository_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder in ("lightning_unlearn", "callbacks", "datamodules", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT).as_posix()
            assert (inside if folder == "lightning_unlearn" else f"lightning_unlearn/{inside}") in names


def test_sample_data_weighs_at_most_20_megabytes() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "datamodules" / "sample").rglob("*")) <= 20e6
