"""`torch.compile(model, backend="ctfp8")`: the passes inside Inductor."""
