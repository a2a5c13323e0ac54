"""Ahead of time: graphs from torch.export, rewritten, written to a file, and loaded again."""
