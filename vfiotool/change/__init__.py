"""Changing a host: pure plans of steps that verify and undo themselves, on one journalled path."""
