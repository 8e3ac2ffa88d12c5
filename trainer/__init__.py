"""Search during training, and accuracy-aware tuning, on transformers' Trainer."""

from typing import TYPE_CHECKING

from quant.lazy import names_of, renamed

if TYPE_CHECKING:
    from trainer.reinforce_trainer import ReinforceTrainer
    from trainer.search.config import ReinforceConfig
    from trainer.training.distillation import Teacher
    from trainer.tuning.nlp_trainer import NLPTrainer
    from trainer.tuning.strategy import QuantizationConfig

__all__ = [
    "NLPTrainer",
    "QuantizationConfig",
    "ReinforceConfig",
    "ReinforceTrainer",
    "Teacher",
]

__getattr__ = names_of(
    __name__,
    {
        "trainer.reinforce_trainer": ["ReinforceTrainer"],
        "trainer.search.config": ["ReinforceConfig"],
        "trainer.training.distillation": ["Teacher"],
        "trainer.tuning.nlp_trainer": ["NLPTrainer"],
        "trainer.tuning.strategy": ["QuantizationConfig"],
    },
)
renamed({"trainer.teacher": "trainer.training.distillation", "trainer.tuner": "trainer.tuning.nlp_trainer"})
