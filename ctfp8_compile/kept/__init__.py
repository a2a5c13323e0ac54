"""Compiled graphs kept between processes: where they lie, what must hold for one to be run again."""
