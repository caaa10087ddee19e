"""Real models, demonstrations and measurements; packaged as ``torch_pagedkv.evals``."""
