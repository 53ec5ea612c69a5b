"""Every block of code in README and docs does what it says, and every link leads somewhere.

Python runs on toy data, YAML is a config that the parser takes, and each command in a shell block is parsed with all of
its options.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from command_toys import toy_config, toy_folder, write_config
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser
from toys import tiny_unet

from lightning_unlearn.command_line.cli import COMMANDS, main
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.training import DiffusionModule

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS_OF_A_TRAINING = {"train.yaml", "evaluation.yaml"}
