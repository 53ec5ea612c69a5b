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
    "test_distributed.py",
    "test_commands.py",
    "test_command_processes.py",
    "test_race_runs.py",
    "test_evaluation_command.py",
    "test_strategies_penalised.py",
    "test_module.py",
    "test_laws.py",
    "test_fisher_accumulator.py",
    "test_fisher_ekfac.py",
    "test_packaging.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
