"""Desired state: policies, what they plan, what is exported and imported."""
