"""The demo: the main job on a small real model, and then what it was for.

In: `demo.yaml` beside this file. Out: after the stages, a dozen features with their contexts, three
SQL queries with answers, one prompt unsteered and steered, and what to try next.
"""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from activation_cache import LanguageModel
from feature_db import FeatureDB
from interp import Clamp, compare
from sae import SAE

from .commands_hint import python_lines
from .config import PipelineConfig, read_config
from .doctor import has_fast_bfloat16
from .steering_table import outcome_table

CONFIG = Path(__file__).with_name("demo.yaml")
