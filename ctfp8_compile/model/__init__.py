"""FP8 parameters in an nn.Module: planned, attached, frozen, loaded; no transformers here."""
