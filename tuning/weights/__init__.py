"""Methods that change weights: full fine-tuning and LoRA. Torch only; what they learn ends as a
checkpoint folder.
"""
