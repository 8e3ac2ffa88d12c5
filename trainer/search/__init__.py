"""The search: its settings, targets, evaluations, competitors, final selection and diagnostics."""
