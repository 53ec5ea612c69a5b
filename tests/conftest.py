"""Every test runs on one thread: several test processes share two cores, and take the files in this order."""

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# A stopwatch would fail them on a busy machine.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Long ones first, so that at the end no worker waits for another's last file.
LONG = (
    "lightning_unlearn/test_distributed.py",
    "command_line/test_attribute_command.py",
    "command_line/test_command_processes.py",
    "command_line/test_race_runs.py",
    "command_line/test_evaluate_command.py",
    "strategies/test_penalised.py",
    "unlearning/test_module.py",
    "lightning_unlearn/test_laws.py",
    "callbacks/test_fisher_accumulator.py",
    "fisher/test_ekfac.py",
    "tests/test_packaging.py",
    "tests/test_docs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    items.sort(key=lambda item: next((at for at, name in enumerate(LONG) if item.path.match(name)), len(LONG)))
