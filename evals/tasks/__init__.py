"""Task files for lm-eval; `evals.data` reads their documents."""
