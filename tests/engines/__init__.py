"""Engines that keep the step to themselves, run by several processes."""
