"""Is this host ready for passthrough?"""
