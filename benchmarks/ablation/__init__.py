"""Which regularizer, and which of the other ingredients, is worth having: see docs/ablation.md."""
