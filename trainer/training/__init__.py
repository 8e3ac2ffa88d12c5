"""Parts of a training run that are independent of the search: checkpoints, sampling, distillation, history."""
