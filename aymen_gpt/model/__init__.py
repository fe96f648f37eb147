"""Tokens -> logits and loss: GPT-2/GPT-3 itself. Imports nothing local outside this folder."""
