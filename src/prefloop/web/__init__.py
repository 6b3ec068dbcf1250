"""The studio: local pages over the store."""
