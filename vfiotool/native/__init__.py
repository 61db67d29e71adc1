"""The only importer of the C extensions."""
