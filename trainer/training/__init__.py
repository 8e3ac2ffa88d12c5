"""Parts of a training run that know no search: checkpoints, sampling, distillation, history."""
