"""`python -m benchmarks.gpu` starts where only torch, triton, transformers, timm and numpy are installed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import step_time
from trainer.search.config import ReinforceConfig

ROOT = Path(__file__).parents[2]
ABSENT = (
    "ray", "datasets", "scipy", "sklearn", "pandas", "omegaconf", "optuna", "matplotlib", "accelerate", "tensorboard",
    "tensorboardX", "pyarrow", "rich", "psutil", "ml_dtypes", "hypothesis", "pytest", "wandb",
)  # fmt: skip
WITHOUT = f"""
import sys

class Without:
    # A finder of modules that finds none of the absent ones, as if they were not installed.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else self.finder.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
sys.argv = ["gpu", "--models", "MODELS"]
import benchmarks.gpu
benchmarks.gpu.main()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the small version is for machines without a GPU")
def test_without_a_gpu_and_without_other_packages_a_small_version_says_so():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.replace("MODELS", "resnet50")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("NO GPU HERE")
    assert sum(line.startswith("resnet50") for line in lines) == 4
    assert {"per tensor", "per channel", "per token", "mxfp4", "nvfp4"} <= {line[2:14].strip() for line in lines}


def test_a_whole_step_is_rewarded_as_the_searchs_own():
    assert ReinforceConfig.reward_draws == step_time.REWARD_DRAWS
    assert ReinforceConfig.reward_share == step_time.REWARD_SHARE
