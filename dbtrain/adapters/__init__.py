"""LoRA, LoHa and LoKr on a base model."""
