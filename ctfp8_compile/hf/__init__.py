"""All that touches transformers: its loader, its weight conversions, its caches."""
